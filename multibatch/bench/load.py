"""Sends a load to the engine on the wall clock, and notes when each token comes."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from multibatch.artifact import Artifact
from multibatch.backends.base import LoadedPrograms
from multibatch.config import EngineConfig
from multibatch.cost_table import Slowdown
from multibatch.engine import Engine
from multibatch.launch import Launch
from multibatch.sampler import SampledRows
from multibatch.sampling_params import RequestOutputKind, SamplingParams
from multibatch.scheduled_step import ScheduledStep
from multibatch.trace import RequestTimes, TraceRequest

Progress = Callable[[str], object]
"""Told of each run before it begins, in a few words. Not of every step: whoever draws must not take time from what is measured."""


def unheard(_: str) -> None:
    """Progress that nobody follows."""


class ScriptedEngine(Engine):
    """An engine whose requests end when the load says, and not when the model does.

    Everything is computed and sampled as ever; only the last token of each request is changed to one that stops it. So
    what a request declares as its longest output may be longer than what it gives, as it is in life.
    """

    def __init__(self, artifact: Artifact, config: EngineConfig, programs: LoadedPrograms | None = None) -> None:
        super().__init__(artifact, config, programs)
        self.output_lengths: dict[str, int] = {}
        """By request id: tokens after which it ends."""
        self.seconds_to_next: Callable[[], float] = lambda: math.inf
        """Until the load sends its next request."""
        self._ms = {prompts: [0.0, 0.0] for prompts in (False, True)}

    @property
    def slowdown(self) -> Slowdown:
        """How many times as long the steps took as was predicted of them, in all; 1 of a kind that did not come up."""
        ratios = {prompts: ms / predicted if predicted else 1.0 for prompts, (predicted, ms) in self._ms.items()}
        return Slowdown(decode=ratios[False], prompts=ratios[True])

    def _compare(self, step: ScheduledStep, predicted_ms: float, ms: float) -> None:
        super()._compare(step, predicted_ms, ms)
        sums = self._ms[bool(step.prefill)]
        sums[0] += predicted_ms
        sums[1] += ms

    def _may_follow(self, step: ScheduledStep) -> bool:
        """Not where the load ends a row with this step or sends a request soon: a server would know of both before the next begins."""
        lengths = self.output_lengths
        ends = any(row.num_output_tokens + 1 >= lengths[row.request_id] for row in step.decode)
        return not ends and self.seconds_to_next() > SOON_S

    def compute(self, step: ScheduledStep, launch: Launch | None = None) -> SampledRows:
        """See `Engine.compute`."""
        sampled = super().compute(step, launch)
        ids = [
            STOP if sequence.num_output_tokens + 1 == self.output_lengths[sequence.request_id] else token or STOP + 1
            for sequence, token in zip(step.sampled, sampled.token_ids, strict=True)
        ]
        return dataclasses.replace(sampled, token_ids=ids)


SOON_S: Final = 0.1
"""Longer than a step with decode rows alone takes."""

STOP = 0
"""Ends a scripted request; where the model draws it earlier, the id is changed to the next."""


def run_load(
    engine: ScriptedEngine,
    trace: Sequence[TraceRequest],
    *,
    max_concurrency: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Any] = time.sleep,
) -> list[RequestTimes]:
    """Sends every request at its time, with random token ids of its own.

    Args:
        engine: idle.
        trace: what to send, by time of arrival.
        max_concurrency: requests in the engine at once; others wait outside, and their time counts.
        temperature: of every request.
        seed: of the token ids and the sampling.
        clock: seconds.
        sleep: waits so many seconds.

    Returns:
        One for each request, in the order of the trace. A request whose step failed has an `error`.
    """
    rng, vocabulary = random.Random(seed), engine.manifest.model.vocab_size
    prompts = [[rng.randrange(vocabulary) for _ in range(request.input_length)] for request in trace]
    times = [RequestTimes(request.timestamp) for request in trace]
    arriving, start = deque(enumerate(trace)), clock()

    def send() -> None:
        while arriving and arriving[0][1].timestamp <= clock() - start:
            if engine.num_unfinished >= (max_concurrency or len(trace)):
                return
            number, request = arriving.popleft()
            engine.output_lengths[str(number)] = request.output_length
            params = _params(request, temperature, seed + number)
            engine.add_request(str(number), prompts[number], params, priority=request.priority)

    def seconds_to_next() -> float:
        if not arriving or engine.num_unfinished >= (max_concurrency or len(trace)):
            return math.inf
        return arriving[0][1].timestamp - (clock() - start)

    engine.seconds_to_next = seconds_to_next
    while arriving or engine.has_unfinished:
        now = clock() - start
        if not engine.has_unfinished and arriving[0][1].timestamp > now:
            sleep(arriving[0][1].timestamp - now)
            continue
        outputs = engine.step(send)
        now = clock() - start
        for output in outputs:
            entry = times[int(output.request_id)]
            entry.tokens += [now] * len(output.outputs[0].token_ids)
            m = output.metrics
            if m is not None:
                entry.num_preemptions = m.num_preemptions
                if entry.scheduled is None and m.first_token_ts is not None and m.scheduled_ts is not None:
                    entry.scheduled = now - (m.first_token_ts - m.scheduled_ts)
            if output.finished and output.outputs[0].finish_reason == "error":
                entry.error = str(engine.failure)
    return times


def _params(request: TraceRequest, temperature: float, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=temperature,
        seed=seed,
        max_tokens=request.max_tokens or request.output_length,
        ignore_eos=True,
        stop_token_ids=[STOP],
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
