"""Who waits and who runs, each in the order in which they are served.

The order is fixed when a request comes. First come, first served: by arrival. By priority: the lower number first, as in
vLLM; with a patience, a request counts as having come `priority * patience` steps later than it did, so that one of a
later priority is passed by those of an earlier one for so many steps per level and no longer. That is earliest deadline
first (Liu and Layland 1973) over deadlines that never change: only finitely many requests can ever go before another.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as AnySequence
from typing import Literal

from multibatch.request import Sequence, SequenceStatus

QueuePolicy = Literal["fcfs", "priority"]


class Queues:
    """Two lists and a table of names. Blocks are taken and given back elsewhere."""

    def __init__(self, policy: QueuePolicy, priority_patience: int | None) -> None:
        """Starts empty.

        Args:
            policy: see above.
            priority_patience: steps that a level of priority is worth; None: any number of them.
        """
        self._policy = policy
        self._patience = priority_patience
        self._num_added = 0
        self._by_id: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []

    @property
    def waiting(self) -> AnySequence[Sequence]:
        """Sequences without blocks, the next to be admitted first."""
        return self._waiting

    @property
    def running(self) -> AnySequence[Sequence]:
        """Sequences that hold blocks, the first to be paused last."""
        return self._running

    def get(self, request_id: str) -> Sequence | None:
        """The sequence of this id that waits or runs."""
        return self._by_id.get(request_id)

    def add(self, sequence: Sequence, num_steps: int) -> None:
        """Takes in a new sequence that came before step `num_steps`."""
        priority = sequence.request.priority if self._policy == "priority" else 0
        rank = priority if self._patience is None else num_steps + priority * self._patience
        sequence.order = (rank if self._policy == "priority" else 0, self._num_added)
        self._num_added += 1
        self._by_id[sequence.request_id] = sequence
        insort(self._waiting, sequence, key=_order)

    def admit(self, sequence: Sequence) -> None:
        """From the head of the waiting ones to the running ones."""
        self._waiting.remove(sequence)
        sequence.status = SequenceStatus.RUNNING
        insort(self._running, sequence, key=_order)

    def pause(self, sequence: Sequence) -> None:
        """From the running ones back to its place among the waiting ones."""
        self._running.remove(sequence)
        sequence.status = SequenceStatus.WAITING
        insort(self._waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Out of either."""
        (self._running if sequence.status is SequenceStatus.RUNNING else self._waiting).remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        del self._by_id[sequence.request_id]


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
