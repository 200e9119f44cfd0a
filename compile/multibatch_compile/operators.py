"""Builds the operator library from the C++ sources of this package, once per source, torch, compiler and processor."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from multibatch.config import cache_dir
from multibatch.errors import CompileError
from multibatch.hardware import read_cpu_info

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ["-std=c++20", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno"]
_FLAGS += ["-fPIC", "-shared", "-pthread", "-Wall", "-Wno-psabi"]


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


def is_built() -> bool:
    """Whether `operator_library` has nothing to do."""
    return _library_path(find_compiler()).is_file()


def operator_library() -> Path:
    """Path of the library for this machine, built at first use.

    Raises:
        CompileError: there is no C++ compiler, or it failed; the message has what it said.
    """
    compiler = find_compiler()
    library = _library_path(compiler)
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        _build(compiler, library)
    return library


def _library_path(compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = hashlib.sha256()
    for part in (*sorted(_SOURCES.iterdir()),):
        key.update(part.read_bytes())
    key.update(" ".join([*_FLAGS, version, torch.__version__, *read_cpu_info().isa]).encode())
    return cache_dir() / "operators" / f"multibatch_ops-{key.hexdigest()[:16]}.so"


def _build(compiler: str, library: Path) -> None:
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / "ops.so"
        command = [compiler, *_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
        command += [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
        command += [str(_SOURCES / "ops.cpp"), "-o", str(built)]
        command += [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(f"{compiler} could not build the operators:\n{done.stderr[-3000:]}")
        os.replace(built, library)
