"""How many blocks of the KV pool fit on a GPU, from memory that was measured after everything else was there."""

from __future__ import annotations

from dataclasses import dataclass

from multibatch.errors import CapacityError, ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes of one GPU, as its driver gives them."""

    total: int
    free_at_start: int
    """Before this process put anything there; the rest belongs to others."""
    free_now: int
    """With weights, programs, graphs and what the largest call needs in place, and no pool. What others took since the
    start counts as this process's: it cannot be told apart, and cannot be planned with."""


def blocks_in_memory(
    memory: DeviceMemory,
    *,
    gpu_memory_utilization: float,
    bytes_per_block: int,
    blocks_per_sequence: int,
) -> int:
    """Blocks besides the scratch block that fit into this process's share of the GPU.

    `gpu_memory_utilization` is vLLM's: the share of the GPU's whole memory that this process may take, weights, graphs and
    pool together. What others hold does not count against it, but has to leave that much free.

    Args:
        memory: measured.
        gpu_memory_utilization: above 0, at most 1.
        bytes_per_block: keys and values of all layers.
        blocks_per_sequence: of the longest sequence; the pool has to hold one.

    Raises:
        ConfigError: a gpu_memory_utilization outside what is allowed.
        CapacityError: the share is not free, or too small for what is there already and one sequence.
    """
    share = gpu_memory_utilization
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ConfigError(f"gpu_memory_utilization is {share!r}; allowed: a number above 0 and at most 1")
    allowed = int(memory.total * share)
    if memory.free_at_start < allowed:
        others = memory.total - memory.free_at_start
        raise CapacityError(
            f"gpu_memory_utilization {share} asks for {_gib(allowed)} of the GPU's {_gib(memory.total)}, but others hold"
            f" {_gib(others)}: end them, or set it to at most {_rounded_down(memory.free_at_start / memory.total)}"
        )
    taken = memory.free_at_start - memory.free_now
    left = allowed - taken
    needed = (blocks_per_sequence + 1) * bytes_per_block
    if left < needed:
        raise CapacityError(
            f"the KV pool gets {_gib(max(left, 0))}: gpu_memory_utilization {share} allows {_gib(allowed)}, and weights,"
            f" programs and graphs take {_gib(taken)}; one sequence needs {_gib(needed)}. Raise gpu_memory_utilization,"
            " or set a smaller max_seq_len, capture fewer sizes, or use a GPU with more memory"
        )
    return left // bytes_per_block - 1


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _rounded_down(share: float) -> float:
    return int(share * 100) / 100
