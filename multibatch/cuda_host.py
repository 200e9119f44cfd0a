"""Whether this machine can run programs that were built for CUDA: a decision over facts, which `cuda_device.py` reads."""

from __future__ import annotations

from dataclasses import dataclass

from multibatch.artifact import recompile_command
from multibatch.errors import IncompatibleError
from multibatch.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU."""

    name: str
    compute_capability: str
    """Such as "9.0"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaFacts:
    """What this process has of CUDA."""

    torch_version: str
    torch_cuda: str | None
    """CUDA that torch was built for, such as "13.0"; None: a torch without CUDA."""
    driver_cuda: str | None
    """The newest CUDA that the driver runs, such as "12.8"; None: no driver."""
    gpus: tuple[Gpu, ...]
    """In torch's order; the first one is used."""


def check_cuda(manifest: Manifest, facts: CudaFacts) -> str:
    """The compute capability of the GPU that will run the artifact's programs.

    Args:
        manifest: of an artifact that was built for CUDA.
        facts: of this process.

    Raises:
        IncompatibleError: the first thing that is missing or does not match, and what to do.
    """
    what = f"the artifact of {manifest.model.id} was built for CUDA"
    if facts.torch_cuda is None:
        raise IncompatibleError(f"{what}, and torch {facts.torch_version} is without it; install a torch for CUDA")
    if facts.driver_cuda is None:
        raise IncompatibleError(f"{what}, and there is no NVIDIA driver here; install one for CUDA {facts.torch_cuda}")
    # Within a major version an older driver runs what a newer CUDA has compiled (NVIDIA's minor version compatibility).
    if _major(facts.driver_cuda) < _major(facts.torch_cuda):
        raise IncompatibleError(
            f"{what}; the driver here runs CUDA up to {facts.driver_cuda}, and torch {facts.torch_version} needs"
            f" {_major(facts.torch_cuda)}.0 or newer: update the driver, or install a torch for CUDA"
            f" {_major(facts.driver_cuda)} and build the artifact again with it: {recompile_command(manifest)}"
        )
    if not facts.gpus:
        raise IncompatibleError(f"{what}, and no GPU is visible here; make one so (CUDA_VISIBLE_DEVICES, --gpus all)")
    gpu, built = facts.gpus[0], manifest.build.compute_capability
    # Kernels are compiled for one capability and tuned to its shared memory: 8.0's may not fit 8.6.
    if gpu.compute_capability != built:
        others = [x.name for x in facts.gpus[1:] if x.compute_capability == built]
        cure = f"make the {others[0]} the first GPU (CUDA_VISIBLE_DEVICES), or build" if others else "build"
        raise IncompatibleError(
            f"{what} of compute capability {built}, found {gpu.compute_capability} ({gpu.name});"
            f" {cure} it again here: {recompile_command(manifest)}"
        )
    return gpu.compute_capability


def _major(version: str) -> int:
    return int(version.partition(".")[0])
