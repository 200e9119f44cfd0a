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


@dataclass(frozen=True, slots=True)
class ProgramUse:
    """All calls of one program together."""

    program: str
    num_calls: int
    num_live: int
    num_padded: int
    ms: float


def summarise(records: Iterable[CallRecord]) -> list[ProgramUse]:
    """One entry per program, in the order of first use."""
    totals: dict[str, ProgramUse] = {}
    for r in records:
        t = totals.get(r.program, ProgramUse(r.program, 0, 0, 0, 0.0))
        totals[r.program] = ProgramUse(
            r.program, t.num_calls + 1, t.num_live + r.num_live, t.num_padded + r.num_padded, t.ms + r.ms
        )
    return list(totals.values())
