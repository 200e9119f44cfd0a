"""C functions of the operators, by which compiled programs call them past PyTorch's dispatcher (csrc/shims.h)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from multibatch import ops as _ops  # noqa: F401  declares the operators

_NAMES = (
    "packed_linear", "gated_linear", "normed_linear", "residual_linear", "gated_residual_linear", "gated_mlp",
    "rms_norm", "packed_embedding", "paged_attention", "rotary_attention",
)  # fmt: skip

_C_TYPES = {
    "Tensor": "AtenTensorHandle",
    "Optional[Tensor]": "AtenTensorHandle*",
    "int": "int64_t",
    "float": "double",
    "bool": "int32_t",
    "ScalarType": "int32_t",
    "str": "const char*",
}


def declarations() -> dict[Any, list[str]]:
    """Inductor's `aot_inductor.custom_ops_to_c_shims`: each operator with the declaration of its C function."""
    operators = {name: getattr(torch.ops.multibatch, name).default for name in _NAMES}
    return {operator: [_declaration(name, operator)] for name, operator in operators.items()}


def has_all_shims(library: Path) -> bool:
    """Whether a build of the operators has the C functions; those built before November 2026 do not."""
    return all(f"aoti_torch_cpu_{name}\0".encode() in library.read_bytes() for name in _NAMES)


def _declaration(name: str, operator: Any) -> str:
    arguments = [f"{_C_TYPES[str(argument.real_type)]} {argument.name}" for argument in operator._schema.arguments]
    return f"AOTITorchError aoti_torch_cpu_{name}({', '.join(arguments)}, AtenTensorHandle* result)"
