"""benchmarks/gpu_check.py where there is no GPU: what it says then, and its own code over a pretended one."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from multibatch.backends import cuda_device
from multibatch.cuda_host import CudaFacts, Gpu

ROOT = Path(__file__).parents[2]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'compile'}", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_without_cuda_it_says_so_and_ends_with_2() -> None:
    # A bare machine has torch and transformers, and not what else multibatch depends on.
    absent = ["click", "jinja2", "llguidance", "prometheus_client", "rich"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); from benchmarks.gpu_check import main; sys.exit(main([]))"
    done = run(code, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"no CUDA here: torch {torch.__version__} is built ")
    assert done.stdout == ""


def test_the_parts_need_no_more_than_torch_and_transformers() -> None:
    pytest.importorskip("triton", reason="no Triton for this machine")
    absent = ["click", "jinja2", "llguidance", "prometheus_client", "rich"]
    names = "gpu_attention, gpu_decode, gpu_machine"
    done = run(f"import sys; sys.modules.update(dict.fromkeys({absent})); from benchmarks import {names}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--seconds", "soon"], ["--jsn", "x"], ["extra"]])
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(arguments)
    assert "usage: python -m benchmarks.gpu_check" in capsys.readouterr().err


def test_its_code_works_over_a_pretended_device(run_interpreted: Callable[[str], None]) -> None:
    run_interpreted("tests/cuda/interpreted_gpu_check.py")


def test_a_part_that_fails_is_reported_and_the_next_one_runs() -> None:
    def fails() -> dict[str, Any]:
        raise ValueError("no such kernel")

    ticks = itertools.count()
    parts = {"first": fails, "second": lambda: {"ok": True, "x": 1}, "third": lambda: {}}
    results = gpu_check.run_parts(parts, seconds=3, clock=lambda: float(next(ticks)))
    assert results["first"]["error"] == "ValueError('no such kernel')"
    assert "raise ValueError" in "".join(results["first"]["traceback"])
    assert results["second"] == {"ok": True, "x": 1, "seconds": 1.0}
    assert results["third"] == {"ok": False, "error": "not begun: 3 s had passed"}


@pytest.mark.parametrize("is_right", [True, False])
def test_the_last_line_is_one_json(
    is_right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton", reason="no Triton for this machine")
    facts = CudaFacts(torch_version="2.13.0", torch_cuda="13.0", driver_cuda="13.1", gpus=(Gpu("H100", "9.0"),))
    monkeypatch.setattr(cuda_device, "read_cuda_facts", lambda: facts)
    monkeypatch.setattr(gpu_check, "cuda_parts", lambda: {"a": lambda: {"ok": is_right}, "b": lambda: {"gbps": 1.5}})
    assert gpu_check.main(["--json", str(tmp_path / "x.json")]) == (0 if is_right else 1)
    last = capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "x.json").read_text() == last + "\n"
    report = json.loads(last)
    assert report["ok"] is is_right
    assert (report["gpu"], report["compute_capability"], report["driver_cuda"]) == ("H100", "9.0", "13.1")
    assert report["parts"]["b"]["gbps"] == 1.5
