"""The floor plan, the public names, and what `import multibatch` may load."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import multibatch

_ROOT = Path(__file__).parent.parent
_DOCUMENTS = sorted([_ROOT / "README.md", *_ROOT.glob("*/README.md"), *_ROOT.glob("docs/*.md")])


def test_public_names_exist() -> None:
    assert [name for name in multibatch.__all__ if getattr(multibatch, name, None) is None] == []


def test_import_loads_no_torch() -> None:
    code = "import multibatch, sys; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_floors_are_kept() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_version_is_in_changelog() -> None:
    changelog = (_ROOT / "CHANGELOG.md").read_text()
    assert f"## {multibatch.__version__}" in changelog


@pytest.mark.parametrize("document", _DOCUMENTS, ids=lambda path: str(path.relative_to(_ROOT)))
def test_what_a_document_names_exists(document: Path) -> None:
    text, missing = document.read_text(), list[str]()
    for file, test in re.findall(r"\b(tests/[\w/]+\.py)(?:::(\w+))?", text):
        path = _ROOT / file
        if not path.is_file() or (test and not re.search(rf"\bdef {test}\b", path.read_text())):
            missing.append(f"{file}::{test}")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    missing += [link for link in links if not (document.parent / link).exists()]
    files = re.findall(r"`((?:multibatch|compile|benchmarks|docs)/[\w/]+\.(?:py|md|cpp|h))`", text)
    missing += [file for file in files if not (_ROOT / file).exists()]
    modules = re.findall(r"python -m (benchmarks\.\w+)", text)
    missing += [name for name in modules if not (_ROOT / f"{name.replace('.', '/')}.py").exists()]
    assert missing == []
