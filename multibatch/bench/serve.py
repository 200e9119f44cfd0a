"""A load on the engine, in this process: `vllm bench serve` without the server; beside it what the simulator predicts."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from multibatch.artifact import Artifact
from multibatch.backends.base import LoadedPrograms
from multibatch.backends.load import load_programs
from multibatch.bench.load import ScriptedEngine, run_load
from multibatch.config import EngineConfig
from multibatch.cost_table import CostTable, Slowdown
from multibatch.errors import ConfigError
from multibatch.policies.build import build_policies
from multibatch.simulator import simulate
from multibatch.trace import RequestTimes, TraceRequest, summarise_times

COMPARED = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms")
"""What a prediction is judged by."""


def run_serve(
    artifact: Artifact,
    trace: Sequence[TraceRequest],
    config: EngineConfig,
    *,
    programs: LoadedPrograms | None = None,
    max_concurrency: int | None = None,
    goodput: Mapping[str, float] | None = None,
    predict: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Sends a load and gives the figures of `vllm bench serve`.

    Args:
        artifact: what serves.
        trace: what is sent.
        config: of the engine.
        programs: of the artifact, if they are loaded and warm already.
        max_concurrency: requests in the engine at once.
        goodput: as in `summarise_times`.
        predict: also simulates the same load with the artifact's cost table, scaled by how long the load's steps took in all
            beside what it says of them (a machine changes its speed after calibration), and as it is.
        seed: of the token ids.

    Raises:
        ConfigError: `predict` without a cost table.
    """
    engine = ScriptedEngine(artifact, config, programs or warm_programs(artifact))
    if predict:
        _table(artifact)  # that there is none is said before the load is sent
    figures = summarise_times(trace, run_load(engine, trace, max_concurrency=max_concurrency, seed=seed), goodput)
    record = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": "multibatch",
        "model_id": artifact.manifest.model.id,
        "max_concurrency": max_concurrency,
        **figures,
    }
    if predict:
        record["slowdown"] = dataclasses.asdict(engine.slowdown)
        for name, by in {"predicted": engine.slowdown, "predicted_as_calibrated": Slowdown()}.items():
            found = summarise_times(trace, _simulated(artifact, trace, config, engine, by), goodput)
            record[name] = found
            record[f"{name}_over_measured"] = {key: found[key] / figures[key] for key in COMPARED if figures[key]}
    return record


def predict_serve(
    artifact: Artifact,
    trace: Sequence[TraceRequest],
    config: EngineConfig,
    *,
    engine: ScriptedEngine,
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The figures that the simulator gives for the load on this engine.

    Raises:
        ConfigError: the artifact has no cost table.
    """
    return summarise_times(trace, _simulated(artifact, trace, config, engine, Slowdown()), goodput)


def _simulated(
    artifact: Artifact, trace: Sequence[TraceRequest], config: EngineConfig, engine: ScriptedEngine, by: Slowdown
) -> list[RequestTimes]:
    """On a machine so much slower than the calibrated one; the policies know, as in service, the table as it is."""
    table = _table(artifact)
    policies = build_policies(config, engine.max_num_seqs, table)
    return simulate(trace, table.scaled(by), engine.limits, engine.pool.num_blocks - 1, policies)


def _table(artifact: Artifact) -> CostTable:
    table = artifact.cost_table()
    if table is None:
        raise ConfigError("the artifact has no cost table to predict with; run multibatch calibrate on it first")
    return table


def warm_programs(artifact: Artifact) -> LoadedPrograms:
    """Loads the programs and calls them: each size of the ladder once, and a prompt.

    In an engine of its own: the policies of a measured one must not learn from such short requests.
    """
    programs = load_programs(artifact)
    engine = ScriptedEngine(artifact, EngineConfig(enable_prefix_caching=False), programs)
    most = min(engine.max_num_seqs, engine.pool.num_blocks - 1)
    warm = TraceRequest(timestamp=0.0, input_length=1, output_length=2)
    for size in sorted({n for n in engine.manifest.decoder_batch_sizes if n <= most}):
        run_load(engine, [warm] * size)
    longest = min(engine.manifest.max_prefill_tokens, engine.max_seq_len - 1)
    run_load(engine, [dataclasses.replace(warm, input_length=longest, output_length=1)])
    return programs


__all__ = ["COMPARED", "predict_serve", "run_serve", "warm_programs"]
