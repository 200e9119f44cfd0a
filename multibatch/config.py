"""How an engine is set up. The only file that reads the environment.

| variable | meaning |
|---|---|
| MULTIBATCH_CACHE | folder of artifacts compiled on first use by `LLM(model_dir)`, and of built operator libraries |
| MULTIBATCH_ISA | CPU features to use at most, separated by commas: a portable artifact then runs as on a lesser machine |
| MULTIBATCH_NUM_THREADS | threads of the operators where `EngineConfig.num_threads` is not given |
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from multibatch.errors import ConfigError

DYNAMIC_BATCHING: Final = ("off", "linear", "statistical")
_WHOLE_NUMBERS: Final = (
    "max_num_seqs",
    "max_seq_len",
    "max_num_batched_tokens",
    "kv_cache_memory_bytes",
    "num_kv_blocks",
    "num_threads",
    "priority_patience",
    "batch_size_lower",
    "batch_size_upper",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of an engine.

    Raises:
        ConfigError: a value outside what is allowed.
    """

    max_num_seqs: int | None = None
    """Sequences running at once; None: what the artifact was compiled for."""
    max_seq_len: int | None = None
    """Longest sequence served; None: what the artifact was compiled for."""
    max_num_batched_tokens: int | None = None
    """Prompt tokens of one step, which all decode rows of that step wait for; None: what the artifact was compiled for,
    in `AsyncEngine` 512 of it at most."""
    kv_cache_memory_bytes: int | None = None
    """Bytes of the KV pool; None: room for max_num_seqs sequences of max_seq_len, within half the free memory."""
    num_kv_blocks: int | None = None
    """Blocks of the KV pool besides the scratch block; overrides kv_cache_memory_bytes."""
    selector_policy: str = "cheapest"
    """Which decoders run n live rows: cheapest, nearest, pad_to_max or one_by_one (see `multibatch.selector`)."""
    num_threads: int | None = None
    """Threads of the operators, shared by the process; None: the cores this process may use."""
    enable_prefix_caching: bool = True
    """Keeps full blocks of the KV pool until their room is needed, and begins a prompt behind those it shares."""
    scheduling_policy: str = "fcfs"
    """Order of the queue: fcfs, or priority (lower numbers first, and they pause others where there is no room)."""
    priority_patience: int | None = 1000
    """Steps that a request of the next priority lets others pass at most; None: any number, as in vLLM."""
    dynamic_batching: str = "off"
    """Caps admission by the memory of the pool: off, linear or statistical (see `multibatch.policies.memory_limit`)."""
    dynamic_batching_memory_factor: float = 0.95
    """linear: share of the pool to plan with."""
    dynamic_batching_epsilon: float = 0.05
    """statistical: allowed probability that all who run, fully grown, exceed the pool."""
    batch_size_lower: int = 1
    """No policy caps the running sequences below this."""
    batch_size_upper: int | None = None
    """What the policies start from and never exceed; None: max_num_seqs."""
    target_inter_token_ms: float | None = None
    """Caps admission so that the mean step takes this long (see `multibatch.policies.deadline_limit`); None: off."""
    slo_limits_for_dynamic_batch: float = -1
    """Above 0: milliseconds that a step with decode rows may take, kept by shortening prompts' chunks by the artifact's
    cost table (`multibatch calibrate`). 0 and -1: off; vllm-ascend's decode-first order, its 0, is ours at all times."""
    async_scheduling: bool | None = None
    """Runs the next step while the outputs of the one before are made and handed out; None: where the programs can."""
    seed: int = 0
    """Where requests without a seed get theirs from."""

    def __post_init__(self) -> None:
        for name in _WHOLE_NUMBERS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}; allowed: an int >= 1, or None")
        for name, allowed in {"scheduling_policy": ("fcfs", "priority"), "dynamic_batching": DYNAMIC_BATCHING}.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        slo = self.slo_limits_for_dynamic_batch
        if isinstance(slo, bool) or not isinstance(slo, int | float) or not (slo in (-1, 0) or 0 < slo < math.inf):
            raise ConfigError(f"slo_limits_for_dynamic_batch is {slo!r}; allowed: -1, 0, or milliseconds above 0")
        if not isinstance(self.enable_prefix_caching, bool):
            raise ConfigError(f"enable_prefix_caching is {self.enable_prefix_caching!r}; allowed: True or False")
        if self.async_scheduling is not None and not isinstance(self.async_scheduling, bool):
            raise ConfigError(f"async_scheduling is {self.async_scheduling!r}; allowed: True, False or None")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed is {self.seed!r}; allowed: an int")


def cache_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """Where artifacts and operator libraries are cached: MULTIBATCH_CACHE, else below the user's cache folder."""
    given = environment.get("MULTIBATCH_CACHE")
    if given:
        return Path(given)
    base = environment.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "multibatch"


def isa_from_environment(present: Iterable[str], environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The CPU features to use: those present, or those of them that MULTIBATCH_ISA lists.

    Raises:
        ConfigError: it lists one that is not present.
    """
    there, given = tuple(present), environment.get("MULTIBATCH_ISA")
    if not given:
        return there
    wanted = {feature.strip() for feature in given.split(",")}
    if unknown := sorted(wanted.difference(there)):
        raise ConfigError(f"MULTIBATCH_ISA lists {', '.join(unknown)}; allowed here: {', '.join(there)}")
    return tuple(feature for feature in there if feature in wanted)


def threads_from_environment(environment: Mapping[str, str] = os.environ) -> int | None:
    """MULTIBATCH_NUM_THREADS as an int >= 1; None where it is not set.

    Raises:
        ConfigError: it is set to something else.
    """
    given = environment.get("MULTIBATCH_NUM_THREADS")
    if not given:
        return None
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"MULTIBATCH_NUM_THREADS is {given!r}; allowed: an int >= 1")
    return int(given)
