"""A device without CUDA: graphs that run their call again, and memory that is counted."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch


class PretendedGraph:
    def __init__(self, call: Callable[[], torch.Tensor], output: torch.Tensor) -> None:
        self._call, self._output = call, output

    def replay(self) -> None:
        """Like a CUDA graph, it reads the inputs' memory and writes the output's; it takes and returns nothing."""
        with torch.inference_mode():
            self._output.copy_(self._call())


class PretendedDevice:
    """Captures take `bytes_of(rows)` until their graph is gone and released; torch.OutOfMemoryError beyond `total`."""

    device = torch.device("cpu")

    def __init__(self, total: int = 10**9, bytes_of: Callable[[int], int] = lambda rows: 100 * rows) -> None:
        self.total, self._bytes_of = total, bytes_of
        self.captured_rows: list[int] = []
        self.pools: list[object] = []
        self.num_releases = 0
        self._taken: list[tuple[int, weakref.ref[PretendedGraph]]] = []

    def new_pool(self) -> Any:
        self.pools.append(object())
        return self.pools[-1]

    def capture(self, call: Callable[[], torch.Tensor], pool: Any) -> tuple[PretendedGraph, torch.Tensor]:
        assert pool is self.pools[-1]
        output = call()
        rows = output.shape[0]
        self.captured_rows.append(rows)
        if self.free_memory() < self._bytes_of(rows):
            raise torch.OutOfMemoryError(f"pretended: {rows} rows")
        graph = PretendedGraph(call, output)
        self._taken.append((self._bytes_of(rows), weakref.ref(graph)))
        return graph, output

    def free_memory(self) -> int:
        return self.total - sum(num_bytes for num_bytes, _ in self._taken)

    def release(self) -> None:
        self.num_releases += 1
        self._taken = [(num_bytes, graph) for num_bytes, graph in self._taken if graph() is not None]
