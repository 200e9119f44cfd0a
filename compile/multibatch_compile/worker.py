"""One program in a process of its own: compiling many in one leaks memory (pytorch#167630), and a crash is contained.

Run as `python -m multibatch_compile.worker JOB.json`, leading a process group of its own; ends with its standard input.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multibatch.manifest import KVLayer, KVLayout


def main() -> None:
    """Builds what the job file says."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    job = json.loads(Path(sys.argv[1]).read_text())
    if "operators" in job:
        from .operators import operator_library, targets

        operator_library(next(target for target in targets(portable=True) if target.name == job["operators"]))
        return
    if "replay" in job:
        _replay(job)
        return
    import torch

    from .export import ProgramShape, build_program

    torch.set_num_threads(1)
    layers = tuple(KVLayer(*layer) for layer in job["layers"])
    kv = KVLayout(job["block_size"], len(layers), layers)
    folder, shape = Path(job["folder"]), ProgramShape(**job["shape"])
    output, portable, latest = Path(job["output"]), job["portable"], job["latest_operators"]
    build_program(folder, folder / job["weights"], shape, kv, job["dtype"], output, portable, latest)


def _replay(job: Mapping[str, Any]) -> None:
    """Runs the canary as a machine of fewer CPU features would."""
    os.environ["MULTIBATCH_ISA"] = ",".join(job["isa"])
    from multibatch.artifact import Artifact
    from multibatch.manifest import Manifest

    from .canary import replay_canary

    problems = replay_canary(Artifact(Path(job["folder"]), Manifest.from_json(job["replay"])))
    if problems:
        sys.exit("; ".join(problems))


def _end_with_input() -> None:
    # The pipe closes when the compile step dies. A death signal of the kernel (PR_SET_PDEATHSIG) would reach this
    # process, but not the C++ compiler that it started.
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
