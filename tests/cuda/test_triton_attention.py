"""The Triton kernels as far as a CPU can prove them: results in the interpreter, launches from shapes alone, compilation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="no Triton for this machine")

from benchmarks.attention_cases import SCALE, Shape  # noqa: E402
from multibatch import triton_attention  # noqa: E402

SHARED_MEMORY_BYTES = 99 * 1024
"""What a block of threads may have on compute capability 8.6 and 8.9, the least of those from 8.0 on."""


def test_the_kernels_are_right_in_the_interpreter(run_interpreted: Callable[[str], None]) -> None:
    run_interpreted("tests/cuda/interpreted_attention.py")


class RecordedKernel:
    """Stands where a kernel is, and keeps what it would have been launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **named: Any) -> None:
            names = self.kernel.arg_names
            self.launches.append((grid, dict(zip(names, arguments, strict=False)) | named))

        return launch


KERNELS = ("write_kernel", "attend_kernel", "merge_kernel")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, RecordedKernel]:
    kernels = {name: RecordedKernel(getattr(triton_attention, name)) for name in KERNELS}
    for name, kernel in kernels.items():
        monkeypatch.setattr(triton_attention, name, kernel)
    return kernels


def launch_on_meta(shape: Shape, num_rows: int, num_tokens: int, num_blocks: int) -> torch.Tensor:
    """A call whose tensors have shapes and no values, as a host that never waits for the device sees them."""

    def floats(*dims: int) -> torch.Tensor:
        return torch.empty(dims, dtype=shape.dtype, device="meta")

    def ints(*dims: int) -> torch.Tensor:
        return torch.empty(dims, dtype=torch.int32, device="meta")

    heads = shape.kv_heads * shape.group
    return triton_attention.paged_attention(
        floats(1, num_tokens, heads, shape.dim).transpose(1, 2),
        floats(1, num_tokens, shape.kv_heads, shape.dim).transpose(1, 2),
        floats(1, num_tokens, shape.kv_heads, shape.value_dim).transpose(1, 2),
        floats(100, shape.kv_heads, shape.dim, shape.block_size),
        floats(100, shape.kv_heads, shape.block_size, shape.value_dim),
        torch.empty(num_tokens, dtype=torch.int64, device="meta"),
        ints(num_rows + 1),
        ints(num_rows, num_blocks),
        ints(num_rows),
        torch.empty(heads, device="meta") if shape.sinks else None,
        SCALE,
        shape.window,
        shape.softcap,
    )


def test_launches_follow_from_shapes_alone(recorded: dict[str, RecordedKernel]) -> None:
    shape = Shape(kv_heads=2, group=7, dim=64, value_dim=64, block_size=32)
    out = launch_on_meta(shape, num_rows=4, num_tokens=4, num_blocks=20)
    assert out.shape == (1, 4, 14, 64)
    grids = {name: [grid for grid, _ in kernel.launches] for name, kernel in recorded.items()}
    # 20 blocks of 32 positions are three spans of 256.
    assert grids == {"write_kernel": [(4, 2)], "attend_kernel": [(4, 2, 3)], "merge_kernel": [(4, 14)]}
    launch_on_meta(shape, num_rows=4, num_tokens=100, num_blocks=20)
    # Nine tokens of seven heads are a tile; each row may need one more than its share.
    assert recorded["attend_kernel"].launches[1][0] == (100 // 9 + 4, 2, 1)
    assert len(recorded["merge_kernel"].launches) == 1
    # The spans of a row, and how its queries are tiled, are the same in every decoder of a ladder.
    launch_on_meta(shape, num_rows=1, num_tokens=1, num_blocks=20)
    sizes = ("SPAN_BLOCKS", "TOKENS", "M", "SPLIT")
    four, one = ({name: recorded["attend_kernel"].launches[i][1][name] for name in sizes} for i in (0, 2))
    assert four == one == {"SPAN_BLOCKS": 8, "TOKENS": 1, "M": 16, "SPLIT": True}
    assert compiled_for(recorded["attend_kernel"], 0) == compiled_for(recorded["attend_kernel"], 2)
    assert compiled_for(recorded["merge_kernel"], 0) == compiled_for(recorded["merge_kernel"], 1)


def compiled_for(kernel: RecordedKernel, index: int) -> dict[str, Any]:
    """What a launch's kernel depends on, besides the types of its tensors."""
    arguments = kernel.launches[index][1]
    names = {p.name for p in kernel.kernel.params if not p.do_not_specialize}
    return {name: x for name, x in arguments.items() if name in names and not isinstance(x, torch.Tensor)}


def compiled(kernel: Any, arguments: dict[str, Any], capability: int) -> Any:
    """A recorded launch through Triton's compiler and ptxas, which need no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # As Triton specialises a launch: what is divisible by 16 may be read as vectors.
    kinds = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    kinds |= {torch.int32: "i32", torch.int64: "i64"}
    fixed = {p.name for p in kernel.params if p.is_constexpr}
    plain = {p.name for p in kernel.params if p.do_not_specialize}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + kinds[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in fixed or value is None or (value == 1 and name not in plain):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and name not in plain:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"enable_fp_fusion": arguments["enable_fp_fusion"]}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(kv_heads=8, group=4, dim=128, value_dim=128, block_size=32, dtype=torch.bfloat16),
        Shape(kv_heads=2, group=7, dim=64, value_dim=64, block_size=16, dtype=torch.float16, sinks=True, window=128),
        Shape(kv_heads=1, group=4, dim=256, value_dim=256, block_size=32, dtype=torch.bfloat16, softcap=50.0),
    ],
    ids=["llama", "gpt-oss", "gemma"],
)
def test_the_kernels_compile_for_a_gpu(
    recorded: dict[str, RecordedKernel], shape: Shape, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launch_on_meta(shape, num_rows=8, num_tokens=8, num_blocks=64)
    launch_on_meta(shape, num_rows=8, num_tokens=512, num_blocks=64)
    assert {name: len(kernel.launches) for name, kernel in recorded.items()} == {
        "write_kernel": 2,
        "attend_kernel": 2,
        "merge_kernel": 1,
    }
    for name, kernel in recorded.items():
        for _, arguments in kernel.launches:
            program = compiled(kernel.kernel, arguments, capability)
            assert program.metadata.shared <= SHARED_MEMORY_BYTES
            if name == "attend_kernel":
                # Blocks of the pool come 16 bytes at a time, and the products are the tensor cores'.
                assert "cp.async.cg.shared.global" in program.asm["ptx"]
                assert "mma" in program.asm["ptx"]


def test_the_operator_has_this_code_on_cuda_once_registered() -> None:
    triton_attention.register()
    triton_attention.register()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("multibatch::paged_attention", "CUDA")
