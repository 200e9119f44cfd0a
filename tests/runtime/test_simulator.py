"""Loads and the simulator: what is drawn, what is counted, and that the clock adds up."""

from __future__ import annotations

import itertools
import math

import pytest

from multibatch.cost_table import CostRow, CostTable
from multibatch.errors import ConfigError
from multibatch.policies.base import Policies
from multibatch.policies.memory_limit import StatisticalMemoryLimit
from multibatch.scheduler import SchedulerConfig
from multibatch.simulator import simulate
from multibatch.trace import (
    RequestTimes,
    TraceRequest,
    make_trace,
    percentile,
    read_trace,
    summarise_times,
    write_trace,
)

CONFIG = SchedulerConfig(max_num_seqs=4, max_seq_len=256, block_size=16, max_prefill_tokens=64, max_prefill_rows=8)
# a step of prompts takes 1 ms per token, decode rows 10 ms and 1 each, whatever the context
TABLE = CostTable(
    [CostRow(16, 0, chunk, float(chunk)) for chunk in (1, 64)]
    + [CostRow(16, rows, chunk, 10.0 + rows + chunk) for rows in (1, 4) for chunk in (0, 64)]
)


def request(at: float, num_in: int, num_out: int, max_tokens: int | None = None) -> TraceRequest:
    return TraceRequest(timestamp=at, input_length=num_in, output_length=num_out, max_tokens=max_tokens)


def test_the_clock_adds_up_the_steps() -> None:
    times = simulate([request(0.5, 20, 3), request(0.525, 10, 2)], TABLE, CONFIG, num_blocks=64)
    # alone: prompt 20 ms; then one step of its row and the other's prompt (21), one of both rows (12)
    assert [round(t * 1000, 6) for t in times[0].tokens] == [520.0, 541.0 - 10, 531 + 21]
    assert times[0].scheduled == 0.5
    assert times[1].arrival == 0.525


def test_everyone_gets_all_tokens_also_when_the_pool_is_small() -> None:
    trace = make_trace(40, request_rate=20, input_len=40, output_len=40, lengths="heavy", longest_output=120, seed=3)
    trace = [r for r in trace if r.input_length + 120 < 256]
    times = simulate(trace, TABLE, CONFIG, num_blocks=18)
    assert [len(t.tokens) for t in times] == [r.output_length for r in trace]
    assert sum(t.num_preemptions for t in times) > 0
    for r, t in zip(trace, times, strict=True):
        assert t.tokens == sorted(t.tokens)
        assert t.scheduled is not None
        assert r.timestamp <= t.scheduled < t.tokens[0]


def test_policies_change_what_happens_and_the_same_load_gives_the_same_times() -> None:
    trace = make_trace(60, request_rate=math.inf, input_len=30, output_len=60, lengths="uniform", longest_output=200)
    config = SchedulerConfig(**{name: getattr(CONFIG, name) for name in CONFIG.__slots__} | {"max_num_seqs": 16})

    def run(limited: bool) -> list[RequestTimes]:
        limits = (StatisticalMemoryLimit(lower=1, upper=16),) if limited else ()
        return simulate(trace, TABLE, config, 40, Policies(limits))

    free, limited = run(False), run(True)
    assert sum(t.num_preemptions for t in limited) < sum(t.num_preemptions for t in free)
    assert run(True) == limited


def test_a_load_is_drawn_as_asked() -> None:
    for burstiness, low, high in ((100.0, 0.05, 0.15), (1.0, 0.8, 1.2), (0.2, 1.8, 2.8)):
        trace = make_trace(4000, request_rate=10, burstiness=burstiness, seed=1)
        gaps = [b.timestamp - a.timestamp for a, b in itertools.pairwise(trace)]
        mean = sum(gaps) / len(gaps)
        deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
        assert mean == pytest.approx(0.1, rel=0.1)
        assert low < deviation / mean < high
    for lengths in ("uniform", "heavy"):
        trace = make_trace(4000, request_rate=math.inf, output_len=50, lengths=lengths, seed=2)
        assert {r.timestamp for r in trace} == {0.0}
        assert sum(r.output_length for r in trace) / 4000 == pytest.approx(50, rel=0.1)
    capped = make_trace(100, request_rate=1, output_len=50, lengths="heavy", longest_output=60)
    assert max(r.output_length for r in capped) == 60
    assert {r.max_tokens for r in capped} == {60}


def test_a_trace_survives_its_file() -> None:
    trace = [request(0.25, 5, 7), request(1.0, 3, 2, max_tokens=9)]
    assert read_trace(write_trace(reversed(trace)).splitlines()) == trace


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"timestamp": 1}', '{"timestamp": 0, "input_length": 0, "output_length": 1}']
)
def test_a_line_that_is_no_request_is_named(line: str) -> None:
    good = '{"timestamp": 0, "input_length": 1, "output_length": 1}'
    with pytest.raises(ConfigError, match="line 2 of the trace"):
        read_trace([good, line])


def test_figures_are_vllms() -> None:
    trace = [request(0.0, 10, 3), request(1.0, 20, 1), request(1.0, 20, 1)]
    times = [RequestTimes(0.0, [0.5, 0.6, 0.8]), RequestTimes(1.0, [2.0]), RequestTimes(1.0, error="a step failed")]
    figures = summarise_times(trace, times, {"ttft": 600, "tpot": 200})
    assert figures["duration"] == 2.0
    assert (figures["completed"], figures["failed"]) == (2, 1)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (30, 4)
    assert figures["output_throughput"] == 2.0
    assert figures["total_token_throughput"] == 17.0
    assert figures["request_goodput"] == 0.5  # the second took 1000 ms to its first token
    assert figures["mean_ttft_ms"] == pytest.approx(750)
    assert figures["mean_tpot_ms"] == pytest.approx(150)  # only where there is a second token
    assert figures["median_itl_ms"] == pytest.approx(150)
    assert figures["p99_e2el_ms"] == pytest.approx(percentile([800, 1000], 99))


def test_percentiles_are_interpolated() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([5.0], 99) == 5.0
    assert percentile([], 50) == 0.0
