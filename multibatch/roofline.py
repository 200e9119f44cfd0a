"""What this machine can do at best: the limit that every figure stands beside."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from multibatch.manifest import Manifest

_MEGABYTES = 256
_MATRIX = 1024
_REPEATS = 7


def measure_bandwidth() -> float:
    """Read bandwidth in GB/s: the best of seven sums over more memory than any cache holds."""
    data = torch.ones(_MEGABYTES * 2**20 // 4)
    return data.numel() * 4 / _best_time(lambda: data.sum()) / 1e9


def measure_matmul(dtype: torch.dtype = torch.float32) -> float:
    """Rate of a square matrix product in GFLOP/s: the best of seven."""
    a, b = torch.ones((_MATRIX, _MATRIX), dtype=dtype), torch.ones((_MATRIX, _MATRIX), dtype=dtype)
    return 2 * _MATRIX**3 / _best_time(lambda: a @ b) / 1e9


def decode_bytes(manifest: Manifest, context_lens: list[int]) -> int:
    """Bytes that one decode step must read: every weight once, and the KV of each row.

    Args:
        manifest: of the artifact.
        context_lens: positions each row attends to.
    """
    kv = manifest.kv
    per_position = kv.bytes_per_block(manifest.model.dtype) / kv.block_size
    return manifest.model.weight_bytes + round(per_position * sum(context_lens))


def _best_time(call: Callable[[], torch.Tensor]) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
