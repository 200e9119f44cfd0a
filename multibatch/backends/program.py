"""A compiled program in this process: its weights are given to it, and it runs without Python's lock."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeGuard

import torch


class Program(Protocol):
    """What an AOTInductor package holds."""

    def constant_names(self) -> list[str]:
        """Of the weights that it asks for."""
        ...

    def set_constants(self, constants: Mapping[str, torch.Tensor]) -> None:
        """Gives it every weight. They are not copied: whoever gives them keeps them for as long as it runs."""
        ...

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Its outputs."""
        ...


class StartableProgram(Program, Protocol):
    """One that the operators' threads can run while Python goes on."""

    def bind(self, others: list[torch.Tensor]) -> None:
        """What every call gets behind its inputs from now on."""
        ...

    def start(self, inputs: list[torch.Tensor], draws: list[torch.Tensor], scale: float) -> int:
        """Begins a run, at most one at a time, and gives its number; the run that follows it has the next one.

        Its tokens are `draw_tokens` of its first output, without draws `first_maxima`.
        """
        ...

    def follow(
        self, inputs: list[torch.Tensor], num_tokens: int, stops: list[int], draws: list[torch.Tensor], scale: float
    ) -> bool:
        """Has another run begin as soon as the one that was started ends, with its first tokens as the first of its inputs.

        Unless one of them is in `stops`, or a row has none, or the run fails. False where no thread would do it.
        """
        ...

    def withdraw(self) -> None:
        """Takes back what `follow` asked for, unless it has begun. From any thread."""
        ...

    def finish(self, number: int) -> tuple[list[torch.Tensor], torch.Tensor, float, float, bool]:
        """Ends the run of this number, the calling thread helping; once.

        Its outputs, its tokens, how many seconds it took and how many have passed since, and whether the
        run that was to follow has begun.
        """
        ...

    def settle(self) -> None:
        """Ends runs that nobody will finish; nothing where there are none."""
        ...


def can_start(program: Program) -> TypeGuard[StartableProgram]:
    """Whether the operator library that runs it can do so while Python goes on."""
    return hasattr(program, "follow")


def load_program(path: Path) -> Program:
    """The program of a package, as the operator library runs it. Older libraries leave that to PyTorch."""
    try:
        kind = torch.classes.multibatch.Program
    except RuntimeError:
        return _LockedProgram(path)
    program: Program = kind(str(path))
    return program


class _LockedProgram:
    """By PyTorch's own binding, which keeps Python's lock while the program runs (pytorch/pytorch#197516)."""

    def __init__(self, path: Path) -> None:
        # Single-threaded: one call at a time, and no thread of the loader's own.
        self._loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)

    def constant_names(self) -> list[str]:
        return self._loader.get_constant_fqns()

    def set_constants(self, constants: Mapping[str, torch.Tensor]) -> None:
        self._loader.load_constants(dict(constants), False, True, True)

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return self._loader.boxed_run(inputs)
