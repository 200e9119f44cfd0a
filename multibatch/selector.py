"""Which compiled decoders run n live rows: a table over all n, made once from the ladder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from multibatch.cost import CostModel
from multibatch.errors import CapacityError, ConfigError
from multibatch.ladder import DecoderLadder

SelectorPolicy = Literal["cheapest", "nearest", "pad_to_max", "one_by_one"]

MARGIN = 0.05
"""Several calls have to be cheaper by this share than the one of the smallest decoder that fits: what times drift by."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One decoder call: live rows `start` up to `stop` run in the decoder of `batch_size`."""

    batch_size: int
    start: int
    stop: int

    @property
    def num_live(self) -> int:
        """Rows of this call that belong to a sequence."""
        return self.stop - self.start

    @property
    def num_padded(self) -> int:
        """Rows of this call that only fill the decoder, on the scratch block."""
        return self.batch_size - self.num_live


class Selector:
    """Splits n live rows over the decoders of a ladder.

    `nearest` takes the smallest decoder that fits. `cheapest` too, unless two or more smaller ones
    were measured to take less time together, by MARGIN: 9 rows as 8 and 1 where size 16 costs twice
    size 8. To wait a step for a row about to join is no third way here, since the prompts that join
    are computed in the same step as the decode rows. The other two are baselines to measure against:
    `pad_to_max` always takes the largest, `one_by_one` runs every row in a call of its own, which
    needs size 1 in the ladder.
    """

    def __init__(
        self, ladder: DecoderLadder, policy: SelectorPolicy = "nearest", cost: CostModel | None = None
    ) -> None:
        """Works out the slots of every n from 1 to `ladder.max`.

        Args:
            ladder: the sizes there are.
            policy: see above.
            cost: for `cheapest`; a size that was never measured is only taken alone.

        Raises:
            ConfigError: an unknown policy, or `one_by_one` without size 1 in the ladder.
        """
        allowed = get_args(SelectorPolicy)
        if policy not in allowed:
            raise ConfigError(f"selector policy {policy!r}; choose one of {', '.join(allowed)}")
        if policy == "one_by_one" and 1 not in ladder.sizes:
            raise ConfigError(
                "selector policy 'one_by_one' needs a decoder of batch size 1; the ladder has "
                f"{', '.join(map(str, ladder.sizes))}: compile size 1 too, or choose 'nearest'"
            )
        self.ladder = ladder
        self.policy = policy
        if policy == "cheapest":
            self._table = tuple(_cheapest(ladder, cost or CostModel()))
        else:
            self._table = tuple(_slots(ladder, policy, n) for n in range(1, ladder.max + 1))

    def select(self, num_live: int) -> tuple[Slot, ...]:
        """The decoder calls for `num_live` rows: slots that cover 0..num_live once, in order.

        Raises:
            CapacityError: more rows than the ladder's largest size.
            ConfigError: fewer rows than 1.
        """
        if not 1 <= num_live <= len(self._table):
            self.ladder.smallest_fitting(num_live)  # raises, and says why
        return self._table[num_live - 1]


def select_chunk(num_tokens: int, sizes: Iterable[int]) -> int:
    """The smallest prefill program among `sizes` (in tokens) that holds `num_tokens`.

    Raises:
        CapacityError: none does, or there is none.
        ConfigError: fewer tokens than 1.
    """
    if num_tokens < 1:
        raise ConfigError(f"{num_tokens} prefill tokens; a prefill call has at least 1")
    compiled = sorted(sizes)
    for size in compiled:
        if size >= num_tokens:
            return size
    raise CapacityError(
        f"{num_tokens} prefill tokens in one call, compiled prefill sizes are "
        f"{', '.join(map(str, compiled)) or 'none'}; plan smaller chunks, or recompile with a "
        f"prefill size of at least {num_tokens}"
    )


def _slots(ladder: DecoderLadder, policy: SelectorPolicy, num_live: int) -> tuple[Slot, ...]:
    if policy == "one_by_one":
        return tuple(Slot(1, row, row + 1) for row in range(num_live))
    size = ladder.max if policy == "pad_to_max" else ladder.smallest_fitting(num_live)
    return (Slot(size, 0, num_live),)


def _cheapest(ladder: DecoderLadder, cost: CostModel) -> Iterator[tuple[Slot, ...]]:
    """The slots of 1, 2, 3, … rows, each built on the best of fewer rows."""
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]  # ms and sizes for n rows
    for n in range(1, ladder.max + 1):
        nearest = ladder.smallest_fitting(n)
        ms = cost.ms(nearest)
        found: tuple[float, tuple[int, ...]] = (math.inf if ms is None else ms, (nearest,))
        for size in ladder.sizes:
            part = cost.ms(size)
            if ms is None or part is None or size >= n:
                continue
            rest_ms, rest = best[n - size]
            if part + rest_ms < min(found[0], ms * (1 - MARGIN)):
                found = (part + rest_ms, tuple(sorted((size, *rest), reverse=True)))
        best.append(found)
        yield _filled(found[1], n)


def _filled(sizes: Iterable[int], num_live: int) -> tuple[Slot, ...]:
    """The largest decoders full, what is left in the smallest."""
    slots, start = [], 0
    for size in sizes:
        stop = min(start + size, num_live)
        slots.append(Slot(size, start, stop))
        start = stop
    return tuple(slots)
