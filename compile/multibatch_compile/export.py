"""One program: the model's structure through torch.export and AOTInductor, without its weights."""

from __future__ import annotations

import platform
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from multibatch.backends.base import DTYPES
from multibatch.backends.eager import assign_weights, model_skeleton
from multibatch.backends.flat_model import COMPILED_ATTENTION, FlatDecoder
from multibatch.backends.inductor import map_weights
from multibatch.errors import CompileError
from multibatch.manifest import KVLayout, TensorSpec

from .fusion import fuse_gates, fuse_mlps, fuse_norms, fuse_residuals, fuse_rotary, remove_identities, replace_norms
from .packing import Packing, pack_model
from .selection import select_early
from .shims import declarations


@dataclass(frozen=True, slots=True)
class ProgramShape:
    """What distinguishes one program of an artifact from another."""

    name: str
    kind: str
    num_rows: int
    """The most of them, for a step program; so are the tokens."""
    num_tokens: int
    max_blocks: int

    @property
    def num_logits(self) -> int | str:
        """Rows of the output: one per row of the call, or free."""
        return "num_logits" if self.kind == "step" else self.num_rows


def input_specs(shape: ProgramShape, kv: KVLayout, dtype: str) -> tuple[TensorSpec, ...]:
    """The program's inputs in order."""
    t: int | str = shape.num_tokens
    r: int | str = shape.num_rows
    bounds: int | str = shape.num_rows + 1
    if shape.kind == "step":
        t, r, bounds = "num_tokens", "num_rows", "num_rows + 1"
    fixed: list[tuple[str, tuple[int | str, ...], str]] = [
        ("token_ids", (1, t), "int64"),
        ("positions", (1, t), "int64"),
        ("slot_mapping", (t,), "int64"),
        ("cu_seqlens", (bounds,), "int32"),
        ("block_tables", (r, shape.max_blocks), "int32"),
        ("seq_lens", (r,), "int32"),
        ("logits_to_keep", (shape.num_logits,), "int64"),
    ]
    specs = [TensorSpec(name, size, kind) for name, size, kind in fixed]
    free, size = "num_blocks", kv.block_size
    keys = [(free, x.num_kv_heads, x.head_dim, size) for x in kv.layers]
    values = [(free, x.num_kv_heads, size, x.value_dim) for x in kv.layers]
    specs += [TensorSpec(f"key_pool_{i}", dims, dtype) for i, dims in enumerate(keys)]
    specs += [TensorSpec(f"value_pool_{i}", dims, dtype) for i, dims in enumerate(values)]
    return tuple(specs)


def build_program(
    folder: Path,
    weights: Path,
    shape: ProgramShape,
    kv: KVLayout,
    dtype: str,
    output: Path,
    portable: bool = False,
    latest_operators: bool = True,
) -> None:
    """Exports and compiles one program to `output` (.pt2).

    Args:
        folder: holds config.json.
        weights: the artifact's packed weights; mapped, and not copied into the program.
        shape: rows and tokens of the program.
        kv: the pool's layout.
        dtype: the model's.
        output: the file to write.
        portable: use no CPU features but those of `hardware.portable_isa`.
        latest_operators: whether the artifact's library has what `shims.has_all_shims` asks for; else the program does without.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    with safe_open(weights, framework="pt") as file:
        packing = Packing.from_metadata(file.metadata())
    model = model_skeleton(folder, DTYPES[dtype])
    pack_model(model, packing)
    replace_norms(model)
    assign_weights(model, map_weights(weights))
    with torch.no_grad():
        program = export_model(model, shape, kv, dtype, latest_operators)
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(output),
            inductor_configs={
                "aot_inductor.package_constants_in_so": False,
                # What is left to Inductor is small beside the operators, whose threads would fight with OpenMP's.
                "cpp.threads": 1,
                # Inductor test-compiles each instruction set that the CPU reports, 15 s in every process. The operators
                # were built here for the same CPU before this.
                "cpp.vec_isa_ok": True,
                "aot_inductor.custom_ops_to_c_shims": declarations() if latest_operators else {},
                **(_portable_options() if portable else {}),
            },
        )


def export_model(
    model: nn.Module, shape: ProgramShape, kv: KVLayout, dtype: str, latest_operators: bool = True
) -> torch.export.ExportedProgram:
    """The program's graph, its parts replaced by the operators that do them in one go.

    Args:
        model: its linear layers packed.
        shape: see `build_program`, as the others.
        kv: the pool's layout.
        dtype: the model's.
        latest_operators: see `build_program`.
    """
    decoder, arguments = FlatDecoder(model, COMPILED_ATTENTION), _example(shape, kv, dtype)
    program = torch.export.export(decoder, arguments, dynamic_shapes=_free_dimensions(shape, kv), strict=False)
    remove_identities(program.graph)
    fuse_gates(program.graph)
    select_early(program.graph)
    fuse_norms(program.graph)
    if latest_operators:
        fuse_residuals(program.graph)
        fuse_mlps(program.graph)
        fuse_rotary(program.graph)
    program.graph_module.recompile()
    return program


def _portable_options() -> dict[str, Any]:
    """Inductor's options for code of the least vector width that its architecture has, and no -march.

    Raises:
        CompileError: this torch always compiles for the machine that it runs on.
    """
    if not hasattr(torch._inductor.config.cpp, "march"):
        raise CompileError(f"--portable needs a torch whose Inductor has cpp.march; here: torch {torch.__version__}")
    width = 256 if platform.machine() in ("x86_64", "AMD64") else 128
    return {"cpp.march": "", "cpp.simdlen": width}


# Sizes of the example call where they are free: all different, so that none is taken for another.
_EXAMPLE = {"num_blocks": 3, "num_tokens": 11, "num_rows": 5, "num_rows + 1": 6, "num_logits": 4}


def _free_dimensions(shape: ProgramShape, kv: KVLayout) -> Any:
    """The dimensions that differ from call to call, as torch.export takes them."""
    pools = [{0: torch.export.Dim("num_blocks", min=2)} for _ in kv.layers]
    if shape.kind != "step":
        return (*(None,) * 7, pools, list(pools))
    tokens, rows, logits = (torch.export.Dim(name, min=1) for name in ("num_tokens", "num_rows", "num_logits"))
    flat = ({1: tokens}, {1: tokens}, {0: tokens}, {0: rows + 1}, {0: rows}, {0: rows}, {0: logits})
    return (*flat, pools, list(pools))


def _example(shape: ProgramShape, kv: KVLayout, dtype: str) -> tuple[Any, ...]:
    tensors = []
    for spec in input_specs(shape, kv, dtype):
        dims = [_EXAMPLE[size] if isinstance(size, str) else size for size in spec.shape]
        kind = DTYPES.get(spec.dtype) or {"int64": torch.int64, "int32": torch.int32}[spec.dtype]
        tensors.append(torch.zeros(dims, dtype=kind))
    pools = tensors[7:]
    return (*tensors[:7], pools[: kv.num_layers], pools[kv.num_layers :])
