"""What this machine can do at best: the limit that every figure stands beside."""

from __future__ import annotations

import time

import torch

from multibatch.manifest import Manifest

_MEGABYTES = 256
_REPEATS = 7


def measure_bandwidth() -> float:
    """Read bandwidth in GB/s: the best of seven sums over more memory than any cache holds."""
    data = torch.ones(_MEGABYTES * 2**20 // 4)
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.numel() * 4 / best / 1e9


def decode_bytes(manifest: Manifest, context_lens: list[int]) -> int:
    """Bytes that one decode step must read: every weight once, and the KV of each row.

    Args:
        manifest: of the artifact.
        context_lens: positions each row attends to.
    """
    kv = manifest.kv
    per_position = kv.bytes_per_block(manifest.model.dtype) / kv.block_size
    return manifest.model.weight_bytes + round(per_position * sum(context_lens))
