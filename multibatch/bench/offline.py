"""`vllm bench latency` and `vllm bench throughput` on the engine in this process, with their options and JSON fields."""

from __future__ import annotations

from typing import Any

from multibatch.artifact import Artifact
from multibatch.bench.load import ScriptedEngine, run_load
from multibatch.config import EngineConfig
from multibatch.trace import TraceRequest, make_trace, percentile, summarise_times

PERCENTILES = (10, 25, 50, 75, 90, 99)


def run_latency(
    artifact: Artifact,
    *,
    input_len: int,
    output_len: int,
    batch_size: int,
    num_iters_warmup: int,
    num_iters: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Seconds that a batch of equal requests takes, sent at once to an idle engine, at temperature 1.

    Returns:
        model_id, avg_latency, latencies and percentiles (seconds).
    """
    engine = ScriptedEngine(artifact, EngineConfig(enable_prefix_caching=False))
    batch = [TraceRequest(timestamp=0.0, input_length=input_len, output_length=output_len)] * batch_size
    latencies = []
    for turn in range(num_iters_warmup + num_iters):
        times = run_load(engine, batch, temperature=1.0, seed=seed + turn)
        latencies.append(max(t.tokens[-1] for t in times))
    measured = latencies[num_iters_warmup:]
    return {
        "model_id": artifact.manifest.model.id,
        "avg_latency": sum(measured) / len(measured),
        "latencies": measured,
        "percentiles": {str(p): percentile(measured, p) for p in PERCENTILES},
    }


def run_throughput(
    artifact: Artifact, *, input_len: int, output_len: int, num_prompts: int, num_warmups: int, seed: int = 0
) -> dict[str, Any]:
    """Tokens per second of a queue of equal requests that are all there from the start, at temperature 1.

    Returns:
        model_id, elapsed_time (s), num_requests, total_num_tokens, requests_per_second, tokens_per_second.
    """
    engine = ScriptedEngine(artifact, EngineConfig(enable_prefix_caching=False))
    load: dict[str, Any] = {"request_rate": float("inf"), "input_len": input_len, "output_len": output_len}
    if num_warmups:
        run_load(engine, make_trace(num_warmups, **load), seed=seed + 1)
    trace = make_trace(num_prompts, **load)
    figures = summarise_times(trace, run_load(engine, trace, temperature=1.0, seed=seed))
    return {
        "model_id": artifact.manifest.model.id,
        "elapsed_time": figures["duration"],
        "num_requests": num_prompts,
        "total_num_tokens": figures["total_input_tokens"] + figures["total_output_tokens"],
        "requests_per_second": figures["request_throughput"],
        "tokens_per_second": figures["total_token_throughput"],
        "output_tokens_per_second": figures["output_throughput"],
    }
