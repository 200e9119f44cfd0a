"""The floor plan, the public names, and what `import multibatch` may load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import multibatch


def test_public_names_exist() -> None:
    assert [name for name in multibatch.__all__ if getattr(multibatch, name, None) is None] == []


def test_import_loads_no_torch() -> None:
    code = "import multibatch, sys; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_floors_are_kept() -> None:
    root = Path(__file__).parent.parent
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_version_is_in_changelog() -> None:
    changelog = (Path(__file__).parent.parent / "CHANGELOG.md").read_text()
    assert f"## {multibatch.__version__}" in changelog
