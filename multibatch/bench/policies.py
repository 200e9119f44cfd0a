"""Static batching against the dynamic policies, on the engine and in the simulator, for loads of different kinds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from multibatch.artifact import Artifact
from multibatch.backends.base import LoadedPrograms
from multibatch.bench.load import Progress, ScriptedEngine, unheard
from multibatch.bench.serve import predict_serve, run_serve, warm_programs
from multibatch.config import EngineConfig
from multibatch.errors import ConfigError
from multibatch.kv.block_table import blocks_for
from multibatch.trace import TraceRequest, make_trace

LOADS: Mapping[str, Mapping[str, Any]] = {
    "steady": {"burstiness": 100.0, "lengths": "uniform"},
    "bursty": {"burstiness": 0.2, "lengths": "uniform"},
    "heavy-tailed": {"burstiness": 1.0, "lengths": "heavy"},
}
_BISECTIONS = 7


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoliciesOptions:
    """What is sent, and what it has to keep to."""

    num_requests: int = 64
    """Of each run on the engine."""
    capacity_requests: int = 512
    """Of each load in the search for capacity, which only the simulator runs."""
    input_len: int = 64
    """Mean tokens of a prompt."""
    output_len: int = 64
    """Mean tokens of an output."""
    longest_output: int = 512
    """What every request declares as max_tokens, as it cannot know better."""
    num_kv_blocks: int = 96
    """Of the pool: memory is what the policies share out."""
    request_rate: float = float("inf")
    """Requests per second of the throughput runs; infinity: the queue is full from the start."""
    target_ttft_ms: float = 2_000.0
    """95th percentile that a rate has to keep to count as capacity."""
    target_tpot_ms: float = 100.0
    """The same for the time per output token; also the deadline policy's target."""
    seed: int = 0


def run_policies(artifact: Artifact, options: PoliciesOptions, progress: Progress = unheard) -> dict[str, Any]:
    """Throughput of each policy for each kind of load, and the highest rate that keeps the targets.

    static: so many running sequences that the pool never overflows, whatever they declared; greedy: as many as the artifact
    runs, and preemption where the pool overflows; linear and statistical: Algorithm 1; dynamic: statistical and the
    deadline (Algorithms 1 and 2 together). Capacity is searched in the simulator; at what was found the engine runs once.

    Raises:
        ConfigError: no cost table, or the pool cannot hold one request.
    """
    if artifact.cost_table() is None:
        raise ConfigError("the artifact has no cost table to simulate with; run multibatch calibrate on it first")
    configs = _configs(artifact, options)
    programs = warm_programs(artifact)
    cases = []
    for load in LOADS:
        trace = _trace(artifact, load, options)
        for policy, config in configs.items():
            progress(f"{load} load, {policy}")
            found = run_serve(artifact, trace, config, programs=programs, predict=True, seed=options.seed)
            predicted = found.pop("predicted")
            ratios = found.pop("predicted_over_measured")
            cases.append(
                {
                    "load": load,
                    "policy": policy,
                    "measured": found,
                    "predicted": predicted,
                    "predicted_over_measured": ratios,
                }
            )
    capacity = []
    for load in LOADS:
        for policy in ("static", "dynamic"):
            progress(f"{load} load, {policy}: capacity")
            capacity.append(_capacity(artifact, load, policy, configs[policy], options, programs))
    return {
        "model_id": artifact.manifest.model.id,
        "options": dataclasses.asdict(options),
        "static_max_num_seqs": configs["static"].max_num_seqs,
        "cases": cases,
        "capacity": capacity,
    }


def run_chunk_budget(
    artifact: Artifact,
    options: PoliciesOptions,
    target_ms: float,
    request_rate: float,
    progress: Progress = unheard,
) -> list[dict[str, Any]]:
    """Inter-token times with the whole prefill budget in each step, and with one refined to keep `target_ms`."""
    trace = make_trace(
        options.num_requests,
        request_rate=request_rate,
        input_len=options.input_len,
        output_len=options.output_len,
        lengths="uniform",
        seed=options.seed,
    )
    programs = warm_programs(artifact)
    rows = []
    for name, slo in {"fixed budget": -1.0, "refined budget": target_ms}.items():
        progress(name)
        config = EngineConfig(enable_prefix_caching=False, slo_limits_for_dynamic_batch=slo)
        rows.append({"policy": name, **run_serve(artifact, trace, config, programs=programs, seed=options.seed)})
    return rows


def _configs(artifact: Artifact, options: PoliciesOptions) -> dict[str, EngineConfig]:
    block_size = artifact.manifest.kv.block_size
    longest = max(
        min(r.input_length + options.longest_output, artifact.manifest.max_seq_len)
        for load in LOADS
        for r in _trace(artifact, load, options)
    )
    careful = options.num_kv_blocks // blocks_for(longest, block_size)
    if not careful:
        raise ConfigError(
            f"a pool of {options.num_kv_blocks} blocks cannot hold one request of {longest} tokens; give it more,"
            " or declare a shorter longest output"
        )
    common: dict[str, Any] = {"num_kv_blocks": options.num_kv_blocks, "enable_prefix_caching": False}
    return {
        "static": EngineConfig(**common, max_num_seqs=min(careful, artifact.manifest.max_num_seqs)),
        "greedy": EngineConfig(**common),
        "linear": EngineConfig(**common, dynamic_batching="linear"),
        "statistical": EngineConfig(**common, dynamic_batching="statistical"),
        "dynamic": EngineConfig(**common, dynamic_batching="statistical", target_inter_token_ms=options.target_tpot_ms),
    }


def _trace(artifact: Artifact, load: str, options: PoliciesOptions) -> list[TraceRequest]:
    room = artifact.manifest.max_seq_len - options.longest_output
    if room < 1:
        raise ConfigError(
            f"a longest output of {options.longest_output} tokens leaves no room for a prompt in sequences of"
            f" {artifact.manifest.max_seq_len}; declare a shorter one"
        )
    return make_trace(
        options.num_requests,
        request_rate=options.request_rate,
        input_len=options.input_len,
        output_len=options.output_len,
        longest_input=room,
        longest_output=options.longest_output,
        seed=options.seed,
        **LOADS[load],
    )


def _capacity(
    artifact: Artifact,
    load: str,
    policy: str,
    config: EngineConfig,
    options: PoliciesOptions,
    programs: LoadedPrograms,
) -> dict[str, Any]:
    """The highest rate whose 95th percentiles keep the targets: doubled until it does not, then bisected."""
    engine = ScriptedEngine(artifact, config, programs)

    def keeps(rate: float) -> bool:
        searched = dataclasses.replace(options, num_requests=options.capacity_requests, request_rate=rate)
        found = predict_serve(artifact, _trace(artifact, load, searched), config, engine=engine)
        return bool(found["p95_ttft_ms"] <= options.target_ttft_ms and found["p95_tpot_ms"] <= options.target_tpot_ms)

    low, high = 0.0, 1 / 64
    while keeps(high) and high < 2**20:
        low, high = high, high * 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    result: dict[str, Any] = {"load": load, "policy": policy, "requests_per_s": low}
    if low:
        trace = _trace(artifact, load, dataclasses.replace(options, request_rate=low))
        found = run_serve(artifact, trace, config, programs=programs, seed=options.seed)
        result["measured"] = {name: found[name] for name in ("p95_ttft_ms", "p95_tpot_ms", "output_throughput")}
    return result


def gains(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each policy gained over static batching, load by load: throughput and, for dynamic, capacity."""
    rows = []
    for load in LOADS:
        cases: Sequence[Mapping[str, Any]] = [case for case in result["cases"] if case["load"] == load]
        static = next(case for case in cases if case["policy"] == "static")
        capacity = {c["policy"]: c["requests_per_s"] for c in result["capacity"] if c["load"] == load}
        for case in cases:
            throughput = case["measured"]["output_throughput"] / static["measured"]["output_throughput"]
            row = {"load": load, "policy": case["policy"], "throughput_over_static": throughput}
            if case["policy"] == "dynamic" and capacity["static"]:
                row["capacity_over_static"] = capacity["dynamic"] / capacity["static"]
            rows.append(row)
    return rows
