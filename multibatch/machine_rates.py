"""Measures what this machine can do at best."""

from __future__ import annotations

import time

import torch

from multibatch import ops
from multibatch.backends.base import DTYPES
from multibatch.manifest import Manifest
from multibatch.roofline import Roofline

_MEGABYTES = 256
_REPEATS = 7
_SECONDS = 0.05


def measure_roofline(manifest: Manifest) -> Roofline:
    """The best of seven tries each; takes about a second. The artifact's programs must be loaded."""
    gproducts = None
    if manifest.build.backend == "inductor":
        dtype, quantization = DTYPES[manifest.model.dtype], manifest.quantization
        weights = dtype if quantization is None else ops.QUANTIZED[quantization.scheme]
        gproducts = max(ops.peak_rate(weights, _SECONDS) for _ in range(_REPEATS)) / 1e9
    return Roofline(bandwidth_gbps=measure_bandwidth(), gproducts=gproducts)


def measure_bandwidth() -> float:
    """Read bandwidth in GB/s: the best of seven sums over more memory than any cache holds."""
    data = torch.ones(_MEGABYTES * 2**20 // 4)
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.numel() * 4 / best / 1e9
