"""Continuous batching over whole runs: random requests, aborts and failures on tiny pools.

A token's id follows from its request and position alone, so what a request should give is known
without a scheduler, and a pretended pool can remember which token each of its slots holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from multibatch.errors import RequestError
from multibatch.kv.allocator import BlockAllocator
from multibatch.kv.block_table import blocks_for, slots_of
from multibatch.kv.prefix import PrefixCache
from multibatch.request import FinishReason, Request, Sequence
from multibatch.sampling_params import SamplingParams
from multibatch.scheduler import ScheduledStep, Scheduler, SchedulerConfig

EOS = 0
WAYS = st.sampled_from(["in turn", "ahead", "following"])


@dataclass(frozen=True)
class Arrival:
    tick: int
    num_prompt: int
    params: SamplingParams
    abort_tick: int | None = None
    num_shared: int = 24
    """Prompts are alike up to here, and each its own behind."""
    priority: int = 0


@dataclass(frozen=True)
class Trace:
    config: SchedulerConfig
    num_blocks: int
    arrivals: tuple[Arrival, ...]
    failing_ticks: tuple[int, ...] = ()
    prefix_caching: bool = False


@dataclass
class Outcome:
    sequences: dict[str, Sequence] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)
    batches: list[object] = field(default_factory=list)
    num_followed: int = 0


def make_sequence(name: str, arrival: Arrival) -> Sequence:
    request = Request(
        request_id=name,
        prompt_token_ids=tuple(
            p + 1 if p < arrival.num_shared else 100 * (1 + int(name)) + p for p in range(arrival.num_prompt)
        ),
        params=arrival.params,
        priority=arrival.priority,
        seed=0,
        eos_token_ids=(EOS,),
    )
    return Sequence(request)


def chunks(step: ScheduledStep) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.request_id, chunk.start, chunk.stop) for chunk in step.prefill]


def names(sequences: tuple[Sequence, ...]) -> list[str]:
    return [sequence.request_id for sequence in sequences]


def token_at(request_id: str, position: int) -> int:
    return (int(request_id) * 31 + position * 17) % 11


def expected_tokens(sequence: Sequence, max_seq_len: int) -> list[int]:
    params = sequence.request.params
    output: list[int] = []
    while True:
        position = sequence.num_prompt_tokens + len(output)
        output.append(token_at(sequence.request_id, position))
        may_stop = len(output) >= params.min_tokens
        stops = params.stop_token_ids if params.ignore_eos else [EOS, *params.stop_token_ids]
        full = position + 1 == max_seq_len or len(output) == params.max_tokens
        if full or (may_stop and output[-1] in stops):
            return output


class Device:
    """Computes steps as they are launched; each token has to find all before it in the pool, whoever put them there."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.pool: dict[int, tuple[int, ...]] = {}

    def run(self, step: ScheduledStep) -> list[int]:
        for chunk in step.prefill:
            self._compute(chunk.sequence, chunk.start, chunk.stop)
        for sequence in step.decode:
            position = sequence.num_computed_tokens - 1
            self._compute(sequence, position, position + 1)
        return [token_at(seq.request_id, seq.num_computed_tokens) for seq in step.sampled]

    def run_again(self, step: ScheduledStep) -> list[int]:
        """Computes the step that follows a reserved one, before anybody has heard of what that one gave."""
        for sequence in step.decode:
            self._compute(sequence, sequence.num_computed_tokens, sequence.num_computed_tokens + 1)
        return [token_at(seq.request_id, seq.num_computed_tokens + 1) for seq in step.decode]

    def _compute(self, sequence: Sequence, start: int, stop: int) -> None:
        prompt = sequence.request.prompt_token_ids
        tokens = (*prompt, *(token_at(sequence.request_id, p) for p in range(len(prompt), stop)))
        slots = slots_of(sequence.block_ids, 0, stop, self.block_size)
        for position in range(start, stop):
            self.pool[slots[position]] = tokens[: position + 1]
        assert [self.pool.get(slot) for slot in slots] == [tokens[: p + 1] for p in range(stop)]


def check_step(scheduler: Scheduler, step: ScheduledStep, config: SchedulerConfig, *, sharing: bool) -> None:
    everyone = [*step.sequences, *step.preempted]
    assert len({id(sequence) for sequence in everyone}) == len(everyone)
    assert len(step.decode) <= config.max_num_seqs
    assert len(scheduler.running) <= config.max_num_seqs
    assert step.num_prefill_tokens <= config.max_prefill_tokens
    assert len(step.prefill) <= config.max_prefill_rows
    assert all(chunk.num_tokens >= 1 for chunk in step.prefill)
    held = [block for sequence in scheduler.running for block in sequence.block_ids]
    assert sharing or len(set(held)) == len(held)
    assert 0 not in held
    assert not any(sequence.block_ids for sequence in scheduler.waiting)
    running, waiting = ([seq.order for seq in queue] for queue in (scheduler.running, scheduler.waiting))
    assert running == sorted(running)
    assert waiting == sorted(waiting)
    assert config.queue_policy == "priority" or [*running, *waiting] == sorted([*running, *waiting])
    scheduler.check_integrity()


def check_nobody_starves(scheduler: Scheduler, decoding: list[Sequence], step: ScheduledStep) -> None:
    assert not step.is_empty
    assert scheduler.running[0] in step.sequences
    assert all(sequence in step.decode or sequence in step.preempted for sequence in decoding)


def take_requests(scheduler: Scheduler, trace: Trace, tick: int, outcome: Outcome) -> None:
    for number, arrival in enumerate(trace.arrivals):
        if arrival.abort_tick == tick:
            scheduler.abort(str(number))
        if arrival.tick != tick:
            continue
        sequence = make_sequence(str(number), arrival)
        try:
            scheduler.add(sequence)
            outcome.sequences[sequence.request_id] = sequence
        except RequestError:
            outcome.refused.append(sequence.request_id)


def collect(scheduler: Scheduler, trace: Trace, tick: int, step: ScheduledStep, ids: list[int]) -> None:
    if tick in trace.failing_ticks:
        scheduler.fail(step)
    else:
        scheduler.update(step, ids)
    scheduler.check_integrity()


def plan(scheduler: Scheduler, trace: Trace, outcome: Outcome, *, in_turn: bool) -> ScheduledStep:
    had_work = scheduler.has_unfinished
    decoding = [s for s in scheduler.running if s.num_tokens - s.num_computed_tokens == 1]
    step = scheduler.schedule()
    check_step(scheduler, step, trace.config, sharing=trace.prefix_caching)
    if had_work and in_turn:
        check_nobody_starves(scheduler, decoding, step)
    for chunk in step.prefill:
        name = chunk.sequence.request_id
        if chunk.sequence.num_preemptions == 0 and name not in outcome.admitted:
            outcome.admitted.append(name)
    return step


def simulate(trace: Trace, way: str = "in turn") -> Outcome:
    """Runs a trace to its end: each step collected at once ("in turn"), after the next launch ("ahead"), or at once, but where the
    same rows go on after the next one has run already ("following").
    """
    outcome, device = Outcome(), Device(trace.config.block_size)
    allocator = BlockAllocator(trace.num_blocks)
    prefix_cache = PrefixCache(allocator, trace.config.block_size) if trace.prefix_caching else None
    scheduler = Scheduler(trace.config, allocator, prefix_cache)
    launched: list[tuple[int, ScheduledStep, list[int]]] = []
    # The step that was reserved, and what the one that follows it gave.
    reserved: tuple[ScheduledStep, list[int]] | None = None
    last_arrival = max(arrival.tick for arrival in trace.arrivals)
    tick = 0
    while tick <= last_arrival or scheduler.has_unfinished or launched or reserved:
        assert tick < 5000
        take_requests(scheduler, trace, tick, outcome)
        if reserved is None:
            step = plan(scheduler, trace, outcome, in_turn=way != "ahead")
            ids = device.run(step)
        else:
            step, ids = scheduler.schedule_again(reserved[0]), reserved[1]
            outcome.num_followed += 1
        outcome.batches.append((chunks(step), names(step.decode), names(step.preempted)))
        launched.append((tick, step, ids))
        follows = way == "following" and scheduler.reserve_again(step)
        reserved = (step, device.run_again(step)) if follows else None
        num_kept = 1 if way == "ahead" and not step.is_empty else 0
        while len(launched) > num_kept:
            collect(scheduler, trace, *launched.pop(0))
        if tick in trace.failing_ticks:
            reserved = None
        tick += 1
    assert not scheduler.running
    assert not scheduler.waiting
    scheduler.check_integrity()
    assert allocator.num_free == allocator.num_total
    return outcome


@st.composite
def sampling(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.none() | st.integers(1, 30))
    highest = 6 if max_tokens is None else min(6, max_tokens)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, highest)),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=draw(st.lists(st.integers(1, 10), max_size=1)),
    )


@st.composite
def traces(draw: st.DrawFn, *, disturbed: bool = True) -> Trace:
    config = SchedulerConfig(
        max_num_seqs=draw(st.integers(1, 5)),
        max_seq_len=draw(st.integers(2, 24)),
        block_size=draw(st.integers(1, 5)),
        max_prefill_tokens=draw(st.integers(1, 12)),
        max_prefill_rows=draw(st.integers(1, 4)),
        queue_policy=draw(st.sampled_from(["fcfs", "fcfs", "priority"])),
        priority_patience=draw(st.none() | st.integers(1, 5)),
    )
    least = blocks_for(config.max_seq_len, config.block_size)
    arrival = st.builds(
        Arrival,
        tick=st.integers(0, 12),
        num_prompt=st.integers(1, config.max_seq_len),
        params=sampling(),
        abort_tick=st.none() | st.integers(0, 40) if disturbed else st.none(),
        num_shared=st.integers(0, config.max_seq_len),
        priority=st.integers(-2, 2),
    )
    arrivals = draw(st.lists(arrival, min_size=1, max_size=8))
    return Trace(
        config=config,
        num_blocks=1 + least + draw(st.integers(-(least - 1), 6)),
        arrivals=tuple(sorted(arrivals, key=lambda a: a.tick)),
        failing_ticks=tuple(draw(st.lists(st.integers(0, 30), max_size=2)) if disturbed else ()),
        prefix_caching=draw(st.booleans()),
    )


def fits_alone(trace: Trace, arrival: Arrival) -> bool:
    longest = trace.config.max_seq_len
    if arrival.num_prompt >= longest:
        return False
    if arrival.params.max_tokens is not None:
        longest = min(longest, arrival.num_prompt + arrival.params.max_tokens)
    return blocks_for(longest, trace.config.block_size) < trace.num_blocks


@settings(max_examples=300, deadline=None)
@given(trace=traces(disturbed=False), way=WAYS)
def test_every_request_gets_exactly_its_tokens(trace: Trace, way: str) -> None:
    outcome = simulate(trace, way)
    fitting = [str(n) for n, arrival in enumerate(trace.arrivals) if fits_alone(trace, arrival)]
    assert list(outcome.sequences) == fitting
    assert sorted(outcome.admitted, key=int) == fitting
    assert trace.config.queue_policy == "priority" or outcome.admitted == fitting  # first come, first served
    for sequence in outcome.sequences.values():
        assert sequence.output_token_ids == expected_tokens(sequence, trace.config.max_seq_len)
        assert sequence.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


@settings(max_examples=300, deadline=None)
@given(trace=traces(), way=WAYS)
def test_aborts_and_failed_steps_harm_nobody_else(trace: Trace, way: str) -> None:
    outcome = simulate(trace, way)
    in_order = outcome.admitted == sorted(outcome.admitted, key=int)
    assert in_order or trace.config.queue_policy == "priority"
    for name, sequence in outcome.sequences.items():
        expected = expected_tokens(sequence, trace.config.max_seq_len)
        if sequence.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert sequence.output_token_ids == expected
            continue
        assert sequence.output_token_ids == expected[: sequence.num_output_tokens]
        if sequence.finish_reason is FinishReason.ABORT:
            assert trace.arrivals[int(name)].abort_tick is not None
        else:
            assert sequence.finish_reason is FinishReason.ERROR
            assert trace.failing_ticks


@settings(max_examples=50, deadline=None)
@given(trace=traces(), way=WAYS)
def test_the_same_trace_gives_the_same_batches(trace: Trace, way: str) -> None:
    assert simulate(trace, way).batches == simulate(trace, way).batches


def test_the_simulation_meets_preemption_and_shared_prefill() -> None:
    config = SchedulerConfig(max_num_seqs=4, max_seq_len=24, block_size=2, max_prefill_tokens=8, max_prefill_rows=3)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    arrivals = tuple(Arrival(tick=0, num_prompt=n, params=params) for n in (3, 5, 4, 6))
    for way in ("in turn", "ahead", "following"):
        outcome = simulate(Trace(config, 1 + 14, arrivals), way)
        assert any(sequence.num_preemptions for sequence in outcome.sequences.values())
        assert all(sequence.num_output_tokens == 12 for sequence in outcome.sequences.values())
        assert bool(outcome.num_followed) == (way == "following")


def test_the_simulation_meets_shared_blocks_and_eviction() -> None:
    config = SchedulerConfig(max_num_seqs=2, max_seq_len=24, block_size=2, max_prefill_tokens=8, max_prefill_rows=3)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    arrivals = tuple(
        Arrival(tick=3 * n, num_prompt=10, params=params, num_shared=24 if n % 2 else 6) for n in range(12)
    )
    outcome = simulate(Trace(config, 1 + 16, arrivals, prefix_caching=True))
    cached = [sequence.num_cached_tokens for sequence in outcome.sequences.values()]
    assert cached[0] == 0
    assert 6 in cached  # what all share
    assert 8 in cached  # all but the block with the newest token
