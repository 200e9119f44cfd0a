"""The seam between the runner and whatever runs the programs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from multibatch.batch import ProgramInputs
from multibatch.kv.pool import KVPool
from multibatch.logit_passes import LogitPasses


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


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes of a manifest as torch has them."""
