"""An engine whose programs take no time: what comes next follows from the newest token and its position alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from multibatch.artifact import Artifact
from multibatch.backends.base import CallResult
from multibatch.batch import ProgramInputs
from multibatch.config import EngineConfig
from multibatch.engine import Engine
from multibatch.kv.pool import KVPool
from multibatch.logit_passes import LogitPasses


def next_token(token: Any, position: Any, vocabulary: int) -> Any:
    return (31 * token + 17 * position + 7) % vocabulary


class PretendedPrograms:
    can_start = False
    passes = LogitPasses()
    own_threads = contextlib.nullcontext

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.num_calls = 0
        self.on_call: Callable[[], None] = lambda: None

    def run(self, program: str, inputs: ProgramInputs, pool: KVPool) -> torch.Tensor:
        self.num_calls += 1
        self.on_call()
        keep = inputs.logits_to_keep
        chosen = next_token(inputs.token_ids[0, keep], inputs.positions[0, keep], self.vocabulary)
        return torch.zeros(len(keep), self.vocabulary).scatter_(1, chosen[:, None], 1.0)

    def start(self, program: str, inputs: ProgramInputs, pool: KVPool, draws: None = None) -> PretendedCall:
        assert draws is None  # `passes` cannot draw
        return PretendedCall(partial(self.run, program, pool=pool), inputs)

    def settle(self) -> None:
        """Nothing runs by itself."""


class PretendedCall:
    """Runs when it is waited for, so that all which comes between comes before."""

    def __init__(self, run: Callable[..., torch.Tensor], inputs: ProgramInputs) -> None:
        self._run, self._inputs = run, inputs
        self._offered: tuple[ProgramInputs, int, Sequence[int]] | None = None

    def follow(self, inputs: ProgramInputs, num_rows: int, stop_token_ids: Sequence[int], draws: None = None) -> bool:
        assert draws is None
        assert inputs.token_ids.data_ptr() != self._inputs.token_ids.data_ptr()
        self._offered = inputs, num_rows, stop_token_ids
        return True

    def withdraw(self) -> None:
        self._offered = None

    def finish(self) -> CallResult:
        logits = self._run(inputs=self._inputs)
        highest = LogitPasses().highest(logits)
        followed = None
        if self._offered is not None:
            inputs, num_rows, stops = self._offered
            tokens = highest[:num_rows]
            if min(tokens.tolist()) >= 0 and not set(tokens.tolist()) & set(stops):
                inputs.token_ids[0, :num_rows] = tokens
                followed = PretendedCall(self._run, inputs)
        return CallResult(logits, highest, 0.0, followed=followed)


def pretended_engine(artifact: Path, **options: Any) -> tuple[Engine, PretendedPrograms]:
    opened = Artifact.open(artifact)
    programs = PretendedPrograms(opened.manifest.model.vocab_size)
    return Engine(opened, EngineConfig(**options), programs), programs


def continuation(prompt: list[int], num_tokens: int, vocabulary: int) -> list[int]:
    """What such an engine answers greedily."""
    token, output = prompt[-1], []
    for position in range(len(prompt) - 1, len(prompt) - 1 + num_tokens):
        token = next_token(token, position, vocabulary)
        output.append(token)
    return output
