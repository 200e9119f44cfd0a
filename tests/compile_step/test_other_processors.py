"""The kernels as programs of their own, also for a processor that is not at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import multibatch_compile
from multibatch.hardware import read_cpu_info

_SOURCES = Path(multibatch_compile.__file__).parent / "csrc"
_HEADERS = Path(torch.__file__).parent / "include"
_CROSS = "aarch64-linux-gnu-g++-12"
_EMULATOR = "qemu-aarch64-static"


def _compile(compiler: str, source: Path, output: Path, *flags: str) -> None:
    includes = [f"-I{_SOURCES}", f"-I{_HEADERS}", f"-I{_HEADERS / 'torch/csrc/api/include'}"]
    command = [compiler, "-std=c++20", "-O2", "-ffp-contract=fast", "-Wno-psabi", *flags, *includes]
    done = subprocess.run([*command, str(source), "-o", str(output)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.returncode} wrong: {done.stdout}{done.stderr}"


def _builds() -> list[str]:
    """Values of -march that give the kernel another form each, as far as this processor has them."""
    isa = read_cpu_info().isa
    builds = {"haswell": "avx2", "skylake-avx512": "avx512f", "cascadelake": "avx512_vnni"}
    return ["native", *(build for build, feature in builds.items() if feature in isa)]


@pytest.mark.parametrize("build", _builds())
def test_the_linear_kernel_alone(build: str, tmp_path: Path) -> None:
    program = tmp_path / "kernel"
    _compile(os.environ.get("CXX", "g++"), Path(__file__).parent / "linear_kernel.cpp", program, f"-march={build}")
    _run(str(program))


@pytest.mark.skipif(
    not (shutil.which(_CROSS) and shutil.which(_EMULATOR)),
    reason=f"needs {_CROSS} and {_EMULATOR} (Debian: g++-12-aarch64-linux-gnu, qemu-user-static)",
)
def test_aarch64_has_the_linear_kernel_and_compiles_the_operators(tmp_path: Path) -> None:
    program = tmp_path / "kernel"
    _compile(_CROSS, Path(__file__).parent / "linear_kernel.cpp", program, "-static", "-march=armv8-a")
    _run(_EMULATOR, str(program))
    _compile(_CROSS, _SOURCES / "ops.cpp", tmp_path / "ops.o", "-c", "-fPIC", "-march=armv8-a")
