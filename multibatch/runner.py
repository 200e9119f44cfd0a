"""Runs a scheduled step: selects programs, pads, calls, strips. Knows nothing of queues or text."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

import torch

from multibatch.backends.base import LoadedPrograms
from multibatch.batch import DecodeRow, InputBuffers, decode_inputs, prefill_inputs, step_inputs
from multibatch.kv.block_table import blocks_for
from multibatch.kv.pool import KVPool
from multibatch.manifest import STEP, Manifest, decoder_name, prefill_name
from multibatch.metrics import CallRecord, ProgramUse
from multibatch.scheduled_step import ScheduledStep
from multibatch.selector import Selector, select_chunk

MAX_RECORDS: Final = 65536
"""Calls that are kept one by one, some 10 MB; an engine may serve for months."""


class Runner:
    """Executes steps with the programs of one artifact over one pool."""

    def __init__(
        self,
        manifest: Manifest,
        programs: LoadedPrograms,
        pool: KVPool,
        selector: Selector,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Joins what it is given; loads nothing itself."""
        self._manifest = manifest
        self._programs = programs
        self._pool = pool
        self._selector = selector
        self._clock = clock
        self._block_size = manifest.kv.block_size
        self._buffers = InputBuffers()
        self._max_blocks = blocks_for(manifest.max_seq_len, self._block_size)
        self.records: deque[CallRecord] = deque(maxlen=MAX_RECORDS)
        # Every call since the start, whatever became of its record.
        self.program_uses: dict[str, ProgramUse] = {}

    def run(self, step: ScheduledStep) -> torch.Tensor:
        """Logits of the step's sampled sequences, in that order, then of each chunk's `prompt_positions`: [n, V]."""
        rows = [
            DecodeRow(seq.token_ids[seq.num_computed_tokens - 1], seq.num_computed_tokens - 1, seq.block_ids)
            for seq in step.decode
        ]
        if step.prefill and self._manifest.step is not None:
            return self._mixed(step, rows)
        parts: list[torch.Tensor] = []
        if step.prefill:
            logits = self._prefill(step)
            last = [i for i, chunk in enumerate(step.prefill) if chunk.is_last]
            if last:
                parts.append(logits[last] if len(last) < logits.shape[0] else logits)
        if rows:
            parts += self._decode(rows)
        if not parts:
            return torch.empty((0, self._manifest.model.vocab_size))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _mixed(self, step: ScheduledStep, rows: list[DecodeRow]) -> torch.Tensor:
        """Prompts and decode rows in one call, so that the weights are read once."""
        inputs = step_inputs(step.prefill, rows, self._max_blocks, self._block_size)
        start = self._clock()
        logits = self._programs.run(STEP, inputs, self._pool)
        num_tokens = step.num_prefill_tokens + len(rows)
        self._record(STEP, num_tokens, num_tokens, start)
        return logits[: len(step.sampled) + sum(len(chunk.prompt_positions) for chunk in step.prefill)]

    def _prefill(self, step: ScheduledStep) -> torch.Tensor:
        size = select_chunk(step.num_prefill_tokens, self._manifest.prefill_chunk_sizes)
        spec = self._manifest.prefills[size]
        inputs = prefill_inputs(step.prefill, size, spec.batch_size, self._max_blocks, self._block_size)
        start = self._clock()
        logits = self._programs.run(prefill_name(size), inputs, self._pool)
        self._record(prefill_name(size), step.num_prefill_tokens, size, start)
        return logits

    def _decode(self, rows: list[DecodeRow]) -> list[torch.Tensor]:
        parts = []
        for slot in self._selector.select(len(rows)):
            live = rows[slot.start : slot.stop]
            program = self._manifest.decoder_for(slot.batch_size)
            inputs = decode_inputs(live, slot.batch_size, self._max_blocks, self._block_size, self._buffers)
            start = self._clock()
            logits = self._programs.run(program.name, inputs, self._pool)
            self._record(decoder_name(slot.batch_size), slot.num_live, slot.batch_size, start)
            parts.append(logits if slot.num_live == logits.shape[0] else logits[: slot.num_live])
        return parts

    def _record(self, program: str, num_live: int, size: int, start: float) -> None:
        record = CallRecord(program, num_live, size - num_live, (self._clock() - start) * 1000)
        self.records.append(record)
        if program not in self.program_uses:
            self.program_uses[program] = ProgramUse(program)
        self.program_uses[program].add(record)
