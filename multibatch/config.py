"""How an engine is set up. The only file that reads the environment.

| variable | meaning |
|---|---|
| MULTIBATCH_CACHE | folder of artifacts compiled on first use by `LLM(model_dir)`, and of built operator libraries |
| MULTIBATCH_ISA | CPU features to use at most, separated by commas: a portable artifact then runs as on a lesser machine |
| MULTIBATCH_NUM_THREADS | threads of the operators where `EngineConfig.num_threads` is not given |
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from multibatch.errors import ConfigError


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
    kv_cache_memory_bytes: int | None = None
    """Bytes of the KV pool; None: room for max_num_seqs sequences of max_seq_len, within half the free memory."""
    num_kv_blocks: int | None = None
    """Blocks of the KV pool besides the scratch block; overrides kv_cache_memory_bytes."""
    selector_policy: str = "nearest"
    """Which decoder runs n live rows: nearest, pad_to_max or one_by_one."""
    num_threads: int | None = None
    """Threads of the operators, shared by the process; None: the cores this process may use."""
    seed: int = 0
    """Where requests without a seed get theirs from."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_seq_len", "kv_cache_memory_bytes", "num_kv_blocks", "num_threads"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}; allowed: an int >= 1, or None")
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
