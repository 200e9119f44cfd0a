"""Builders, each in a process of its own that ends with this one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import multibatch
from multibatch.errors import CompileError

from .progress import Progress


def run_workers(folder: Path, jobs: Mapping[str, Mapping[str, Any]], limit: int, bars: Progress) -> dict[str, float]:
    """Runs every job in a process of its own, `limit` at once, in the order given.

    Args:
        folder: scratch files lie in a folder inside it while the jobs run.
        jobs: by name; what `worker.py` reads.
        limit: jobs at once.
        bars: told of every start and end.

    Returns:
        Seconds that each took.

    Raises:
        CompileError: one failed; the others were ended.
    """
    waiting, running = list(jobs), dict[str, tuple[subprocess.Popen[bytes], float, Path]]()
    seconds: dict[str, float] = {}
    for name in jobs:
        bars.program(name)
    # In the staging folder: what a killed compile leaves there is cleared by the next one.
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder, ignore_cleanup_errors=True) as scratch:
        try:
            while waiting or running:
                while waiting and len(running) < limit:
                    name = waiting.pop(0)
                    running[name] = _start(Path(scratch), name, jobs[name])
                    bars.started(name)
                for name, (process, started, log) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[name]
                    _end(process)
                    if process.returncode:
                        raise _failure(name, process.returncode, log)
                    seconds[name] = time.monotonic() - started
                    bars.done(name)
                bars.tick()
                time.sleep(0.1)
        finally:
            for process, _, _ in running.values():
                _end(process)
    return seconds


def _start(scratch: Path, name: str, job: Mapping[str, Any]) -> tuple[subprocess.Popen[bytes], float, Path]:
    file, log = scratch / f"{name}.json", scratch / f"{name}.log"
    file.write_text(json.dumps(job))
    roots = [str(Path(module.__file__ or "").parent.parent) for module in (multibatch, sys.modules[__package__])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*roots, os.environ.get("PYTHONPATH", "")]),
        # Programs are the unit of parallelism; Inductor's own pool would outlive a killed worker.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / f"{name}-inductor"),
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "multibatch_compile.worker", str(file)],
            # Never written to: it ends when this process does, however that happens, and the builder with it.
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    return process, time.monotonic(), log


def _failure(name: str, returncode: int, log: Path) -> CompileError:
    if returncode == -signal.SIGKILL:
        how = "killed, perhaps for lack of memory: try fewer --jobs"
    else:
        how = f"exit code {returncode}" if returncode > 0 else f"signal {-returncode}"
    return CompileError(f"{name} could not be built ({how}):\n{log.read_text(errors='replace')[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills what still runs of a builder and its compilers, and closes its pipe."""
    with process:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
