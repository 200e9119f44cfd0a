"""From an artifact to programs that can be called on this machine."""

from __future__ import annotations

import torch

from multibatch.artifact import Artifact, check_host
from multibatch.backends.base import LoadedPrograms
from multibatch.config import isa_from_environment, threads_from_environment
from multibatch.cuda_host import check_cuda
from multibatch.errors import IncompatibleError
from multibatch.hardware import read_cpu_info
from multibatch.manifest import Manifest


def check_this_host(manifest: Manifest) -> tuple[str, ...]:
    """The CPU features to use, where this machine and torch can run the artifact's programs.

    Raises:
        IncompatibleError: they cannot.
    """
    cpu = read_cpu_info()
    isa = isa_from_environment(cpu.isa)
    capability = None
    if manifest.build.device == "cuda":
        from multibatch.backends.cuda_device import read_cuda_facts

        capability = check_cuda(manifest, read_cuda_facts())
    check_host(
        manifest,
        torch_version=torch.__version__,
        isa=isa,
        architecture=cpu.architecture,
        device=manifest.build.device,
        compute_capability=capability,
    )
    return isa


def load_programs(artifact: Artifact, num_threads: int | None = None) -> LoadedPrograms:
    """The programs of an artifact by the backend that its manifest names.

    Raises:
        IncompatibleError: they were built for another machine or torch, or for CUDA.
    """
    isa = check_this_host(artifact.manifest)
    if artifact.manifest.build.device == "cuda":
        raise IncompatibleError(
            f"{artifact.path} holds programs for CUDA, which this version of multibatch cannot load; use a newer one"
        )
    if artifact.manifest.build.backend == "eager":
        from multibatch.backends.eager import EagerPrograms

        return EagerPrograms.load(artifact)
    from multibatch.backends.inductor import InductorPrograms

    return InductorPrograms(artifact, isa, num_threads or threads_from_environment())
