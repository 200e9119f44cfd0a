"""One thread that steps an engine and is alone in calling it. What others want of it comes through an inbox.

Callers never wait for the thread: they leave a command under a lock that is held for microseconds, and hear of what
came of it through a future or through the `Stream` of their request. While there is nothing to do the thread sleeps.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from multibatch.engine import Engine
from multibatch.errors import EngineDeadError, QueueFullError, RequestError, StepError
from multibatch.prompts import EncodedPrompt
from multibatch.request import RequestOutput
from multibatch.sampling_params import SamplingParams
from multibatch.streams import Stream, wake

PauseMode = Literal["abort", "wait", "keep"]

_LOG = logging.getLogger(__name__)
_SHUT_DOWN = "the engine was shut down"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class Submission:
    """A request, and where its outputs go."""

    request_id: str
    prompt: EncodedPrompt
    params: SamplingParams
    priority: int
    arrived: float
    """When it came, of `time.monotonic`."""
    stream: Stream


class EngineThread:
    """Owns the thread of one engine. Public methods may be called from any thread; the engine itself from none."""

    def __init__(self, engine: Engine, max_queued: int | None = None) -> None:
        """Starts the thread.

        Args:
            engine: nobody else may call it from now on.
            max_queued: sequences that may be unfinished beyond those that can run at once; None: any number.
        """
        self._engine = engine
        self._limit = None if max_queued is None else engine.max_num_seqs + max_queued
        # Guarded by the condition, which is signalled when the thread may have something to do:
        self._changed = threading.Condition()
        self._inbox: deque[_Command] = deque()
        self._unfinished: dict[str, Submission] = {}
        self._num_unfinished = 0
        self._is_stopping = False
        self._end: BaseException | str | None = None
        # Touched by the thread alone:
        self._is_paused = False
        self._held: dict[str, Submission] = {}
        self._drain: list[tuple[Future[None], bool]] = []
        self._to_wake: list[Stream] = []
        self.closed: Future[None] = Future()
        self.closed.set_running_or_notify_cancel()
        self._thread = threading.Thread(target=self._run, name="multibatch-engine", daemon=True)
        self._thread.start()

    @property
    def num_unfinished(self) -> int:
        """Sequences that run or wait, each of a request's n being one."""
        return self._num_unfinished

    @property
    def is_paused(self) -> bool:
        """Whether requests that come now wait for `resume`."""
        return self._is_paused

    def check(self, request_id: str | None = None) -> None:
        """Checks that the thread serves.

        Raises:
            EngineDeadError: it has ended, or was told to.
        """
        if self._end is not None or self._is_stopping:
            raise _dead(self._end or _SHUT_DOWN, request_id)

    def submit(self, submission: Submission) -> None:
        """Queues a request; whether it can run at all its stream will tell.

        Raises:
            RequestError: its id is in use.
            QueueFullError: too many are unfinished.
            EngineDeadError: the thread has ended.
        """
        name, n = submission.request_id, submission.params.n
        with self._changed:
            self.check(name)
            if name in self._unfinished:
                raise RequestError(f"request {name!r} is being served already; give each request its own id")
            if self._limit is not None and self._num_unfinished + n > self._limit:
                raise QueueFullError(
                    f"request {name!r} ({n} sequences): {self._num_unfinished} sequences run or wait; allowed:"
                    f" {self._limit}, which are max_num_seqs {self._engine.max_num_seqs} and max_queued_requests"
                    f" {self._limit - self._engine.max_num_seqs}. Try again later, or raise max_queued_requests",
                    self._num_unfinished,
                    self._limit,
                )
            self._unfinished[name] = submission
            self._num_unfinished += n
            self._post(partial(self._take_in, submission), is_arrival=True)
        self._engine.hold_next_step()

    def drop(self, submission: Submission) -> None:
        """Ends a request whose consumer is gone, if it has not ended."""
        with self._changed:
            if self._unfinished.get(submission.request_id) is submission:
                self._post(partial(self._drop, submission))

    def ask(self, action: Callable[[], _T]) -> Future[_T]:
        """Has the thread call `action` between two steps."""
        future: Future[_T] = Future()
        with self._changed:
            self.check()
            self._post(action, future)
        return future

    def abort(self, request_ids: Iterable[str]) -> Future[None]:
        """Ends requests with finish_reason "abort", their blocks freed; unknown ones are passed over."""
        names = list(request_ids)
        return self.ask(partial(self._abort_all, names))

    def pause(self, mode: PauseMode, clear_cache: bool) -> Future[Future[None]]:
        """Stops stepping (see `AsyncEngine.pause_generation`); the inner future is done once nothing is stepped any more."""
        return self.ask(partial(self._pause, mode, clear_cache))

    def resume(self) -> Future[None]:
        """Goes on, with what was kept and what came meanwhile."""
        return self.ask(self._resume)

    def reset_prefix_cache(self) -> Future[None]:
        """See `Engine.reset_prefix_cache`."""
        return self.ask(self._engine.reset_prefix_cache)

    def stop(self, timeout: float | None = 0.0) -> None:
        """Has the thread end after its step, with every request; waits for it so long at most (None: until it has)."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    # What follows runs on the thread.

    def _run(self) -> None:
        why: BaseException | str = _SHUT_DOWN
        try:
            while self._wait_for_work():
                self._step()
                self._wake()
            for submission in self._submissions():
                self._engine.abort(submission.request_id)
        except BaseException as error:  # whatever it was, nobody may be left waiting
            _LOG.critical("the engine's thread died", exc_info=True)
            why = error
        self._close_all(why)
        self._wake()
        self.closed.set_result(None)

    def _wait_for_work(self) -> bool:
        """Does what the inbox says and sleeps until there is a step to run; False once there shall be none."""
        while True:
            with self._changed:
                while not (self._inbox or self._is_stopping or self._has_work()):
                    self._changed.wait()
                if self._is_stopping:
                    return False
                command = self._inbox.popleft() if self._inbox else None
            if command is None:
                return True
            _call(command)
            self._wake()

    def _has_work(self) -> bool:
        return self._engine.has_unfinished and (not self._is_paused or bool(self._drain))

    def _step(self) -> None:
        engine = self._engine
        engine.failure = None
        outputs = engine.step(self._take_arrivals)
        failure: StepError | None = engine.failure
        failed = () if failure is None else failure.request_ids
        for output in outputs:
            if output.request_id not in failed:
                self._put(output)
        for name in failed:
            engine.abort(name)  # completions of it that were not in this step
            error = StepError(str(failure), failed)
            error.__cause__ = failure.__cause__ if failure is not None else None
            self._fail(name, error)
        self._note_drained()

    def _take_arrivals(self) -> None:
        """Takes in the requests that came first, up to the first command that is none."""
        while True:
            with self._changed:
                if self._is_stopping or not self._inbox or not self._inbox[0].is_arrival:
                    return
                command = self._inbox.popleft()
            _call(command)

    def _put(self, output: RequestOutput) -> None:
        submission = self._unfinished.get(output.request_id)
        if submission is None:
            return
        if output.finished:
            self._close(submission)
        if submission.stream.put(output):
            self._to_wake.append(submission.stream)

    def _fail(self, name: str, error: BaseException) -> None:
        submission = self._unfinished.get(name)
        if submission is not None:
            self._close(submission)
            if submission.stream.fail(error):
                self._to_wake.append(submission.stream)

    def _close(self, submission: Submission) -> None:
        with self._changed:
            del self._unfinished[submission.request_id]
            self._num_unfinished -= submission.params.n

    def _take_in(self, submission: Submission) -> None:
        if self._is_paused:
            self._held[submission.request_id] = submission
        else:
            self._add(submission)

    def _add(self, submission: Submission) -> None:
        prompt = submission.prompt
        try:
            self._engine.add_request(
                submission.request_id,
                prompt.token_ids,
                submission.params,
                prompt.text,
                priority=submission.priority,
                cache_salt=prompt.cache_salt,
                arrived=submission.arrived,
            )
        except Exception as error:  # what is wrong with one request must not end the others
            self._engine.abort(submission.request_id)
            self._fail(submission.request_id, error)

    def _abort(self, name: str) -> None:
        held = self._held.pop(name, None)
        if held is not None:
            self._add(held)  # its last output is then made like any other's
        output = self._engine.abort(name)
        if output is not None:
            self._put(output)
        self._note_drained()

    def _abort_all(self, names: Iterable[str]) -> None:
        for name in names:
            self._abort(name)

    def _drop(self, submission: Submission) -> None:
        if self._unfinished.get(submission.request_id) is submission:
            self._abort(submission.request_id)

    def _pause(self, mode: PauseMode, clear_cache: bool) -> Future[None]:
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # from here on nobody can cancel it, so setting it cannot fail
        self._is_paused = True
        if mode == "abort":
            self._abort_all([s.request_id for s in self._submissions() if s.request_id not in self._held])
        if mode == "keep":
            self._engine.wait_ahead()
            done.set_result(None)
        else:
            self._drain.append((done, clear_cache))
            self._note_drained()
        return done

    def _resume(self) -> None:
        self._is_paused = False
        held, self._held = self._held, {}
        for submission in held.values():
            self._add(submission)
        self._note_drained()

    def _note_drained(self) -> None:
        """Tells those who wait for a pause that nothing runs any more, or that there is no pause."""
        if self._drain and not (self._is_paused and self._engine.has_unfinished):
            drained, self._drain = self._drain, []
            if self._is_paused and any(clears for _, clears in drained):
                self._engine.reset_prefix_cache()
            for done, _ in drained:
                done.set_result(None)

    def _wake(self) -> None:
        if self._to_wake:
            streams, self._to_wake = self._to_wake, []
            gone = wake(streams)
            if gone:
                self._abort_all([s.request_id for s in self._submissions() if s.stream in gone])

    def _submissions(self) -> list[Submission]:
        with self._changed:
            return list(self._unfinished.values())

    def _close_all(self, why: BaseException | str) -> None:
        with self._changed:
            self._end = why
            submissions, self._unfinished = list(self._unfinished.values()), {}
            self._num_unfinished = 0
            asked = [command.future for command in self._inbox if command.future is not None]
            self._inbox.clear()
        for submission in submissions:
            if submission.stream.fail(_dead(why, submission.request_id)):
                self._to_wake.append(submission.stream)
        for future in asked:
            if future.set_running_or_notify_cancel():
                future.set_exception(_dead(why))
        for done, _ in self._drain:
            done.set_exception(_dead(why))

    def _post(self, action: Callable[[], Any], future: Future[Any] | None = None, *, is_arrival: bool = False) -> None:
        self._inbox.append(_Command(action, future, is_arrival))
        self._changed.notify()


@dataclass(frozen=True, slots=True)
class _Command:
    """What somebody wants of the thread."""

    action: Callable[[], Any]
    future: Future[Any] | None
    is_arrival: bool
    """It only takes a request in, which the engine allows within a step."""


def _call(command: _Command) -> None:
    action, future = command.action, command.future
    if future is None:
        action()
    elif future.set_running_or_notify_cancel():
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)
            raise


def _dead(why: BaseException | str, request_id: str | None = None) -> EngineDeadError:
    """The error for one request, or for whoever else asks."""
    reason = why if isinstance(why, str) else f"the engine's thread died of {type(why).__name__}: {why}"
    whose = "" if request_id is None else f"request {request_id!r} is not served: "
    error = EngineDeadError(f"{whose}{reason}; start another engine", request_id)
    error.__cause__ = None if isinstance(why, str) else why
    return error
