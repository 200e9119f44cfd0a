"""The seam between the runner and whatever runs the programs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from multibatch.batch import ProgramInputs
from multibatch.kv.pool import KVPool
from multibatch.logit_passes import DrawOptions, LogitPasses


@dataclass(frozen=True, slots=True)
class CallResult:
    """What came of a call that was started."""

    logits: torch.Tensor
    """[R, V]"""
    tokens: torch.Tensor
    """int64[R]: `LogitPasses.highest` of the logits; or int64[n], drawn by the options that were given for the first n rows."""
    seconds: float
    """How long it took."""
    late_seconds: float = 0.0
    """Between its end and this."""
    followed: StartedCall | None = None
    """The call that `StartedCall.follow` asked for, if it has begun."""


class StartedCall(Protocol):
    """A call that was begun."""

    def follow(
        self, inputs: ProgramInputs, num_rows: int, stop_token_ids: Sequence[int], draws: DrawOptions | None = None
    ) -> bool:
        """Has the same program called again as soon as this call ends, whoever waits for it then or does not.

        The first `num_rows` tokens of `inputs` become those of this call. It does not begin where one of them is in
        `stop_token_ids`, or a row has none, or this call fails; but where tokens stay on a device it begins at once, and gives
        such rows whatever it likes. `draws` are of the call that follows.

        Returns:
            Whether it may begin; False where the program would have to be called for it.
        """
        ...

    def withdraw(self) -> None:
        """Takes back what `follow` asked for, unless it has begun. From any thread."""
        ...

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

    def start(self, program: str, inputs: ProgramInputs, pool: KVPool, draws: DrawOptions | None = None) -> StartedCall:
        """Begins what `run` does; at most one call at a time and one that follows it. Their inputs stay as they are until finished.

        With `draws` the tokens of its first n rows are drawn by them; they need `passes.draw_tokens`.
        """
        ...

    def settle(self) -> None:
        """Waits for calls that were begun and that nobody will finish."""
        ...


class NeverStarts:
    """The part of `LoadedPrograms` that starts calls, for programs that run while Python waits."""

    can_start = False

    def start(self, program: str, inputs: ProgramInputs, pool: KVPool, draws: DrawOptions | None = None) -> StartedCall:
        """Not to be called."""
        raise NotImplementedError(f"{type(self).__name__} runs {program} only while Python waits")

    def settle(self) -> None:
        """Nothing was begun."""


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes of a manifest as torch has them."""
