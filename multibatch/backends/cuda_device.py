"""CUDA itself, behind `cudagraph.GraphDevice`: the only file that captures with `torch.cuda`.

Its calls need a GPU; benchmarks/gpu_check.py and tests/gpu/ make them where there is one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

_WARM_UPS = 2
"""Calls before a capture: the first compiles kernels and allocates workspaces, which a capture must not do."""


class CudaDevice:
    """One GPU."""

    def __init__(self, index: int = 0) -> None:
        """Names the GPU; nothing is allocated there."""
        self.device = torch.device("cuda", index)

    def new_pool(self) -> Any:
        """A handle for memory that belongs to graphs alone."""
        return torch.cuda.graph_pool_handle()

    def capture(self, call: Callable[[], torch.Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """See `cudagraph.GraphDevice.capture`. Nothing else may use the device meanwhile."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    output = call()
            except RuntimeError as error:
                # Ending a capture that ran out of memory fails too, and with another error.
                if isinstance(error.__context__, torch.OutOfMemoryError):
                    raise error.__context__ from None
                raise
        return graph, output

    def free_memory(self) -> int:
        """Bytes that the driver has left, once all work is done."""
        torch.cuda.synchronize(self.device)
        free: int = torch.cuda.mem_get_info(self.device)[0]
        return free

    def release(self) -> None:
        """Gives back what PyTorch keeps for later."""
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
