"""The C functions by which programs call the operators."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from multibatch.artifact import sha256_file
from multibatch.ops import PROCESS_OPERATORS, load_operators
from multibatch_compile.operators import operator_library, targets
from multibatch_compile.shims import declarations, has_all_shims


def test_a_loaded_library_gives_programs_every_function_that_is_declared_to_them() -> None:
    library = operator_library(targets(portable=False)[-1])
    load_operators(library, sha256_file(library), PROCESS_OPERATORS)
    everything = ctypes.CDLL(None)  # what a program finds, and not only this library
    for operator, (declaration,) in declarations().items():
        name = declaration.partition("(")[0].split()[-1]
        assert name == f"aoti_torch_cpu_{operator._schema.name.split('::')[1]}"
        assert hasattr(everything, name)


def test_a_declaration_has_the_types_of_the_schema() -> None:
    (declaration,) = declarations()[torch.ops.multibatch.packed_embedding.default]
    assert declaration == (
        "AOTITorchError aoti_torch_cpu_packed_embedding(AtenTensorHandle ids, AtenTensorHandle weight,"
        " AtenTensorHandle* scales, int64_t num_embeddings, int64_t embedding_dim, int32_t dtype, AtenTensorHandle* result)"
    )


@pytest.mark.parametrize(("missing", "found"), [(None, True), ("rotary_attention", False), ("rms_norm", False)])
def test_a_library_of_an_earlier_version_is_recognised(tmp_path: Path, missing: str | None, found: bool) -> None:
    names = [operator._schema.name.split("::")[1] for operator in declarations()]
    symbols = [f"aoti_torch_cpu_{name}\0" for name in names if name != missing]
    (tmp_path / "ops.so").write_bytes("".join(symbols).encode())
    assert has_all_shims(tmp_path / "ops.so") is found
