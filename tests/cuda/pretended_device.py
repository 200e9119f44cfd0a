"""A device without CUDA: graphs that run their call again, and memory that is counted."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from multibatch.backends.cudagraph import Outputs


class PretendedGraph:
    def __init__(self, call: Callable[[], Outputs], outputs: Outputs) -> None:
        self._call, self._outputs = call, outputs

    def replay(self) -> None:
        """Like a CUDA graph, it reads the inputs' memory and writes the outputs'; it takes and returns nothing."""
        with torch.inference_mode():
            for held, made in zip(self._outputs, self._call(), strict=True):
                held.copy_(made)


class PretendedMark:
    def __init__(self, number: int, copies: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._number, self._copies = number, copies
        self.is_done = False

    def wait(self) -> None:
        """Only now do the copies arrive that were queued before."""
        self.is_done = True
        for host, found in self._copies:
            host.copy_(found)

    def seconds_since(self, earlier: PretendedMark) -> float:
        assert self.is_done
        return float(self._number - earlier._number)


class PretendedDevice:
    """Captures take `bytes_of(rows)` until their graph is gone and released; torch.OutOfMemoryError beyond `total`."""

    device = torch.device("cpu")

    def __init__(self, total: int = 10**9, bytes_of: Callable[[int], int] = lambda rows: 100 * rows) -> None:
        self.total, self._bytes_of = total, bytes_of
        self.captured_rows: list[int] = []
        self.pools: list[object] = []
        self.num_releases = 0
        self._num_marks = 0
        self._copies: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=4)
        self._taken: list[tuple[int, weakref.ref[PretendedGraph]]] = []

    def new_pool(self) -> Any:
        self.pools.append(object())
        return self.pools[-1]

    def mark(self) -> PretendedMark:
        self._num_marks += 1
        return PretendedMark(self._num_marks, list(self._copies))

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.full_like(tensor, -(10**6))
        self._copies.append((host, tensor.clone()))
        return host

    def capture(self, call: Callable[[], Outputs], pool: Any) -> tuple[PretendedGraph, Outputs]:
        assert pool is self.pools[-1]
        outputs = call()
        rows = outputs[0].shape[0]
        self.captured_rows.append(rows)
        if self.free_memory() < self._bytes_of(rows):
            raise torch.OutOfMemoryError(f"pretended: {rows} rows")
        graph = PretendedGraph(call, outputs)
        self._taken.append((self._bytes_of(rows), weakref.ref(graph)))
        return graph, outputs

    def free_memory(self) -> int:
        return self.total - sum(num_bytes for num_bytes, _ in self._taken)

    def release(self) -> None:
        self.num_releases += 1
        self._taken = [(num_bytes, graph) for num_bytes, graph in self._taken if graph() is not None]
