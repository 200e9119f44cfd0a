"""Continuous batching, one rule at a time; whole runs are in test_scheduler_runs."""

from __future__ import annotations

from collections import abc
from dataclasses import replace
from typing import Any

import pytest

from multibatch.errors import ConfigError, RequestError
from multibatch.kv.allocator import BlockAllocator
from multibatch.kv.prefix import PrefixCache
from multibatch.policies.base import Load, Policies
from multibatch.request import FinishReason, Request, Sequence, SequenceStatus
from multibatch.sampling_params import SamplingParams
from multibatch.scheduler import PrefillChunk, ScheduledStep, Scheduler, SchedulerConfig

EOS = 0
CONFIG = SchedulerConfig(max_num_seqs=4, max_seq_len=32, block_size=4, max_prefill_tokens=16, max_prefill_rows=4)


def make_sequence(
    name: str, num_prompt: int = 4, params: SamplingParams | None = None, eos: tuple[int, ...] = ()
) -> Sequence:
    return Sequence(
        Request(
            request_id=name,
            prompt_token_ids=tuple(range(1, num_prompt + 1)),
            params=params or SamplingParams(max_tokens=8),
            seed=0,
            eos_token_ids=eos,
        )
    )


def make_scheduler(*sequences: Sequence, num_blocks: int = 64, config: SchedulerConfig = CONFIG) -> Scheduler:
    scheduler = Scheduler(config, BlockAllocator(num_blocks))
    for sequence in sequences:
        scheduler.add(sequence)
    return scheduler


def run_step(scheduler: Scheduler, token_id: int = 7) -> ScheduledStep:
    step = scheduler.schedule()
    scheduler.update(step, [token_id] * len(step.sampled))
    scheduler.check_integrity()
    return step


def chunks(step: ScheduledStep) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.request_id, chunk.start, chunk.stop) for chunk in step.prefill]


def names(sequences: tuple[Sequence, ...] | list[Sequence]) -> list[str]:
    return [sequence.request_id for sequence in sequences]


def test_a_prompt_is_prefilled_then_decoded() -> None:
    sequence = make_sequence("a", num_prompt=5, params=SamplingParams(max_tokens=3))
    scheduler = make_scheduler(sequence)
    first = run_step(scheduler)
    assert (chunks(first), first.decode) == ([("a", 0, 5)], ())
    assert first.num_prefill_tokens == 5
    assert sequence.output_token_ids == [7]
    assert names(run_step(scheduler).decode) == ["a"]
    last = scheduler.schedule()
    assert scheduler.update(last, [9]) == [sequence]
    assert sequence.output_token_ids == [7, 7, 9]
    assert sequence.finish_reason is FinishReason.LENGTH
    assert sequence.status is SequenceStatus.FINISHED
    assert sequence.block_ids == []
    assert not scheduler.has_unfinished
    assert scheduler.schedule().is_empty


def test_prompts_share_a_prefill_call_up_to_its_tokens() -> None:
    scheduler = make_scheduler(*[make_sequence(name, num_prompt=7) for name in "abc"])
    assert chunks(run_step(scheduler)) == [("a", 0, 7), ("b", 0, 7), ("c", 0, 2)]
    second = run_step(scheduler)
    assert chunks(second) == [("c", 2, 7)]
    assert names(second.decode) == ["a", "b"]
    assert names(second.sampled) == ["c", "a", "b"]


def test_prompts_share_a_prefill_call_up_to_its_rows() -> None:
    config = replace(CONFIG, max_prefill_rows=2)
    scheduler = make_scheduler(*[make_sequence(name) for name in "abc"], config=config)
    assert chunks(run_step(scheduler)) == [("a", 0, 4), ("b", 0, 4)]
    assert chunks(run_step(scheduler)) == [("c", 0, 4)]


def test_decodes_run_in_every_step_of_a_long_prefill() -> None:
    config = replace(CONFIG, max_prefill_tokens=4)
    scheduler = make_scheduler(make_sequence("a"), config=config)
    run_step(scheduler)
    scheduler.add(make_sequence("long", num_prompt=12))
    for start in (0, 4, 8):
        step = run_step(scheduler)
        assert chunks(step) == [("long", start, start + 4)]
        assert names(step.decode) == ["a"]


def test_a_begun_prompt_goes_on_before_a_new_one() -> None:
    scheduler = make_scheduler(make_sequence("long", num_prompt=20), make_sequence("b"))
    assert chunks(run_step(scheduler)) == [("long", 0, 16)]
    assert chunks(run_step(scheduler)) == [("long", 16, 20), ("b", 0, 4)]


def test_one_token_left_of_a_prompt_is_a_decode_row() -> None:
    sequence = make_sequence("a", num_prompt=17)
    scheduler = make_scheduler(sequence)
    assert run_step(scheduler).sampled == ()
    step = run_step(scheduler)
    assert (step.prefill, names(step.decode)) == ((), ["a"])
    assert sequence.output_token_ids == [7]


def test_a_prompt_of_one_token_is_prefilled() -> None:
    scheduler = make_scheduler(make_sequence("a", num_prompt=1))
    assert chunks(run_step(scheduler)) == [("a", 0, 1)]


def test_no_more_run_than_max_num_seqs() -> None:
    scheduler = make_scheduler(*[make_sequence(name, num_prompt=2) for name in "abcdef"])
    run_step(scheduler)
    assert names(list(scheduler.running)) == list("abcd")
    assert names(list(scheduler.waiting)) == list("ef")
    scheduler.abort("b")
    assert chunks(run_step(scheduler)) == [("e", 0, 2)]


def test_nobody_passes_a_head_that_does_not_fit() -> None:
    first, head, small = make_sequence("a", 12), make_sequence("head", 12), make_sequence("s", 1)
    scheduler = make_scheduler(first, head, small, num_blocks=1 + 6)  # 4 blocks each, and 1
    assert chunks(run_step(scheduler)) == [("a", 0, 12)]
    assert run_step(scheduler).prefill == ()
    scheduler.finish(first, FinishReason.STOP, "stop string")
    assert chunks(run_step(scheduler)) == [("head", 0, 12), ("s", 0, 1)]


def test_admission_reserves_the_next_token_too() -> None:
    scheduler = make_scheduler(make_sequence("a", num_prompt=4), make_sequence("b"), num_blocks=4)
    assert chunks(run_step(scheduler)) == [("a", 0, 4)]  # 2 of the 3 blocks


def test_the_last_admitted_gives_its_blocks_and_comes_back_first() -> None:
    config = replace(CONFIG, max_seq_len=16)
    a, b, c = (make_sequence(name, num_prompt=3) for name in "abc")
    scheduler = make_scheduler(a, b, c, num_blocks=1 + 4, config=config)
    assert len(run_step(scheduler).prefill) == 3  # one block each, full with the next token
    scheduler.add(make_sequence("d", num_prompt=3))  # takes the fourth block
    run_step(scheduler)
    step = run_step(scheduler)
    assert names(step.preempted) == ["d", "c"]
    assert names(step.decode) == ["a", "b"]
    assert step.prefill == ()
    assert names(list(scheduler.waiting)) == ["c", "d"]
    assert (c.status, c.num_preemptions, c.block_ids) == (SequenceStatus.WAITING, 1, [])
    assert (c.num_computed_tokens, c.output_token_ids) == (0, [7, 7])


def test_a_preempted_sequence_prefills_its_output_as_well() -> None:
    params = SamplingParams(max_tokens=6)
    a, b = (make_sequence(name, num_prompt=3, params=params) for name in "ab")
    scheduler = make_scheduler(a, b, num_blocks=1 + 3)
    steps = [run_step(scheduler) for _ in range(3)]
    assert names(steps[-1].decode) == ["a"]  # position 4 takes the third block
    assert names(steps[-1].preempted) == ["b"]  # it preempts itself: it is the last admitted
    while not a.is_finished:
        assert run_step(scheduler).prefill == ()
    assert chunks(run_step(scheduler)) == [("b", 0, 5)]  # its prompt and two tokens of output
    while not b.is_finished:
        assert names(run_step(scheduler).decode) == ["b"]
    assert a.output_token_ids == b.output_token_ids == [7] * 6


@pytest.mark.parametrize(
    ("params", "token_ids", "reason", "stop_reason"),
    [
        (SamplingParams(max_tokens=9), [7, EOS], FinishReason.STOP, None),
        (SamplingParams(max_tokens=2), [7, EOS], FinishReason.STOP, None),
        (SamplingParams(max_tokens=2), [7, 7], FinishReason.LENGTH, None),
        (SamplingParams(max_tokens=3, ignore_eos=True), [EOS] * 3, FinishReason.LENGTH, None),
        (SamplingParams(max_tokens=9, stop_token_ids=[5, 6]), [7, 6], FinishReason.STOP, 6),
        (SamplingParams(max_tokens=9, stop_token_ids=[EOS]), [EOS], FinishReason.STOP, None),
        (
            SamplingParams(max_tokens=9, stop_token_ids=[EOS], ignore_eos=True),
            [EOS],
            FinishReason.STOP,
            EOS,
        ),
        (SamplingParams(max_tokens=9, min_tokens=3), [EOS] * 3, FinishReason.STOP, None),
        (
            SamplingParams(max_tokens=9, min_tokens=2, stop_token_ids=[5]),
            [5, 5],
            FinishReason.STOP,
            5,
        ),
        # max_seq_len 32, prompt 4
        (SamplingParams(max_tokens=None), [7] * 28, FinishReason.LENGTH, None),
        (SamplingParams(max_tokens=100), [7] * 28, FinishReason.LENGTH, None),
        (SamplingParams(max_tokens=None, min_tokens=60), [EOS] * 28, FinishReason.LENGTH, None),
    ],
)
def test_stop_rules(
    params: SamplingParams,
    token_ids: list[int],
    reason: FinishReason,
    stop_reason: int | None,
) -> None:
    sequence = make_sequence("a", params=params, eos=(EOS, 99))
    scheduler = make_scheduler(sequence)
    for count, token_id in enumerate(token_ids, start=1):
        assert not sequence.is_finished
        finished = scheduler.update(scheduler.schedule(), [token_id])
        assert finished == ([sequence] if count == len(token_ids) else [])
    assert sequence.output_token_ids == token_ids
    assert (sequence.finish_reason, sequence.stop_reason) == (reason, stop_reason)


def test_every_end_of_sequence_id_counts() -> None:
    sequence = make_sequence("a", eos=(EOS, 99))
    scheduler = make_scheduler(sequence)
    assert scheduler.update(scheduler.schedule(), [99]) == [sequence]


def test_a_stop_string_ends_a_sequence_from_outside() -> None:
    a, b = make_sequence("a"), make_sequence("b")
    scheduler = make_scheduler(a, b)
    run_step(scheduler)
    scheduler.finish(a, FinishReason.STOP, "\n\n")
    assert (a.finish_reason, a.stop_reason, a.block_ids) == (FinishReason.STOP, "\n\n", [])
    scheduler.check_integrity()
    assert names(run_step(scheduler).decode) == ["b"]


def test_a_stop_string_in_the_last_token_replaces_the_reason() -> None:
    sequence = make_sequence("a", params=SamplingParams(max_tokens=1))
    scheduler = make_scheduler(sequence)
    run_step(scheduler)
    assert sequence.finish_reason is FinishReason.LENGTH
    scheduler.add(make_sequence("a"))  # the id is free again, and the new one is left alone
    scheduler.finish(sequence, FinishReason.STOP, "x")
    assert (sequence.finish_reason, sequence.stop_reason) == (FinishReason.STOP, "x")
    assert names(list(scheduler.waiting)) == ["a"]


def test_abort_ends_waiting_and_running_ones_and_knows_no_others() -> None:
    config = replace(CONFIG, max_num_seqs=1)
    a, b = make_sequence("a"), make_sequence("b")
    scheduler = make_scheduler(a, b, config=config)
    run_step(scheduler)
    assert scheduler.abort("b") is b
    assert scheduler.abort("a") is a
    assert (a.finish_reason, b.finish_reason) == (FinishReason.ABORT, FinishReason.ABORT)
    assert scheduler.abort("a") is None
    assert scheduler.abort("nobody") is None
    assert not scheduler.has_unfinished
    scheduler.check_integrity()


def test_a_failed_step_ends_its_own_sequences_only() -> None:
    config = replace(CONFIG, max_num_seqs=2)
    a, b, c = (make_sequence(name) for name in "abc")
    scheduler = make_scheduler(a, config=config)
    run_step(scheduler)
    scheduler.add(b)
    scheduler.add(c)
    step = scheduler.schedule()
    assert names(step.sequences) == ["b", "a"]
    assert scheduler.fail(step) == [b, a]
    assert (a.finish_reason, b.finish_reason) == (FinishReason.ERROR, FinishReason.ERROR)
    scheduler.check_integrity()
    assert scheduler.fail(step) == []
    assert chunks(run_step(scheduler)) == [("c", 0, 4)]


def test_update_wants_one_id_per_sampled_sequence() -> None:
    sequence = make_sequence("a")
    scheduler = make_scheduler(sequence)
    step = scheduler.schedule()
    with pytest.raises(ValueError, match="2 ids for the 1 sequences"):
        scheduler.update(step, [1, 2])
    assert sequence.num_output_tokens == 0


def test_a_step_keeps_its_meaning_after_the_update() -> None:
    scheduler = make_scheduler(make_sequence("a"))
    step = run_step(scheduler)
    assert step.prefill[0].is_last
    assert names(step.sampled) == ["a"]


def test_a_chunk_knows_whether_it_is_the_last() -> None:
    sequence = make_sequence("a", num_prompt=5)
    assert not PrefillChunk(sequence, 0, 4).is_last
    assert PrefillChunk(sequence, 4, 1).is_last


def test_one_step_ahead_positions_follow_the_counts() -> None:
    sequence = make_sequence("a", num_prompt=4, params=SamplingParams(max_tokens=2))
    scheduler = make_scheduler(sequence)
    first = scheduler.schedule()
    assert sequence.num_computed_tokens == 4
    second = scheduler.schedule()  # the id at position 4 is not known yet
    assert names(second.decode) == ["a"]
    assert sequence.num_computed_tokens - 1 == 4
    assert scheduler.schedule().is_empty  # two tokens are on their way, and two are all
    assert scheduler.update(first, [7]) == []
    assert scheduler.update(second, [8]) == [sequence]
    assert sequence.output_token_ids == [7, 8]


def test_one_step_ahead_an_id_of_an_ended_sequence_is_dropped() -> None:
    sequence = make_sequence("a", eos=(EOS,))
    scheduler = make_scheduler(sequence)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert scheduler.update(first, [EOS]) == [sequence]
    assert scheduler.update(second, [7]) == []
    assert sequence.output_token_ids == [EOS]
    scheduler.check_integrity()


def test_a_request_id_in_use_is_refused() -> None:
    scheduler = make_scheduler(make_sequence("a"))
    with pytest.raises(RequestError, match="'a' is being served already"):
        scheduler.add(make_sequence("a"))
    assert len(scheduler.waiting) == 1


def test_a_prompt_without_room_for_a_token_is_refused() -> None:
    scheduler = make_scheduler(make_sequence("fits", num_prompt=31))
    with pytest.raises(RequestError, match="prompt of 32 tokens; allowed are 1 to 31"):
        scheduler.add(make_sequence("long", num_prompt=32))


def test_what_the_whole_pool_cannot_hold_is_refused() -> None:
    scheduler = make_scheduler(num_blocks=1 + 3)
    one = SamplingParams(max_tokens=1)
    with pytest.raises(RequestError, match="needs 4 KV blocks of 4; the pool has 3"):
        scheduler.add(make_sequence("a", num_prompt=12, params=one))
    with pytest.raises(RequestError, match="may grow to 32 tokens and needs 8 KV blocks"):
        scheduler.add(make_sequence("b", num_prompt=4, params=SamplingParams(max_tokens=None)))
    scheduler.add(make_sequence("c", num_prompt=11, params=one))
    assert chunks(run_step(scheduler)) == [("c", 0, 11)]


@pytest.mark.parametrize(("length", "expected"), [(512, 27), (2048, 6)])
def test_as_many_run_as_the_pool_holds(length: int, expected: int) -> None:
    # 14,000 tokens, what 14 GB hold at 1 MB a token: 27.3 sequences of 512, 6.8 of 2,048.
    config = SchedulerConfig(
        max_num_seqs=32, max_seq_len=2048, block_size=16, max_prefill_tokens=10**6, max_prefill_rows=32
    )
    params = SamplingParams(max_tokens=1)
    sequences = [make_sequence(str(i), length - 1, params) for i in range(32)]
    scheduler = make_scheduler(*sequences, num_blocks=1 + 14_000 // 16, config=config)
    assert len(scheduler.schedule().prefill) == expected


@pytest.mark.parametrize(
    "name", ["max_num_seqs", "max_seq_len", "block_size", "max_prefill_tokens", "max_prefill_rows"]
)
@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_limits_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        replace(CONFIG, **{name: value})


PRIORITY = replace(CONFIG, queue_policy="priority", priority_patience=None)


def with_priority(name: str, priority: int, num_prompt: int = 4) -> Sequence:
    sequence = make_sequence(name, num_prompt)
    sequence.request = replace(sequence.request, priority=priority)
    return sequence


def test_an_unknown_queue_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="queue policy 'lifo'; choose one of fcfs, priority"):
        replace(CONFIG, queue_policy="lifo")  # type: ignore[arg-type]


def test_the_lower_priority_number_goes_first_and_equals_by_arrival() -> None:
    config = replace(PRIORITY, max_num_seqs=3)
    late = [with_priority(name, priority) for name, priority in [("a", 1), ("b", 0), ("c", 1), ("d", -1)]]
    scheduler = make_scheduler(*late, config=config)
    assert chunks(run_step(scheduler)) == [("d", 0, 4), ("b", 0, 4), ("a", 0, 4)]


def test_a_more_urgent_request_pauses_the_least_urgent_one() -> None:
    config = replace(PRIORITY, max_num_seqs=2)
    scheduler = make_scheduler(with_priority("a", 1), with_priority("b", 2), config=config)
    run_step(scheduler)
    scheduler.add(with_priority("c", 0))
    step = run_step(scheduler)
    assert (names(step.preempted), names(step.decode), chunks(step)) == (["b"], ["a"], [("c", 0, 4)])
    assert names(list(scheduler.waiting)) == ["b"]


def test_nobody_is_paused_for_an_equal_or_for_one_that_would_not_fit_anyway() -> None:
    scheduler = make_scheduler(
        with_priority("a", 0, 12), with_priority("b", 2, 4), num_blocks=1 + 7, config=replace(PRIORITY, max_num_seqs=2)
    )
    run_step(scheduler)
    scheduler.add(with_priority("c", 1, 20))  # 6 blocks; a keeps 4 of the 7
    scheduler.add(with_priority("d", 2, 4))
    assert names(run_step(scheduler).preempted) == []


def test_with_patience_urgent_requests_pass_for_so_many_steps_only() -> None:
    def first_step_of_the_patient(patience: int | None) -> int | None:
        config = replace(PRIORITY, max_num_seqs=1, priority_patience=patience)
        scheduler = make_scheduler(with_priority("patient", 1), config=config)
        scheduler.add(with_priority("urgent 0", 0))
        for number in range(1, 200):
            step = run_step(scheduler)
            if "patient" in names(step.sequences):
                return number
            scheduler.add(with_priority(f"urgent {number}", 0))
        return None

    assert first_step_of_the_patient(None) is None
    found = first_step_of_the_patient(10)
    # the urgent ones that came in 10 steps, 8 steps each but two, are served first, and no more
    assert found is not None
    assert found > 10


def test_limits_cap_admission_and_hear_of_steps_and_ends() -> None:
    class Two:
        heard: list[object]

        def __init__(self) -> None:
            self.heard = []

        def limit(self, load: Load) -> int:
            self.load = load
            return 2

        def step_done(self, num_decoding: int, ms: float) -> None:
            self.heard.append((num_decoding, ms))

        def sequence_done(self, num_blocks: int) -> None:
            self.heard.append(num_blocks)

    two = Two()
    scheduler = Scheduler(CONFIG, BlockAllocator(64), policies=Policies(limits=(two,)))
    for name in "abc":
        scheduler.add(make_sequence(name, params=SamplingParams(max_tokens=2)))
    scheduler.step_done(run_step(scheduler), 1.5)
    assert names(list(scheduler.running)) == ["a", "b"]
    scheduler.step_done(run_step(scheduler), 2.5)
    assert two.heard == [(0, 1.5), 2, 2, (2, 2.5)]
    expected = Load(
        num_waiting=1, num_running=2, num_decoding=2, num_held_blocks=4, num_total_blocks=63, declared_blocks=6
    )
    assert two.load == expected


def test_a_step_budget_of_nothing_leaves_prompts_waiting_while_others_decode() -> None:
    class Nothing:
        def refine(self, budget: int, context_lens: abc.Sequence[int]) -> int:
            self.context_lens = list(context_lens)
            return 0 if context_lens else budget

        def step_done(self, context_lens: abc.Sequence[int], num_prefill_tokens: int, ms: float) -> None:
            self.heard = (list(context_lens), num_prefill_tokens, ms)

    nothing = Nothing()
    scheduler = Scheduler(CONFIG, BlockAllocator(64), policies=Policies(step_budget=nothing))
    scheduler.add(make_sequence("a", params=SamplingParams(max_tokens=3)))
    run_step(scheduler)
    scheduler.add(make_sequence("b"))
    for length in (5, 6):
        step = run_step(scheduler)
        assert (names(step.decode), chunks(step), nothing.context_lens) == (["a"], [], [length])
    step = run_step(scheduler)
    assert chunks(step) == [("b", 0, 4)]
    scheduler.step_done(step, 1.5)
    assert nothing.heard == ([], 4, 1.5)


def test_cached_blocks_are_shared_and_counted() -> None:
    allocator = BlockAllocator(64)
    cache = PrefixCache(allocator, CONFIG.block_size)
    scheduler = Scheduler(CONFIG, allocator, cache)
    scheduler.add(make_sequence("a", 9))
    run_step(scheduler)
    scheduler.add(make_sequence("b", 9))
    scheduler.add(make_sequence("c", 8))
    skipping = SamplingParams(max_tokens=8, skip_reading_prefix_cache=True)
    scheduler.add(make_sequence("d", 6, skipping))
    # of c's two blocks one is computed again, because the logits of its last token are wanted
    assert chunks(run_step(scheduler)) == [("b", 8, 9), ("c", 4, 8), ("d", 0, 6)]
    a, b, c, d = scheduler.running
    assert a.block_ids[:2] == b.block_ids[:2]
    assert a.block_ids[:1] == c.block_ids[:1]
    assert d.block_ids[0] != a.block_ids[0]
    assert [sequence.num_cached_tokens for sequence in (a, b, c, d)] == [0, 8, 4, 0]
    assert (cache.stats.queries, cache.stats.hits) == (9 + 9 + 8 + 6, 12)


def test_prompts_of_one_step_share_what_the_first_computes() -> None:
    allocator = BlockAllocator(64)
    cache = PrefixCache(allocator, CONFIG.block_size)
    scheduler = Scheduler(CONFIG, allocator, cache)
    for name in "abc":
        scheduler.add(make_sequence(name, 10))
    other = make_sequence("d", 10)
    other.request = replace(other.request, cache_salt="s")
    scheduler.add(other)
    step = scheduler.schedule()
    assert chunks(step) == [("a", 0, 10), ("b", 8, 10), ("c", 8, 10), ("d", 0, 2)]
    a, b, c, d = scheduler.running
    assert a.block_ids[:2] == b.block_ids[:2] == c.block_ids[:2]
    assert (
        len({*a.block_ids, *b.block_ids, *c.block_ids, *d.block_ids}) == 2 + 3 + 3
    )  # 2 shared, the last of a, b, c; d
    assert [sequence.num_cached_tokens for sequence in (a, b, c, d)] == [0, 8, 8, 0]
    scheduler.fail(step)  # what the step should have computed is not there
    assert allocator.num_free == allocator.num_total
    scheduler.add(make_sequence("e", 10))
    assert chunks(scheduler.schedule()) == [("e", 0, 10)]


def test_a_salt_keeps_prefixes_apart() -> None:
    allocator = BlockAllocator(64)
    scheduler = Scheduler(CONFIG, allocator, PrefixCache(allocator, CONFIG.block_size))
    for name, salt in [("a", None), ("b", "s"), ("c", "t"), ("d", "s")]:
        sequence = make_sequence(name, 9)
        sequence.request = replace(sequence.request, cache_salt=salt)
        scheduler.add(sequence)
        run_step(scheduler)
    assert [sequence.num_cached_tokens for sequence in scheduler.running] == [0, 0, 0, 8]


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    allocator = BlockAllocator(1 + 7)
    scheduler = Scheduler(CONFIG, allocator, PrefixCache(allocator, CONFIG.block_size))
    for name in "ab":
        sequence = make_sequence(name, 11)
        sequence.token_ids = [ord(name)] * 11
        sequence.request = replace(sequence.request, prompt_token_ids=tuple(sequence.token_ids))
        scheduler.add(sequence)
    while "b" not in names(run_step(scheduler).preempted):
        assert scheduler.has_unfinished
    while "b" in names(list(scheduler.waiting)):
        run_step(scheduler)
    (b,) = (sequence for sequence in scheduler.running if sequence.request_id == "b")
    assert b.num_computed_tokens > 0
    assert b.num_cached_tokens == 0  # of its first admission


def test_a_step_may_be_followed_where_the_next_is_known() -> None:
    first, second = make_sequence("a", num_prompt=3), make_sequence("b", num_prompt=6)
    scheduler = make_scheduler(first, second)
    prompts = scheduler.schedule()
    assert not scheduler.reserve_again(prompts)
    scheduler.update(prompts, [7, 7])
    step = scheduler.schedule()  # writes positions 3 and 6
    assert [len(s.block_ids) for s in (first, second)] == [1, 2]
    assert scheduler.reserve_again(step)
    assert [len(s.block_ids) for s in (first, second)] == [2, 2]
    assert scheduler.reserve_again(step)  # takes nothing twice
    scheduler.check_integrity()
    scheduler.update(step, [7, 8])
    again = scheduler.schedule_again(step)
    assert (again.prefill, names(again.decode)) == ((), ["a", "b"])
    assert [s.num_computed_tokens for s in (first, second)] == [5, 8]
    scheduler.update(again, [9, 10])
    assert (first.output_token_ids, second.output_token_ids) == ([7, 7, 9], [7, 8, 10])


def test_who_ends_before_the_step_that_follows_is_told_gets_nothing_of_it() -> None:
    first, second = make_sequence("a"), make_sequence("b")
    scheduler = make_scheduler(first, second)
    run_step(scheduler)
    step = scheduler.schedule()
    assert scheduler.reserve_again(step)
    scheduler.abort("a")
    scheduler.update(step, [7, 8])
    again = scheduler.schedule_again(step)
    scheduler.update(again, [9, 10])
    assert (first.output_token_ids, second.output_token_ids) == ([7], [7, 8, 10])
    scheduler.check_integrity()


@pytest.mark.parametrize("why", ["a row ends", "a prompt waits", "a prompt is begun", "no block", "it could be paused"])
def test_a_step_is_not_followed_where_the_next_may_be_another(why: str) -> None:
    config = replace(CONFIG, queue_policy="priority") if why == "it could be paused" else CONFIG
    num_tokens = 2 if why == "a row ends" else 8
    rows = [make_sequence(name, num_prompt=3, params=SamplingParams(max_tokens=num_tokens)) for name in "abcd"]
    scheduler = make_scheduler(*rows, config=config, num_blocks=9 if why == "no block" else 64)
    run_step(scheduler)
    if why in ("a prompt waits", "a prompt is begun"):
        scheduler.abort("d")
    if why == "a prompt is begun":
        scheduler.add(make_sequence("long", num_prompt=20))
    step = scheduler.schedule()
    assert len(step.decode) >= 3
    if why in ("a prompt waits", "it could be paused"):
        scheduler.add(make_sequence("new"))
    if why == "no block":
        held = scheduler._allocator.allocate(2)
        assert not scheduler.reserve_again(step)
        scheduler._allocator.free(held)
        assert scheduler.reserve_again(step)
    else:
        assert not scheduler.reserve_again(step)


def test_a_step_is_followed_while_others_wait_for_a_place() -> None:
    scheduler = make_scheduler(*[make_sequence(name) for name in "abcdef"])
    run_step(scheduler)
    step = scheduler.schedule()
    assert len(scheduler.waiting) == 2
    assert scheduler.reserve_again(step)


def test_a_block_that_was_reserved_and_not_filled_is_none_of_a_sequences_size() -> None:
    heard: list[int] = []

    class Listening:
        def limit(self, load: Load) -> int:
            return 4

        def step_done(self, num_decoding: int, ms: float) -> None:
            """Not asked."""

        def sequence_done(self, num_blocks: int) -> None:
            heard.append(num_blocks)

    sequence = make_sequence("a", num_prompt=6, params=SamplingParams(max_tokens=8, stop_token_ids=[9]))
    scheduler = Scheduler(CONFIG, BlockAllocator(64), policies=Policies(limits=(Listening(),)))
    scheduler.add(sequence)
    run_step(scheduler)
    run_step(scheduler)
    step = scheduler.schedule()  # fills the second block
    assert sequence.num_computed_tokens == 8
    assert scheduler.reserve_again(step)
    assert len(sequence.block_ids) == 3
    scheduler.update(step, [9])
    assert heard == [2]
