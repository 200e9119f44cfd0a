"""Measures an artifact: the ladder against its baselines on the same requests, in turn, in one run.

Without the prefix cache, since every run sends the same prompts.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch

from multibatch.artifact import Artifact
from multibatch.backends.eager import EagerPrograms
from multibatch.backends.flat_model import REFERENCE_ATTENTION, FlatDecoder
from multibatch.backends.load import load_programs
from multibatch.bench.load import Progress, unheard
from multibatch.config import EngineConfig
from multibatch.engine import Engine
from multibatch.hardware import read_cpu_info, usable_cores
from multibatch.machine_rates import measure_roofline
from multibatch.manifest import Manifest, decoder_name
from multibatch.metrics import ProgramUse
from multibatch.roofline import Roofline, best_of
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


def run_bench(
    artifact: Artifact, options: BenchOptions, reference: Any = None, progress: Progress = unheard
) -> dict[str, Any]:
    """Tokens per second of each variant, and what the limit is.

    Args:
        artifact: what to measure.
        options: the load.
        reference: the model in transformers, for two more variants: our engine over it, uncompiled ("eager"), and its
            own static `generate`. Or None.
        progress: told of each run.

    Returns:
        A JSON-ready record with hardware and versions.
    """
    prompts = _prompts(artifact, options)
    variants = _variants(artifact, prompts, options.output_len, reference)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    rooflines: list[Roofline] = []
    for turn in range(options.repeats):
        rooflines.append(measure_roofline(artifact.manifest))
        for name, run in variants.items():
            progress(f"{name}, run {turn + 1} of {options.repeats}")
            runs[name].append(run())
    ladder = variants["ladder"]
    assert isinstance(ladder, _Serve)
    roofline = best_of(rooflines)
    contexts = [len(p) + options.output_len // 2 for p in prompts]
    limit = roofline.decode_tokens_per_s(artifact.manifest, contexts)
    medians = {name: _median(results, limit) for name, results in runs.items()}
    rate = medians["ladder"]["decode_tokens_per_s"]
    return {
        "model": artifact.manifest.model.id,
        "architecture": artifact.manifest.model.architecture,
        "dtype": artifact.manifest.model.dtype,
        "decoder_batch_sizes": list(artifact.manifest.decoder_batch_sizes),
        "batch": len(prompts),
        "input_len": [len(p) for p in prompts] if options.prompts else options.input_len,
        "output_len": options.output_len,
        "repeats": options.repeats,
        "variants": medians,
        "ladder_over": {
            name: round(rate / v["decode_tokens_per_s"], 3) for name, v in medians.items() if name != "ladder"
        },
        "programs": [_use(artifact.manifest, use, roofline) for use in ladder.engine.runner.program_uses.values()],
        "weight_bytes_per_step": artifact.manifest.model.weight_bytes,
        "bandwidth_gbps": _range([r.bandwidth_gbps for r in rooflines]),
        "gproducts": _range([r.gproducts for r in rooflines if r.gproducts]),
        "limit_decode_tokens_per_s": round(limit, 1),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "cpu": read_cpu_info().model_name,
        "cores": usable_cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "multibatch": version("multibatch"),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _variants(
    artifact: Artifact, prompts: list[tuple[int, ...]], output_len: int, reference: Any
) -> dict[str, Callable[[], dict[str, float]]]:
    programs = load_programs(artifact)
    policies = {"ladder": "cheapest", "nearest": "nearest", "pad_to_max": "pad_to_max"}
    if 1 in artifact.manifest.decoder_batch_sizes:
        policies["batch_1"] = "one_by_one"
    served = {
        name: _Serve(
            Engine(artifact, EngineConfig(selector_policy=policy, enable_prefix_caching=False), programs),
            prompts,
            output_len,
        )
        for name, policy in policies.items()
    }
    # The first run touches every page of the weights and of the pool; no variant should pay for that alone.
    for run in served.values():
        _serve(run.engine, prompts, 2)
        run.engine.runner.program_uses.clear()
    variants: dict[str, Callable[[], dict[str, float]]] = dict(served)
    if reference is not None:
        own_attention = reference.config._attn_implementation
        eager = EagerPrograms(FlatDecoder(reference, REFERENCE_ATTENTION))
        engine = Engine(artifact, EngineConfig(enable_prefix_caching=False), eager)

        def run_eager() -> dict[str, float]:
            reference.set_attn_implementation(REFERENCE_ATTENTION)
            return _serve(engine, prompts, output_len)

        def run_generate() -> dict[str, float]:
            reference.set_attn_implementation(own_attention)
            return _generate(reference, prompts, output_len)

        variants |= {"eager": run_eager, "transformers_generate": run_generate}
    return variants


@dataclasses.dataclass(frozen=True, slots=True)
class _Serve:
    """One variant that our engine serves."""

    engine: Engine
    prompts: Sequence[Sequence[int]]
    output_len: int

    def __call__(self) -> dict[str, float]:
        return _serve(self.engine, self.prompts, self.output_len)


def _range(values: Sequence[float]) -> dict[str, float] | None:
    return {"best": round(max(values), 1), "worst": round(min(values), 1)} if values else None


def _use(manifest: Manifest, use: ProgramUse, roofline: Roofline) -> dict[str, Any]:
    """One program's calls, and how near they came to the limit (KV not counted)."""
    record = dataclasses.asdict(use)
    rungs = {decoder_name(size): size for size in manifest.decoder_batch_sizes}
    if use.program in rungs:
        limit = roofline.step_ms(manifest, [0] * rungs[use.program])
        record["share_of_limit"] = round(limit * use.num_calls / use.ms, 3)
    return record


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
    metrics = [output.metrics for output in engine.run_all().values() if output.metrics is not None]
    firsts = [m.first_token_ts or 0.0 for m in metrics]
    lasts = [m.last_token_ts or 0.0 for m in metrics]
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


def _median(results: Sequence[dict[str, float]], limit: float) -> dict[str, float]:
    medians = {key: round(statistics.median(r[key] for r in results), 4) for key in results[0]}
    return {**medians, "share_of_limit": round(medians["decode_tokens_per_s"] / limit, 3)}
