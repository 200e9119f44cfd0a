"""The loop: requests in, tokens out. Joins scheduler, runner and sampler; owns the clock and the pool's size."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence as AnySequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from multibatch.artifact import Artifact
from multibatch.backends.base import DTYPES, LoadedPrograms
from multibatch.backends.load import load_programs
from multibatch.config import EngineConfig
from multibatch.constraints import Constraints
from multibatch.cost import CostModel
from multibatch.errors import CapacityError, ConfigError, RequestError, StepError
from multibatch.groups import Completion, Group, output_of
from multibatch.hardware import available_memory_bytes
from multibatch.kv.allocator import BlockAllocator
from multibatch.kv.block_table import blocks_for
from multibatch.kv.pool import KVPool
from multibatch.kv.prefix import PrefixCache, PrefixCacheStats
from multibatch.ladder import DecoderLadder
from multibatch.manifest import Manifest
from multibatch.policies.build import build_policies
from multibatch.request import FinishReason, Logprob, Request, RequestOutput, Sequence, resolve_seed
from multibatch.runner import Runner
from multibatch.sampler import RowLogprobs, SampledRows, Sampler, row_logprobs
from multibatch.sampling_params import RequestOutputKind, SamplingParams
from multibatch.sampling_row import SamplingRow
from multibatch.scheduled_step import ScheduledStep
from multibatch.scheduler import Scheduler, SchedulerConfig
from multibatch.selector import Selector
from multibatch.stats import CompletionTimes, EngineStats
from multibatch.step_times import StepTimes
from multibatch.tokenizer import Detokenizer, Tokenizer

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from multibatch.exposition import EngineState


class Engine:
    """Serves requests with the decoders of one artifact. Not thread-safe: one thread adds, steps and aborts."""

    def __init__(self, artifact: Artifact, config: EngineConfig, programs: LoadedPrograms | None = None) -> None:
        """Loads the programs (unless given) and allocates the pool.

        Raises:
            IncompatibleError: the artifact was built for another machine or torch.
            ConfigError: a limit above what the artifact was compiled for.
            CapacityError: the pool cannot hold one sequence of max_seq_len.
        """
        manifest = artifact.manifest
        self.manifest = manifest
        self.max_num_seqs = _limit("max_num_seqs", config.max_num_seqs, manifest.max_num_seqs, "--max-num-seqs")
        self.max_seq_len = _limit("max_seq_len", config.max_seq_len, manifest.max_seq_len, "--max-seq-len")
        self._programs = programs or load_programs(artifact, config.num_threads)
        num_blocks = _num_blocks(manifest, config, self.max_num_seqs, self.max_seq_len)
        self.pool = KVPool.allocate(manifest.kv, num_blocks + 1, DTYPES[manifest.model.dtype])
        self.limits = SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_seq_len=self.max_seq_len,
            block_size=manifest.kv.block_size,
            max_prefill_tokens=manifest.max_prefill_tokens,
            max_prefill_rows=manifest.max_prefill_rows,
            queue_policy=config.scheduling_policy,  # type: ignore[arg-type]
            priority_patience=config.priority_patience,
        )
        self._allocator = BlockAllocator(num_blocks + 1)
        self._prefix_cache: PrefixCache | None = None
        if config.enable_prefix_caching:
            self._prefix_cache = PrefixCache(self._allocator, manifest.kv.block_size)
        table = artifact.cost_table()
        policies = build_policies(config, self.max_num_seqs, table)
        self.scheduler = Scheduler(self.limits, self._allocator, self._prefix_cache, policies)
        measured = {size: spec.measured_ms for size, spec in manifest.decoders.items() if spec.measured_ms is not None}
        cost = CostModel.from_mapping(measured)
        selector = Selector(DecoderLadder(manifest.decoder_batch_sizes), config.selector_policy, cost)  # type: ignore[arg-type]
        self.runner = Runner(manifest, self._programs, self.pool, selector)
        self._step_times = StepTimes(table, selector, cost)
        tokenizer_dir = artifact.path / "tokenizer"
        self._tokenizer_dir: Path | None = tokenizer_dir if tokenizer_dir.is_dir() else None
        self._tokenizer: Tokenizer | None = None
        self._constraints = Constraints(manifest.model, lambda: self.tokenizer)
        self._sampler = Sampler(self._programs.passes)
        self._seed = config.seed
        self._num_requests = 0
        self._groups: dict[str, Group] = {}
        self._owner: dict[str, tuple[Group, Completion]] = {}
        self.stats = EngineStats(self.max_seq_len)
        self._registry: CollectorRegistry | None = None
        # Why the latest failed step failed; the engine goes on after it.
        self.failure: StepError | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """Loaded at first use, since prompts of ids need none.

        Raises:
            RequestError: the artifact has none.
        """
        if self._tokenizer is None:
            if self._tokenizer_dir is None:
                raise RequestError("the artifact has no tokenizer; give prompts as token ids, with detokenize=False")
            self._tokenizer = Tokenizer(self._tokenizer_dir)
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether the artifact has a tokenizer."""
        return self._tokenizer_dir is not None

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_unfinished

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: AnySequence[int],
        params: SamplingParams,
        prompt: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        arrived: float | None = None,
    ) -> None:
        """Queues a request.

        Args:
            request_id: no other request that is being served may have it.
            prompt_token_ids: one or more.
            params: how to continue it.
            prompt: the text, handed back with the outputs.
            priority: see `multibatch.request.Request`.
            cache_salt: see `multibatch.request.Request`.
            arrived: when it came, of `time.monotonic`; default: now.

        Raises:
            RequestError: it can never run here; nothing was queued.
        """
        self._check(request_id, prompt_token_ids, params)
        if priority and self.limits.queue_policy != "priority":
            raise RequestError(
                f"request {request_id!r}: priority {priority}, and the engine serves first come, first served;"
                ' give it scheduling_policy="priority", or leave the priority out'
            )
        rules = self._constraints.rules(request_id, params)
        now = time.monotonic()
        queued = now if arrived is None else arrived
        group = Group(
            request_id, prompt, list(prompt_token_ids), params, [], rules, [None], time.time() - (now - queued), queued
        )
        number = self._num_requests
        for child in range(params.n):
            # One of them tells of the prompt for all.
            is_mute = child > 0 and params.prompt_logprobs is not None
            own = dataclasses.replace(params, prompt_logprobs=None) if is_mute else params
            request = Request(
                request_id=request_id if params.n == 1 else f"{request_id}#{child}",
                prompt_token_ids=tuple(prompt_token_ids),
                params=own,
                prompt=prompt,
                arrival_time=group.arrival_time,
                seed=resolve_seed(params.seed, number, self._seed, child_index=child),
                eos_token_ids=self.manifest.model.eos_token_ids,
                priority=priority,
                cache_salt=cache_salt,
            )
            detokenizer = None
            if params.detokenize and (self._tokenizer_dir is not None or params.stop):
                detokenizer = Detokenizer(self.tokenizer, params.stop, params.skip_special_tokens)
            matcher = self._constraints.matcher(request.request_id, params)
            group.completions.append(Completion(Sequence(request), detokenizer, matcher))
        added: list[Completion] = []
        try:
            for completion in group.completions:
                self.scheduler.add(completion.sequence)
                added.append(completion)
        except RequestError:
            for completion in added:
                self.scheduler.abort(completion.sequence.request_id)
            raise
        self._num_requests += 1
        self._groups[request_id] = group
        self._owner |= {c.sequence.request_id: (group, c) for c in group.completions}

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request and frees its blocks at once; its last output, or None where it is not being served."""
        group = self._groups.get(request_id)
        if group is None:
            return None
        for completion in group.completions:
            self.scheduler.abort(completion.sequence.request_id)
        return self._output(group)

    def step(self) -> list[RequestOutput]:
        """Runs one step; an output for each request that got a token or ended.

        A step that fails ends its own requests with finish_reason "error"; `failure` says why and the engine goes on.
        """
        step = self.scheduler.schedule()
        now = started = time.monotonic()
        for sequence in step.sequences:
            completion = self._owner[sequence.request_id][1]
            if completion.scheduled_ts is None:
                completion.scheduled_ts = now
        self.stats.num_preemptions += len(step.preempted)
        predicted = self._step_times.predict(step)
        try:
            sampled = self.compute(step)
        except (RuntimeError, StepError) as error:
            return self._fail(step, error)
        self.stats.iteration_tokens.observe(step.num_prefill_tokens + len(step.decode))
        live = [sequence for sequence in step.sampled if not sequence.is_finished]
        self.scheduler.update(step, sampled.token_ids)
        now = time.monotonic()
        self.scheduler.step_done(step, (now - started) * 1000)
        if predicted is not None:
            self._compare(step, predicted, (now - started) * 1000)
        waits: dict[float, int] = {}
        for sequence, token, logprobs in zip(step.sampled, sampled.token_ids, sampled.logprobs, strict=True):
            if sequence in live:
                wait = self._accept(sequence, token, logprobs, now)
                self._advance(sequence, token)
                if wait is not None:
                    waits[wait] = waits.get(wait, 0) + 1
        for wait, num_tokens in waits.items():
            self.stats.next_tokens(wait, num_tokens)
        groups = dict.fromkeys(self._owner[sequence.request_id][0].request_id for sequence in step.sampled)
        outputs = [self._output(self._groups[name]) for name in groups]
        return [output for output in outputs if output is not None]

    def _compare(self, step: ScheduledStep, predicted_ms: float, ms: float) -> None:
        """Notes what a step took, beside what it was expected to take."""
        self.stats.step_predicted(predicted_ms / 1000, ms / 1000)

    @property
    def prefix_cache_stats(self) -> PrefixCacheStats:
        """Prompt tokens asked for and found since the start; zeros where prefix caching is off."""
        return PrefixCacheStats() if self._prefix_cache is None else self._prefix_cache.stats

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV blocks that sequences hold."""
        return 1 - self._allocator.num_free / self._allocator.num_total

    @property
    def registry(self) -> CollectorRegistry:
        """The engine's own Prometheus registry, to be collected from any thread."""
        if self._registry is None:
            # Here, since who never asks need not wait for the library.
            from multibatch.exposition import EngineCollector, registry_of

            self._registry = registry_of(EngineCollector(self.manifest.model.id, self.stats, self._state))
        return self._registry

    def metrics_text(self) -> str:
        """What was done since the start and what is going on, as Prometheus text; from any thread."""
        from multibatch.exposition import text_of

        return text_of(self.registry)

    def _state(self) -> EngineState:
        from multibatch.exposition import EngineState

        found = self.prefix_cache_stats
        return EngineState(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            kv_cache_usage=self.kv_cache_usage,
            prefix_cache_queries=found.queries,
            prefix_cache_hits=found.hits,
            programs=list(self.runner.program_uses.values()),
        )

    def reset_prefix_cache(self) -> None:
        """Forgets what is in the blocks of the pool; running requests keep theirs."""
        self._allocator.forget()

    def run_all(self) -> dict[str, RequestOutput]:
        """Steps until nothing is left; the requests that ended meanwhile, by id.

        Raises:
            StepError: a step failed.
        """
        done: dict[str, RequestOutput] = {}
        self.failure = None
        while self.has_unfinished:
            done |= {output.request_id: output for output in self.step() if output.finished}
        if self.failure is not None:
            raise self.failure
        return done

    def compute(self, step: ScheduledStep) -> SampledRows:
        """Runs the programs and draws the tokens of a step, in the order of `step.sampled`.

        Queues and requests do not change. Raises what the programs and the sampler do.
        """
        with self._programs.own_threads():
            logits, num_sampled = self.runner.run(step), len(step.sampled)
            if logits.shape[0] > num_sampled:
                self._note_prompt_logprobs(step, logits[num_sampled:])
                logits = logits[:num_sampled]
            return self._sample(step.sampled, logits)

    def _check(self, request_id: str, prompt_token_ids: AnySequence[int], params: SamplingParams) -> None:
        if request_id in self._groups:
            raise RequestError(f"request {request_id!r} is being served already; give each request its own id")
        vocabulary = self.manifest.model.vocab_size
        beyond = [t for t in prompt_token_ids if not 0 <= t < vocabulary]
        if beyond:
            raise RequestError(
                f"request {request_id!r}: token id {beyond[0]} in the prompt; allowed: 0 to {vocabulary - 1}"
            )
        if params.prompt_logprobs is not None and self.manifest.step is None:
            raise RequestError(
                f"request {request_id!r}: prompt_logprobs is {params.prompt_logprobs}, and the artifact's programs for"
                " prompts give the logits of the last token alone; allowed: None. Leave it out, or compile without"
                " --prefill-chunk-sizes"
            )
        total = len(prompt_token_ids) + (params.max_tokens or 1)
        if len(prompt_token_ids) and total > self.max_seq_len:
            raise RequestError(
                f"request {request_id!r}: {len(prompt_token_ids)} prompt tokens and max_tokens {params.max_tokens}"
                f" make {total}; allowed: max_seq_len {self.max_seq_len} in all. Lower max_tokens, shorten the prompt,"
                " give max_tokens=None for as many as fit, or compile with a larger --max-seq-len"
            )

    def _sample(self, sequences: AnySequence[Sequence], logits: torch.Tensor) -> SampledRows:
        """Draws a token for each sequence; one that can have none ends alone, with the reason ERROR.

        It gets token 0, which nobody reads, as the sequence is finished.
        """
        drawn = SampledRows([0] * len(sequences), [None] * len(sequences))
        while live := [i for i, sequence in enumerate(sequences) if not sequence.is_finished]:
            is_whole = len(live) == len(sequences)
            try:
                rows = [self._row(sequences[i]) for i in live]
                sampled = self._sampler.sample(logits if is_whole else logits[live], rows)
            except StepError as error:
                self._end_alone(error)
                continue
            if is_whole:
                return sampled
            for i, token_id, logprobs in zip(live, sampled.token_ids, sampled.logprobs, strict=True):
                drawn.token_ids[i], drawn.logprobs[i] = token_id, logprobs
            break
        return drawn

    def _row(self, sequence: Sequence) -> SamplingRow:
        owner = self._owner.get(sequence.request_id)
        if owner is None:  # a step that is only timed
            return SamplingRow.from_sequence(sequence)
        group, completion = owner
        if completion.plain_row is not None:
            return completion.plain_row
        mask = None if completion.matcher is None else completion.matcher.allowed()
        row = SamplingRow.from_sequence(sequence, group.rules, mask)
        if row.is_plain and completion.matcher is None:
            completion.plain_row = row
        return row

    def _end_alone(self, error: StepError) -> None:
        """Ends the sequences that an error names and no others; one that names none is of the whole step."""
        if not error.request_ids:
            raise error
        for name in error.request_ids:
            self.scheduler.finish(self._owner[name][1].sequence, FinishReason.ERROR)
        self.failure = error

    def _note_prompt_logprobs(self, step: ScheduledStep, logits: torch.Tensor) -> None:
        """Takes in the logits of every chunk's `prompt_positions`, one chunk after the other."""
        row = 0
        for chunk in step.prefill:
            if not chunk.prompt_positions:
                continue
            group = self._owner[chunk.sequence.request_id][0]
            top = group.params.prompt_logprobs
            for position in chunk.prompt_positions:
                # Others were given before a preemption.
                if top is not None and position + 1 == len(group.prompt_logprobs):
                    token_id = group.prompt_token_ids[position + 1]
                    group.prompt_logprobs.append(self._named(row_logprobs(logits[row], token_id, top)))
                row += 1

    def _accept(self, sequence: Sequence, token: int, logprobs: RowLogprobs | None, now: float) -> float | None:
        """Takes a token in; the seconds since the one before, or None for the first."""
        group, completion = self._owner[sequence.request_id]
        before, completion.last_token_ts = completion.last_token_ts, now
        if before is None:
            completion.first_token_ts = now
            cached = sequence.num_cached_tokens or 0
            self.stats.first_token(sequence.num_prompt_tokens, cached, now - group.queued_ts)
        self._write(completion, token, logprobs)
        return None if before is None else now - before

    def _write(self, completion: Completion, token: int, logprobs: RowLogprobs | None) -> None:
        sequence = completion.sequence
        if logprobs is not None:
            entries = self._named(logprobs)
            completion.logprobs.append(entries)
            completion.cumulative_logprob += entries[token].logprob
        detokenizer, params = completion.detokenizer, sequence.request.params
        if detokenizer is None:
            return
        is_stop_token = sequence.finish_reason is FinishReason.STOP
        if is_stop_token and not params.include_stop_str_in_output:
            return
        stop = detokenizer.add(token)
        if stop is not None and not is_stop_token and sequence.num_output_tokens > params.min_tokens:
            detokenizer.cut(stop, keep=params.include_stop_str_in_output)
            self.scheduler.finish(sequence, FinishReason.STOP, stop)

    def _advance(self, sequence: Sequence, token: int) -> None:
        """Tells the matcher of a drawn token; ends an output that is complete where no token stands for the end."""
        matcher = self._owner[sequence.request_id][1].matcher
        if matcher is None or sequence.is_finished:
            return
        try:
            matcher.advance(token)
            if matcher.is_exhausted():
                self.scheduler.finish(sequence, FinishReason.STOP)
        except StepError as error:
            self._end_alone(error)

    def _named(self, row: RowLogprobs) -> dict[int, Logprob]:
        name = self.tokenizer.decode_token if self._tokenizer_dir is not None else None
        return {
            token: Logprob(logprob, rank, name(token) if name else None)
            for token, logprob, rank in zip(row.token_ids, row.logprobs, row.ranks, strict=True)
        }

    def _fail(self, step: ScheduledStep, error: Exception) -> list[RequestOutput]:
        failed = self.scheduler.fail(step)
        names = list(dict.fromkeys(self._owner[sequence.request_id][0].request_id for sequence in failed))
        self.failure = StepError(f"a step failed: {error}", names)
        self.failure.__cause__ = error
        outputs = [self._output(self._groups[name]) for name in names]
        return [output for output in outputs if output is not None]

    def _output(self, group: Group) -> RequestOutput | None:
        if group.is_finished:
            self._forget(group)
        elif group.params.output_kind is RequestOutputKind.FINAL_ONLY:
            return None
        return output_of(group)

    def _forget(self, group: Group) -> None:
        """Counts a request that has ended; its id is free again."""
        now = time.monotonic()
        del self._groups[group.request_id]
        for completion in group.completions:
            sequence = completion.sequence
            del self._owner[sequence.request_id]
            times = CompletionTimes(
                queued=group.queued_ts,
                scheduled=completion.scheduled_ts,
                first_token=completion.first_token_ts,
                last_token=completion.last_token_ts,
                ended=now,
            )
            assert sequence.finish_reason is not None
            self.stats.completion_ended(
                sequence.finish_reason, sequence.num_prompt_tokens, sequence.num_output_tokens, times
            )
        self.stats.request_ended(group.params.n, group.params.max_tokens)


def _limit(name: str, asked: int | None, compiled: int, option: str) -> int:
    if asked is None:
        return compiled
    if asked > compiled:
        raise ConfigError(
            f"{name} is {asked}; the artifact was compiled for at most {compiled}: lower it, or compile with {option} {asked}"
        )
    return asked


def _num_blocks(manifest: Manifest, config: EngineConfig, max_num_seqs: int, max_seq_len: int) -> int:
    """Blocks besides the scratch block."""
    one = blocks_for(max_seq_len, manifest.kv.block_size)
    per_block = manifest.kv.bytes_per_block(manifest.model.dtype)
    if config.num_kv_blocks is not None:
        num_blocks = config.num_kv_blocks
    elif config.kv_cache_memory_bytes is not None:
        num_blocks = config.kv_cache_memory_bytes // per_block - 1
    else:
        num_blocks = min(one * max_num_seqs, available_memory_bytes() // 2 // per_block - 1)
    if num_blocks < one:
        raise CapacityError(
            f"the KV pool has {max(num_blocks, 0)} blocks; one sequence of max_seq_len {max_seq_len} needs {one}"
            f" ({one * per_block} bytes): give it more memory, or set a smaller max_seq_len"
        )
    return num_blocks
