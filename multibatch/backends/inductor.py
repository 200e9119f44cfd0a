"""Loads AOTInductor programs. Weights are mapped from one file and shared by all of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from multibatch import ops
from multibatch.artifact import Artifact
from multibatch.batch import ProgramInputs
from multibatch.errors import ArtifactCorruptError
from multibatch.hardware import usable_cores
from multibatch.kv.pool import KVPool

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


class InductorPrograms:
    """Programs of one artifact on a CPU."""

    chunk_maxima = staticmethod(ops.chunk_maxima)
    own_threads = staticmethod(ops.one_torch_thread)

    def __init__(self, artifact: Artifact, num_threads: int | None = None, only: Iterable[str] | None = None) -> None:
        """Loads the operator library, maps the weights and loads every program (or those named in `only`).

        Raises:
            ArtifactCorruptError: a program asks for a weight that the artifact does not have.
        """
        manifest = artifact.manifest
        assert manifest.ops is not None
        ops.load_operators(artifact.file(manifest.ops), manifest.ops.sha256, ops.PROCESS_OPERATORS)
        ops.set_num_threads(num_threads or usable_cores())
        self._weights = map_weights(artifact.file(manifest.weights))
        wanted = None if only is None else set(only)
        self._programs = {
            spec.name: self._load(artifact.file(spec.file))
            for spec in manifest.programs
            if spec.file is not None and (wanted is None or spec.name in wanted)
        }

    def _load(self, path: Path) -> torch._C._aoti.AOTIModelPackageLoader:
        # Single-threaded: one call at a time, and no thread of the loader's own.
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
        names = loader.get_constant_fqns()
        # A program holds the model one level down, as `FlatDecoder.model`.
        missing = [name for name in names if name.removeprefix("model.") not in self._weights]
        if missing:
            raise ArtifactCorruptError(
                f"{path}: asks for {', '.join(missing[:3])}, not in the weights; compile the model again"
            )
        weights = {name: self._weights[name.removeprefix("model.")] for name in names}
        loader.load_constants(weights, False, True, True)
        return loader

    def run(self, program: str, inputs: ProgramInputs, pool: KVPool) -> torch.Tensor:
        """See `base.LoadedPrograms.run`."""
        logits: torch.Tensor = self._programs[program].boxed_run([*inputs.tensors(), *pool.keys, *pool.values])[0]
        return logits
