"""Cases of `peers.py`, and the processes of the engines that run them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import click

OURS = "multibatch"
Prompts = list[list[int]]


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table: requests, how many may run at once, and what is counted."""

    name: str
    work: str
    prompts: Prompts
    lengths: list[int]
    running: int

    def rate(self, answer: Mapping[str, list[float]]) -> float:
        """Tokens per second: decoded ones, prompt tokens, or all that came out."""
        if self.work == "w1":
            return (sum(self.lengths) - len(self.lengths)) / (max(answer["last"]) - max(answer["first"]))
        tokens = sum(map(len, self.prompts)) if self.work == "prefill" else sum(self.lengths)
        return tokens / max(answer["last"])

    @property
    def longest(self) -> int:
        """Positions of the longest request."""
        return max(len(prompt) + length for prompt, length in zip(self.prompts, self.lengths, strict=True))

    def ragged(self, answer: Mapping[str, list[float]]) -> float:
        """Share of W1's decode time in which some requests had ended already: not a batch of that size any more."""
        if self.work != "w1":
            return 0.0
        return (max(answer["last"]) - min(answer["last"])) / (max(answer["last"]) - max(answer["first"]))


class Worker:
    """An engine's process, in a session of its own so that its children end with it.

    It stands still, with its children, but while it is asked something: what an idle engine's threads would do costs the
    others nothing.
    """

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], timeout: float) -> None:
        self.name, self._timeout = name, timeout
        self._log: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - open while the process is
        before = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.version: str = self._read()["version"]
        self.start_s = time.perf_counter() - before  # until it takes requests
        self._signal(signal.SIGSTOP)

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Sends a job and waits for the answer."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        self._signal(signal.SIGSTOP)
        return answer

    def run(self, case: Case, most_tokens: int | None = None) -> dict[str, Any]:
        """Runs a case, or its first requests with few tokens each; every token asked for must come."""
        prompts, lengths = case.prompts, case.lengths
        if most_tokens is not None:
            prompts = prompts[: case.running + 1]
            lengths = [min(n, most_tokens) for n in lengths[: len(prompts)]]
        answer = self.ask({"prompts": prompts, "lengths": lengths})
        for i, (got, length) in enumerate(zip(answer["num_tokens"], lengths, strict=True)):
            if got != length:
                raise click.ClickException(f"{self.name}, {case.name}: request {i} got {got} tokens of {length}")
        return answer

    def close(self) -> None:
        """Ends the process and its children."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._signal(signal.SIGCONT)
        with suppress(subprocess.TimeoutExpired, BrokenPipeError):
            self._process.stdin.close()
            self._process.wait(30)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(self._timeout, self._signal, [signal.SIGKILL])
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._log.seek(0)
        tail = "\n".join(self._log.read().splitlines()[-8:])
        raise click.ClickException(f"{self.name} ended, or took over {self._timeout:g} s:\n{tail}")

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


@dataclass(frozen=True, slots=True)
class Spec:
    """How to start an engine."""

    name: str
    kind: str
    path: str
    python: str
    preload: str = ""
    """Libraries that are loaded before all others, as in LD_PRELOAD."""

    def start(self, cases: Sequence[Case], threads: int, timeout: float) -> Worker:
        """A worker that is ready for these cases."""
        most, longest = max(case.running for case in cases), max(case.longest for case in cases)
        settings = {"threads": threads, "max_running": most, "max_len": longest}
        script = str(Path(__file__).with_name("peer_engines.py"))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if self.kind != OURS:
            environment.pop("PYTHONPATH", None)
            if self.preload:
                environment["LD_PRELOAD"] = self.preload
            environment["PATH"] = os.pathsep.join([str(Path(self.python).parent), environment.get("PATH", "")])
        command = [self.python, script, self.kind, self.path, json.dumps(settings)]
        return Worker(self.name, command, environment, timeout)
