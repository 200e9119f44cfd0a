"""Runs a scheduled step: selects programs, pads, calls, strips. Knows nothing of queues or text."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass
from typing import Final

import torch

from multibatch.backends.base import LoadedPrograms, StartedCall
from multibatch.batch import InputBuffers, ProgramInputs, decode_inputs, decode_row, prefill_inputs, step_inputs
from multibatch.kv.block_table import blocks_for
from multibatch.kv.pool import KVPool
from multibatch.logit_passes import DrawOptions
from multibatch.manifest import STEP, Manifest, decoder_name, prefill_name
from multibatch.metrics import CallRecord, ProgramUse
from multibatch.request import Sequence
from multibatch.scheduled_step import ScheduledStep
from multibatch.selector import Selector, Slot, select_chunk

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
        # One for the call that runs, one for the call that follows it.
        self._buffers = [InputBuffers(), InputBuffers()]
        self._max_blocks = blocks_for(manifest.max_seq_len, self._block_size)
        self.records: deque[CallRecord] = deque(maxlen=MAX_RECORDS)
        # Every call since the start, whatever became of its record.
        self.program_uses: dict[str, ProgramUse] = {}

    def run(self, step: ScheduledStep) -> torch.Tensor:
        """Logits of the step's sampled sequences, in that order, then of each chunk's `prompt_positions`: [n, V]."""
        return self._joined([self._run(call) for call in self._calls(step)])

    def start(self, step: ScheduledStep, draws: DrawOptions | None = None) -> StartedStep | None:
        """Begins what `run` does, where the programs can; None of a step without calls.

        Args:
            step: as planned.
            draws: how the tokens of `step.sampled` are drawn; None: each the maximum of its logits.
        """
        calls = self._calls(step)
        if not calls:
            return None
        first, others = calls[0], calls[1:]
        has_tokens = not others and (draws is None or isinstance(first.wanted, range))
        running = self._programs.start(first.program, first.inputs, self._pool, draws if has_tokens else None)
        return StartedStep(first, running, others, has_tokens)

    def follow(
        self,
        started: StartedStep,
        rows: tuple[Sequence, ...],
        stop_token_ids: AnySequence[int],
        draws: DrawOptions | None = None,
    ) -> bool:
        """Has these decode rows of a started step decoded again as soon as it ends (see `StartedCall.follow`).

        Args:
            started: a step that was not waited for yet.
            rows: all that it decodes; each holds the block of its next token.
            stop_token_ids: nothing follows where one of them is drawn.
            draws: see `start`; of the tokens behind those of the started step.

        Returns:
            Whether it may begin.
        """
        slots = self._selector.select(len(rows))
        if not started.has_tokens or len(slots) != 1:
            return False
        call = self._decode_call(rows, slots[0], ahead=1)
        if call.program == started.first.program:
            started.offered = call
            return started.running.follow(call.inputs, len(rows), stop_token_ids, draws)
        return False

    def finish(self, started: StartedStep) -> StepResult:
        """What `run` gives, of a step that was started, and what else came of it. Its first call is recorded by `record`.

        Once waited for it gives the same again. Raises what the programs do.
        """
        if not started.is_finished:
            try:
                started.result = self._finish(started)
            except RuntimeError as error:
                started.error = error
                started.ended = time.monotonic()
        if started.result is None:
            assert started.error is not None
            raise started.error
        return started.result

    def _finish(self, started: StartedStep) -> StepResult:
        result, first = started.running.finish(), started.first
        started.ended = time.monotonic() - result.late_seconds
        started.seconds = result.seconds
        if started.others:
            started.idle_seconds = result.late_seconds
            parts = [first.strip(result.logits), *map(self._run, started.others)]
            started.ended = time.monotonic()
            return StepResult(self._joined(parts), None, None)
        followed = None
        if result.followed is not None:
            assert started.offered is not None
            followed = StartedStep(started.offered, result.followed, [], has_tokens=True)
        tokens = first.strip(result.tokens) if started.has_tokens else None
        return StepResult(first.strip(result.logits), tokens, followed)

    def record(self, started: StartedStep) -> None:
        """Counts the first call of a step that is finished."""
        self._record(started.first, started.seconds)

    def _calls(self, step: ScheduledStep) -> list[_Call]:
        if step.prefill and self._manifest.step is not None:
            return [self._mixed(step)]
        prefill = [self._prefill(step)] if step.prefill else []
        return prefill + (self._decode(step) if step.decode else [])

    def _mixed(self, step: ScheduledStep) -> _Call:
        """Prompts and decode rows in one call, so that the weights are read once."""
        rows = [decode_row(sequence) for sequence in step.decode]
        inputs = step_inputs(step.prefill, rows, self._max_blocks, self._block_size)
        num_tokens = step.num_prefill_tokens + len(rows)
        wanted = len(step.sampled) + sum(len(chunk.prompt_positions) for chunk in step.prefill)
        return _Call(STEP, STEP, inputs, num_tokens, num_tokens, range(wanted))

    def _prefill(self, step: ScheduledStep) -> _Call:
        size = select_chunk(step.num_prefill_tokens, self._manifest.prefill_chunk_sizes)
        spec = self._manifest.prefills[size]
        inputs = prefill_inputs(step.prefill, size, spec.batch_size, self._max_blocks, self._block_size)
        last = [i for i, chunk in enumerate(step.prefill) if chunk.is_last]
        return _Call(prefill_name(size), prefill_name(size), inputs, step.num_prefill_tokens, size, last)

    def _decode(self, step: ScheduledStep) -> list[_Call]:
        slots = self._selector.select(len(step.decode))
        if len(slots) == 1:
            return [self._decode_call(step.decode, slots[0])]
        calls: list[_Call] = []
        for slot in slots:  # calls of one size would share their tensors
            rows = list(map(decode_row, step.decode[slot.start : slot.stop]))
            calls.append(self._call_of(slot, decode_inputs(rows, slot.batch_size, self._max_blocks, self._block_size)))
        return calls

    def _decode_call(self, rows: tuple[Sequence, ...], slot: Slot, ahead: int = 0) -> _Call:
        """Of all decode rows of a step, in tensors that no call has which is under way."""
        self._buffers.reverse()
        inputs = self._buffers[0].decode_inputs(rows, slot.batch_size, self._max_blocks, self._block_size, ahead)
        return self._call_of(slot, inputs)

    def _call_of(self, slot: Slot, inputs: ProgramInputs) -> _Call:
        size = slot.batch_size
        program = self._manifest.decoder_for(size).name
        return _Call(program, decoder_name(size), inputs, slot.num_live, size, range(slot.num_live))

    def _run(self, call: _Call) -> torch.Tensor:
        start = self._clock()
        logits = self._programs.run(call.program, call.inputs, self._pool)
        self._record(call, self._clock() - start)
        return call.strip(logits)

    def _joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        found = [part for part in parts if part.shape[0]]
        if not found:
            return torch.empty((0, self._manifest.model.vocab_size))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _record(self, call: _Call, seconds: float) -> None:
        record = CallRecord(call.name, call.num_live, call.size - call.num_live, seconds * 1000)
        self.records.append(record)
        if call.name not in self.program_uses:
            self.program_uses[call.name] = ProgramUse(call.name)
        self.program_uses[call.name].add(record)


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a program."""

    program: str
    name: str
    """In the records."""
    inputs: ProgramInputs
    num_live: int
    size: int
    """Rows or tokens, padding included."""
    wanted: AnySequence[int]
    """Rows of the logits, ascending."""

    def strip(self, found: torch.Tensor) -> torch.Tensor:
        """The wanted rows of [R, ...]."""
        num_wanted = len(self.wanted)
        if num_wanted == found.shape[0]:
            return found
        return found[:num_wanted] if isinstance(self.wanted, range) else found[self.wanted]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a step that was started."""

    logits: torch.Tensor
    """See `Runner.run`."""
    tokens: torch.Tensor | None
    """int64[n] of the sampled sequences, drawn as `Runner.start` was told; None where they have to be drawn from the logits."""
    followed: StartedStep | None
    """The step that follows it, if one has begun."""


@dataclass(slots=True)
class StartedStep:
    """A step whose first call runs."""

    first: _Call
    running: StartedCall
    others: list[_Call]
    has_tokens: bool
    """Whether it gives its tokens too."""
    offered: _Call | None = None
    """What may follow it."""
    result: StepResult | None = None
    error: RuntimeError | None = None
    """One of the two, once it was waited for."""
    seconds: float = 0.0
    """Then: how long its first call took."""
    ended: float = 0.0
    """Then: when it ended, of `time.monotonic`, whenever that was noticed."""
    idle_seconds: float = 0.0
    """Then: before its end, between the first call and the others."""

    @property
    def is_finished(self) -> bool:
        """Whether it was waited for."""
        return self.result is not None or self.error is not None
