"""Which blocks of the KV pool are lent, free, or free and still good for something. It knows ids, neither tensors nor sequences.

A block may have several holders, and may be *remembered* by a key that names what is in it. When the last holder frees
a remembered block it keeps its content until it is needed for something else, the one unused longest first: vLLM's
block-level prefix cache, where nothing is ever copied. What a key is made of is decided in `multibatch.kv.prefix`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from multibatch.errors import CapacityError, ConfigError

# padded rows read and write this block; no sequence ever owns it
SCRATCH_BLOCK = 0


class BlockOwnershipError(ValueError):
    """A block freed twice, never lent or out of range: a fault of multibatch, not of its user."""


class BlockAllocator:
    """Lends the blocks 1 .. num_blocks - 1 of a pool; block 0 is the scratch block.

    Blocks with nothing in them are lent first, the one freed last before the others; then the
    remembered ones, the one freed first before the others. Every order is that of lists: the same
    calls give the same ids. All calls take time in proportion to the blocks they name only.
    """

    def __init__(self, num_blocks: int) -> None:
        """Starts with every block but block 0 free.

        Args:
            num_blocks: blocks of the pool, the scratch block among them.

        Raises:
            ConfigError: fewer than 2 blocks.
        """
        if num_blocks < 2:
            raise ConfigError(
                f"a KV pool of {num_blocks} blocks; it needs at least 2, the scratch block and one to lend"
            )
        self._num_blocks = num_blocks
        # the end of the list is lent first, so a new pool lends 1, 2, 3, ...
        self._free = list(range(num_blocks - 1, SCRATCH_BLOCK, -1))
        self._num_holders = [0] * num_blocks
        # free, but remembered; the oldest first
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be lent now, those that are remembered among them."""
        return len(self._free) + len(self._idle)

    @property
    def num_total(self) -> int:
        """Blocks that can be lent at all: the pool without the scratch block."""
        return self._num_blocks - 1

    @property
    def num_remembered(self) -> int:
        """Blocks whose content has a key, lent or free."""
        return len(self._key_of)

    def allocate(self, num_blocks: int) -> list[int]:
        """Lends `num_blocks` blocks to one holder, all or none; what was remembered in them is forgotten.

        Raises:
            CapacityError: more than `num_free`; nothing was lent.
            ValueError: a negative number.
        """
        if num_blocks < 0:
            raise ValueError(f"{num_blocks} blocks asked for; the number has to be >= 0")
        if num_blocks > self.num_free:
            raise CapacityError(
                f"{num_blocks} KV blocks asked for, {self.num_free} of {self.num_total} are "
                "free; give the KV pool more memory, or run fewer or shorter requests"
            )
        block_ids = [self._free.pop() if self._free else self._evict() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._num_holders[block_id] = 1
        return block_ids

    def free(self, block_ids: Iterable[int]) -> None:
        """One holder gives lent blocks back, all or none.

        Of those without another holder the first is the next to be lent, and of remembered ones the last is forgotten
        before the first, because the first blocks of a sequence are what others are likeliest to begin with.

        Raises:
            BlockOwnershipError: one of them is not lent, or is named twice; nothing was taken.
        """
        returned = list(block_ids)
        seen: set[int] = set()
        for block_id in returned:
            reason = "it is free already" if block_id in seen else self._why_not_lent(block_id)
            if reason is not None:
                raise BlockOwnershipError(f"block {block_id} cannot be freed: {reason}")
            seen.add(block_id)
        for block_id in reversed(returned):
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id]:
                continue
            if block_id in self._key_of:
                self._idle[block_id] = None
            else:
                self._free.append(block_id)

    def remember(self, block_id: int, key: bytes) -> None:
        """Says what is in a lent block. Where another block is known by this key already, that one stays it.

        Raises:
            BlockOwnershipError: the block is not lent.
        """
        reason = self._why_not_lent(block_id)
        if reason is not None:
            raise BlockOwnershipError(f"block {block_id} cannot be remembered: {reason}")
        if key not in self._block_of and block_id not in self._key_of:
            self._key_of[block_id] = key
            self._block_of[key] = block_id

    def find(self, key: bytes) -> int | None:
        """The block that is remembered by this key, lent or free; None where there is none."""
        return self._block_of.get(key)

    def num_idle(self, block_ids: Sequence[int]) -> int:
        """How many of these remembered blocks have no holder, and count as free until they are shared."""
        return sum(block_id in self._idle for block_id in block_ids)

    def share(self, block_ids: Sequence[int]) -> None:
        """Lends blocks that are remembered or lent to one more holder each, with what is in them, all or none.

        Raises:
            BlockOwnershipError: one of them is neither; nothing was lent.
        """
        for block_id in block_ids:
            if block_id not in self._key_of and self._why_not_lent(block_id) is not None:
                raise BlockOwnershipError(f"block {block_id} cannot be shared: nobody knows what is in it")
        for block_id in block_ids:
            self._num_holders[block_id] += 1
            self._idle.pop(block_id, None)

    def forget(self) -> None:
        """Forgets what is in every block; lent ones stay lent."""
        self._free.extend(reversed(self._idle))
        self._idle.clear()
        self._key_of.clear()
        self._block_of.clear()

    def check_integrity(self, lent: Iterable[int] | None = None) -> None:
        """Checks that no block is lost, doubled or the scratch block, and that every key names one block.

        Args:
            lent: every block that somebody holds, once per holder; where given, free and lent
                blocks together have to be the whole pool.

        Raises:
            BlockOwnershipError: with the first block that is wrong.
        """
        seen = [0] * self._num_blocks
        for block_id in (*self._free, *self._idle):
            if not SCRATCH_BLOCK < block_id < self._num_blocks or self._num_holders[block_id]:
                raise BlockOwnershipError(f"block {block_id} is in the free list by mistake")
            if seen[block_id]:
                raise BlockOwnershipError(f"block {block_id} is in the free list twice")
            seen[block_id] = 1
        num_free = sum(not holders for holders in self._num_holders) - 1
        if self.num_free != num_free:
            raise BlockOwnershipError(f"{num_free} blocks are marked free, the free list has {self.num_free}")
        if {block: key for key, block in self._block_of.items()} != self._key_of:
            raise BlockOwnershipError("blocks and the keys they are remembered by do not name each other")
        for block_id in self._idle:
            if block_id not in self._key_of:
                raise BlockOwnershipError(f"block {block_id} is kept for its content, which has no key")
        if lent is not None:
            self._check_lent(lent, seen)

    def _check_lent(self, lent: Iterable[int], seen: list[int]) -> None:
        for block_id in lent:
            reason = self._why_not_lent(block_id)
            if reason is not None:
                raise BlockOwnershipError(f"block {block_id} is held by a sequence: {reason}")
            seen[block_id] += 1
        for block_id in range(SCRATCH_BLOCK + 1, self._num_blocks):
            expected = max(self._num_holders[block_id], 1)
            if seen[block_id] != expected:
                fault = "lost" if not seen[block_id] else f"held by {seen[block_id]}, and was lent to {expected}"
                raise BlockOwnershipError(f"block {block_id} is {fault}")

    def _evict(self) -> int:
        """The remembered block that was free longest, its content forgotten."""
        block_id, _ = self._idle.popitem(last=False)
        del self._block_of[self._key_of.pop(block_id)]
        return block_id

    def _why_not_lent(self, block_id: int) -> str | None:
        if block_id == SCRATCH_BLOCK:
            return "it is the scratch block"
        if not SCRATCH_BLOCK < block_id < self._num_blocks:
            return f"the pool has blocks 1 to {self.num_total}"
        return None if self._num_holders[block_id] else "it is free already"
