"""Where a sequence's tokens lie in the pool: position -> block and offset, as plain integers.

A *slot* is `block_id * block_size + offset`: a token's place when the pool is seen as one row.
"""

from __future__ import annotations

from collections.abc import Sequence


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that `num_tokens` tokens take."""
    return -(-num_tokens // block_size)


def slot_of(block_ids: Sequence[int], position: int, block_size: int) -> int:
    """The slot of the token at `position`.

    Raises:
        IndexError: the position is negative, or behind the last block.
    """
    _check_range(block_ids, position, position + 1, block_size)
    return block_ids[position // block_size] * block_size + position % block_size


def slots_of(block_ids: Sequence[int], start: int, stop: int, block_size: int) -> list[int]:
    """The slots of the tokens at positions `start` up to `stop`.

    Raises:
        IndexError: a position is negative, or behind the last block.
    """
    if start >= stop:
        return []
    _check_range(block_ids, start, stop, block_size)
    slots: list[int] = []
    for index in range(start // block_size, blocks_for(stop, block_size)):
        first = max(start, index * block_size)
        last = min(stop, (index + 1) * block_size)
        shift = (block_ids[index] - index) * block_size
        slots.extend(range(first + shift, last + shift))
    return slots


def _check_range(block_ids: Sequence[int], start: int, stop: int, block_size: int) -> None:
    if start < 0 or stop > len(block_ids) * block_size:
        raise IndexError(
            f"positions {start} to {stop - 1} of a sequence that has {len(block_ids)} blocks "
            f"of {block_size}; allowed are 0 to {len(block_ids) * block_size - 1}"
        )
