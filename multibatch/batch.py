"""Builds the padded inputs of one program call from plain integers.

Padded rows get token 0, position 0, length 1 and block 0; padded tokens of a prefill call belong to no row and write to
the scratch block. Nothing else of the pool is touched by either.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from multibatch import request
from multibatch.kv.allocator import SCRATCH_BLOCK
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


def decode_row(sequence: request.Sequence, ahead: int = 0) -> DecodeRow:
    """The newest token that a planned step computes of a sequence, or one so many tokens on; 0 stands for an id not known yet."""
    position = sequence.num_computed_tokens - 1 + ahead
    return DecodeRow(_token(sequence, position), position, sequence.block_ids)


def _token(sequence: request.Sequence, position: int) -> int:
    return sequence.token_ids[position] if position < sequence.num_tokens else 0


_PADDED_ROW = DecodeRow(0, 0, (SCRATCH_BLOCK,))


class InputBuffers:
    """Tensors of earlier calls, written anew for a call of the same shape: making them costs more than filling them.

    What a call was given is gone with the next one's.
    """

    def __init__(self, max_shapes: int = 64) -> None:
        """Keeps the tensors of up to `max_shapes` shapes."""
        self._max_shapes = max_shapes
        self._kept: dict[tuple[int, int, int], tuple[array[int], array[int], ProgramInputs]] = {}
        # The rows of the latest decode call, and how often each had lost its blocks by then.
        self._rows: tuple[request.Sequence, ...] = ()
        self._preemptions: list[int] = []
        self._latest: tuple[array[int], array[int], ProgramInputs] | None = None

    def _written(self, flat: _Flattened, keep: list[int]) -> ProgramInputs:
        """As `_inputs`."""
        shape = (len(flat.tokens), len(flat.lengths), len(keep))
        longs, ints = _joined(flat, keep)
        if shape not in self._kept:
            if len(self._kept) == self._max_shapes:
                self._kept.clear()
            self._kept[shape] = (longs, ints, _tensors(longs, ints, *shape))
        self._latest = self._kept[shape]
        kept_longs, kept_ints, inputs = self._latest
        kept_longs[:], kept_ints[:] = longs, ints
        return inputs

    def decode_inputs(
        self, sequences: tuple[request.Sequence, ...], batch_size: int, max_blocks: int, block_size: int, ahead: int = 0
    ) -> ProgramInputs:
        """As the function, of each sequence's `decode_row`. Where they are those of the latest call, tokens on, only these are written."""
        preemptions = [sequence.num_preemptions for sequence in sequences]
        is_same = sequences == self._rows and preemptions == self._preemptions
        self._rows = ()  # where the writing is interrupted all is written the next time
        inputs = self._advanced(sequences, batch_size, block_size, ahead) if is_same else None
        if inputs is None:
            rows = [decode_row(sequence, ahead) for sequence in sequences]
            inputs = self._written(*_flattened_rows(rows, batch_size, max_blocks, block_size))
        self._rows, self._preemptions = sequences, preemptions
        return inputs

    def _advanced(
        self, sequences: tuple[request.Sequence, ...], batch_size: int, block_size: int, ahead: int
    ) -> ProgramInputs | None:
        """None where the call had another shape, or a row is in another block now."""
        if self._latest is None:
            return None
        longs, ints, inputs = self._latest
        if inputs.token_ids.shape[1] != batch_size:
            return None
        positions = [sequence.num_computed_tokens - 1 + ahead for sequence in sequences]
        before = longs[batch_size : batch_size + len(positions)]
        if any(now // block_size != then // block_size for now, then in zip(positions, before, strict=True)):
            return None
        first_length = len(ints) - batch_size
        for row, (sequence, now, then) in enumerate(zip(sequences, positions, before, strict=True)):
            longs[row] = _token(sequence, now)
            longs[batch_size + row] = now
            longs[2 * batch_size + row] += now - then
            ints[first_length + row] += now - then
        return inputs


def decode_inputs(rows: Sequence[DecodeRow], batch_size: int, max_blocks: int, block_size: int) -> ProgramInputs:
    """T = R = batch_size; rows beyond the live ones are padding."""
    return _inputs(*_flattened_rows(rows, batch_size, max_blocks, block_size))


def prefill_inputs(
    chunks: Sequence[PrefillChunk], num_tokens: int, num_rows: int, max_blocks: int, block_size: int
) -> ProgramInputs:
    """T = num_tokens, R = num_rows; the chunks' tokens one after the other, then padding."""
    flat = _flattened(chunks, (), max_blocks, block_size)
    padding, empty = num_tokens - len(flat.tokens), num_rows - len(chunks)
    keep = [stop - 1 for stop in flat.starts[1:]] + [0] * empty
    flat.tokens += [0] * padding
    flat.positions += [0] * padding
    flat.slots += [0] * padding
    flat.starts += [flat.starts[-1]] * empty
    flat.tables += [0] * (max_blocks * empty)
    flat.lengths += [1] * empty
    return _inputs(flat, keep)


def step_inputs(
    chunks: Sequence[PrefillChunk], rows: Sequence[DecodeRow], max_blocks: int, block_size: int
) -> ProgramInputs:
    """Chunks of prompts, then decode rows, in one call without padding.

    Logits are asked for where a token will be sampled: of each chunk that ends its prompt, then of each decode row; then
    where prompt_logprobs needs them, chunk by chunk. Where none are, what follows the last attention computes nothing.
    """
    flat = _flattened(chunks, rows, max_blocks, block_size)
    last = [stop - 1 for stop in flat.starts[1:]]
    keep = [token for token, chunk in zip(last, chunks, strict=False) if chunk.is_last] + last[len(chunks) :]
    for first, chunk in zip(flat.starts, chunks, strict=False):
        keep += [first + position - chunk.start for position in chunk.prompt_positions]
    return _inputs(flat, keep)


@dataclass(slots=True)
class _Flattened:
    tokens: list[int]
    positions: list[int]
    slots: list[int]
    starts: list[int]
    tables: list[int]
    lengths: list[int]


def _flattened_rows(
    rows: Sequence[DecodeRow], batch_size: int, max_blocks: int, block_size: int
) -> tuple[_Flattened, list[int]]:
    """Of a decode call, and where its logits are asked for."""
    padding = [_PADDED_ROW] * (batch_size - len(rows))
    return _flattened((), [*rows, *padding], max_blocks, block_size), list(range(batch_size))


def _inputs(flat: _Flattened, keep: list[int]) -> ProgramInputs:
    return _tensors(*_joined(flat, keep), len(flat.tokens), len(flat.lengths), len(keep))


def _joined(flat: _Flattened, keep: list[int]) -> tuple[array[int], array[int]]:
    """What a program gets in int64, and what in int32, one vector after the other."""
    longs = array("q", [*flat.tokens, *flat.positions, *flat.slots, *keep])
    return longs, array("i", [*flat.starts, *flat.tables, *flat.lengths])


def _tensors(longs: array[int], ints: array[int], num_tokens: int, num_rows: int, num_logits: int) -> ProgramInputs:
    """Views of the two arrays: `torch.tensor` takes several times as long, and for each of the inputs."""
    t, r = num_tokens, num_rows
    tokens, positions, slots, keep = torch.frombuffer(longs, dtype=torch.int64).split([t, t, t, num_logits])
    num_ints = len(ints) - 2 * r - 1
    starts, tables, lengths = torch.frombuffer(ints, dtype=torch.int32).split([r + 1, num_ints, r])
    return ProgramInputs(tokens[None], positions[None], slots, starts, tables.view(r, -1), lengths, keep)


def _flattened(
    chunks: Sequence[PrefillChunk], rows: Sequence[DecodeRow], max_blocks: int, block_size: int
) -> _Flattened:
    flat = _Flattened([], [], [], [0], [], [])
    for chunk in chunks:
        sequence = chunk.sequence
        flat.tokens += sequence.token_ids[chunk.start : chunk.stop]
        flat.positions += range(chunk.start, chunk.stop)
        flat.slots += slots_of(sequence.block_ids, chunk.start, chunk.stop, block_size)
        flat.starts.append(len(flat.tokens))
        flat.tables += _table(sequence.block_ids, chunk.stop, max_blocks, block_size)
        flat.lengths.append(chunk.stop)
    for row in rows:
        flat.tokens.append(row.token_id)
        flat.positions.append(row.position)
        flat.slots.append(slot_of(row.block_ids, row.position, block_size))
        flat.starts.append(len(flat.tokens))
        flat.tables += _table(row.block_ids, row.position + 1, max_blocks, block_size)
        flat.lengths.append(row.position + 1)
    return flat


def _table(block_ids: Sequence[int], length: int, max_blocks: int, block_size: int) -> list[int]:
    used = list(block_ids[: -(-length // block_size)])
    return used + [0] * (max_blocks - len(used))
