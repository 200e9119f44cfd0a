"""Runs the model with transformers' own code and the reference attention: right, slow, nothing compiled."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from multibatch.artifact import Artifact
from multibatch.backends.base import DTYPES, NeverStarts
from multibatch.backends.flat_model import REFERENCE_ATTENTION, FlatDecoder
from multibatch.backends.inductor import map_weights
from multibatch.batch import ProgramInputs
from multibatch.errors import ArtifactCorruptError
from multibatch.kv.pool import KVPool
from multibatch.logit_passes import LogitPasses


def model_skeleton(config_dir: Path, dtype: torch.dtype) -> Any:
    """The model of a folder's config.json on the meta device: structure, and no memory for weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(config_dir)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def assign_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Gives every parameter and buffer of a skeleton its tensor, without copying; tied ones stay one object.

    Raises:
        ArtifactCorruptError: one has none.
    """
    parameters: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for table, kind in ((module._parameters, nn.Parameter), (module._buffers, torch.Tensor)):
            for name, old in list(table.items()):
                if old is None:
                    continue
                full = f"{prefix}.{name}" if prefix else name
                if full not in weights:
                    raise ArtifactCorruptError(f"no weight {full}; compile the model again")
                new = weights[full]
                if kind is nn.Parameter:
                    table[name] = parameters.setdefault(id(new), nn.Parameter(new, requires_grad=False))
                else:
                    table[name] = new


class EagerPrograms(NeverStarts):
    """The eager reference: one model for every batch size and chunk size."""

    passes = LogitPasses()
    own_threads = contextlib.nullcontext

    def __init__(self, decoder: FlatDecoder) -> None:
        """Runs `decoder` as it is."""
        self._decoder = decoder

    @classmethod
    def load(cls, artifact: Artifact) -> EagerPrograms:
        """From an artifact built with `--backend eager`."""
        manifest = artifact.manifest
        model = model_skeleton(artifact.path, DTYPES[manifest.model.dtype])
        assign_weights(model, map_weights(artifact.file(manifest.weights)))
        return cls(FlatDecoder(model, REFERENCE_ATTENTION))

    def run(self, program: str, inputs: ProgramInputs, pool: KVPool) -> torch.Tensor:
        """See `base.LoadedPrograms.run`; `program` only names the shape, which the inputs have anyway."""
        with torch.inference_mode():
            logits: torch.Tensor = self._decoder(*inputs.tensors(), pool.keys, pool.values)
        return logits
