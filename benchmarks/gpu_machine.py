"""What the GPU checks need of a machine: captures, and times of work that runs beside the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from multibatch.backends.cudagraph import GraphDevice


@dataclass(frozen=True, slots=True)
class Machine:
    """A device and how to wait for it; tests give one that only pretends."""

    graphs: GraphDevice
    synchronize: Callable[[], None]
    total_memory: int
    """Bytes of the device."""
    free_at_start: int
    """Bytes that were free before this process put anything there."""
    clock: Callable[[], float] = time.perf_counter
    repeats: int = 7
    least_seconds: float = 0.05
    """Of one repeat."""

    @property
    def device(self) -> torch.device:
        """Where tensors go."""
        return self.graphs.device

    def seconds(self, call: Callable[[], object]) -> float:
        """Wall time of one call among many in a row, host and device together: the median of `repeats` tries."""
        num_calls, taken = 1, 0.0
        for _ in range(3):  # warm
            taken = self._taken(call, 1)
        num_calls = max(1, min(1000, round(self.least_seconds / max(taken, 1e-6))))
        return statistics.median(self._taken(call, num_calls) / num_calls for _ in range(self.repeats))

    def _taken(self, call: Callable[[], object], num_calls: int) -> float:
        self.synchronize()
        start = self.clock()
        for _ in range(num_calls):
            call()
        self.synchronize()
        return self.clock() - start


def copy_bandwidth(machine: Machine, num_bytes: int = 2**30) -> float:
    """GB/s (10^9) of a copy within the device's memory, read and written bytes counted."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    return 2 * num_bytes / machine.seconds(lambda: target.copy_(source)) / 1e9
