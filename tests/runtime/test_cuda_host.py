from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from multibatch.artifact import Artifact
from multibatch.backends.cuda_device import read_cuda_facts
from multibatch.backends.load import check_this_host, load_programs
from multibatch.cuda_host import CudaFacts, Gpu, check_cuda
from multibatch.errors import IncompatibleError
from multibatch.hardware import read_cpu_info
from multibatch.manifest import Manifest
from tests.runtime.small_artifact import GOLDEN, build

H100, A100, A10 = Gpu("H100", "9.0"), Gpu("A100", "8.0"), Gpu("A10", "8.6")
HERE = CudaFacts(torch_version="2.13.0+cu130", torch_cuda="13.0", driver_cuda="13.1", gpus=(A100, H100))


@pytest.fixture
def manifest() -> Manifest:
    golden = Manifest.from_json(GOLDEN.read_text(encoding="utf-8"))
    architecture = read_cpu_info().architecture
    build = replace(
        golden.build,
        device="cuda",
        compute_capability="8.0",
        cpu_architecture=architecture,
        isa=(),
        torch_version=torch.__version__,
    )
    return replace(golden, build=build)


def test_a_gpu_of_the_same_capability_is_taken(manifest: Manifest) -> None:
    assert check_cuda(manifest, HERE) == "8.0"


@pytest.mark.parametrize("driver", ["13.0", "13.2", "14.0"])
def test_a_driver_of_the_same_major_version_or_newer_will_do(manifest: Manifest, driver: str) -> None:
    assert check_cuda(manifest, replace(HERE, torch_cuda="13.1", driver_cuda=driver)) == "8.0"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            replace(HERE, torch_version="2.13.0+cpu", torch_cuda=None, driver_cuda=None, gpus=()),
            r"built for CUDA, and torch 2\.13\.0\+cpu is without it; install a torch for CUDA$",
        ),
        (replace(HERE, driver_cuda=None, gpus=()), r"no NVIDIA driver here; install one for CUDA 13\.0$"),
        (
            replace(HERE, driver_cuda="12.8", gpus=()),
            r"driver here runs CUDA up to 12\.8, and torch 2\.13\.0\+cu130 needs 13\.0 or newer: update .* --device cuda",
        ),
        (replace(HERE, gpus=()), r"no GPU is visible here; make one so \(CUDA_VISIBLE_DEVICES"),
        (
            replace(HERE, gpus=(A10,)),
            r"compute capability 8\.0, found 8\.6 \(A10\); build it again here: multibatch compile .* --device cuda",
        ),
        (
            replace(HERE, gpus=(H100, A100)),
            r"8\.0, found 9\.0 \(H100\); make the A100 the first GPU \(CUDA_VISIBLE_DEVICES\), or build",
        ),
    ],
    ids=["torch", "no driver", "old driver", "no GPU", "capability", "another GPU is first"],
)
def test_what_does_not_fit_is_refused_by_name(manifest: Manifest, facts: CudaFacts, message: str) -> None:
    with pytest.raises(IncompatibleError, match=message):
        check_cuda(manifest, facts)


def test_facts_of_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert read_cuda_facts() == CudaFacts(torch_version=torch.__version__, torch_cuda=None, driver_cuda=None, gpus=())


def test_facts_of_a_torch_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [("A10", (8, 6)), ("H100", (9, 0))]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13010, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpus[index][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index][1])
    facts = read_cuda_facts()
    assert facts == replace(HERE, torch_version=torch.__version__, gpus=(A10, H100))
    # With a driver that is too old, torch has no GPU to ask about.
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert read_cuda_facts() == replace(facts, driver_cuda="12.8", gpus=())


def test_loading_asks_the_machine(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = "multibatch.backends.cuda_device.read_cuda_facts"
    monkeypatch.setattr(where, lambda: replace(HERE, gpus=(A10,)))
    with pytest.raises(IncompatibleError, match=r"compute capability 8\.0, found 8\.6"):
        check_this_host(manifest)
    monkeypatch.setattr(where, lambda: HERE)
    assert check_this_host(manifest) == read_cpu_info().isa
    artifact = replace(build(tmp_path / "model"), manifest=manifest)
    assert isinstance(artifact, Artifact)
    with pytest.raises(IncompatibleError, match="programs for CUDA, which this version of multibatch cannot load"):
        load_programs(artifact)
