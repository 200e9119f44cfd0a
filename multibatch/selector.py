"""Which compiled decoders run n live rows: a table over all n, made once from the ladder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from multibatch.errors import CapacityError, ConfigError
from multibatch.ladder import DecoderLadder

SelectorPolicy = Literal["nearest", "pad_to_max", "one_by_one"]


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

    `nearest` takes the smallest decoder that fits. The other two are baselines to measure
    against: `pad_to_max` always takes the largest, `one_by_one` runs every row in a call of its
    own, which needs size 1 in the ladder.
    """

    def __init__(self, ladder: DecoderLadder, policy: SelectorPolicy = "nearest") -> None:
        """Works out the slots of every n from 1 to `ladder.max`.

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
