"""Loads: what comes when and how long it is, what became of it, and the figures that follow.

A trace file is vLLM's `timed_trace`, as Mooncake's and Qwen's are: JSON lines with `timestamp` (milliseconds),
`input_length` and `output_length`. The figures have the names and definitions of `vllm bench serve`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, pstdev
from typing import Any, Literal

from multibatch.errors import ConfigError

Lengths = Literal["fixed", "uniform", "heavy"]
METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request of a load."""

    timestamp: float
    """Seconds from the start at which it comes."""
    input_length: int
    """Tokens of the prompt."""
    output_length: int
    """Tokens it gives before it ends."""
    max_tokens: int | None = None
    """What it declares as its longest output; None: output_length."""
    priority: int = 0


@dataclass(slots=True)
class RequestTimes:
    """What became of a request; seconds on one clock that starts with the load."""

    arrival: float
    tokens: list[float] = field(default_factory=list)
    """When each token came."""
    scheduled: float | None = None
    """When its prompt was first computed on."""
    num_preemptions: int = 0
    error: str | None = None


def read_trace(lines: Iterable[str]) -> list[TraceRequest]:
    """Reads a `timed_trace`; further fields are ignored.

    Raises:
        ConfigError: a line is not what it has to be; names it.
    """
    trace = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            request = TraceRequest(
                timestamp=float(record["timestamp"]) / 1000,
                input_length=int(record["input_length"]),
                output_length=int(record["output_length"]),
                max_tokens=record.get("max_tokens"),
                priority=int(record.get("priority", 0)),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"line {number} of the trace: {error!r}; each has timestamp (ms), input_length and output_length"
            ) from error
        if request.input_length < 1 or request.output_length < 1 or request.timestamp < 0:
            raise ConfigError(f"line {number} of the trace: lengths have to be at least 1, and the time at least 0")
        trace.append(request)
    return sorted(trace, key=lambda request: request.timestamp)


def write_trace(trace: Iterable[TraceRequest]) -> str:
    """The lines that `read_trace` reads."""
    records = (
        {"timestamp": r.timestamp * 1000, "input_length": r.input_length, "output_length": r.output_length}
        | ({} if r.max_tokens is None else {"max_tokens": r.max_tokens})
        | ({} if r.priority == 0 else {"priority": r.priority})
        for r in trace
    )
    return "".join(json.dumps(record) + "\n" for record in records)


def make_trace(
    num_requests: int,
    *,
    request_rate: float,
    burstiness: float = 1.0,
    input_len: int = 128,
    output_len: int = 64,
    lengths: Lengths = "fixed",
    longest_input: int | None = None,
    longest_output: int | None = None,
    seed: int = 0,
) -> list[TraceRequest]:
    """Draws a load.

    Args:
        num_requests: how many.
        request_rate: requests per second on average; infinity: all at once.
        burstiness: shape of the gamma distribution of the gaps, as in vLLM: 1 is a Poisson process, below 1 comes in
            bursts, above 1 is steadier.
        input_len: mean tokens of a prompt.
        output_len: mean tokens of an output.
        lengths: "fixed" at the means; "uniform" from half to one and a half times them; "heavy": log-normal with sigma 1,
            whose longest twentieth is more than three times the mean.
        longest_input: none is longer.
        longest_output: where lengths vary, what every request declares as max_tokens and none exceeds.
        seed: the same gives the same load.

    Raises:
        ConfigError: a rate or burstiness that is not above 0, or no request.
    """
    if num_requests < 1 or not request_rate > 0 or not burstiness > 0:
        raise ConfigError(
            f"a load of {num_requests} requests at rate {request_rate} and burstiness {burstiness}; each has to be above 0"
        )
    rng, now, trace = random.Random(seed), 0.0, []
    for _ in range(num_requests):
        output, prompt = _length(rng, output_len, lengths), _length(rng, input_len, lengths)
        trace.append(
            TraceRequest(
                timestamp=now,
                input_length=prompt if longest_input is None else min(prompt, longest_input),
                output_length=output if longest_output is None else min(output, longest_output),
                max_tokens=longest_output,
            )
        )
        if request_rate != float("inf"):
            now += rng.gammavariate(burstiness, 1 / (request_rate * burstiness))
    return trace


def summarise_times(
    trace: Sequence[TraceRequest], times: Sequence[RequestTimes], goodput: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """The figures of `vllm bench serve` for a load that was run.

    Args:
        trace: what was sent.
        times: what became of it, in the same order.
        goodput: milliseconds that ttft, tpot or e2el may take for a request to count as good.

    Returns:
        A JSON-ready record: duration (s), completed, failed, total_input_tokens, total_output_tokens,
        request_throughput, request_goodput, output_throughput, total_token_throughput (per second), num_preemptions,
        and mean, median, std, p50, p90, p95, p99 of ttft, tpot, itl and e2el in milliseconds.
    """
    done = [(r, t) for r, t in zip(trace, times, strict=True) if t.error is None and t.tokens]
    duration = max((t.tokens[-1] for _, t in done), default=0.0)
    per_request = [_metrics(t) for _, t in done]
    num_out = sum(len(t.tokens) for _, t in done)
    num_in = sum(r.input_length for r, _ in done)
    wanted = goodput or {}
    good = sum(all(m.get(name, 0.0) <= most for name, most in wanted.items()) for m in per_request)
    values: dict[str, list[float]] = {
        name: [m[name] for m in per_request if name in m] for name in ("ttft", "tpot", "e2el")
    }
    values["itl"] = [(b - a) * 1000 for _, t in done for a, b in zip(t.tokens, t.tokens[1:], strict=False)]
    per_second = 1 / duration if duration else 0.0
    return {
        "num_prompts": len(trace),
        "duration": duration,
        "completed": len(done),
        "failed": len(trace) - len(done),
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "request_throughput": len(done) * per_second,
        "request_goodput": good * per_second if wanted else None,
        "output_throughput": num_out * per_second,
        "total_token_throughput": (num_in + num_out) * per_second,
        "num_preemptions": sum(t.num_preemptions for t in times),
        **{key: value for name in METRICS for key, value in _spread(name, values[name]).items()},
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the ranks around it, as numpy does; 0.0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def _length(rng: random.Random, mean: int, lengths: Lengths) -> int:
    if lengths == "fixed":
        return mean
    if lengths == "uniform":
        return max(1, round(rng.uniform(0.5, 1.5) * mean))
    return max(1, round(rng.lognormvariate(-0.5, 1.0) * mean))


def _metrics(times: RequestTimes) -> dict[str, float]:
    first, last = times.tokens[0], times.tokens[-1]
    metrics = {"ttft": (first - times.arrival) * 1000, "e2el": (last - times.arrival) * 1000}
    if len(times.tokens) > 1:
        metrics["tpot"] = (last - first) * 1000 / (len(times.tokens) - 1)
    return metrics


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    spread = {
        f"mean_{name}_ms": fmean(values) if values else 0.0,
        f"median_{name}_ms": median(values) if values else 0.0,
    }
    spread[f"std_{name}_ms"] = pstdev(values) if values else 0.0
    return spread | {f"p{p}_{name}_ms": percentile(values, p) for p in (50, 90, 95, 99)}
