"""Measures an artifact: the ladder against its baselines on the same requests, in turn, in one run."""

from __future__ import annotations

import dataclasses
import os
import platform
import random
import resource
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from multibatch.artifact import Artifact
from multibatch.config import EngineConfig
from multibatch.engine import Engine, load_programs
from multibatch.hardware import read_cpu_info, usable_cores
from multibatch.metrics import summarise
from multibatch.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What `bench` runs."""

    batch: int = 8
    """Requests at once."""
    input_len: int = 128
    """Prompt tokens of each, random ids, unless `prompts` gives them."""
    output_len: int = 64
    """New tokens of each; end-of-sequence is ignored."""
    repeats: int = 5
    """The median of so many is reported; the variants take turns."""
    seed: int = 0
    prompts: tuple[tuple[int, ...], ...] = ()
    """Token ids to use instead of random ones."""


def run_bench(artifact: Artifact, options: BenchOptions, reference: Any = None) -> dict[str, Any]:
    """Tokens per second of each variant, and what the limit is.

    Args:
        artifact: what to measure.
        options: the load.
        reference: a loaded transformers model whose static `generate` is timed on the same prompts, or None.

    Returns:
        A JSON-ready record with hardware and versions.
    """
    prompts = _prompts(artifact, options)
    programs = load_programs(artifact)
    policies = ["nearest", "pad_to_max"]
    if 1 in artifact.manifest.decoder_batch_sizes:
        policies.append("one_by_one")
    engines = {p: Engine(artifact, EngineConfig(selector_policy=p), programs) for p in policies}
    runs: dict[str, list[dict[str, float]]] = {p: [] for p in policies}
    if reference is not None:
        runs["transformers_generate"] = []
    _serve(engines["nearest"], prompts, 2)
    for _ in range(options.repeats):
        for policy, engine in engines.items():
            runs[policy].append(_serve(engine, prompts, options.output_len))
        if reference is not None:
            runs["transformers_generate"].append(_generate(reference, prompts, options.output_len))
    variants = {name: _median(results) for name, results in runs.items()}
    used = summarise(engines["nearest"].runner.records)
    return {
        "model": artifact.manifest.model.id,
        "architecture": artifact.manifest.model.architecture,
        "dtype": artifact.manifest.model.dtype,
        "decoder_batch_sizes": list(artifact.manifest.decoder_batch_sizes),
        "batch": len(prompts),
        "input_len": [len(p) for p in prompts] if options.prompts else options.input_len,
        "output_len": options.output_len,
        "repeats": options.repeats,
        "variants": variants,
        "ladder_over_generate": _ratio(variants, "transformers_generate"),
        "ladder_over_pad_to_max": _ratio(variants, "pad_to_max"),
        "ladder_over_one_by_one": _ratio(variants, "one_by_one"),
        "programs": [dataclasses.asdict(use) for use in used],
        "weight_bytes_per_step": artifact.manifest.model.weight_bytes,
        "bandwidth_gbps_at_build": artifact.manifest.build.measured_bandwidth_gbps,
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "cpu": read_cpu_info().model_name,
        "cores": usable_cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "other_load": round(os.getloadavg()[0], 2),
    }


def _prompts(artifact: Artifact, options: BenchOptions) -> list[tuple[int, ...]]:
    if options.prompts:
        return list(options.prompts)
    rng = random.Random(options.seed)
    vocabulary = artifact.manifest.model.vocab_size
    return [tuple(rng.randrange(vocabulary) for _ in range(options.input_len)) for _ in range(options.batch)]


def _serve(engine: Engine, prompts: Sequence[Sequence[int]], output_len: int) -> dict[str, float]:
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    start = time.monotonic()
    for i, prompt in enumerate(prompts):
        engine.add_request(f"bench-{i}", prompt, params)
    firsts: list[float] = []
    lasts: list[float] = []
    while engine.has_unfinished:
        for output in engine.step():
            if output.finished and output.metrics is not None:
                firsts.append(output.metrics.first_token_ts or 0.0)
                lasts.append(output.metrics.last_token_ts or 0.0)
    if engine.failure is not None:
        raise engine.failure
    wall = time.monotonic() - start
    decode = max(lasts) - max(firsts)
    tokens = len(prompts) * output_len
    return {
        "output_tokens_per_s": tokens / wall,
        "decode_tokens_per_s": len(prompts) * (output_len - 1) / decode if decode else 0.0,
        "ttft_mean_s": statistics.mean(firsts) - start,
        "wall_s": wall,
    }


def _generate(model: Any, prompts: Sequence[Sequence[int]], output_len: int) -> dict[str, float]:
    """Static batching by transformers: prompts of one length, a first token apart from the rest."""
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    options = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.inference_mode():
        start = time.monotonic()
        model.generate(ids, max_new_tokens=1, min_new_tokens=1, **options)
        first = time.monotonic() - start
        start = time.monotonic()
        model.generate(ids, max_new_tokens=output_len, min_new_tokens=output_len, **options)
        wall = time.monotonic() - start
    return {
        "output_tokens_per_s": len(prompts) * output_len / wall,
        "decode_tokens_per_s": len(prompts) * (output_len - 1) / (wall - first),
        "ttft_mean_s": first,
        "wall_s": wall,
    }


def _median(results: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(r[key] for r in results), 4) for key in results[0]}


def _ratio(variants: dict[str, dict[str, float]], baseline: str) -> float | None:
    if baseline not in variants:
        return None
    return round(variants["nearest"]["decode_tokens_per_s"] / variants[baseline]["decode_tokens_per_s"], 3)
