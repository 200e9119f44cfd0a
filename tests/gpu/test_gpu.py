"""The parts of benchmarks/gpu_check.py one by one, where there is a GPU."""

from __future__ import annotations

import pytest

from benchmarks import gpu_check

PARTS = ("bandwidth", "attention", "architectures", "decode_0.5b", "attention_rates")


def test_every_part_is_here() -> None:
    assert tuple(gpu_check.cuda_parts()) == PARTS


@pytest.mark.parametrize("name", [name for name in PARTS if name != "bandwidth"])
def test_part(name: str) -> None:
    parts = gpu_check.cuda_parts()
    results = gpu_check.run_parts({key: parts[key] for key in ("bandwidth", name)}, seconds=600)
    assert results["bandwidth"]["copy_gbps"] > 0
    assert results[name].get("ok", True), results[name]
