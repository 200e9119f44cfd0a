"""The seam between the runner and whatever runs the programs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from multibatch.batch import ProgramInputs
from multibatch.kv.pool import KVPool
from multibatch.logit_passes import LogitPasses


@dataclass(frozen=True, slots=True)
class CallResult:
    """What came of a call that was started."""

    logits: torch.Tensor
    """[R, V]"""
    highest: torch.Tensor
    """int64[R]: as `LogitPasses.highest` of the logits."""
    seconds: float


class StartedCall(Protocol):
    """A call that was begun."""

    def finish(self) -> CallResult:
        """Waits for it. Raises what the program does."""
        ...


class LoadedPrograms(Protocol):
    """The load half of a backend: every program of an artifact, ready to be called."""

    def own_threads(self) -> AbstractContextManager[None]:
        """Entered around all that a step does with torch: threads of torch must not fight with the backend's."""
        ...

    @property
    def passes(self) -> LogitPasses:
        """What the sampler reads the logits with."""
        ...

    def run(self, program: str, inputs: ProgramInputs, pool: KVPool) -> torch.Tensor:
        """Runs one program by its manifest name; the pool changes in place. Returns logits [R, V]."""
        ...

    @property
    def can_start(self) -> bool:
        """Whether `start` may be called: whether a program can run while Python does something else."""
        ...

    def start(self, program: str, inputs: ProgramInputs, pool: KVPool) -> StartedCall:
        """Begins what `run` does; at most one call at a time, and its inputs stay as they are until it is finished."""
        ...

    def settle(self) -> None:
        """Waits for a call that was begun and that nobody will finish."""
        ...


class NeverStarts:
    """The part of `LoadedPrograms` that starts calls, for programs that run while Python waits."""

    can_start = False

    def start(self, program: str, inputs: ProgramInputs, pool: KVPool) -> StartedCall:
        """Not to be called."""
        raise NotImplementedError(f"{type(self).__name__} runs {program} only while Python waits")

    def settle(self) -> None:
        """Nothing was begun."""


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes of a manifest as torch has them."""
