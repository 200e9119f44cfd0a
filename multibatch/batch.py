"""Builds the padded inputs of one program call from plain integers.

Padded rows get token 0, position 0, length 1 and block 0; padded tokens of a prefill call belong to no row and write to
the scratch block. Nothing else of the pool is touched by either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from multibatch.kv.block_table import slot_of, slots_of
from multibatch.scheduled_step import PrefillChunk


@dataclass(frozen=True, slots=True)
class ProgramInputs:
    """What every program takes before the pools, in this order; shapes as in `flat_model.FlatDecoder.forward`."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    cu_seqlens: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    logits_to_keep: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        """In the order of the programs' inputs."""
        return [
            self.token_ids,
            self.positions,
            self.slot_mapping,
            self.cu_seqlens,
            self.block_tables,
            self.seq_lens,
            self.logits_to_keep,
        ]


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One live row of a decode call."""

    token_id: int
    position: int
    """Of `token_id` in its sequence; its key and value are written there."""
    block_ids: Sequence[int]


def decode_inputs(rows: Sequence[DecodeRow], batch_size: int, max_blocks: int, block_size: int) -> ProgramInputs:
    """T = R = batch_size; rows beyond the live ones are padding."""
    padding = batch_size - len(rows)
    tables = [_table(row.block_ids, row.position + 1, max_blocks, block_size) for row in rows]
    return ProgramInputs(
        torch.tensor([[row.token_id for row in rows] + [0] * padding]),
        torch.tensor([[row.position for row in rows] + [0] * padding]),
        torch.tensor([slot_of(row.block_ids, row.position, block_size) for row in rows] + [0] * padding),
        torch.arange(batch_size + 1, dtype=torch.int32),
        torch.tensor(tables + [[0] * max_blocks] * padding, dtype=torch.int32),
        torch.tensor([row.position + 1 for row in rows] + [1] * padding, dtype=torch.int32),
        torch.arange(batch_size),
    )


def prefill_inputs(
    chunks: Sequence[PrefillChunk], num_tokens: int, num_rows: int, max_blocks: int, block_size: int
) -> ProgramInputs:
    """T = num_tokens, R = num_rows; the chunks' tokens one after the other, then padding."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    for chunk in chunks:
        sequence = chunk.sequence
        tokens += sequence.token_ids[chunk.start : chunk.stop]
        positions += range(chunk.start, chunk.stop)
        slots += slots_of(sequence.block_ids, chunk.start, chunk.stop, block_size)
        starts.append(len(tokens))
    padding, empty = num_tokens - len(tokens), num_rows - len(chunks)
    tables = [_table(c.sequence.block_ids, c.stop, max_blocks, block_size) for c in chunks]
    return ProgramInputs(
        torch.tensor([tokens + [0] * padding]),
        torch.tensor([positions + [0] * padding]),
        torch.tensor(slots + [0] * padding),
        torch.tensor(starts + [starts[-1]] * empty, dtype=torch.int32),
        torch.tensor(tables + [[0] * max_blocks] * empty, dtype=torch.int32),
        torch.tensor([c.stop for c in chunks] + [1] * empty, dtype=torch.int32),
        torch.tensor([stop - 1 for stop in starts[1:]] + [0] * empty),
    )


def _table(block_ids: Sequence[int], length: int, max_blocks: int, block_size: int) -> list[int]:
    used = list(block_ids[: -(-length // block_size)])
    return used + [0] * (max_blocks - len(used))
