from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def run_interpreted() -> Callable[[str], None]:
    """Runs a file of tests in Triton's interpreter, in a process of its own.

    Triton decides at its import whether it interprets, and other tests of this process may have imported it.
    """
    triton = pytest.importorskip("triton", reason="no Triton for this machine")
    if _numbers(triton.__version__) < (3, 7) and _numbers(np.__version__) >= (2, 4):
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not work with NumPy {np.__version__}")

    def run(file: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert " passed" in done.stdout

    return run


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
