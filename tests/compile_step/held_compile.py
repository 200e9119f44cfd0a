"""A compile in a process of its own that a test can hold at one opening of a staged file, stop, or give a full disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import multibatch
import multibatch_compile

OLD, NEW = 48, 32
"""max_seq_len tells which of two artifacts it is."""
COMMON: dict[str, Any] = {"decoder_batch_sizes": [1], "prefill_chunk_sizes": [16], "dtype": "float32"}
ARGUMENTS = f"--decoder-batch-sizes 1 --prefill-chunk-sizes 16 --dtype float32 --max-seq-len {NEW}".split()
RUN = "MULTIBATCH_TEST_RUN"
"""In the environment of every process that a compile starts: the folder of that run."""
PATIENCE = 90.0
EAGER = ("--backend", "eager", "--force")

# Imports what a compile needs once, and then forks a process for each command that it reads, or tells how one ended.
# In that process a hook waits at one opening of a staged file, or finds the disk full there.
LAUNCHER = """
import errno, json, os, signal, sys, time
from transformers import AutoTokenizer, LlamaForCausalLM
import multibatch_compile
from multibatch.cli import main

def watch(what, name, count, run):
    def hook(event, arguments):
        nonlocal count
        if event != "open" or not isinstance(arguments[0], (str, os.PathLike)):
            return
        folder, _, file = os.fspath(arguments[0]).rpartition("/")
        if ".staging-" not in folder or file != name:
            return
        count -= 1
        if count == 0 and what == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if count == 0:
            open(run + "/reached", "w").close()
            for _ in range(12000):
                if os.path.exists(run + "/go"):
                    break
                time.sleep(0.01)
    sys.addaudithook(hook)

while line := sys.stdin.readline():
    request = json.loads(line)
    if isinstance(request, int):
        pid, status = os.waitpid(request, os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    os.setsid()
    # As a terminal starts it: what runs these tests in the background may ignore the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run = request["environment"]["MULTIBATCH_TEST_RUN"]
    log = os.open(run + "/log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for number, source in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
        os.dup2(source, number)
    os.environ.update(request["environment"])
    sys.argv = ["multibatch", *request["arguments"]]
    watch(*request["stop"], run)
    main()
"""
STAGES = {
    "the staging folder is there": ("config.json", 1),
    "the weights are written": ("weights.safetensors", 1),
    # Opened once for writing, and once more to flush it when every file is whole.
    "all but the renaming is done": ("manifest.sha256", 2),
}

# A C++ compiler that builds the operators, but stays in the middle of a program for minutes, or fails there.
COMPILER = """#!/bin/sh
case "$*" in --version | -v | */csrc/ops.cpp*) exec "REAL" "$@" ;; esac
: > "$MULTIBATCH_TEST_RUN/compiles"
if [ -n "$MULTIBATCH_TEST_FAILING" ]; then
    echo "program.cpp:1: error: [/no] such thing as 'std::unobtainium'" >&2
    exit 1
fi
exec sleep 300
"""


class Launcher:
    """Compiles start here in a fraction of the seconds that their imports take."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            start_new_session=True,
        )

    def ask(self, request: object) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        with self.process:
            pass


class Compile:
    """One `multibatch compile` into `output`, leading a process group of its own; `run` holds what it says."""

    def __init__(
        self,
        launcher: Launcher,
        run: Path,
        arguments: list[str],
        output: Path,
        stop: tuple[str, str, int],
        variables: dict[str, str],
    ) -> None:
        self.launcher, self.run, self.output = launcher, run, output
        arguments = ["compile", *arguments, "-o", str(output)]
        request = {"arguments": arguments, "stop": stop, "environment": {**variables, RUN: str(run)}}
        self.pid: int = launcher.ask(request)
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self.launcher.ask(self.pid)
        return self.code

    def end(self) -> int:
        deadline = time.monotonic() + PATIENCE
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"does not end:\n{self.said()}"
            time.sleep(0.05)
        return code

    def said(self) -> str:
        return (self.run / "log").read_text(encoding="utf-8", errors="replace")

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Polls; fails when the compile ends before the condition holds."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.poll() is None, f"ended before {what}:\n{self.said()}"
            assert time.monotonic() < deadline, f"never {what}:\n{self.said()}"
            time.sleep(0.05)

    def until_file(self, name: str) -> None:
        self.until((self.run / name).exists, name)

    def others(self) -> dict[int, str]:
        """The living processes that descend from this one, with their command lines."""
        mark, found = f"{RUN}={self.run}\0".encode(), {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes():
                    line = (folder / "cmdline").read_bytes()
                    found[int(folder.name)] = line.replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # gone meanwhile, or not ours
                continue
        return found

    def has_builder(self) -> bool:
        return any("multibatch_compile.worker" in line for line in self.others().values())

    def check_no_other_left(self) -> None:
        # A builder notices the end of its parent once it has imported its modules.
        deadline = time.monotonic() + PATIENCE / 3
        while others := self.others():
            assert time.monotonic() < deadline, f"still there: {others}"
            time.sleep(0.05)

    def kill_all(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.end()
        for pid in self.others():
            os.kill(pid, signal.SIGKILL)


Start = Callable[..., Compile]


def kill(one: Compile) -> None:
    os.kill(one.pid, signal.SIGKILL)


def interrupt(one: Compile) -> None:
    os.kill(one.pid, signal.SIGINT)


def interrupt_group(one: Compile) -> None:
    """As a terminal does on Ctrl-C."""
    os.killpg(one.pid, signal.SIGINT)


def environment() -> dict[str, str]:
    """For a process that imports the packages under test."""
    roots = [str(Path(module.__file__ or "").parent.parent) for module in (multibatch, multibatch_compile)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "OMP_NUM_THREADS": "1"}
