"""What a decode step of each batch size was measured to cost; nothing is decided here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from multibatch.errors import ConfigError


@dataclass(frozen=True, slots=True)
class CostModel:
    """Measured milliseconds per decode step, by batch size. Sizes never measured are absent."""

    # (batch_size, ms) pairs, ascending by size; made by from_mapping
    steps: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        """Checks the pairs.

        Raises:
            ConfigError: sizes not ascending ints >= 1, or a time that is not finite and > 0.
        """
        previous = 0
        for batch_size, ms in self.steps:
            if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
                raise ConfigError(f"batch size {batch_size!r} has a cost; sizes are ints >= 1")
            if batch_size <= previous:
                raise ConfigError(
                    f"the cost of batch size {batch_size} comes after that of {previous}; sizes ascend and come once"
                )
            if not (math.isfinite(ms) and ms > 0):
                raise ConfigError(
                    f"a step of batch size {batch_size} is said to take {ms} ms; "
                    "it has to be a finite number > 0: measure again"
                )
            previous = batch_size

    @classmethod
    def from_mapping(cls, ms_by_size: Mapping[int, float]) -> CostModel:
        """Takes `{batch_size: ms}` in any order.

        Raises:
            ConfigError: as for the class.
        """
        return cls(tuple(sorted(ms_by_size.items())))

    def ms(self, batch_size: int) -> float | None:
        """Measured milliseconds of one step at this batch size, or None where not measured."""
        for size, ms in self.steps:
            if size == batch_size:
                return ms
        return None

    def tokens_per_second_at_full(self, batch_size: int) -> float | None:
        """Tokens per second with every row of this batch size live, or None where not measured."""
        ms = self.ms(batch_size)
        return None if ms is None else batch_size * 1000.0 / ms
