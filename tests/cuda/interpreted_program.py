"""A program compiled by AOTInductor calls the Triton kernels: run by `test_compiled_program.py` in the interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attention_cases import Case, Shape
from multibatch import triton_attention


class Doubled(torch.nn.Module):
    def forward(self, *inputs: torch.Tensor) -> Any:
        return 2 * torch.ops.multibatch.paged_attention(*inputs, None, 0.2, 0, 0.0)


@pytest.mark.filterwarnings("ignore")  # of torch.export and Inductor
def test_a_compiled_program_reaches_the_kernels_and_its_pools_change_in_place(tmp_path: Path) -> None:
    triton_attention.register("CPU")
    case = Case(Shape(kv_heads=1, group=2), [(1, 5), (1, 20)], 0)

    def inputs() -> tuple[Any, ...]:
        return tuple(x.contiguous() for x in case.arguments()[:9])  # type: ignore[attr-defined]

    package = str(tmp_path / "program.pt2")
    with torch.no_grad():
        program = torch.export.export(Doubled(), inputs(), strict=False)
        options = {"cpp.vec_isa_ok": True, "cpp.threads": 1}
        torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=options)
    given = inputs()
    out = torch._C._aoti.AOTIModelPackageLoader(package, "model", True, 1, -1).boxed_run(list(given))[0]
    assert case.problems(out / 2, given[3], given[4]) == []
