"""Which blocks of the KV pool are free. It knows ids only, neither tensors nor sequences."""

from __future__ import annotations

from collections.abc import Iterable

from multibatch.errors import CapacityError, ConfigError

# padded rows read and write this block; no sequence ever owns it
SCRATCH_BLOCK = 0


class BlockOwnershipError(ValueError):
    """A block freed twice, never lent or out of range: a fault of multibatch, not of its user."""


class BlockAllocator:
    """Lends the blocks 1 .. num_blocks - 1 of a pool; block 0 is the scratch block.

    The block freed last is lent first, and every order is that of lists: the same calls give the
    same ids. Both calls take time in proportion to the blocks they name only.
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
        self._is_free = bytearray([0]) + bytearray([1]) * (num_blocks - 1)

    @property
    def num_free(self) -> int:
        """Blocks that can be lent now."""
        return len(self._free)

    @property
    def num_total(self) -> int:
        """Blocks that can be lent at all: the pool without the scratch block."""
        return self._num_blocks - 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Lends `num_blocks` blocks, all or none.

        Raises:
            CapacityError: more than `num_free`; nothing was lent.
            ValueError: a negative number.
        """
        if num_blocks < 0:
            raise ValueError(f"{num_blocks} blocks asked for; the number has to be >= 0")
        if num_blocks > len(self._free):
            raise CapacityError(
                f"{num_blocks} KV blocks asked for, {len(self._free)} of {self.num_total} are "
                "free; give the KV pool more memory, or run fewer or shorter requests"
            )
        block_ids = [self._free.pop() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._is_free[block_id] = 0
        return block_ids

    def free(self, block_ids: Iterable[int]) -> None:
        """Takes lent blocks back, all or none; the first of them is the next to be lent.

        Raises:
            BlockOwnershipError: one of them is not lent, or is named twice; nothing was taken.
        """
        returned = list(block_ids)
        for index, block_id in enumerate(returned):
            reason = self._why_not_lent(block_id)
            if reason is not None:
                for earlier in returned[:index]:
                    self._is_free[earlier] = 0
                raise BlockOwnershipError(f"block {block_id} cannot be freed: {reason}")
            self._is_free[block_id] = 1
        self._free.extend(reversed(returned))

    def check_integrity(self, lent: Iterable[int] | None = None) -> None:
        """Checks that no block is lost, doubled or the scratch block.

        Args:
            lent: every block that somebody holds; where given, free and lent blocks together
                have to be the whole pool.

        Raises:
            BlockOwnershipError: with the first block that is wrong.
        """
        seen = [0] * self._num_blocks
        for block_id in self._free:
            if not SCRATCH_BLOCK < block_id < self._num_blocks or not self._is_free[block_id]:
                raise BlockOwnershipError(f"block {block_id} is in the free list by mistake")
            if seen[block_id]:
                raise BlockOwnershipError(f"block {block_id} is in the free list twice")
            seen[block_id] = 1
        if len(self._free) != sum(self._is_free):
            raise BlockOwnershipError(
                f"{sum(self._is_free)} blocks are marked free, the free list has {len(self._free)}"
            )
        if lent is None:
            return
        for block_id in lent:
            reason = self._why_not_lent(block_id)
            if reason is not None:
                raise BlockOwnershipError(f"block {block_id} is held by a sequence: {reason}")
            seen[block_id] += 1
        for block_id in range(SCRATCH_BLOCK + 1, self._num_blocks):
            if seen[block_id] != 1:
                fault = "lost" if seen[block_id] == 0 else "held twice"
                raise BlockOwnershipError(f"block {block_id} is {fault}")

    def _why_not_lent(self, block_id: int) -> str | None:
        if block_id == SCRATCH_BLOCK:
            return "it is the scratch block"
        if not SCRATCH_BLOCK < block_id < self._num_blocks:
            return f"the pool has blocks 1 to {self.num_total}"
        return "it is free already" if self._is_free[block_id] else None
