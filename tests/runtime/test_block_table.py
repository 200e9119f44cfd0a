"""A position's slot is its block's slots plus its offset, one by one or in a run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multibatch.kv.block_table import blocks_for, slot_of, slots_of


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_blocks_are_counted_up(num_tokens: int, blocks: int) -> None:
    assert blocks_for(num_tokens, 16) == blocks


def test_slots_follow_the_blocks() -> None:
    assert [slot_of([5, 2], position, 4) for position in range(8)] == [
        20, 21, 22, 23, 8, 9, 10, 11,
    ]  # fmt: skip
    assert slots_of([5, 2], 2, 6, 4) == [22, 23, 8, 9]


@given(data=st.data(), block_size=st.integers(1, 9))
def test_a_run_of_slots_is_its_slots_one_by_one(data: st.DataObject, block_size: int) -> None:
    block_ids = data.draw(st.lists(st.integers(1, 30), max_size=6, unique=True))
    num_positions = len(block_ids) * block_size
    start = data.draw(st.integers(0, num_positions))
    stop = data.draw(st.integers(0, num_positions))
    slots = slots_of(block_ids, start, stop, block_size)
    assert slots == [slot_of(block_ids, p, block_size) for p in range(start, stop)]
    assert len(set(slots)) == len(slots)
    assert all(slot // block_size in block_ids for slot in slots)


@pytest.mark.parametrize("position", [-1, 8])
def test_a_position_without_a_block_is_refused(position: int) -> None:
    with pytest.raises(IndexError, match="2 blocks of 4; allowed are 0 to 7"):
        slot_of([5, 2], position, 4)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (6, 9), (0, 9)])
def test_a_run_beyond_the_blocks_is_refused(start: int, stop: int) -> None:
    with pytest.raises(IndexError):
        slots_of([5, 2], start, stop, 4)
