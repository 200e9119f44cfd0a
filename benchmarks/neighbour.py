"""How much of its speed decoding keeps beside a process that spins on one of its cores.

Blocks of decode steps of the same requests, alone and beside in turn, since a shared machine is not as fast a second later.

usage: python -m benchmarks.neighbour ARTIFACT [--rows 8] [--steps 60] [--repeats 5] [--core CORE]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.decode_rows import add_rows
from multibatch.artifact import Artifact
from multibatch.config import EngineConfig
from multibatch.engine import Engine

_SETTLE_S = 0.2


class Neighbour:
    """A process that spins on one core, when it is let."""

    def __init__(self, core: int) -> None:
        code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
        self._process = subprocess.Popen([sys.executable, "-c", code])
        self._process.send_signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def spinning(self) -> Iterator[None]:
        """Spins meanwhile."""
        self._process.send_signal(signal.SIGCONT)
        time.sleep(_SETTLE_S)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGSTOP)
            time.sleep(_SETTLE_S)

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


def tokens_per_second(engine: Engine, rows: int, steps: int) -> float:
    """Of so many decode steps."""
    before = time.perf_counter()
    for _ in range(steps):
        engine.step()
    return rows * steps / (time.perf_counter() - before)


def blocks(engine: Engine, neighbour: Neighbour, rows: int, steps: int, name: str) -> tuple[list[float], list[float]]:
    """Tokens per second of five blocks of decode steps of the same requests: alone three times, beside twice."""
    add_rows(engine, rows, 5 * steps + 8, name)
    quiet, beside = [tokens_per_second(engine, rows, steps)], list[float]()
    for _ in range(2):
        with neighbour.spinning():
            beside.append(tokens_per_second(engine, rows, steps))
        quiet.append(tokens_per_second(engine, rows, steps))
    engine.run_all()
    return quiet, beside


def main() -> None:
    """Prints a line for each number of rows: medians of the blocks, and of each over the mean of the two quiet ones around it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--rows", default="8")
    parser.add_argument(
        "--steps", type=int, default=60, help="of a block; 128 and five blocks must fit into a sequence"
    )
    parser.add_argument("--repeats", type=int, default=5, help="two blocks beside the neighbour each")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    engine = Engine(Artifact.open(arguments.artifact), EngineConfig(enable_prefix_caching=False))
    neighbour = Neighbour(arguments.core)
    try:
        for rows in map(int, arguments.rows.split(",")):
            alone, disturbed, kept = list[float](), list[float](), list[float]()
            for repeat in range(arguments.repeats):
                quiet, beside = blocks(engine, neighbour, rows, arguments.steps, f"{rows}-{repeat}")
                alone += quiet
                disturbed += beside
                kept += [2 * b / (q + r) for q, b, r in zip(quiet, beside, quiet[1:], strict=False)]
            print(
                f"{rows:3} rows: {statistics.median(alone):7.1f} tokens/s quiet, {statistics.median(disturbed):7.1f} beside,"
                f" {statistics.median(kept):.2f} kept ({min(kept):.2f} to {max(kept):.2f})"
            )
    finally:
        neighbour.end()


if __name__ == "__main__":
    main()
