"""What a decode step costs beside the program: scheduling, inputs, sampling, outputs. With --profile, which functions.

usage: python -m benchmarks.overhead ARTIFACT [--rows 1,8,16] [--tokens 128] [--temperature 0] [--profile] [--in-turn]

Prints it for steps that begin while the outputs of the one before are made, as they do by default, and with --in-turn for one after the
other.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import pstats
import statistics
import time

import torch

from benchmarks.decode_rows import add_rows
from multibatch.artifact import Artifact
from multibatch.backends.base import CallResult, LoadedPrograms, StartedCall
from multibatch.backends.load import load_programs
from multibatch.batch import ProgramInputs
from multibatch.config import EngineConfig
from multibatch.engine import Engine
from multibatch.kv.pool import KVPool
from multibatch.logit_passes import DrawOptions


class Timed:
    """Programs that add up the seconds they took."""

    def __init__(self, programs: LoadedPrograms) -> None:
        self._programs = programs
        self.own_threads, self.passes, self.can_start = programs.own_threads, programs.passes, programs.can_start
        self.seconds: list[float] = []

    def run(self, program: str, inputs: ProgramInputs, pool: KVPool) -> torch.Tensor:
        """See `LoadedPrograms.run`."""
        start = time.perf_counter()
        logits = self._programs.run(program, inputs, pool)
        self.seconds.append(time.perf_counter() - start)
        return logits

    def start(self, program: str, inputs: ProgramInputs, pool: KVPool, draws: DrawOptions | None = None) -> StartedCall:
        """See `LoadedPrograms.start`."""
        return TimedCall(self._programs.start(program, inputs, pool, draws), self.seconds)

    def settle(self) -> None:
        """See `LoadedPrograms.settle`."""
        self._programs.settle()


class TimedCall:
    """A call whose seconds are noted when it is finished."""

    def __init__(self, call: StartedCall, seconds: list[float]) -> None:
        self._call, self._seconds = call, seconds
        self.follow, self.withdraw = call.follow, call.withdraw

    def finish(self) -> CallResult:
        """See `StartedCall.finish`."""
        result = self._call.finish()
        self._seconds.append(result.seconds)
        followed = None if result.followed is None else TimedCall(result.followed, self._seconds)
        return dataclasses.replace(result, followed=followed)


def steps(
    engine: Engine, programs: Timed, rows: int, tokens: int, temperature: float = 0.0
) -> list[tuple[float, float]]:
    """Milliseconds of each decode step of `rows` requests, and of its programs."""
    add_rows(engine, rows, tokens, str(rows), temperature)
    found = []
    while engine.has_unfinished:
        programs.seconds.clear()
        start = time.perf_counter()
        engine.step()
        found.append(((time.perf_counter() - start) * 1000, sum(programs.seconds) * 1000))
    return found


def main() -> None:
    """Prints a line for each number of rows: medians over the decode steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--rows", default="1,8,16")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--in-turn", action="store_true")
    arguments = parser.parse_args()
    artifact = Artifact.open(arguments.artifact)
    programs = Timed(load_programs(artifact))
    engine = Engine(artifact, EngineConfig(async_scheduling=False if arguments.in_turn else None), programs)
    steps(engine, programs, 1, 16)  # first calls
    for rows in map(int, arguments.rows.split(",")):
        profile = cProfile.Profile()
        if arguments.profile:
            profile.enable()
        found = steps(engine, programs, rows, arguments.tokens, arguments.temperature)
        profile.disable()
        step, program, rest = (statistics.median(x) for x in zip(*((s, p, s - p) for s, p in found), strict=True))
        print(f"{rows:3d} rows: step {step:.2f} ms, program {program:.2f}, rest {rest:.3f} ({rest / step:.1%})")
        if arguments.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(24)


if __name__ == "__main__":
    main()
