"""Which blocks of a sequence are in the pool already: keys of full blocks, chained so that a key stands for a whole prefix.

The key of block i is SHA-256 over the key of block i - 1 and the block's own token ids, and the first one's over the
request's `cache_salt`. So equal keys mean equal tokens from position 0 on, which is all that keys and values depend on:
an artifact holds one model, and its programs give a position the same values whatever else is in the batch.

What one prompt of a step computes, the prompts behind it in the same step need not: a program writes the keys and values of
all its tokens before any of them attends. So n samples of one prompt compute it once.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass

from multibatch.kv.allocator import BlockAllocator
from multibatch.request import Sequence


@dataclass(slots=True)
class PrefixCacheStats:
    """How often the pool was asked for prompt tokens, and had them; vLLM's `prefix_cache_queries` and `_hits`."""

    queries: int = 0
    """Prompt tokens of requests that were admitted for the first time."""
    hits: int = 0
    """Those of them whose keys and values were there."""


class PrefixCache:
    """Looks sequences up in an allocator's remembered blocks, and has their own full blocks remembered."""

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        """Starts with nothing known; the blocks are of `block_size` tokens."""
        self._allocator = allocator
        self._block_size = block_size
        # Blocks that the step being planned will make full, by key.
        self._planned: dict[bytes, int] = {}
        self.stats = PrefixCacheStats()

    def begin_step(self) -> None:
        """A new step is planned: what the last one was to compute is remembered, or will not be there."""
        self._planned.clear()

    def plan(self, sequence: Sequence, start: int, stop: int) -> None:
        """Says that the step being planned computes the tokens `start` up to `stop`."""
        for index in range(start // self._block_size, stop // self._block_size):
            self._planned.setdefault(self._key(sequence, index), sequence.block_ids[index])

    def match(self, sequence: Sequence) -> list[int]:
        """The blocks that hold the sequence's first tokens when its own are computed, remembered or planned ones.

        None if its request asked not to read them.
        At least the newest token is left to compute, because its logits are wanted.
        """
        if sequence.request.params.skip_reading_prefix_cache:
            return []
        block_ids: list[int] = []
        for index in range((sequence.num_tokens - 1) // self._block_size):
            key = self._key(sequence, index)
            block_id = self._allocator.find(key)
            if block_id is None:
                block_id = self._planned.get(key)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def admitted(self, sequence: Sequence, num_cached_tokens: int) -> None:
        """Notes what a sequence found; later admissions after a preemption do not count."""
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(num_cached_tokens, sequence.num_prompt_tokens)
            self.stats.queries += sequence.num_prompt_tokens
            self.stats.hits += sequence.num_cached_tokens

    def remember(self, sequence: Sequence, start: int, stop: int) -> None:
        """Has the blocks remembered that the tokens `start` up to `stop`, computed just now, made full."""
        for index in range(start // self._block_size, stop // self._block_size):
            self._allocator.remember(sequence.block_ids[index], self._key(sequence, index))

    def _key(self, sequence: Sequence, index: int) -> bytes:
        keys = sequence.block_keys
        while len(keys) <= index:
            start = len(keys) * self._block_size
            tokens = array("q", sequence.token_ids[start : start + self._block_size])
            before = keys[-1] if keys else hashlib.sha256((sequence.request.cache_salt or "").encode()).digest()
            keys.append(hashlib.sha256(before + tokens.tobytes()).digest())
        return keys[index]
