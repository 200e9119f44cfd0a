"""CUDA itself: the only file of the runtime that asks `torch.cuda` anything.

What it gives is behind `cudagraph.GraphDevice` and `cuda_host.CudaFacts`, so that all else is tested without a GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from multibatch.backends.cudagraph import Outputs
from multibatch.cuda_host import CudaFacts, Gpu

_WARM_UPS = 2
"""Calls before a capture: the first compiles kernels and allocates workspaces, which a capture must not do."""


class CudaMark:
    """See `cudagraph.Mark`."""

    def __init__(self) -> None:
        """Is recorded now."""
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def wait(self) -> None:
        """Blocks this thread alone."""
        self._event.synchronize()

    def seconds_since(self, earlier: CudaMark) -> float:
        """By the device's clock."""
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return milliseconds / 1000


class CudaDevice:
    """One GPU."""

    def __init__(self, index: int = 0) -> None:
        """Names the GPU; nothing is allocated there."""
        self.device = torch.device("cuda", index)

    def new_pool(self) -> Any:
        """A handle for memory that belongs to graphs alone."""
        return torch.cuda.graph_pool_handle()

    def mark(self) -> CudaMark:
        """An event on the current stream."""
        return CudaMark()

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Into pinned memory: any other copy waits for the device."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    def capture(self, call: Callable[[], Outputs], pool: Any) -> tuple[torch.cuda.CUDAGraph, Outputs]:
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
                    outputs = call()
            except RuntimeError as error:
                # Ending a capture that ran out of memory fails too, and with another error.
                if isinstance(error.__context__, torch.OutOfMemoryError):
                    raise error.__context__ from None
                raise
        return graph, outputs

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


def read_cuda_facts() -> CudaFacts:
    """What this process has of CUDA; raises nothing where it has none."""
    has_cuda = torch.version.cuda is not None
    # As cudaDriverGetVersion gives it: 12080 for 12.8, 0 without a driver. A torch without CUDA has no such call.
    driver: int = torch._C._cuda_getDriverVersion() if has_cuda else 0  # type: ignore[attr-defined]
    gpus: tuple[Gpu, ...] = ()
    if has_cuda and torch.cuda.is_available():
        indices = range(torch.cuda.device_count())
        gpus = tuple(Gpu(torch.cuda.get_device_name(i), _dotted(torch.cuda.get_device_capability(i))) for i in indices)
    return CudaFacts(
        torch_version=torch.__version__,
        torch_cuda=torch.version.cuda,
        driver_cuda=_dotted((driver // 1000, driver % 1000 // 10)) if driver else None,
        gpus=gpus,
    )


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
