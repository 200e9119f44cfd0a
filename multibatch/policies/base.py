"""What a policy is told, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The queues and the pool, just before a step is planned."""

    num_waiting: int
    num_running: int
    """Sequences that hold blocks, prefilling or decoding."""
    num_decoding: int
    """Those of them that a decode call would take."""
    num_held_blocks: int
    """Blocks of all running sequences added up, a shared one once for each: what they would take alone."""
    num_total_blocks: int
    """Blocks that can be lent."""
    declared_blocks: int
    """Blocks that the running and waiting sequences may grow to at most, by prompt and max_tokens, added up."""


class StepBudget(Protocol):
    """Caps how many prompt tokens ride along with the decode rows of a step."""

    def refine(self, budget: int, context_lens: Sequence[int]) -> int:
        """0 to `budget` prompt tokens, for a step whose decode rows attend to so many tokens each; all of it for none."""
        ...

    def step_done(self, context_lens: Sequence[int], num_prefill_tokens: int, ms: float) -> None:
        """Notes that a step with such decode rows and so many prompt tokens took `ms` wall milliseconds in all."""
        ...


class BatchLimit(Protocol):
    """Caps how many sequences run at once. It caps admission only: nobody who runs is stopped for it."""

    def limit(self, load: Load) -> int:
        """Sequences that may run after the next admissions; the scheduler takes the least of all policies."""
        ...

    def step_done(self, num_decoding: int, ms: float) -> None:
        """Notes that a step with `num_decoding` decode rows took `ms` wall milliseconds in all."""
        ...

    def sequence_done(self, num_blocks: int) -> None:
        """Notes that a sequence ended that took `num_blocks` blocks."""
        ...


@dataclass(frozen=True, slots=True)
class Policies:
    """What the scheduler asks; by default nothing."""

    limits: tuple[BatchLimit, ...] = ()
    """The least of their answers is what may run."""
    step_budget: StepBudget | None = None
