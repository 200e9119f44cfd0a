"""Random calls of `multibatch::paged_attention`, and what the reference says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from multibatch import reference
from multibatch.reference import AttentionOptions, StepInputs

Rows = Sequence[tuple[int, int]]
"""(New tokens, positions after the call) of each row."""
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
"""Largest difference of an output; values are standard normal. The kernels round weights to the values' dtype."""
SCALE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Heads, sizes and options of an attention layer."""

    kv_heads: int = 2
    group: int = 3
    dim: int = 24
    value_dim: int = 40
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    dtype: torch.dtype = torch.float32


class Case:
    """Some rows, then tokens that belong to nobody."""

    def __init__(self, shape: Shape, rows: Rows, num_padded: int, *, seed: int = 0, device: str = "cpu") -> None:
        """Draws what is random, the same on every device."""
        generator, size = torch.Generator().manual_seed(seed), shape.block_size
        self.shape = shape
        self.num_live = sum(count for count, _ in rows)
        tables, starts, slots, next_block = [], [0], [], 1
        for count, length in rows:
            blocks = list(range(next_block, next_block - (-length // size)))
            next_block += len(blocks)
            slots += [blocks[p // size] * size + p % size for p in range(length - count, length)] if count else []
            tables.append(blocks)
            starts.append(len(slots))
        slots += [0] * num_padded
        most = max(map(len, tables)) + 1
        tables = [blocks + [0] * (most - len(blocks)) for blocks in tables]
        self.starts, self.slots = starts, slots

        def random(*dims: int) -> torch.Tensor:
            return torch.randn(dims, generator=generator).to(device, shape.dtype)

        tokens, heads = len(slots), shape.kv_heads * shape.group
        # As projections leave them: [T, H, D] in memory.
        self.query = random(1, tokens, heads, shape.dim).transpose(1, 2)
        self.key = random(1, tokens, shape.kv_heads, shape.dim).transpose(1, 2)
        self.value = random(1, shape.kv_heads, tokens, shape.value_dim)
        self.keys = random(next_block, shape.kv_heads, shape.dim, size)
        self.values = random(next_block, shape.kv_heads, size, shape.value_dim)
        self.sinks = random(heads).float() if shape.sinks else None
        self.slot_mapping = torch.tensor(slots, device=device)
        self.cu_seqlens, self.block_tables, self.seq_lens = (
            torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, tables, [n for _, n in rows])
        )

    def arguments(self) -> list[object]:
        """What the operator takes, its pools copied."""
        tensors = [self.query, self.key, self.value, self.keys.clone(), self.values.clone(), self.slot_mapping]
        tensors += [self.cu_seqlens, self.block_tables, self.seq_lens]
        return [*tensors, self.sinks, SCALE, self.shape.window, self.shape.softcap]

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the reference makes of it: the output and both pools."""
        pools = [self.keys.clone()], [self.values.clone()]
        step = StepInputs(self.slot_mapping, self.cu_seqlens, self.block_tables, self.seq_lens, *pools)
        options = AttentionOptions(SCALE, self.shape.window, self.shape.softcap)
        out = reference.paged_attention(self.query, self.key, self.value, step, 0, options, self.sinks)
        return out, pools[0][0], pools[1][0]

    def error(self, out: torch.Tensor) -> float:
        """Largest difference from the reference; infinite where one of the two is not a number."""
        difference = (out.float() - self.expected()[0].float()).abs().max()
        return float(difference.nan_to_num(float("inf")))

    def problems(self, out: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> list[str]:
        """What is wrong with an output and the pools after the call."""
        expected, expected_keys, expected_values = self.expected()
        if out.shape != expected.shape or out.dtype != expected.dtype:
            return [f"{out.dtype}{tuple(out.shape)} instead of {expected.dtype}{tuple(expected.shape)}"]
        found = []
        if (error := self.error(out)) > TOLERANCE[self.shape.dtype]:
            found.append(f"off by {error:.3g}, allowed {TOLERANCE[self.shape.dtype]}")
        if bool(out[0, self.num_live :].any()):
            found.append("tokens of nobody are not zero")
        # Block 0 takes the tokens of nobody, in any order; the rest of the pool is written alike.
        if not (torch.equal(keys[1:], expected_keys[1:]) and torch.equal(values[1:], expected_values[1:])):
            found.append("the pool is not as it should be")
        return found
