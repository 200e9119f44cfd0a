"""The loop: requests in, tokens out. Joins scheduler, runner and sampler; owns the clock and the pool's size."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from collections.abc import Sequence as AnySequence
from typing import TYPE_CHECKING

import torch

from multibatch.artifact import Artifact
from multibatch.backends.base import DTYPES, LoadedPrograms
from multibatch.backends.load import load_programs
from multibatch.config import EngineConfig
from multibatch.cost import CostModel
from multibatch.engine_limits import limit_of, pool_blocks, prefill_tokens
from multibatch.errors import ConfigError, StepError
from multibatch.intake import Intake
from multibatch.kv.allocator import BlockAllocator
from multibatch.kv.pool import KVPool
from multibatch.kv.prefix import PrefixCache, PrefixCacheStats
from multibatch.ladder import DecoderLadder
from multibatch.launch import Launch
from multibatch.policies.build import build_policies
from multibatch.request import RequestOutput, Sequence
from multibatch.request_book import RequestBook
from multibatch.runner import Runner
from multibatch.sampler import SampledRows
from multibatch.sampling_params import SamplingParams
from multibatch.scheduled_step import ScheduledStep
from multibatch.scheduler import Scheduler, SchedulerConfig
from multibatch.selector import Selector
from multibatch.stats import EngineStats
from multibatch.step_sampler import StepSampler
from multibatch.step_times import StepTimes
from multibatch.tokenizer import Tokenizer, TokenizerFolder

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
            max_prefill_tokens=prefill_tokens(manifest, config.max_num_batched_tokens),
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
        self.stats = EngineStats(self.max_seq_len)
        self._tokenizer = TokenizerFolder(artifact.path / "tokenizer")
        self._intake = Intake(manifest, self.limits, self._tokenizer, config.seed)
        self._book = RequestBook(self.scheduler, self.stats, self._tokenizer)
        self._sampler = StepSampler(self._programs.passes, manifest.model.vocab_size, self._book)
        # None, or the step that runs while its caller does something else; and torch's threads, which rest meanwhile.
        self._ahead: Launch | None = None
        self._resting_threads: contextlib.ExitStack | None = None
        self._starts_ahead = self._programs.can_start if config.async_scheduling is None else config.async_scheduling
        if self._starts_ahead and not self._programs.can_start:
            raise ConfigError(
                "async_scheduling is True, and the artifact's programs run only while Python waits; allowed: None or False."
                " Compile it again with this version, or leave the option out"
            )
        self._registry: CollectorRegistry | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """Loaded at first use.

        Raises:
            RequestError: the artifact has none.
        """
        return self._tokenizer.get()

    @property
    def has_tokenizer(self) -> bool:
        """Whether the artifact has a tokenizer."""
        return self._tokenizer.exists

    @property
    def failure(self) -> StepError | None:
        """Why the latest failed step failed, until it is set to None; the engine goes on after it."""
        return self._book.failure

    @failure.setter
    def failure(self, failure: StepError | None) -> None:
        self._book.failure = failure

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
        group = self._intake.group(
            request_id,
            prompt_token_ids,
            params,
            prompt,
            number=self._book.num_added,
            priority=priority,
            cache_salt=cache_salt,
            arrived=arrived,
        )
        self._book.add(group)
        self.hold_next_step()

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request and frees its blocks at once; its last output, or None where it is not being served."""
        group = self._book.get(request_id)
        if group is None:
            return None
        self.hold_next_step()
        output = self._book.abort(group)
        self._ground()
        return output

    def step(self, arrivals: Callable[[], None] | None = None) -> list[RequestOutput]:
        """Ends one step; an output for each request that got a token or ended.

        A step that fails ends its own requests with finish_reason "error"; `failure` says why and the engine goes on.
        With `async_scheduling` the step after it runs already when this returns; what is added now is in the one after that.

        Args:
            arrivals: called once, before the next step is planned, to add requests that came while another ran. A step of the same
                rows may have followed by itself; who would be in it calls `hold_next_step` when a request comes. It must not raise:
                the outputs of the step before are not made yet.
        """
        launch = self._ahead
        if launch is None:
            if self._starts_ahead:
                self._programs.settle()  # a step that followed one whose end was interrupted
            if arrivals is not None:
                arrivals()
            launch = self._launch(starts=False)
        outputs = self._land(launch, arrivals)
        self._ground()
        self._offer_next()
        return outputs

    def hold_next_step(self) -> None:
        """Has the next step planned when the one that runs has ended, if it has not begun by itself by then; from any thread."""
        launch = self._ahead
        if launch is not None and launch.started is not None:
            launch.started.running.withdraw()

    def wait_ahead(self) -> None:
        """Waits for what runs while nobody waits for it; the next `step` tells what came of it."""
        self.hold_next_step()
        started = None if self._ahead is None else self._ahead.started
        while started is not None:
            with contextlib.suppress(RuntimeError):  # kept for the step
                self.runner.finish(started)
            started = None if started.result is None else started.result.followed
        self._wake_threads()

    def _ground(self) -> None:
        """Waits for the step that runs, where nobody wants it any more."""
        if not self.has_unfinished:
            self.wait_ahead()
            started = None if self._ahead is None else self._ahead.started
            while started is not None and started.result is not None:
                self.runner.record(started)
                started = started.result.followed
            self._ahead = None
            self._programs.settle()  # of a step whose launch was interrupted

    def _wake_threads(self) -> None:
        resting, self._resting_threads = self._resting_threads, None
        if resting is not None:
            resting.close()

    def _launch(self, *, starts: bool) -> Launch:
        """Plans the next step and begins it, if asked to."""
        step = self.scheduler.schedule()
        begin = time.monotonic()
        self._book.note_scheduled(step.sequences, begin)
        self.stats.num_preemptions += len(step.preempted)
        launch = Launch(step, begin)
        if starts:
            launch.rows = self._sampler.known_rows(step)
            try:
                launch.started = self.runner.start(step, self._sampler.draws(launch.rows))
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

    def _see_to_next(self, launch: Launch, ended: float, arrivals: Callable[[], None] | None) -> None:
        """Takes up the step that followed by itself when `launch` had ended, or begins one."""
        if launch.followed is None:
            self._launch_ahead(arrivals)
            return
        self._ahead = Launch(self.scheduler.schedule_again(launch.step), ended, launch.followed, rows=launch.next_rows)
        if arrivals is not None:
            arrivals()

    def _offer_next(self) -> None:
        """Lets the step that runs be followed by one of the same rows, where it will be: then nobody need plan it in between."""
        launch = self._ahead
        if launch is None or launch.rows is None or launch.started is None or launch.started.is_finished:
            return
        rows = self._sampler.known_rows(launch.step, ahead=1)
        if rows is None or not self._may_follow(launch.step) or not self.scheduler.reserve_again(launch.step):
            return
        sequences = launch.step.decode
        stops = {token for sequence in sequences for token in sequence.request.ending_token_ids}
        try:
            if self.runner.follow(launch.started, sequences, list(stops), self._sampler.draws(rows)):
                launch.next_rows = rows
        except torch.OutOfMemoryError:  # on a device; it is told where the step is begun and still finds no room
            return

    def _may_follow(self, step: ScheduledStep) -> bool:
        """Whether the rows of a step may be decoded again before anybody has seen its tokens."""
        return True

    def _land(self, launch: Launch, arrivals: Callable[[], None] | None) -> list[RequestOutput]:
        """Ends a step, sees to the next one and tells what came of the first."""
        step, landing = launch.step, time.monotonic()
        predicted = self._step_times.predict(step)
        wanted = [sequence for sequence in step.sampled if not sequence.is_finished]
        try:
            if launch.error is not None:
                raise launch.error
            sampled = self.compute(step, launch)
        except (RuntimeError, StepError) as error:
            self._ahead = None
            self._programs.settle()
            outputs = self._book.fail(self.scheduler.fail(step), error)
            self._launch_ahead(arrivals)
            return outputs
        self._ahead = None
        live = [sequence for sequence in step.sampled if not sequence.is_finished]
        self.scheduler.update(step, sampled.token_ids)
        now = time.monotonic()
        # What passed between its end and this is none of the step's time.
        started = launch.started
        ended, idle = (now, 0.0) if started is None else (started.ended, started.idle_seconds)
        ms = (ended - launch.begin - idle + now - max(ended, landing)) * 1000
        self.scheduler.step_done(step, ms)
        self._see_to_next(launch, ended, arrivals)
        if started is not None:
            self.runner.record(started)
        self.stats.iteration_tokens.observe(step.num_prefill_tokens + len(step.decode))
        if predicted is not None:
            self._compare(step, predicted, ms)
        self._accept(step, live, sampled, now)
        return self._book.outputs_of(wanted)

    def _accept(self, step: ScheduledStep, live: list[Sequence], sampled: SampledRows, now: float) -> None:
        """Takes in the tokens of the sequences that wait for one."""
        waits: dict[float, int] = {}
        for sequence, token, logprobs in zip(step.sampled, sampled.token_ids, sampled.logprobs, strict=True):
            if sequence in live:
                wait = self._book.accept(sequence, token, logprobs, now)
                if wait is not None:
                    waits[wait] = waits.get(wait, 0) + 1
        for wait, num_tokens in waits.items():
            self.stats.next_tokens(wait, num_tokens)

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
            result = self.runner.finish(launch.started)
            logits = result.logits
            sampled = None if launch.rows is None else self._sampler.take(step, launch.rows, result)
            if sampled is not None:
                return sampled
        with self._programs.own_threads():
            return self._sampler.sample(step, self.runner.run(step) if logits is None else logits)
