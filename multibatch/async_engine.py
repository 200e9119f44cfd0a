"""`AsyncEngine`: generation for asyncio with vLLM's names, over one engine on a thread of its own."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args

from multibatch.engine import Engine
from multibatch.engine_thread import EngineThread, PauseMode, Submission
from multibatch.errors import ConfigError, EngineDeadError, RequestError
from multibatch.open_engine import open_engine
from multibatch.prompts import EncodedPrompt, Prompt, encode_prompt, is_text
from multibatch.request import RequestOutput
from multibatch.sampling_params import SamplingParams
from multibatch.streams import Stream
from multibatch.tokenizer import Tokenizer

_USUAL_BATCHED_TOKENS = 512
"""Of the prompts of a step: fewer cost a prompt time (2.7 % against 1,024, Zen 5), more make the others' next tokens late."""
_EXIT_SECONDS = 60.0
"""How long the end of the process waits for the step that runs: a thread must not be torn out of a program."""


class AsyncEngine:
    """Serves any number of coroutines at once; `LLM` for asyncio.

        async with AsyncEngine("artifacts/NAME") as engine:
            async for output in engine.generate("Hello", SamplingParams(max_tokens=64), "request-1"):
                print(output.outputs[0].text)

    Args:
        model: an artifact's folder, or a Hugging Face model's folder or hub id.
        max_queued_requests: sequences that may wait beyond the `max_num_seqs` that run, each of a request's n being one;
            None: any number.
        options: those of `LLM`; `max_num_batched_tokens` is 512 here, or less where the artifact has less.

    Raises:
        ArtifactError: the folder does not open.
        ConfigError: an option outside what is allowed, or not known.
    """

    def __init__(self, model: str | Path, *, max_queued_requests: int | None = None, **options: Any) -> None:
        _check_queue(max_queued_requests)
        _, engine = open_engine(model, options, usual_batched_tokens=_USUAL_BATCHED_TOKENS)
        self._start(engine, max_queued_requests)

    @classmethod
    def from_engine(cls, engine: Engine, *, max_queued_requests: int | None = None) -> Self:
        """Over an engine that is there already; nobody else may use it from now on."""
        _check_queue(max_queued_requests)
        self = cls.__new__(cls)
        self._start(engine, max_queued_requests)
        return self

    def _start(self, engine: Engine, max_queued_requests: int | None) -> None:
        self._engine = engine
        # Loaded now, so that neither the first request nor the event loop waits for it.
        self._tokenizer = engine.tokenizer if engine.has_tokenizer else None
        # A tokenizer serves one thread at a time, and a long text takes it longer than an event loop should stand still.
        self._encoder = ThreadPoolExecutor(1, "multibatch-tokenizer")
        self._thread = EngineThread(engine, max_queued_requests)
        # When this object goes, or the process ends, without a shutdown.
        self._finalizer = weakref.finalize(self, self._thread.stop, _EXIT_SECONDS)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None,
        request_id: str,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Continues one prompt; yields an output whenever there are new tokens, the last one being `finished`.

        A consumer that is slower than the engine gets several tokens in one output and misses none. One that goes away
        (a cancelled task, `aclose`, `break`) ends its request, whose blocks are free before the next step.

        Args:
            prompt: text, token ids, or a dict of them (see `multibatch.prompts.Prompt`).
            sampling_params: None: `SamplingParams()`. Its `output_kind` says what an output contains.
            request_id: of no other request that is being served.
            priority: lower ones first, with `scheduling_policy="priority"`.

        Raises:
            RequestError: it can never run here.
            QueueFullError: as many as may wait do.
            StepError: a step failed while this request was in it; others go on.
            EngineDeadError: the engine was shut down, or its thread died.
        """
        arrived = time.monotonic()
        params = _checked(sampling_params, request_id, priority)
        self._thread.check(request_id)
        encoded = await self._encode(prompt)
        stream = Stream(params.output_kind, asyncio.get_running_loop())
        submission = Submission(request_id, encoded, params, priority, arrived, stream)
        self._thread.submit(submission)
        try:
            while True:
                output = await stream.take()
                yield output
                if output.finished:
                    return
        finally:
            self._thread.drop(submission)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Ends requests; each yields a last output with finish_reason "abort". Unknown ids are passed over."""
        names = [request_id] if isinstance(request_id, str) else list(request_id)
        try:
            future = self._thread.abort(names)
        except EngineDeadError:
            return  # which ended them all
        await asyncio.wrap_future(future)

    async def pause_generation(self, *, mode: PauseMode = "abort", clear_cache: bool = True) -> None:
        """Returns once no step runs and none will until `resume_generation`. Requests that come meanwhile wait.

        Args:
            mode: what happens to those that are there: abort ends them with finish_reason "abort", wait lets them end,
                keep has them go on afterwards where they were.
            clear_cache: also forgets every cached prefix; not with keep.

        Raises:
            ConfigError: another mode.
            EngineDeadError: the engine serves no more.
        """
        if mode not in get_args(PauseMode):
            raise ConfigError(f"mode is {mode!r}; allowed: {', '.join(get_args(PauseMode))}")
        done = await asyncio.wrap_future(self._thread.pause(mode, clear_cache))
        await asyncio.wrap_future(done)

    async def resume_generation(self) -> None:
        """Goes on after `pause_generation`, with what was kept and what came meanwhile."""
        await asyncio.wrap_future(self._thread.resume())

    async def is_paused(self) -> bool:
        """Whether `pause_generation` was called, and `resume_generation` not yet."""
        return self._thread.is_paused

    async def reset_prefix_cache(self) -> bool:
        """Forgets every cached prefix; True, as in vLLM, because it always can."""
        await asyncio.wrap_future(self._thread.reset_prefix_cache())
        return True

    async def check_health(self) -> None:
        """Checks that requests are served.

        Raises:
            EngineDeadError: the engine was shut down, or its thread died; its cause says of what.
        """
        self._thread.check()

    async def get_tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self.tokenizer.hf

    @property
    def tokenizer(self) -> Tokenizer:
        """The artifact's.

        Raises:
            RequestError: it has none.
        """
        if self._tokenizer is None:
            raise RequestError("the artifact has no tokenizer; give prompts as token ids, with detokenize=False")
        return self._tokenizer

    @property
    def num_unfinished(self) -> int:
        """Sequences that run or wait, each of a request's n being one."""
        return self._thread.num_unfinished

    def metrics_text(self) -> str:
        """What was done since the start and what is going on, as Prometheus text; see `multibatch.exposition`."""
        return self._engine.metrics_text()

    def shutdown(self) -> None:
        """Ends the engine after the step that runs, and every request with an `EngineDeadError`. Does not wait."""
        self._finalizer.detach()
        self._thread.stop()
        self._encoder.shutdown(wait=False)

    async def wait_closed(self) -> None:
        """Returns once the engine's thread has ended."""
        await asyncio.wrap_future(self._thread.closed)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()
        await self.wait_closed()

    async def _encode(self, prompt: Prompt) -> EncodedPrompt:
        if not is_text(prompt):
            return encode_prompt(prompt, self._tokens_of)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoder, encode_prompt, prompt, self._tokens_of)

    def _tokens_of(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)


def _checked(sampling_params: Any, request_id: Any, priority: Any) -> SamplingParams:
    """The parameters, once the types of the three are right: what the engine's thread is given must not surprise it."""
    if not isinstance(request_id, str) or not request_id:
        raise RequestError(f"request_id is {request_id!r}; allowed: a string that is not empty")
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise RequestError(f"request {request_id!r}: priority is {priority!r}; allowed: an int")
    if sampling_params is not None and not isinstance(sampling_params, SamplingParams):
        raise RequestError(
            f"request {request_id!r}: sampling_params is of type {type(sampling_params).__name__};"
            " allowed: SamplingParams, or None"
        )
    return sampling_params or SamplingParams()


def _check_queue(max_queued_requests: Any) -> None:
    if max_queued_requests is None:
        return
    if isinstance(max_queued_requests, bool) or not isinstance(max_queued_requests, int) or max_queued_requests < 0:
        raise ConfigError(f"max_queued_requests is {max_queued_requests!r}; allowed: an int >= 0, or None")
