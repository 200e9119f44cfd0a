"""What the engine did, step by step: which decoder ran, with how many live and padded rows, for how long."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One program call."""

    program: str
    num_live: int
    """Rows (decode) or tokens (prefill) that belong to a sequence."""
    num_padded: int
    """Rows or tokens that only fill the program."""
    ms: float
    """Wall time of the call."""


@dataclass(slots=True)
class ProgramUse:
    """All calls of one program together."""

    program: str
    num_calls: int = 0
    num_live: int = 0
    num_padded: int = 0
    ms: float = 0.0

    def add(self, record: CallRecord) -> None:
        """Counts one more call."""
        self.num_calls += 1
        self.num_live += record.num_live
        self.num_padded += record.num_padded
        self.ms += record.ms


def summarise(records: Iterable[CallRecord]) -> list[ProgramUse]:
    """One entry per program, in the order of first use."""
    totals: dict[str, ProgramUse] = {}
    for record in records:
        totals.setdefault(record.program, ProgramUse(record.program)).add(record)
    return list(totals.values())
