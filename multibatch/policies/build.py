"""From an engine's options to the policies that its scheduler asks."""

from __future__ import annotations

from multibatch.config import EngineConfig
from multibatch.cost_table import CostTable
from multibatch.errors import ConfigError
from multibatch.policies.base import BatchLimit, Policies, StepBudget
from multibatch.policies.chunk_budget import ChunkBudget
from multibatch.policies.deadline_limit import DeadlineLimit
from multibatch.policies.memory_limit import LinearMemoryLimit, StatisticalMemoryLimit


def build_policies(config: EngineConfig, max_num_seqs: int, cost_table: CostTable | None) -> Policies:
    """The policies that `config` switches on.

    Args:
        config: the engine's options.
        max_num_seqs: of the engine, already resolved.
        cost_table: of the artifact, if it has one.

    Raises:
        ConfigError: options that contradict each other, or ask for a cost table that is not there.
    """
    lower, upper = config.batch_size_lower, config.batch_size_upper or max_num_seqs
    if not lower <= upper <= max_num_seqs:
        raise ConfigError(
            f"batch_size_lower is {lower} and batch_size_upper {upper}; allowed: lower <= upper <= max_num_seqs,"
            f" which is {max_num_seqs}"
        )
    limits: list[BatchLimit] = []
    if config.dynamic_batching == "linear":
        factor = config.dynamic_batching_memory_factor
        limits.append(LinearMemoryLimit(lower=lower, upper=upper, memory_factor=factor))
    elif config.dynamic_batching == "statistical":
        epsilon = config.dynamic_batching_epsilon
        limits.append(StatisticalMemoryLimit(lower=lower, upper=upper, epsilon=epsilon))
    if config.target_inter_token_ms is not None:
        limits.append(DeadlineLimit(target_ms=config.target_inter_token_ms, lower=lower, upper=upper))
    return Policies(tuple(limits), _step_budget(config, cost_table))


def _step_budget(config: EngineConfig, cost_table: CostTable | None) -> StepBudget | None:
    target = config.slo_limits_for_dynamic_batch
    if target <= 0:
        return None
    if cost_table is None:
        raise ConfigError(
            f"slo_limits_for_dynamic_batch is {target}, and the artifact has no cost table; measure one with"
            " multibatch calibrate ARTIFACT, or import one with --from"
        )
    return ChunkBudget(cost_table, target)
