"""The ladder of compiled decode batch sizes, and how what a user typed becomes one.

It knows which sizes exist and which of them fit; what a size costs is in `cost`, what is done about
it in `selector`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from multibatch.errors import CapacityError, ConfigError

_FLAG = "--decoder-batch-sizes"


@dataclass(frozen=True, slots=True, init=False)
class DecoderLadder:
    """The compiled decode batch sizes, ascending, each once.

    Every number of live rows from 1 to `max` has a size that fits it.
    """

    sizes: tuple[int, ...]

    def __init__(self, sizes: Iterable[int]) -> None:
        """Takes the sizes in any order.

        Raises:
            ConfigError: no size at all, one that is not a whole number >= 1, or one listed twice.
        """
        checked = [_checked_size(size) for size in sizes]
        if not checked:
            raise ConfigError(f"no decode batch size given; name at least one, e.g. {_FLAG} 8,4,1")
        for size in checked:
            if checked.count(size) > 1:
                raise ConfigError(
                    f"decode batch size {size} is listed twice in {_comma_list(checked)}; list each size once"
                )
        object.__setattr__(self, "sizes", tuple(sorted(checked)))

    @property
    def max(self) -> int:
        """The largest compiled batch size: as many rows as one decode call can hold."""
        return self.sizes[-1]

    def smallest_fitting(self, num_live: int) -> int:
        """The smallest compiled size that holds `num_live` rows.

        Raises:
            CapacityError: more rows than the largest size.
            ConfigError: fewer rows than 1.
        """
        if num_live < 1:
            raise ConfigError(f"{num_live} live rows; a decode call has 1 to {self.max}")
        if num_live > self.max:
            longer = _comma_list([num_live, *reversed(self.sizes)])
            raise CapacityError(
                f"{num_live} live rows, largest compiled batch size is {self.max}; "
                f"recompile with {_FLAG} {longer}, or run at most {self.max} requests at once"
            )
        return self.sizes[bisect_left(self.sizes, num_live)]

    def with_size(self, size: int) -> DecoderLadder:
        """The ladder with one size more.

        Raises:
            ConfigError: the size is no batch size, or is in the ladder already.
        """
        if _checked_size(size) in self.sizes:
            raise ConfigError(
                f"decode batch size {size} is in the ladder {_comma_list(self.sizes)} already; nothing to add"
            )
        return DecoderLadder((*self.sizes, size))

    def without_size(self, size: int) -> DecoderLadder:
        """The ladder with one size less; `max_warning` says what losing the largest means.

        Raises:
            ConfigError: the size is not in the ladder, or is the only one.
        """
        if size not in self.sizes:
            raise ConfigError(
                f"decode batch size {size} is not in the ladder; it can lose one of {_comma_list(self.sizes)}"
            )
        if len(self.sizes) == 1:
            raise ConfigError(
                f"decode batch size {size} is the only one in the ladder and has to stay; add another size first"
            )
        return DecoderLadder(kept for kept in self.sizes if kept != size)

    def max_warning(self, after: DecoderLadder) -> str | None:
        """What to tell the user when `after`, with a smaller largest size, replaces this ladder."""
        if after.max >= self.max:
            return None
        return (
            f"the largest decode batch size falls from {self.max} to {after.max}: "
            f"at most {after.max} requests run at once (max_num_seqs)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedLadder:
    """What `resolve_ladder` made of the sizes a user asked for."""

    ladder: DecoderLadder
    max_num_seqs: int
    # sizes the user did not list; empty, or max_num_seqs alone
    added: tuple[int, ...] = ()

    @property
    def warning(self) -> str | None:
        """What to tell the user about `added`, or None where nothing was."""
        if not self.added:
            return None
        return (
            f"decode batch size {_comma_list(self.added)} was added: max_num_seqs is "
            f"{self.max_num_seqs}, and that many live rows need a decoder that holds them"
        )


def parse_batch_sizes(text: str) -> list[int]:
    """Reads the sizes of a command line, `"8,4,1"`, in the order given and with repetitions.

    Raises:
        ConfigError: an item is empty or not a whole number >= 1 in plain decimal digits.
    """
    return [_parsed_size(item.strip(), text) for item in text.split(",")]


def resolve_ladder(sizes: Iterable[object], max_num_seqs: int | None = None) -> ResolvedLadder:
    """Makes a ladder of the sizes a user listed, in any order, repetitions dropped.

    The largest size is always `max_num_seqs` (the largest listed where None): it is added where
    missing, and `ResolvedLadder.warning` says so. `sizes` itself is left as it was.

    Raises:
        ConfigError: nothing listed, an item that is not an int in 1..max_num_seqs (a bool is
            none), or a max_num_seqs that is not an int >= 1.
    """
    listed = sorted({_checked_size(size) for size in sizes})
    if not listed:
        raise ConfigError(f"no decode batch size given; name at least one, e.g. {_FLAG} 8,4,1")
    if max_num_seqs is None:
        max_num_seqs = listed[-1]
    elif not _is_int(max_num_seqs) or max_num_seqs < 1:
        raise ConfigError(f"max_num_seqs is {max_num_seqs!r}; it has to be a whole number >= 1")
    if listed[-1] > max_num_seqs:
        raise ConfigError(
            f"decode batch size {listed[-1]} is larger than max_num_seqs {max_num_seqs}; allowed "
            f"are 1 to {max_num_seqs}: drop the size, or set max_num_seqs to {listed[-1]}"
        )
    added = () if listed[-1] == max_num_seqs else (max_num_seqs,)
    ladder = DecoderLadder((*listed, *added))
    return ResolvedLadder(ladder=ladder, max_num_seqs=max_num_seqs, added=added)


def _parsed_size(item: str, text: str) -> int:
    # int() alone would also take "1_0", "+4" and digits of other scripts
    if not (item.isascii() and item.isdigit()) or len(item) > 9 or int(item) < 1:
        raise ConfigError(
            f"{item!r} in {text!r} is no decode batch size; "
            f"give whole numbers >= 1 with commas between, e.g. {_FLAG} 8,4,1"
        )
    return int(item)


def _checked_size(size: object) -> int:
    if isinstance(size, int) and _is_int(size) and size >= 1:
        return size
    raise ConfigError(f"{size!r} is no decode batch size; a size is a whole number >= 1, e.g. {_FLAG} 8,4,1")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _comma_list(sizes: Iterable[int]) -> str:
    return ",".join(str(size) for size in sizes)
