"""Checks the CUDA path on a GPU in one call, and prints its figures as one JSON on the last line.

usage: PYTHONPATH=.:compile python -m benchmarks.gpu_check [--seconds 420] [--json FILE]

Needs torch for CUDA (2.11 or newer), which brings Triton, and transformers (5.17 or newer); multibatch need not be installed.
Ends with 0 where all is right, with 1 where something is wrong, and with 2 where there is no CUDA.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Part = Callable[[], dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs every part; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=420, help="begin no further part after so long (default: 420)")
    parser.add_argument("--json", type=Path, help="write the JSON to this file too")
    options = parser.parse_args(arguments)
    from multibatch.backends.cuda_device import read_cuda_facts

    facts = read_cuda_facts()
    if not facts.gpus:
        build = f"built for CUDA {facts.torch_cuda}" if facts.torch_cuda else "built without CUDA"
        driver = f"whose driver runs CUDA {facts.driver_cuda}" if facts.driver_cuda else "no NVIDIA driver"
        print(f"no CUDA here: torch {facts.torch_version} is {build}; {driver}; 0 GPUs are visible", file=sys.stderr)
        return 2
    report = described(facts.gpus[0].name, facts.gpus[0].compute_capability, facts.driver_cuda or "")
    report["parts"] = run_parts(cuda_parts(), options.seconds)
    report["ok"] = all(part.get("ok", True) for part in report["parts"].values())
    text = json.dumps(report)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if report["ok"] else 1


def described(gpu: str, compute_capability: str, driver_cuda: str) -> dict[str, Any]:
    """The hardware and the versions that figures belong to."""
    import torch
    import transformers
    import triton

    return {
        "gpu": gpu,
        "compute_capability": compute_capability,
        "driver_cuda": driver_cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def cuda_parts() -> dict[str, Part]:
    """What is checked and measured, in this order; later parts use the bandwidth of the first."""
    import torch

    from benchmarks.gpu_attention import attention_rates, check_attention
    from benchmarks.gpu_decode import check_architectures, measure_decode
    from benchmarks.gpu_machine import Machine, copy_bandwidth
    from multibatch import triton_attention
    from multibatch.backends.cuda_device import CudaDevice

    triton_attention.register()
    graphs = CudaDevice()
    free, total = torch.cuda.mem_get_info()
    machine = Machine(graphs, torch.cuda.synchronize, total_memory=total, free_at_start=free)
    measured: dict[str, float] = {}

    def bandwidth() -> dict[str, Any]:
        measured["gbps"] = copy_bandwidth(machine)
        return {"copy_gbps": measured["gbps"]}

    return {
        "bandwidth": bandwidth,
        "attention": lambda: check_attention(graphs.device),
        "architectures": lambda: check_architectures(graphs.device),
        "decode_0.5b": lambda: measure_decode(machine, measured["gbps"]),
        "attention_rates": lambda: attention_rates(machine, measured["gbps"]),
    }


def run_parts(
    parts: Mapping[str, Part], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, dict[str, Any]]:
    """Every part's result with its `seconds`; one that fails is `ok: false` with its error, and the next one runs.

    Args:
        parts: name -> what gives its result; `ok` in it is whether all was right.
        seconds: no part begins after so long; it is `ok: false` then, since nothing is known of it.
        clock: seconds.
    """
    start, results = clock(), {}
    for name, part in parts.items():
        began = clock()
        if began - start > seconds:
            results[name] = {"ok": False, "error": f"not begun: {seconds:g} s had passed"}
            continue
        try:
            result = part()
        except Exception as error:  # whatever it is, it belongs into the report, and the other parts are still wanted
            result = {"ok": False, "error": repr(error), "traceback": traceback.format_exc().splitlines()[-12:]}
        results[name] = {**result, "seconds": clock() - began}
        print(f"{name}: {'wrong' if result.get('ok') is False else 'done'}", file=sys.stderr)
    return results


if __name__ == "__main__":
    sys.exit(main())
