"""The tensors in which every decoder of an artifact keeps keys and values: blocks, no batch dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from multibatch.manifest import KVLayout


@dataclass(frozen=True, slots=True)
class KVPool:
    """One pair of tensors per layer. Block 0 is the scratch block that padded rows write to."""

    keys: list[torch.Tensor]
    """Per layer [num_blocks, H_kv, D, block_size]: positions innermost, so that 16 of them are one vector."""
    values: list[torch.Tensor]
    """Per layer [num_blocks, H_kv, block_size, D_v]."""

    @classmethod
    def allocate(cls, layout: KVLayout, num_blocks: int, dtype: torch.dtype, device: str = "cpu") -> KVPool:
        """Zeroed tensors for `num_blocks` blocks, the scratch block included."""
        size = layout.block_size
        keys = [(num_blocks, x.num_kv_heads, x.head_dim, size) for x in layout.layers]
        values = [(num_blocks, x.num_kv_heads, size, x.value_dim) for x in layout.layers]
        return cls(
            [torch.zeros(shape, dtype=dtype, device=device) for shape in keys],
            [torch.zeros(shape, dtype=dtype, device=device) for shape in values],
        )

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool, the scratch block included."""
        return self.keys[0].shape[0]
