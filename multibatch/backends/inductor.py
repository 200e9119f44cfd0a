"""Loads AOTInductor programs. Weights are mapped from one file and shared by all of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from multibatch import ops
from multibatch.artifact import Artifact
from multibatch.backends.base import CallResult, StartedCall
from multibatch.backends.program import Program, StartableProgram, can_start, load_program
from multibatch.batch import ProgramInputs
from multibatch.errors import ArtifactCorruptError, IncompatibleError
from multibatch.hardware import missing_isa, usable_cores
from multibatch.kv.pool import KVPool
from multibatch.logit_passes import DrawOptions
from multibatch.manifest import Manifest, OperatorLibrary

TIED = "tied:"
"""Key prefix in the metadata of weights.safetensors: `tied:NAME` is the name whose tensor NAME shares."""


def map_weights(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the file by name, tied ones included, mapped and not copied."""
    weights: dict[str, torch.Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  not a dict
            weights[name] = file.get_tensor(name)
        for key, target in (file.metadata() or {}).items():
            if key.startswith(TIED):
                weights[key.removeprefix(TIED)] = weights[target]
    return weights


def best_library(manifest: Manifest, isa: Iterable[str]) -> OperatorLibrary:
    """The build of the operators that uses most of these CPU features.

    Raises:
        IncompatibleError: each needs one that is not among them.
    """
    present = tuple(isa)
    usable = [library for library in manifest.ops if not missing_isa(library.isa, present)]
    if not usable:
        needs = " or ".join(" ".join(library.isa) for library in manifest.ops)
        raise IncompatibleError(f"the operators need a processor with {needs}; here: {' '.join(present) or 'none'}")
    return usable[-1]


class InductorPrograms:
    """Programs of one artifact on a CPU."""

    own_threads = staticmethod(ops.one_torch_thread)

    def __init__(
        self,
        artifact: Artifact,
        isa: Iterable[str],
        num_threads: int | None = None,
        only: Iterable[str] | None = None,
    ) -> None:
        """Loads the operator library, maps the weights and loads every program (or those named in `only`).

        Args:
            artifact: an artifact that fits this machine (`artifact.check_host`).
            isa: CPU features that may be used.
            num_threads: of the operators; default: the cores this process may use.
            only: names of programs.

        Raises:
            IncompatibleError: no build of the operators does with these features.
            ArtifactCorruptError: a program asks for a weight that the artifact does not have.
        """
        manifest = artifact.manifest
        library = best_library(manifest, isa)
        ops.load_operators(artifact.file(library.file), library.file.sha256, ops.PROCESS_OPERATORS)
        cores = usable_cores()
        if num_threads is not None and num_threads > cores:
            warnings.warn(
                f"{num_threads} threads, but this process may use {cores} cores: threads that share a core wait for each"
                " other at every operator; leave num_threads out, or lower it",
                stacklevel=4,
            )
        ops.set_num_threads(num_threads or cores)
        self.passes = ops.logit_passes()
        self._weights = map_weights(artifact.file(manifest.weights))
        self._pools: dict[str, KVPool] = {}
        wanted = None if only is None else set(only)
        self._programs = {
            spec.name: self._load(artifact.file(spec.file))
            for spec in manifest.programs
            if spec.file is not None and (wanted is None or spec.name in wanted)
        }

    @property
    def can_start(self) -> bool:
        """See `base.LoadedPrograms.can_start`."""
        return all(map(can_start, self._programs.values()))

    def _load(self, path: Path) -> Program:
        program = load_program(path)
        names = program.constant_names()
        # A program holds the model one level down, as `FlatDecoder.model`.
        missing = [name for name in names if name.removeprefix("model.") not in self._weights]
        if missing:
            raise ArtifactCorruptError(
                f"{path}: asks for {', '.join(missing[:3])}, not in the weights; compile the model again"
            )
        program.set_constants({name: self._weights[name.removeprefix("model.")] for name in names})
        return program

    def run(self, program: str, inputs: ProgramInputs, pool: KVPool) -> torch.Tensor:
        """See `base.LoadedPrograms.run`."""
        called = self._programs[program]
        if can_start(called):
            return self._bound(program, called, pool).run(inputs.tensors())[0]
        return called.run([*inputs.tensors(), *pool.keys, *pool.values])[0]

    def start(self, program: str, inputs: ProgramInputs, pool: KVPool, draws: DrawOptions | None = None) -> StartedCall:
        """See `base.LoadedPrograms.start`."""
        started = self._programs[program]
        if not can_start(started):
            raise NotImplementedError("the artifact's operator library cannot start programs")
        return _Started(started, self._bound(program, started, pool).start(inputs.tensors(), *_given(draws)))

    def settle(self) -> None:
        """See `base.LoadedPrograms.settle`."""
        for program in self._programs.values():
            if can_start(program):
                program.settle()

    def _bound(self, name: str, program: StartableProgram, pool: KVPool) -> StartableProgram:
        """The program, with this pool behind its inputs."""
        if self._pools.get(name) is not pool:
            program.bind([*pool.keys, *pool.values])
            self._pools[name] = pool
        return program


@dataclass(frozen=True, slots=True)
class _Started:
    program: StartableProgram
    number: int

    def follow(
        self, inputs: ProgramInputs, num_rows: int, stop_token_ids: Sequence[int], draws: DrawOptions | None = None
    ) -> bool:
        """See `base.StartedCall.follow`."""
        return self.program.follow(inputs.tensors(), num_rows, list(stop_token_ids), *_given(draws))

    def withdraw(self) -> None:
        """See `base.StartedCall.withdraw`."""
        self.program.withdraw()

    def finish(self) -> CallResult:
        """See `base.StartedCall.finish`."""
        outputs, tokens, seconds, late_seconds, is_followed = self.program.finish(self.number)
        followed = _Started(self.program, self.number + 1) if is_followed else None
        return CallResult(outputs[0], tokens, seconds, late_seconds, followed)


def _given(draws: DrawOptions | None) -> tuple[list[torch.Tensor], float]:
    return ([], 0.0) if draws is None else (draws.tensors(), draws.scale)
