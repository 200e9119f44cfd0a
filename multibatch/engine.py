"""The loop: requests in, tokens out. Joins scheduler, runner and sampler; owns the clock and the pool's size."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable
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
from multibatch.engine_limits import check_request, limit_of, pool_blocks
from multibatch.errors import ConfigError, RequestError, StepError
from multibatch.groups import Completion, Group, output_of
from multibatch.kv.allocator import BlockAllocator
from multibatch.kv.pool import KVPool
from multibatch.kv.prefix import PrefixCache, PrefixCacheStats
from multibatch.ladder import DecoderLadder
from multibatch.launch import Launch
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
        self.max_num_seqs = limit_of("max_num_seqs", config.max_num_seqs, manifest.max_num_seqs, "--max-num-seqs")
        self.max_seq_len = limit_of("max_seq_len", config.max_seq_len, manifest.max_seq_len, "--max-seq-len")
        self._programs = programs or load_programs(artifact, config.num_threads)
        num_blocks = pool_blocks(manifest, config, self.max_num_seqs, self.max_seq_len)
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
        # None, or the step that runs while its caller does something else; and torch's threads, which rest meanwhile.
        self._ahead: Launch | None = None
        self._resting_threads: contextlib.ExitStack | None = None
        self._starts_ahead = self._programs.can_start if config.async_scheduling is None else config.async_scheduling
        if self._starts_ahead and not self._programs.can_start:
            raise ConfigError(
                "async_scheduling is True, and the artifact's programs run only while Python waits; allowed: None or False."
                " Compile it again with this version, or leave the option out"
            )
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

    @property
    def is_ahead(self) -> bool:
        """Whether a step runs while nobody waits for it."""
        return self._ahead is not None

    @property
    def num_unfinished(self) -> int:
        """Sequences that run or wait."""
        return len(self.scheduler.running) + len(self.scheduler.waiting)

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
        if request_id in self._groups:
            raise RequestError(f"request {request_id!r} is being served already; give each request its own id")
        check_request(request_id, prompt_token_ids, params, self.manifest, self.max_seq_len)
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
        output = self._output(group)
        self._ground()
        return output

    def step(self, arrivals: Callable[[], None] | None = None) -> list[RequestOutput]:
        """Ends one step; an output for each request that got a token or ended.

        A step that fails ends its own requests with finish_reason "error"; `failure` says why and the engine goes on.
        With `async_scheduling` the step after it runs already when this returns; what is added now is in the one after that.

        Args:
            arrivals: called before a step is planned, to add requests that came while another ran. It must not raise: the outputs
                of the step before are not made yet.
        """
        launch = self._ahead
        if launch is None:
            if arrivals is not None:
                arrivals()
            launch = self._launch(starts=False)
        outputs = self._land(launch, arrivals)
        self._ground()
        if self._ahead is not None:
            self._ahead.rows = self._plain_rows(self._ahead.step)
        return outputs

    def wait_ahead(self) -> None:
        """Waits for the step that runs while nobody waits for it; the next `step` tells what came of it."""
        launch = self._ahead
        if launch is None or launch.started is None or launch.found is not None or launch.error is not None:
            return
        try:
            launch.found = self.runner.finish(launch.started)
        except RuntimeError as error:
            launch.error = error
        launch.waited = time.monotonic()
        self._wake_threads()

    def _ground(self) -> None:
        """Waits for the step that runs, where nobody wants it any more."""
        if not self.has_unfinished:
            self.wait_ahead()
            if self._ahead is not None and self._ahead.found is not None and self._ahead.started is not None:
                self.runner.record(self._ahead.started)
            self._ahead = None
            self._programs.settle()  # of a step whose launch was interrupted
            self._wake_threads()

    def _wake_threads(self) -> None:
        resting, self._resting_threads = self._resting_threads, None
        if resting is not None:
            resting.close()

    def _launch(self, *, starts: bool) -> Launch:
        """Plans the next step and begins it, if asked to."""
        step = self.scheduler.schedule()
        begin = time.monotonic()
        for sequence in step.sequences:
            completion = self._owner[sequence.request_id][1]
            if completion.scheduled_ts is None:
                completion.scheduled_ts = begin
        self.stats.num_preemptions += len(step.preempted)
        launch = Launch(step, begin)
        if starts:
            try:
                launch.started = self.runner.start(step)
            except RuntimeError as error:
                launch.error = error
        return launch

    def _launch_ahead(self, arrivals: Callable[[], None] | None) -> None:
        """Begins the next step, if there is one and it can run beside Python."""
        if not self._starts_ahead:
            return
        if arrivals is not None:
            arrivals()
        if self.has_unfinished:
            if self._resting_threads is None:
                self._resting_threads = contextlib.ExitStack()
                self._resting_threads.enter_context(self._programs.own_threads())
            self._ahead = self._launch(starts=True)

    def _land(self, launch: Launch, arrivals: Callable[[], None] | None) -> list[RequestOutput]:
        """Ends a step, begins the next one and tells what came of the first."""
        step = launch.step
        predicted = self._step_times.predict(step)
        wanted = [sequence for sequence in step.sampled if not sequence.is_finished]
        try:
            if launch.error is not None:
                raise launch.error
            if launch.waited is not None:
                launch.begin += time.monotonic() - launch.waited
            sampled = self.compute(step, launch)
        except (RuntimeError, StepError) as error:
            self._ahead = None
            outputs = self._fail(step, error)
            self._launch_ahead(arrivals)
            return outputs
        self._ahead = None
        live = [sequence for sequence in step.sampled if not sequence.is_finished]
        self.scheduler.update(step, sampled.token_ids)
        now = time.monotonic()
        ms = (now - launch.begin - launch.idle_seconds) * 1000
        self.scheduler.step_done(step, ms)
        self._launch_ahead(arrivals)
        if launch.started is not None:
            self.runner.record(launch.started)
        self.stats.iteration_tokens.observe(step.num_prefill_tokens + len(step.decode))
        if predicted is not None:
            self._compare(step, predicted, ms)
        waits: dict[float, int] = {}
        for sequence, token, logprobs in zip(step.sampled, sampled.token_ids, sampled.logprobs, strict=True):
            if sequence in live:
                wait = self._accept(sequence, token, logprobs, now)
                self._advance(sequence, token)
                if wait is not None:
                    waits[wait] = waits.get(wait, 0) + 1
        for wait, num_tokens in waits.items():
            self.stats.next_tokens(wait, num_tokens)
        owners = [owner for sequence in wanted if (owner := self._owner_of(sequence)) is not None]
        return self._outputs(group.request_id for group, _ in owners)

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

    def compute(self, step: ScheduledStep, launch: Launch | None = None) -> SampledRows:
        """Runs the programs, or waits for those that were started, and draws the tokens, in the order of `step.sampled`.

        Queues and requests do not change. Raises what the programs and the sampler do.
        """
        logits: torch.Tensor | None = None
        if launch is not None and launch.started is not None:
            logits, highest = launch.found or self.runner.finish(launch.started)
            sampled = self._take(launch, highest)
            if sampled is not None:
                return sampled
        with self._programs.own_threads():
            if logits is None:
                logits = self.runner.run(step)
            num_sampled = len(step.sampled)
            if logits.shape[0] > num_sampled:
                self._note_prompt_logprobs(step, logits[num_sampled:])
                logits = logits[:num_sampled]
            return self._sample(step.sampled, logits)

    def _take(self, launch: Launch, highest: torch.Tensor | None) -> SampledRows | None:
        """Takes the tokens that the step found itself; None where there is more to it."""
        if launch.rows is None or highest is None or len(highest) != len(launch.rows):  # more: of prompt_logprobs
            return None
        for sequence in launch.step.sampled:
            if sequence.is_finished:
                return None
        try:
            return self._sampler.take(highest, launch.rows)
        except StepError:  # of single rows; `_sample` ends those
            return None

    def _plain_rows(self, step: ScheduledStep) -> list[SamplingRow] | None:
        """See `Launch.rows`."""
        rows = []
        for sequence in step.sampled:
            owner = self._owner_of(sequence)
            if owner is None or owner[1].plain_row is None or owner[0].params.logprobs is not None:
                return None
            rows.append(owner[1].plain_row)
        return rows or None

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
        owner = self._owner_of(sequence)
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

    def _owner_of(self, sequence: Sequence) -> tuple[Group, Completion] | None:
        """None where the request was ended while its step ran, whoever has its id now."""
        owner = self._owner.get(sequence.request_id)
        return owner if owner is not None and owner[1].sequence is sequence else None

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
            owner = self._owner_of(chunk.sequence)
            if owner is None:
                row += len(chunk.prompt_positions)
                continue
            group, top = owner[0], owner[0].params.prompt_logprobs
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
        self._programs.settle()
        failed = self.scheduler.fail(step)
        names = list(dict.fromkeys(self._owner[sequence.request_id][0].request_id for sequence in failed))
        self.failure = StepError(f"a step failed: {error}", names)
        self.failure.__cause__ = error
        return self._outputs(names)

    def _outputs(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        """What is to be told of these requests, once for each."""
        found = [self._output(self._groups[name]) for name in dict.fromkeys(request_ids)]
        return [output for output in found if output is not None]

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
