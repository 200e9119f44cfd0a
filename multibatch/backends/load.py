"""From an artifact to programs that can be called on this machine."""

from __future__ import annotations

import torch

from multibatch.artifact import Artifact, check_host
from multibatch.backends.base import LoadedPrograms
from multibatch.config import isa_from_environment, threads_from_environment
from multibatch.hardware import read_cpu_info
from multibatch.manifest import Manifest


def check_this_host(manifest: Manifest) -> tuple[str, ...]:
    """The CPU features to use, where this machine and torch can run the artifact's programs.

    Raises:
        IncompatibleError: they cannot.
    """
    cpu = read_cpu_info()
    isa = isa_from_environment(cpu.isa)
    check_host(manifest, torch_version=torch.__version__, isa=isa, architecture=cpu.architecture)
    return isa


def load_programs(artifact: Artifact, num_threads: int | None = None) -> LoadedPrograms:
    """The programs of an artifact by the backend that its manifest names.

    Raises:
        IncompatibleError: they were built for another machine or torch.
    """
    isa = check_this_host(artifact.manifest)
    if artifact.manifest.build.backend == "eager":
        from multibatch.backends.eager import EagerPrograms

        return EagerPrograms.load(artifact)
    from multibatch.backends.inductor import InductorPrograms

    return InductorPrograms(artifact, isa, num_threads or threads_from_environment())
