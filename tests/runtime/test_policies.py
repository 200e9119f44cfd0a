"""The policies alone: their formulas, their bounds, and that they keep what they promise."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multibatch.config import EngineConfig
from multibatch.cost_table import CostRow, CostTable
from multibatch.errors import ConfigError
from multibatch.policies.base import Load
from multibatch.policies.build import build_policies
from multibatch.policies.chunk_budget import ChunkBudget
from multibatch.policies.deadline_limit import DeadlineLimit
from multibatch.policies.memory_limit import LinearMemoryLimit, StatisticalMemoryLimit

LOAD = Load(num_waiting=3, num_running=4, num_decoding=4, num_held_blocks=20, num_total_blocks=100, declared_blocks=140)


def test_linear_is_the_pool_over_the_mean_of_those_that_run() -> None:
    limit = LinearMemoryLimit(lower=1, upper=64, memory_factor=0.95)
    assert limit.limit(LOAD) == math.floor(100 * 0.95 / 5)
    assert limit.limit(replace(LOAD, num_running=8)) == math.floor(100 * 0.95 / 2.5)


@pytest.mark.parametrize("idle", [{"num_waiting": 0}, {"num_running": 0, "num_held_blocks": 0}])
def test_limits_keep_the_last_answer_while_nobody_waits_or_nobody_runs(idle: dict[str, int]) -> None:
    for limit in (LinearMemoryLimit(lower=1, upper=64), StatisticalMemoryLimit(lower=1, upper=64)):
        assert limit.limit(replace(LOAD, **idle)) == 64
        before = limit.limit(LOAD)
        assert before < 64
        assert limit.limit(replace(LOAD, **idle)) == before


def test_linear_divides_by_nothing_where_no_block_is_held() -> None:
    assert LinearMemoryLimit(lower=1, upper=64).limit(replace(LOAD, num_held_blocks=0)) == 64


@given(
    load=st.builds(
        Load,
        num_waiting=st.integers(0, 9),
        num_running=st.integers(0, 40),
        num_decoding=st.integers(0, 40),
        num_held_blocks=st.integers(0, 500),
        num_total_blocks=st.integers(1, 500),
        declared_blocks=st.integers(1, 5000),
    ),
    sizes=st.lists(st.integers(1, 50), max_size=40),
    lower=st.integers(1, 10),
    above=st.integers(0, 40),
)
def test_limits_stay_in_bounds_and_never_below_those_that_run(
    load: Load, sizes: list[int], lower: int, above: int
) -> None:
    upper = lower + above
    limits = [LinearMemoryLimit(lower=lower, upper=upper), StatisticalMemoryLimit(lower=lower, upper=upper)]
    limits.append(StatisticalMemoryLimit(lower=lower, upper=upper, bound="cantelli", epsilon=0.01))
    for limit in limits:
        for size in sizes:
            limit.sequence_done(size)
        answer = limit.limit(load)
        assert lower <= answer <= upper
        if load.num_waiting and load.num_running <= upper:
            assert answer >= min(load.num_running, upper)


def exponential(rng: random.Random) -> int:
    return min(1 + int(rng.expovariate(1 / 6)), 64)


def uniform(rng: random.Random) -> int:
    return rng.randint(1, 20)


def heavy(rng: random.Random) -> int:
    return min(1 + int(rng.lognormvariate(1.0, 1.0)), 64)


@pytest.mark.parametrize(
    ("draw", "bound", "epsilon"),
    [
        (exponential, "normal", 0.05),
        (exponential, "normal", 0.01),
        (uniform, "normal", 0.05),
        (uniform, "normal", 0.01),
        # the normal bound does not hold for a tail as heavy as this: 5.4 to 6.8 % instead of 5 in 3,000 trials
        (heavy, "cantelli", 0.05),
        (exponential, "cantelli", 0.05),
    ],
)
@pytest.mark.parametrize("num_blocks", [200, 800])
def test_the_chance_to_run_out_of_blocks_stays_below_epsilon(
    draw: Callable[[random.Random], int], bound: Any, epsilon: float, num_blocks: int
) -> None:
    rng, overflows, trials, blocks = random.Random(0), 0, 1000, 0
    for _ in range(trials):
        limit = StatisticalMemoryLimit(lower=1, upper=10_000, epsilon=epsilon, bound=bound)
        for _ in range(256):
            limit.sequence_done(draw(rng))
        total = sum(draw(rng) for _ in range(limit.most_that_fit(num_blocks)))
        overflows += total > num_blocks
        blocks += total
    assert overflows / trials <= epsilon + 3 * math.sqrt(epsilon * (1 - epsilon) / trials)
    # and it is no empty promise: what it admits fills a good part of the pool
    assert blocks / trials >= (0.6 if bound == "normal" else 0.4) * num_blocks


def test_without_samples_what_is_declared_counts() -> None:
    limit = StatisticalMemoryLimit(lower=1, upper=64, least_samples=3)
    assert limit.limit(LOAD) == 5  # 20 blocks each, 100 in all
    for _ in range(3):
        limit.sequence_done(4)
    assert limit.limit(LOAD) == 25


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LinearMemoryLimit(lower=0, upper=4), "1 <= lower <= upper"),
        (lambda: LinearMemoryLimit(lower=1, upper=4, memory_factor=1.5), "memory_factor is 1.5"),
        (lambda: StatisticalMemoryLimit(lower=5, upper=4), "1 <= lower <= upper"),
        (lambda: StatisticalMemoryLimit(lower=1, upper=4, epsilon=0), "epsilon is 0"),
        (lambda: StatisticalMemoryLimit(lower=1, upper=4, least_samples=1), "least_samples is 1"),
        (lambda: StatisticalMemoryLimit(lower=1, upper=4, bound="hope"), "bound is 'hope'"),  # type: ignore[arg-type]
        (lambda: DeadlineLimit(target_ms=0, lower=1, upper=4), "target_ms is 0"),
        (lambda: DeadlineLimit(target_ms=5, lower=3, upper=2), "1 <= lower <= upper"),
        (lambda: DeadlineLimit(target_ms=5, lower=1, upper=2, alpha=-1), "alpha is -1"),
        (lambda: DeadlineLimit(target_ms=5, lower=1, upper=2, window=0), "window is 0"),
    ],
)
def test_wrong_numbers_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_one_decision_of_the_deadline_is_the_papers() -> None:
    def after(rows: int, ms: float) -> tuple[tuple[int, int], int]:
        limit = DeadlineLimit(target_ms=50, lower=1, upper=100, alpha=8, delta=2, tolerance_ms=2, window=1)
        limit.step_done(rows, ms)
        return limit.ends, limit.limit(replace(LOAD, num_decoding=0))

    assert after(40, 60) == ((1, 40), 20)
    assert after(5, 60) == ((1, 9), 5)
    assert after(40, 40) == ((40, 100), 70)
    assert after(99, 40) == ((92, 100), 96)
    assert after(40, 51) == ((36, 44), 40)


@pytest.mark.parametrize("target", [20.0, 35.0, 70.0])
def test_the_deadline_finds_the_batch_that_takes_the_target_and_follows_a_drift(target: float) -> None:
    rng = random.Random(0)
    limit = DeadlineLimit(target_ms=target, lower=1, upper=64)
    slope = 1.0
    for drift in (1.0, 1.5, 0.8):
        slope = drift
        found = []
        for step in range(800):
            rows = limit.limit(LOAD)
            limit.step_done(rows, (8 + slope * rows) * rng.uniform(0.9, 1.1))
            if step >= 400:
                found.append(8 + slope * rows)
        assert sum(found) / len(found) == pytest.approx(min(target, 8 + slope * 64), rel=0.15)


def test_the_deadline_hears_of_decode_steps_only_and_never_stops_who_decodes() -> None:
    limit = DeadlineLimit(target_ms=10, lower=1, upper=8, window=1)
    limit.step_done(0, 1000.0)
    assert limit.limit(LOAD) == 8
    limit.step_done(8, 1000.0)
    assert limit.limit(replace(LOAD, num_decoding=6)) == 6
    assert limit.limit(replace(LOAD, num_decoding=0)) < 6


TABLE = CostTable(
    CostRow(ctx, rows, chunk, 10 + 0.01 * ctx + rows + 0.1 * chunk)
    for ctx in (128, 512)
    for rows in (1, 2, 4, 8)
    for chunk in (0, 16, 64, 256)
)


@pytest.mark.parametrize(
    ("context_lens", "chunk"),
    [
        ([], 300),  # nobody decodes: nobody waits for it
        ([100], 64),  # 11 + 1.28 + 6.4 is within 20, with 256 it is not
        ([100] * 3, 16),  # as for 4 rows
        ([200], 16),  # as for 512 tokens: 11 + 5.12 + 1.6
        ([500] * 4, 0),  # 14 + 5.12 + 1.6 is not within 20, 14 + 5.12 is
        ([500] * 8, 0),  # not even alone
        ([600], 0),  # nothing as long was measured
        ([100] * 9, 0),  # nothing as wide was
    ],
)
def test_the_chunk_budget_is_the_most_that_was_measured_inside_the_target(context_lens: list[int], chunk: int) -> None:
    assert ChunkBudget(TABLE, 20.0).refine(300, context_lens) == chunk


def test_the_chunk_budget_never_exceeds_what_a_step_can_take() -> None:
    assert ChunkBudget(TABLE, 1000.0).refine(100, [100]) == 100


@given(
    lens=st.lists(st.integers(1, 500), min_size=1, max_size=8),
    target=st.floats(12.5, 80),
)
def test_a_refined_step_was_measured_to_keep_the_target(lens: list[int], target: float) -> None:
    chunk = ChunkBudget(TABLE, target).refine(10_000, lens)
    if chunk:
        assert TABLE.predict(sum(lens) / len(lens), len(lens), chunk) <= target + 1e-9


def test_the_chunk_budget_follows_a_machine_that_slows_down() -> None:
    budget = ChunkBudget(TABLE, 20.0)
    predicted = TABLE.predict(100, 1, 64)
    assert (budget.drift, budget.refine(300, [100])) == (1.0, 64)
    for _ in range(32):
        budget.step_done([100], 64, 1.3 * predicted)
    assert budget.drift == pytest.approx(1.3)
    assert budget.refine(300, [100]) == 16  # 20 / 1.3 = 15.4: 12.28 + 1.6 is within
    for _ in range(31):
        budget.step_done([100], 64, predicted)
    assert budget.drift > 1.2  # one slow step of 32 counts
    budget.step_done([100], 64, predicted)
    assert budget.drift == pytest.approx(1.0)
    assert budget.refine(300, [100]) == 64


def test_a_chunk_budget_that_allows_nothing_tries_again() -> None:
    budget = ChunkBudget(TABLE, 20.0)
    budget.step_done([100], 64, 1000.0)
    assert (budget.drift, budget.refine(300, [100])) == (4.0, 0)
    budget.step_done([100], 0, 1000.0)
    assert (budget.drift, budget.refine(300, [100])) == (1.0, 64)


def test_a_target_below_the_cheapest_step_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a step target of 5 ms; the cheapest .* takes 12.28 ms"):
        ChunkBudget(TABLE, 5)


def test_options_become_policies() -> None:
    assert build_policies(EngineConfig(), 8, None).limits == ()
    both = EngineConfig(dynamic_batching="statistical", target_inter_token_ms=50, batch_size_upper=6)
    limits = build_policies(both, 8, None).limits
    assert [type(limit) for limit in limits] == [StatisticalMemoryLimit, DeadlineLimit]
    assert [limit.limit(replace(LOAD, num_waiting=0)) for limit in limits] == [6, 6]
    (linear,) = build_policies(EngineConfig(dynamic_batching="linear"), 8, None).limits
    assert isinstance(linear, LinearMemoryLimit)
    assert build_policies(EngineConfig(slo_limits_for_dynamic_batch=0), 8, None).step_budget is None
    refined = build_policies(EngineConfig(slo_limits_for_dynamic_batch=50), 8, TABLE).step_budget
    assert isinstance(refined, ChunkBudget)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slo_limits_for_dynamic_batch": 50}, "no cost table; measure one with multibatch calibrate"),
        ({"batch_size_upper": 9}, "batch_size_upper 9; allowed: lower <= upper <= max_num_seqs, which is 8"),
        ({"batch_size_lower": 3, "batch_size_upper": 2}, "batch_size_lower is 3"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_policies(EngineConfig(**options), 8, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dynamic_batching": "on"}, "dynamic_batching is 'on'; allowed: off, linear, statistical"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy is 'lifo'; allowed: fcfs, priority"),
        ({"slo_limits_for_dynamic_batch": -2}, "slo_limits_for_dynamic_batch is -2"),
        ({"slo_limits_for_dynamic_batch": math.inf}, "slo_limits_for_dynamic_batch is inf"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching is 1"),
        ({"priority_patience": 0}, "priority_patience is 0"),
    ],
)
def test_options_that_are_not_known_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig(**options)
