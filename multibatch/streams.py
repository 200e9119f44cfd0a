"""How outputs get from the thread that makes them to the coroutines that wait for them. Knows no engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from dataclasses import replace

from multibatch.request import CompletionOutput, RequestOutput
from multibatch.sampling_params import RequestOutputKind


class Stream:
    """The outputs of one request, on their way from one thread to one consumer on an event loop.

    At most one output waits. What comes while the consumer is behind is merged into it, so none is lost, and a slow
    consumer costs neither memory nor anybody's time.
    """

    def __init__(self, kind: RequestOutputKind, loop: asyncio.AbstractEventLoop) -> None:
        """For outputs of `kind` to a consumer on `loop`."""
        self.loop = loop
        self._kind = kind
        self._lock = threading.Lock()
        self._is_woken = False
        self._event = asyncio.Event()
        self._output: RequestOutput | None = None
        self._error: BaseException | None = None

    def put(self, output: RequestOutput) -> bool:
        """Hands an output over, from any thread. Returns whether the consumer has to be woken (see `wake`)."""
        with self._lock:
            self._output = output if self._output is None else merged(self._output, output, self._kind)
            return self._wakes()

    def fail(self, error: BaseException) -> bool:
        """Has the consumer raise `error` once it has taken every output; as `put` otherwise."""
        with self._lock:
            self._error = error
            return self._wakes()

    async def take(self) -> RequestOutput:
        """The next output, as soon as there is one.

        Raises:
            BaseException: what `fail` was given.
        """
        while True:
            with self._lock:
                output, self._output = self._output, None
                error = self._error
                self._is_woken = False
                self._event.clear()
            if output is not None:
                return output
            if error is not None:
                raise error
            await self._event.wait()

    def wake_here(self) -> None:
        """Wakes the consumer; on its event loop only."""
        self._event.set()

    def _wakes(self) -> bool:
        was_woken, self._is_woken = self._is_woken, True
        return not was_woken


def wake(streams: Iterable[Stream]) -> list[Stream]:
    """Wakes consumers from another thread, with one call for each event loop.

    Returns:
        Those whose event loop is closed: nobody will take their outputs.
    """
    by_loop: dict[asyncio.AbstractEventLoop, list[Stream]] = {}
    for stream in streams:
        by_loop.setdefault(stream.loop, []).append(stream)
    gone: list[Stream] = []
    for loop, sleepers in by_loop.items():
        try:
            loop.call_soon_threadsafe(_wake_all, sleepers)
        except RuntimeError:  # the loop is closed
            gone += sleepers
    return gone


def merged(earlier: RequestOutput, later: RequestOutput, kind: RequestOutputKind) -> RequestOutput:
    """One output that says what two successive ones of a request said: DELTA adds up, of the others the later has it all."""
    if kind is not RequestOutputKind.DELTA:
        return later
    outputs = [_joined(a, b) for a, b in zip(earlier.outputs, later.outputs, strict=True)]
    return replace(later, outputs=outputs)


def _joined(earlier: CompletionOutput, later: CompletionOutput) -> CompletionOutput:
    logprobs = None
    if earlier.logprobs is not None and later.logprobs is not None:
        logprobs = earlier.logprobs + later.logprobs
    return replace(
        later,
        text=earlier.text + later.text,
        token_ids=earlier.token_ids + later.token_ids,
        logprobs=logprobs,
    )


def _wake_all(streams: list[Stream]) -> None:
    for stream in streams:
        stream.wake_here()
