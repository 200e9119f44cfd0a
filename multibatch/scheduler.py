"""Who runs in the next step: continuous batching over token counts only, in the order of `multibatch.queues`.

A step is a prefill call and a decode call, either of which may be empty, run in this order:

- prefill: chunks of prompts that share one call, `max_prefill_tokens` and `max_prefill_rows` in
  all; prompts begun earlier go on before new ones are admitted;
- decode: every running sequence that has one token left to compute. It runs in every step,
  however much is waiting for prefill; a sequence whose last chunk runs now decodes from the next
  step on. Admission goes on in every step that has prefill budget left, which keeps decoders full.

The head of the queue is never passed; it waits for room, or, where it came by priority, pauses those
behind it that run. The victim of a full pool is the last in the order, and it returns to its place:
first come, first served, `running` followed by `waiting` is the order of arrival at all times.

`schedule` reserves the blocks of the step and advances `num_computed_tokens` by the step's tokens
at once; `update` appends the sampled ids. So right after `schedule` a decode row's token is at
position `num_computed_tokens - 1`, and a caller may schedule step n + 1 before it knows the ids
of step n: `num_computed_tokens >= num_tokens` then says that ids are on their way. At most one
step may be ahead, and steps have to run in the order they were scheduled, because a block freed
by a stop or a preemption is lent again while the step before may still write to it. An id that
arrives for a sequence which ended meanwhile is dropped.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import get_args

from multibatch.errors import ConfigError, RequestError
from multibatch.kv.allocator import BlockAllocator
from multibatch.kv.block_table import blocks_for
from multibatch.kv.prefix import PrefixCache
from multibatch.policies.base import Load, Policies
from multibatch.queues import QueuePolicy, Queues
from multibatch.request import FinishReason, Sequence, SequenceStatus
from multibatch.scheduled_step import PrefillChunk, ScheduledStep

__all__ = ["PrefillChunk", "ScheduledStep", "Scheduler", "SchedulerConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The limits that the compiled programs and the pool set, and the order of the queues."""

    max_num_seqs: int  # sequences running at once, prefilling or decoding
    max_seq_len: int  # tokens of a sequence, prompt and output together
    block_size: int  # tokens per KV block
    max_prefill_tokens: int  # tokens of one prefill call: the largest prefill program
    max_prefill_rows: int  # prompts that share one prefill call
    queue_policy: QueuePolicy = "fcfs"  # see multibatch.queues
    priority_patience: int | None = 1000  # steps that a level of priority is worth; None: any number

    def __post_init__(self) -> None:
        """Checks the limits.

        Raises:
            ConfigError: one is not an int >= 1, or the policy is unknown.
        """
        if self.queue_policy not in get_args(QueuePolicy):
            raise ConfigError(f"queue policy {self.queue_policy!r}; choose one of {', '.join(get_args(QueuePolicy))}")
        for limit in fields(self):
            value = getattr(self, limit.name)
            if limit.name == "queue_policy" or (limit.name == "priority_patience" and value is None):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{limit.name} is {value!r}; it has to be a whole number >= 1")


class Scheduler:
    """Takes sequences in, says what the next step computes, and ends them.

    Every sequence taken in by `add` ends, whatever the others do: the one admitted first is never
    preempted for another, and `add` refuses what could not end with the whole pool to itself.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        allocator: BlockAllocator,
        prefix_cache: PrefixCache | None = None,
        policies: Policies | None = None,
    ) -> None:
        """Starts with nothing to do; the blocks of `allocator` are lent by this scheduler alone.

        Args:
            config: the limits.
            allocator: of the pool.
            prefix_cache: over the same allocator, to begin with blocks that are computed already; or None.
            policies: what else caps admission and prefill; default: nothing.
        """
        self._config = config
        self._allocator = allocator
        self._prefix_cache = prefix_cache
        self._policies = policies or Policies()
        self._queues = Queues(config.queue_policy, config.priority_patience)
        self._num_steps = 0

    @property
    def waiting(self) -> abc.Sequence[Sequence]:
        """Sequences without blocks, the next to be admitted first."""
        return self._queues.waiting

    @property
    def running(self) -> abc.Sequence[Sequence]:
        """Sequences that hold blocks, in the order of the queue: the last is the first to be paused."""
        return self._queues.running

    @property
    def has_unfinished(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence, behind all others of its priority.

        Raises:
            RequestError: it could never run here, or its request id is in use.
        """
        name = f"request {sequence.request_id!r}"
        if self._queues.get(sequence.request_id) is not None:
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
        self._queues.add(sequence, self._num_steps)

    def schedule(self) -> ScheduledStep:
        """Plans the next step and reserves its blocks.

        In synchronous use the step is empty only if nothing is unfinished. One step ahead it is
        empty too while every running sequence is known to end with the ids on their way.
        """
        self._num_steps += 1
        if self._prefix_cache is not None:
            self._prefix_cache.begin_step()
        max_running = self._max_running()
        preempted = self._pause_for_head(max_running)
        decode = self._plan_decode(preempted)
        prefill = self._plan_prefill(decode, preempted, max_running)
        return ScheduledStep(tuple(prefill), tuple(decode), tuple(preempted))

    def reserve_again(self, step: ScheduledStep) -> bool:
        """Takes the blocks that the rows of a planned step need to be decoded once more, whatever its tokens are.

        Returns:
            False where the step after it may be another one, as far as is known now: some row ends by count, something is or may
            be to be prefilled or paused, or the blocks are not free.
        """
        rows = step.decode
        if step.prefill or not rows or rows != tuple(self.running) or not all(map(self._is_decoding, rows)):
            return False
        if self.waiting and (self._config.queue_policy != "fcfs" or len(rows) < self._config.max_num_seqs):
            return False
        size = self._config.block_size
        missing = [blocks_for(row.num_computed_tokens + 1, size) - len(row.block_ids) for row in rows]
        if sum(missing) > self._allocator.num_free:
            return False
        for row, count in zip(rows, missing, strict=True):
            if count:
                row.block_ids.extend(self._allocator.allocate(count))
        return True

    def schedule_again(self, step: ScheduledStep) -> ScheduledStep:
        """The step that follows a reserved one, of the same rows; those that have ended meanwhile are in it and get nothing."""
        self._num_steps += 1
        if self._prefix_cache is not None:
            self._prefix_cache.begin_step()
        for row in step.decode:
            if not row.is_finished:
                row.num_computed_tokens += 1
        return ScheduledStep(decode=step.decode)

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
        if self._prefix_cache is not None:
            _remember(self._prefix_cache, step)
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
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            # Of all but the newest token, whatever it has reserved.
            num_blocks = blocks_for(sequence.num_tokens - 1, self._config.block_size)
            for limit in self._policies.limits:
                limit.sequence_done(num_blocks)
        self._queues.remove(sequence)
        self._release(sequence)

    def abort(self, request_id: str) -> Sequence | None:
        """Ends a request as its client asked; None where it has ended or was never here."""
        sequence = self._queues.get(request_id)
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

    def step_done(self, step: ScheduledStep, ms: float) -> None:
        """Tells the policies how long a step took, in wall milliseconds, from its launch to its ids."""
        for limit in self._policies.limits:
            limit.step_done(len(step.decode), ms)
        if self._policies.step_budget is not None:
            context_lens = [sequence.num_computed_tokens for sequence in step.decode]
            self._policies.step_budget.step_done(context_lens, step.num_prefill_tokens, ms)

    def check_integrity(self) -> None:
        """Checks that every block is free or held by the running sequences it was lent to.

        Raises:
            BlockOwnershipError: with the first block that is not.
        """
        everyone = (*self.running, *self.waiting)
        self._allocator.check_integrity(block for seq in everyone for block in seq.block_ids)

    def _max_running(self) -> int:
        """Sequences that may run after the admissions of this step."""
        if not self._policies.limits:
            return self._config.max_num_seqs
        size = self._config.block_size
        load = Load(
            num_waiting=len(self.waiting),
            num_running=len(self.running),
            num_decoding=sum(map(self._is_decoding, self.running)),
            num_held_blocks=sum(len(sequence.block_ids) for sequence in self.running),
            num_total_blocks=self._allocator.num_total,
            declared_blocks=sum(
                blocks_for(self._max_total_tokens(sequence), size) for sequence in (*self.running, *self.waiting)
            ),
        )
        return min(self._config.max_num_seqs, *(limit.limit(load) for limit in self._policies.limits))

    def _pause_for_head(self, max_running: int) -> list[Sequence]:
        """Pauses sequences that come after the head of the queue and hold what it needs; never so first come, first served."""
        paused: list[Sequence] = []
        if self._config.queue_policy == "fcfs" or not self.waiting or len(self.running) > max_running:
            return paused
        head = self.waiting[0]
        after = [sequence for sequence in self.running if sequence.order > head.order]
        needed = blocks_for(head.num_tokens + 1, self._config.block_size)
        if needed > self._allocator.num_free + sum(len(sequence.block_ids) for sequence in after):
            return paused
        while after and (len(self.running) >= max_running or self._find_blocks(head) is None):
            victim = after.pop()
            self._preempt(victim)
            paused.append(victim)
        return paused

    def _plan_decode(self, preempted: list[Sequence]) -> list[Sequence]:
        decode: list[Sequence] = []
        for sequence in list(self.running):
            # a victim of this very loop is no longer running
            if sequence.status is not SequenceStatus.RUNNING or not self._is_decoding(sequence):
                continue
            if self._reserve_next(sequence, preempted):
                sequence.num_computed_tokens += 1
                decode.append(sequence)
        return decode

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
            victim = self.running[-1]
            self._preempt(victim)
            preempted.append(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.block_ids.extend(self._allocator.allocate(missing))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a sequence's blocks; its tokens stay, to be prefilled again."""
        self._queues.pause(sequence)
        self._release(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1

    def _plan_prefill(self, decode: list[Sequence], preempted: list[Sequence], max_running: int) -> list[PrefillChunk]:
        chunks: list[PrefillChunk] = []
        budget = self._config.max_prefill_tokens
        if self._policies.step_budget is not None:
            budget = self._policies.step_budget.refine(budget, [sequence.num_computed_tokens for sequence in decode])
        if not budget:
            return chunks
        for sequence in self._prefill_candidates(preempted, max_running):
            start = sequence.num_computed_tokens
            chunk = PrefillChunk(sequence, start, min(budget, sequence.num_tokens - start))
            sequence.num_computed_tokens = chunk.stop
            if self._prefix_cache is not None:
                self._prefix_cache.plan(sequence, chunk.start, chunk.stop)
            chunks.append(chunk)
            budget -= chunk.num_tokens
            if budget == 0 or len(chunks) == self._config.max_prefill_rows:
                break
        return chunks

    def _prefill_candidates(self, preempted: list[Sequence], max_running: int) -> Iterator[Sequence]:
        """Prompts begun, then new ones; a new one is admitted only when it is asked for."""
        for sequence in list(self.running):
            if sequence.num_computed_tokens < sequence.num_tokens:  # decode rows have none left
                yield sequence
        while self.waiting and len(self.running) < max_running:
            sequence = self.waiting[0]
            # A victim could come back at once where another has computed what it shares; a step has everyone once.
            if sequence in preempted or not self._take_blocks(sequence):
                return
            self._queues.admit(sequence)
            yield sequence

    def _find_blocks(self, sequence: Sequence) -> tuple[list[int], int] | None:
        """The cached blocks that a sequence begins with and how many others it needs; None where those are not free.

        They are those of all its tokens and the next one, so that a prompt once begun is never stuck.
        """
        cached = [] if self._prefix_cache is None else self._prefix_cache.match(sequence)
        missing = blocks_for(sequence.num_tokens + 1, self._config.block_size) - len(cached)
        return None if missing > self._allocator.num_free - self._allocator.num_idle(cached) else (cached, missing)

    def _take_blocks(self, sequence: Sequence) -> bool:
        found = self._find_blocks(sequence)
        if found is None:
            return False
        cached, missing = found
        self._allocator.share(cached)
        sequence.block_ids = cached + self._allocator.allocate(missing)
        sequence.num_computed_tokens = len(cached) * self._config.block_size
        if self._prefix_cache is None:
            sequence.num_cached_tokens = 0
        else:
            self._prefix_cache.admitted(sequence, sequence.num_computed_tokens)
        return True

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


def _remember(prefix_cache: PrefixCache, step: ScheduledStep) -> None:
    """Has the blocks remembered that this step made full.

    Only now, that it has run, is it known that they hold what they should. A sequence that lost its blocks meanwhile has
    none to remember. Of a decode row every token it had was computed, and the newest by this step.
    """
    for chunk in step.prefill:
        if chunk.sequence.block_ids:
            prefix_cache.remember(chunk.sequence, chunk.start, chunk.stop)
    for sequence in step.decode:
        if sequence.block_ids:
            prefix_cache.remember(sequence, sequence.num_tokens - 1, sequence.num_tokens)
