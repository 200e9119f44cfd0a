"""Who runs in the next step: continuous batching, first come first served, over token counts only.

A step is a prefill call and a decode call, either of which may be empty, run in this order:

- prefill: chunks of prompts that share one call, `max_prefill_tokens` and `max_prefill_rows` in
  all; prompts begun earlier go on before new ones are admitted;
- decode: every running sequence that has one token left to compute. It runs in every step,
  however much is waiting for prefill; a sequence whose last chunk runs now decodes from the next
  step on. Admission goes on in every step that has prefill budget left, which keeps decoders full.

`running` followed by `waiting` is the order of arrival at all times: the head of the queue is
never passed, the victim of a full pool is the one admitted last, and it returns to the front.

`schedule` reserves the blocks of the step and advances `num_computed_tokens` by the step's tokens
at once; `update` appends the sampled ids. So right after `schedule` a decode row's token is at
position `num_computed_tokens - 1`, and a caller may schedule step n + 1 before it knows the ids
of step n: `num_computed_tokens >= num_tokens` then says that ids are on their way. At most one
step may be ahead, and steps have to run in the order they were scheduled, because a block freed
by a stop or a preemption is lent again while the step before may still write to it. An id that
arrives for a sequence which ended meanwhile is dropped.
"""

from __future__ import annotations

from collections import abc, deque
from collections.abc import Iterator
from dataclasses import dataclass, fields

from multibatch.errors import ConfigError, RequestError
from multibatch.kv.allocator import BlockAllocator
from multibatch.kv.block_table import blocks_for
from multibatch.request import FinishReason, Sequence, SequenceStatus
from multibatch.scheduled_step import PrefillChunk, ScheduledStep

__all__ = ["PrefillChunk", "ScheduledStep", "Scheduler", "SchedulerConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The limits that the compiled programs and the pool set."""

    max_num_seqs: int  # sequences running at once, prefilling or decoding
    max_seq_len: int  # tokens of a sequence, prompt and output together
    block_size: int  # tokens per KV block
    max_prefill_tokens: int  # tokens of one prefill call: the largest prefill program
    max_prefill_rows: int  # prompts that share one prefill call

    def __post_init__(self) -> None:
        """Checks the limits.

        Raises:
            ConfigError: one is not an int >= 1.
        """
        for limit in fields(self):
            value = getattr(self, limit.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{limit.name} is {value!r}; it has to be a whole number >= 1")


class Scheduler:
    """Takes sequences in, says what the next step computes, and ends them.

    Every sequence taken in by `add` ends, whatever the others do: the one admitted first is never
    preempted for another, and `add` refuses what could not end with the whole pool to itself.
    """

    def __init__(self, config: SchedulerConfig, allocator: BlockAllocator) -> None:
        """Starts with nothing to do; the blocks of `allocator` are lent by this scheduler alone."""
        self._config = config
        self._allocator = allocator
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._by_id: dict[str, Sequence] = {}

    @property
    def waiting(self) -> abc.Sequence[Sequence]:
        """Sequences without blocks, the next to be admitted first."""
        return self._waiting

    @property
    def running(self) -> abc.Sequence[Sequence]:
        """Sequences that hold blocks, in the order they were admitted."""
        return self._running

    @property
    def has_unfinished(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._running or self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence behind all others.

        Raises:
            RequestError: it could never run here, or its request id is in use.
        """
        name = f"request {sequence.request_id!r}"
        if sequence.request_id in self._by_id:
            raise RequestError(f"{name} is being served already; give each request its own id")
        num_prompt, longest = sequence.num_prompt_tokens, self._config.max_seq_len - 1
        if not 1 <= num_prompt <= longest:
            raise RequestError(
                f"{name} has a prompt of {num_prompt} tokens; allowed are 1 to {longest} "
                f"(max_seq_len {self._config.max_seq_len} with room for one token): "
                "shorten the prompt, or compile with a larger max_seq_len"
            )
        needed = blocks_for(self._max_total_tokens(sequence), self._config.block_size)
        if needed > self._allocator.num_total:
            raise RequestError(
                f"{name} may grow to {self._max_total_tokens(sequence)} tokens and needs "
                f"{needed} KV blocks of {self._config.block_size}; the pool has "
                f"{self._allocator.num_total}: lower max_tokens, shorten the prompt, or give the "
                "KV pool more memory"
            )
        self._by_id[sequence.request_id] = sequence
        self._waiting.append(sequence)

    def schedule(self) -> ScheduledStep:
        """Plans the next step and reserves its blocks.

        In synchronous use the step is empty only if nothing is unfinished. One step ahead it is
        empty too while every running sequence is known to end with the ids on their way.
        """
        decode, preempted = self._plan_decode()
        # A victim is not admitted in the step it was preempted in: it waits at the head, and what
        # it held, less what was taken of it, is too little for it.
        prefill = self._plan_prefill()
        return ScheduledStep(tuple(prefill), tuple(decode), tuple(preempted))

    def update(self, step: ScheduledStep, sampled: abc.Sequence[int]) -> list[Sequence]:
        """Appends the ids that a step gave, in the order of `step.sampled`.

        Returns:
            The sequences that this ended, their blocks freed.

        Raises:
            ValueError: not one id per sequence of `step.sampled`; nothing was changed.
        """
        sequences = step.sampled
        if len(sampled) != len(sequences):
            raise ValueError(f"{len(sampled)} ids for the {len(sequences)} sequences of a step")
        finished = []
        for sequence, token_id in zip(sequences, sampled, strict=True):
            if sequence.is_finished:
                continue
            sequence.token_ids.append(token_id)
            ended = _token_stop(sequence, self._max_total_tokens(sequence))
            if ended is not None:
                self.finish(sequence, *ended)
                finished.append(sequence)
        return finished

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends a sequence and frees its blocks.

        One that has ended only gets the new reason: a stop string may be found in the text of the
        very token that was also the last allowed.
        """
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason
        if sequence.is_finished:
            return
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.FINISHED
        del self._by_id[sequence.request_id]

    def abort(self, request_id: str) -> Sequence | None:
        """Ends a request as its client asked; None where it has ended or was never here."""
        sequence = self._by_id.get(request_id)
        if sequence is not None:
            self.finish(sequence, FinishReason.ABORT)
        return sequence

    def fail(self, step: ScheduledStep) -> list[Sequence]:
        """Ends every sequence that a failed step computed, with the reason ERROR.

        Returns:
            The sequences that this ended, their blocks freed; all others go on.
        """
        failed = [sequence for sequence in step.sequences if not sequence.is_finished]
        for sequence in failed:
            self.finish(sequence, FinishReason.ERROR)
        return failed

    def check_integrity(self) -> None:
        """Checks that every block is free or held by exactly one running sequence.

        Raises:
            BlockOwnershipError: with the first block that is not.
        """
        everyone = (*self._running, *self._waiting)
        self._allocator.check_integrity(block for seq in everyone for block in seq.block_ids)

    def _plan_decode(self) -> tuple[list[Sequence], list[Sequence]]:
        decode: list[Sequence] = []
        preempted: list[Sequence] = []
        for sequence in list(self._running):
            # a victim of this very loop is no longer running
            if sequence.status is not SequenceStatus.RUNNING or not self._is_decoding(sequence):
                continue
            if self._reserve_next(sequence, preempted):
                sequence.num_computed_tokens += 1
                decode.append(sequence)
        return decode, preempted

    def _is_decoding(self, sequence: Sequence) -> bool:
        # With an id on its way there are num_computed_tokens + 1 tokens. One that these make
        # complete ends by count alone; asking for another token would overrun its blocks.
        num_left = sequence.num_tokens - sequence.num_computed_tokens
        return num_left <= 1 and (sequence.num_computed_tokens + 1 < self._max_total_tokens(sequence))

    def _reserve_next(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """Gets the block of the next position, from others if need be; False if it lost its own."""
        num_blocks = blocks_for(sequence.num_computed_tokens + 1, self._config.block_size)
        missing = num_blocks - len(sequence.block_ids)
        while missing > self._allocator.num_free:
            victim = self._running[-1]
            self._preempt(victim)
            preempted.append(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.block_ids.extend(self._allocator.allocate(missing))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a sequence's blocks; its tokens stay, to be prefilled again."""
        self._running.remove(sequence)
        self._release(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        sequence.status = SequenceStatus.WAITING
        self._waiting.appendleft(sequence)

    def _plan_prefill(self) -> list[PrefillChunk]:
        chunks: list[PrefillChunk] = []
        budget = self._config.max_prefill_tokens
        for sequence in self._prefill_candidates():
            start = sequence.num_computed_tokens
            chunk = PrefillChunk(sequence, start, min(budget, sequence.num_tokens - start))
            sequence.num_computed_tokens = chunk.stop
            chunks.append(chunk)
            budget -= chunk.num_tokens
            if budget == 0 or len(chunks) == self._config.max_prefill_rows:
                break
        return chunks

    def _prefill_candidates(self) -> Iterator[Sequence]:
        """Prompts begun, then new ones; a new one is admitted only when it is asked for."""
        for sequence in self._running:
            if sequence.num_computed_tokens < sequence.num_tokens:  # decode rows have none left
                yield sequence
        while self._waiting and len(self._running) < self._config.max_num_seqs:
            sequence = self._waiting[0]
            # all of its tokens and the next one, so that a prompt once begun is never stuck
            num_blocks = blocks_for(sequence.num_tokens + 1, self._config.block_size)
            if num_blocks > self._allocator.num_free:
                return
            self._waiting.popleft()
            sequence.block_ids = self._allocator.allocate(num_blocks)
            sequence.status = SequenceStatus.RUNNING
            self._running.append(sequence)
            yield sequence

    def _release(self, sequence: Sequence) -> None:
        self._allocator.free(sequence.block_ids)
        sequence.block_ids = []

    def _max_total_tokens(self, sequence: Sequence) -> int:
        max_tokens = sequence.request.params.max_tokens
        if max_tokens is None:
            return self._config.max_seq_len
        return min(self._config.max_seq_len, sequence.num_prompt_tokens + max_tokens)


def _token_stop(sequence: Sequence, max_total_tokens: int) -> tuple[FinishReason, int | None] | None:
    """Whether the newest token ends the sequence; an end-of-sequence id names no stop_reason."""
    params = sequence.request.params
    token_id = sequence.token_ids[-1]
    if sequence.num_output_tokens >= params.min_tokens:
        if not params.ignore_eos and token_id in sequence.request.eos_token_ids:
            return FinishReason.STOP, None
        if token_id in params.stop_token_ids:
            return FinishReason.STOP, token_id
    if sequence.num_tokens >= max_total_tokens:
        return FinishReason.LENGTH, None
    return None
