"""One at a time, fixed groups, and continuous batching on the same 32 requests: what batching is worth.

The comparison of the projects that multibatch grew from, with their columns: TTFT, prefill_ms, decode_ms, latency and its
50th and 95th percentiles, tokens per second.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from multibatch.artifact import Artifact
from multibatch.backends.load import load_programs
from multibatch.bench.load import Progress, ScriptedEngine, run_load, unheard
from multibatch.config import EngineConfig
from multibatch.machine_rates import measure_roofline
from multibatch.manifest import Manifest
from multibatch.roofline import Roofline, best_of, step_bytes, step_products
from multibatch.trace import RequestTimes, TraceRequest, make_trace, percentile

COLUMNS = (
    "scheduler",
    "batch_size",
    "tokens_per_s",
    "ttft_ms",
    "prefill_ms",
    "decode_ms",
    "latency_ms",
    "latency_p50_ms",
    "latency_p95_ms",
    "limit_tokens_per_s",
)


def run_seeds(
    artifact: Artifact,
    *,
    batch_sizes: Sequence[int],
    num_requests: int = 32,
    input_len: int = 128,
    output_len: int = 64,
    request_rate: float = float("inf"),
    repeats: int = 3,
    seed: int = 0,
    progress: Progress = unheard,
) -> list[dict[str, Any]]:
    """Requests come at request_rate, or all at the start; their lengths are drawn from half to one and a half times the means.

    static: groups of batch_size in the order of arrival, each when it is complete and the longest of the group before has
    ended; continuous: at most batch_size run, and one that ends makes room at once. Each row is the median run by mean
    latency, which counts from a request's arrival.

    Returns:
        A row of COLUMNS for each scheduler and batch size; static with 1 is the baseline. limit_tokens_per_s is what the
        machine's rates allow, measured in the same run: with batch_size rows in every decode step, all weights read
        for each, and all products made.
    """
    load: dict[str, Any] = {"request_rate": request_rate, "input_len": input_len, "output_len": output_len}
    trace = make_trace(num_requests, **load, lengths="uniform", seed=seed)
    programs = load_programs(artifact)
    cases = [("static", size) for size in batch_sizes] + [("continuous", size) for size in batch_sizes if size > 1]
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {case: [] for case in cases}
    rooflines = []
    for turn in range(repeats):
        for scheduler, size in cases:
            progress(f"{scheduler}, {size} at once, run {turn + 1} of {repeats}")
            rooflines.append(measure_roofline(artifact.manifest))
            engine = ScriptedEngine(artifact, EngineConfig(max_num_seqs=size, enable_prefix_caching=False), programs)
            times = _run_groups(engine, trace, size) if scheduler == "static" else run_load(engine, trace)
            runs[scheduler, size].append(_row(scheduler, size, times))
    limits = {size: _limit(artifact.manifest, best_of(rooflines), trace, size) for size in batch_sizes}
    return [{**_median_run(rows), "limit_tokens_per_s": limits[size]} for (_, size), rows in runs.items()]


def _limit(manifest: Manifest, roofline: Roofline, trace: Sequence[TraceRequest], batch_size: int) -> float:
    num_outputs = sum(request.output_length for request in trace)
    context = round(fmean(request.input_length + request.output_length / 2 for request in trace))
    num_steps = num_outputs / batch_size
    products = num_steps * step_products(manifest, batch_size)
    products += sum(step_products(manifest, 0, request.input_length) for request in trace)
    return num_outputs * 1000 / roofline.ms(num_steps * step_bytes(manifest, [context] * batch_size), products)


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The rows as a table for other programs."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def _run_groups(engine: ScriptedEngine, trace: Sequence[TraceRequest], size: int) -> list[RequestTimes]:
    """Group after group. Nothing waits for an arrival here: a group's times are moved to when it would have begun."""
    everything: list[RequestTimes] = []
    free = 0.0
    for first in range(0, len(trace), size):
        group = trace[first : first + size]
        start = max(free, group[-1].timestamp)
        found = run_load(engine, [replace(request, timestamp=0.0) for request in group])
        everything += [
            RequestTimes(request.timestamp, [start + at for at in times.tokens], start + (times.scheduled or 0.0))
            for request, times in zip(group, found, strict=True)
        ]
        free = start + max(times.tokens[-1] for times in found)
    return everything


def _row(scheduler: str, batch_size: int, times: Sequence[RequestTimes]) -> dict[str, Any]:
    latencies = [(t.tokens[-1] - t.arrival) * 1000 for t in times]
    num_tokens = sum(len(t.tokens) for t in times)
    first = fmean(t.tokens[0] - t.arrival for t in times) * 1000
    return {
        "scheduler": scheduler,
        "batch_size": batch_size,
        "tokens_per_s": num_tokens / max(t.tokens[-1] for t in times),
        "ttft_ms": first,
        "prefill_ms": first - fmean((t.scheduled or 0.0) - t.arrival for t in times) * 1000,
        "decode_ms": fmean(t.tokens[-1] - t.tokens[0] for t in times) * 1000,
        "latency_ms": fmean(latencies),
        "latency_p50_ms": percentile(latencies, 50),
        "latency_p95_ms": percentile(latencies, 95),
    }


def _median_run(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return sorted(rows, key=lambda row: row["latency_ms"])[len(rows) // 2]
