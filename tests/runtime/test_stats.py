"""Counters and histograms of an engine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multibatch.request import FinishReason
from multibatch.stats import CompletionTimes, EngineStats, Histogram


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 5)), max_size=30))
def test_a_histogram_counts_by_size(observations: list[tuple[float, int]]) -> None:
    histogram = Histogram((1, 2.5, 10))
    for value, times in observations:
        histogram.observe(value, times)
    for i, bound in enumerate((1, 2.5, 10)):
        assert sum(histogram.counts[: i + 1]) == sum(times for value, times in observations if value <= bound)
    assert sum(histogram.counts) == sum(times for _, times in observations)
    assert histogram.total == pytest.approx(sum(value * times for value, times in observations))


@pytest.mark.parametrize(
    ("longest", "bounds"), [(1, (1,)), (9, (1, 2, 5)), (10, (1, 2, 5, 10)), (128, (1, 2, 5, 10, 20, 50, 100))]
)
def test_lengths_have_bounds_of_one_two_and_five(longest: int, bounds: tuple[int, ...]) -> None:
    assert EngineStats(longest).request_prompt_tokens.bounds == bounds


def test_a_completion_that_never_ran_has_no_times_but_an_end() -> None:
    stats = EngineStats(100)
    times = CompletionTimes(queued=1.0, scheduled=None, first_token=None, last_token=None, ended=3.0)
    stats.completion_ended(FinishReason.ABORT, 5, 0, times)
    assert stats.ended == {
        FinishReason.STOP: 0,
        FinishReason.LENGTH: 0,
        FinishReason.ABORT: 1,
        FinishReason.ERROR: 0,
    }
    assert (stats.e2e_request_latency.total, sum(stats.request_queue_time.counts)) == (2.0, 0)


def test_the_times_of_a_completion_are_those_between_its_events() -> None:
    stats = EngineStats(100)
    times = CompletionTimes(queued=1.0, scheduled=2.0, first_token=4.0, last_token=12.0, ended=12.5)
    stats.completion_ended(FinishReason.LENGTH, 5, 5, times)
    totals = (
        stats.e2e_request_latency,
        stats.request_queue_time,
        stats.request_prefill_time,
        stats.request_decode_time,
        stats.request_inference_time,
        stats.request_time_per_output_token,
    )
    assert [histogram.total for histogram in totals] == [11.5, 1.0, 2.0, 8.0, 10.0, 2.0]
