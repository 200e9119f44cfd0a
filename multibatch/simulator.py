"""Replays a trace of requests on a machine that exists only as a cost table, with the engine's own scheduler.

Each step takes what the table predicts for its decode rows, their mean context and its prompt tokens; nothing is computed. So
hours of load take seconds, and what a policy would do can be seen before anyone is served by it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as AnySequence

from multibatch.cost_table import CostTable
from multibatch.kv.allocator import BlockAllocator
from multibatch.policies.base import Policies
from multibatch.request import Request, Sequence
from multibatch.sampling_params import SamplingParams
from multibatch.scheduler import Scheduler, SchedulerConfig
from multibatch.step_times import predict_step
from multibatch.trace import RequestTimes, TraceRequest

_STOP = 1
_OTHER = 2


def simulate(
    trace: AnySequence[TraceRequest],
    table: CostTable,
    config: SchedulerConfig,
    num_blocks: int,
    policies: Policies | None = None,
) -> list[RequestTimes]:
    """When each token of each request would come.

    Args:
        trace: the requests, by time of arrival.
        table: what steps cost.
        config: the limits and the order of the queue.
        num_blocks: blocks of the pool that can be lent.
        policies: what else caps admission and prefill; they keep what they learn, so give each run its own.

    Returns:
        One for each request, in the order of the trace.

    Raises:
        RequestError: a request could never run with these limits.
        ConfigError: the table does not have the steps that come up.
    """
    scheduler = Scheduler(config, BlockAllocator(num_blocks + 1), policies=policies)
    times = [RequestTimes(request.timestamp) for request in trace]
    arriving, now = deque(enumerate(trace)), 0.0
    while arriving or scheduler.has_unfinished:
        if not scheduler.has_unfinished:
            now = max(now, arriving[0][1].timestamp)
        while arriving and arriving[0][1].timestamp <= now:
            number, request = arriving.popleft()
            scheduler.add(_sequence(number, request))
        step = scheduler.schedule()
        ms = predict_step(table, step)
        for sequence in step.sequences:
            entry = times[int(sequence.request_id)]
            entry.scheduled = now if entry.scheduled is None else entry.scheduled
        now += ms / 1000
        sampled = step.sampled
        for sequence in sampled:
            times[int(sequence.request_id)].tokens.append(now)
        for sequence in step.preempted:
            times[int(sequence.request_id)].num_preemptions += 1
        scheduler.update(step, [_next_token(sequence, trace) for sequence in sampled])
        scheduler.step_done(step, ms)
    return times


def _sequence(number: int, request: TraceRequest) -> Sequence:
    # No two prompts are alike: what they would share is not in the trace.
    return Sequence(
        Request(
            request_id=str(number),
            prompt_token_ids=(number,) * request.input_length,
            params=SamplingParams(max_tokens=request.max_tokens or request.output_length, stop_token_ids=[_STOP]),
            priority=request.priority,
            seed=0,
        )
    )


def _next_token(sequence: Sequence, trace: AnySequence[TraceRequest]) -> int:
    is_last = sequence.num_output_tokens + 1 == trace[int(sequence.request_id)].output_length
    return _STOP if is_last else _OTHER
