"""Builds the operator library from the C++ sources of this package, once per source, torch, compiler and set of CPU features."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from multibatch.config import cache_dir
from multibatch.errors import CompileError
from multibatch.hardware import portable_isa, read_cpu_info

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno"]
_FLAGS += ["-fPIC", "-shared", "-pthread", "-Wall", "-Wno-psabi"]


@dataclass(frozen=True)
class Target:
    """What a build of the operators may use of a processor."""

    name: str
    isa: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def file(self) -> str:
        """Where the build lies in an artifact."""
        return f"ops/multibatch_ops_{self.name}.so"


def targets(portable: bool) -> list[Target]:
    """The builds of an artifact: the one for this machine, last, and before it one for lesser machines if asked for."""
    cpu = read_cpu_info()
    native = Target("native", cpu.isa, ("-march=native",))
    if not portable:
        return [native]
    isa = portable_isa(cpu.architecture)
    # Other architectures have these features in every compiler's default.
    flags = tuple(f"-m{feature}" for feature in isa) if cpu.architecture in ("x86_64", "AMD64") else ()
    return [Target("portable", isa, flags), native]


def find_compiler() -> str:
    """Path of the C++ compiler.

    Raises:
        CompileError: there is none.
    """
    name = os.environ.get("CXX", "g++")
    compiler = shutil.which(name)
    if compiler is None:
        raise CompileError(f"no C++ compiler {name} found; install one, or name it in CXX")
    return compiler


def is_built(target: Target) -> bool:
    """Whether `operator_library` has nothing to do."""
    return _library_path(find_compiler(), target).is_file()


def operator_library(target: Target) -> Path:
    """Path of the library for a target, built at first use.

    Raises:
        CompileError: there is no C++ compiler, or it failed; the message has what it said.
    """
    compiler = find_compiler()
    library = _library_path(compiler, target)
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        _build(compiler, target, library)
    return library


def _library_path(compiler: str, target: Target) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = hashlib.sha256()
    for part in (*sorted(_SOURCES.iterdir()),):
        key.update(part.read_bytes())
    key.update(" ".join([*_FLAGS, *target.flags, version, torch.__version__, *target.isa]).encode())
    return cache_dir() / "operators" / f"multibatch_ops_{target.name}-{key.hexdigest()[:16]}.so"


def _build(compiler: str, target: Target, library: Path) -> None:
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / "ops.so"
        command = [compiler, *_FLAGS, *target.flags, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
        command += [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
        command += [str(_SOURCES / "ops.cpp"), "-o", str(built)]
        command += [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(f"{compiler} could not build the operators:\n{done.stderr[-3000:]}")
        os.replace(built, library)
