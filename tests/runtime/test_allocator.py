"""The allocator never loses a block, never lends one twice and never lends block 0."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from multibatch.errors import CapacityError, ConfigError
from multibatch.kv.allocator import SCRATCH_BLOCK, BlockAllocator, BlockOwnershipError


class AllocatorMachine(RuleBasedStateMachine):
    """Random borrowing and returning, right and wrong, against two plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(2)
        self.num_blocks = 2
        self.holders: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # what was last remembered in a block

    @initialize(num_blocks=st.integers(2, 20))
    def make(self, num_blocks: int) -> None:
        self.allocator = BlockAllocator(num_blocks)
        self.num_blocks = num_blocks

    @property
    def lent(self) -> list[int]:
        return [block for holder in self.holders for block in holder]

    @rule(n=st.integers(0, 8))
    def allocate(self, n: int) -> None:
        num_free = self.allocator.num_free
        if n > num_free:
            with pytest.raises(CapacityError):
                self.allocator.allocate(n)
            assert self.allocator.num_free == num_free
            return
        empty = self.num_blocks - 1 - len({*self.lent, *self.content})
        block_ids = self.allocator.allocate(n)
        assert len(block_ids) == n
        assert not set(block_ids) & set(self.lent)
        for block in block_ids:
            self.content.pop(block, None)
        if n <= empty:
            assert all(self.allocator.find(key) == block for block, key in self.content.items())
        self.holders.append(block_ids)

    @precondition(lambda self: self.lent)
    @rule(data=st.data(), key=st.binary(min_size=1, max_size=1))
    def remember(self, data: st.DataObject, key: bytes) -> None:
        block = data.draw(st.sampled_from(self.lent))
        self.allocator.remember(block, key)
        if key not in self.content.values():
            self.content.setdefault(block, key)

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.content)), unique=True))
        num_free, num_idle = self.allocator.num_free, self.allocator.num_idle(blocks)
        self.allocator.share(blocks)
        assert self.allocator.num_free == num_free - num_idle
        self.holders.append(blocks)

    @rule()
    def forget(self) -> None:
        self.allocator.forget()
        self.content.clear()

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.allocator.free(holder)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free_with_a_wrong_id(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        free = [block for block in range(1, self.num_blocks) if block not in self.lent]
        wrong = data.draw(st.sampled_from([SCRATCH_BLOCK, -1, self.num_blocks, *free, *holder[:1]]))
        at = len(holder) if wrong in holder else data.draw(st.integers(0, len(holder)))
        num_free = self.allocator.num_free
        with pytest.raises(BlockOwnershipError, match=f"block {wrong} "):
            self.allocator.free([*holder[:at], wrong, *holder[at:]])
        assert self.allocator.num_free == num_free

    @invariant()
    def nothing_is_lost_doubled_or_scratch(self) -> None:
        lent = self.lent
        assert all(0 < block < self.num_blocks for block in lent)
        assert self.allocator.num_free + len(set(lent)) == self.allocator.num_total
        assert self.allocator.num_remembered == len(self.content)
        assert all(self.allocator.find(key) == block for block, key in self.content.items())
        assert self.allocator.num_total == self.num_blocks - 1
        self.allocator.check_integrity(lent)


TestAllocatorMachine = AllocatorMachine.TestCase


def test_a_new_pool_lends_from_one_upwards() -> None:
    allocator = BlockAllocator(5)
    assert allocator.allocate(4) == [1, 2, 3, 4]
    assert allocator.num_free == 0


def test_the_blocks_freed_last_are_lent_first_in_their_order() -> None:
    allocator = BlockAllocator(8)
    held = allocator.allocate(4)
    allocator.free(held[1:3])
    assert allocator.allocate(3) == [2, 3, 5]


def test_too_little_left_says_how_much_there_is() -> None:
    allocator = BlockAllocator(4)
    allocator.allocate(1)
    with pytest.raises(CapacityError, match="3 KV blocks asked for, 2 of 3 are free"):
        allocator.allocate(3)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 blocks"):
        BlockAllocator(4).allocate(-1)


@pytest.mark.parametrize("num_blocks", [1, 0, -3])
def test_a_pool_without_a_block_to_lend_is_refused(num_blocks: int) -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        BlockAllocator(num_blocks)


def test_a_double_free_is_an_error_with_the_block_in_it() -> None:
    allocator = BlockAllocator(4)
    held = allocator.allocate(2)
    allocator.free(held)
    with pytest.raises(BlockOwnershipError, match="block 1 cannot be freed: it is free already"):
        allocator.free(held)


def test_integrity_finds_lost_doubled_and_foreign_blocks() -> None:
    allocator = BlockAllocator(4)
    first, second = allocator.allocate(2)
    allocator.check_integrity()
    allocator.check_integrity([second, first])
    for lent, words in [
        ([first], f"block {second} is lost"),
        ([first, second, first], f"block {first} is held by 2, and was lent to 1"),
        ([first, second, 3], "block 3 is held by a sequence: it is free already"),
        ([first, second, 0], "block 0 is held by a sequence: it is the scratch block"),
        ([first, second, 4], "block 4 is held by a sequence: the pool has blocks 1 to 3"),
    ]:
        with pytest.raises(BlockOwnershipError, match=words):
            allocator.check_integrity(lent)


@pytest.mark.parametrize("free", [[3, 3], [3, 0], [3, 4], [3], [3, 2, 1]])
def test_integrity_finds_a_broken_free_list(free: list[int]) -> None:
    allocator = BlockAllocator(4)
    allocator.allocate(1)
    allocator._free[:] = free
    with pytest.raises(BlockOwnershipError):
        allocator.check_integrity()


def test_a_remembered_block_is_found_shared_and_evicted_last() -> None:
    allocator = BlockAllocator(5)
    held = allocator.allocate(3)
    for block, key in zip(held, (b"a", b"ab", b"abc"), strict=True):
        allocator.remember(block, key)
    allocator.free(held)
    assert allocator.num_free == 4
    assert [allocator.find(key) for key in (b"a", b"ab", b"abc", b"x")] == [*held, None]
    assert allocator.num_idle(held) == 3
    allocator.share(held[:1])
    assert allocator.num_free == 3
    # the empty one first, then the end of the prefix, which is worth least
    assert allocator.allocate(2) == [4, held[2]]
    assert allocator.find(b"abc") is None
    assert allocator.find(b"ab") == held[1]
    allocator.check_integrity([held[0], 4, held[2]])


def test_content_known_already_is_not_remembered_twice() -> None:
    allocator = BlockAllocator(4)
    first, second = allocator.allocate(2)
    allocator.remember(first, b"same")
    allocator.remember(second, b"same")
    assert allocator.find(b"same") == first
    assert allocator.num_remembered == 1


def test_only_lent_blocks_are_remembered_and_only_lent_or_remembered_ones_shared() -> None:
    allocator = BlockAllocator(4)
    (held,) = allocator.allocate(1)
    with pytest.raises(BlockOwnershipError, match="block 2 cannot be remembered: it is free already"):
        allocator.remember(2, b"k")
    with pytest.raises(BlockOwnershipError, match="block 2 cannot be shared: nobody knows what is in it"):
        allocator.share([held, 2])


def test_a_block_of_two_holders_is_free_after_both() -> None:
    allocator = BlockAllocator(3)
    (block,) = allocator.allocate(1)
    allocator.remember(block, b"k")
    allocator.share([block])
    allocator.check_integrity([block, block])
    with pytest.raises(BlockOwnershipError, match="block 1 is held by 1, and was lent to 2"):
        allocator.check_integrity([block])
    allocator.free([block])
    assert allocator.num_free == 1
    allocator.free([block])
    assert allocator.num_free == 2
