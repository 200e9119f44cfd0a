"""The seam between the runner and whatever runs the programs."""

from __future__ import annotations

from typing import Protocol

import torch

from multibatch.batch import ProgramInputs
from multibatch.kv.pool import KVPool


class LoadedPrograms(Protocol):
    """The load half of a backend: every program of an artifact, ready to be called."""

    def run(self, program: str, inputs: ProgramInputs, pool: KVPool) -> torch.Tensor:
        """Runs one program by its manifest name; the pool changes in place. Returns logits [R, V]."""
        ...


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes of a manifest as torch has them."""
