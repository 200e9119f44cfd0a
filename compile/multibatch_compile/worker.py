"""One program in a process of its own: compiling many in one leaks memory (pytorch#167630), and a crash is contained.

Run as `python -m multibatch_compile.worker JOB.json`; writes the stage it is in to the job's status file.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from pathlib import Path

from multibatch.manifest import KVLayer, KVLayout

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Builds what the job file says."""
    if sys.platform == "linux":
        # A parent that is killed must not leave builders behind.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    job = json.loads(Path(sys.argv[1]).read_text())
    import torch

    from .export import ProgramShape, build_program

    torch.set_num_threads(1)
    layers = tuple(KVLayer(*layer) for layer in job["layers"])
    kv = KVLayout(job["block_size"], len(layers), layers)
    folder = Path(job["folder"])
    build_program(folder, folder / job["weights"], ProgramShape(**job["shape"]), kv, job["dtype"], Path(job["output"]))


if __name__ == "__main__":
    main()
