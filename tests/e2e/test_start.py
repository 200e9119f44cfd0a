"""What a start costs: the parts that must not grow with the number of sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import json, resource, sys
from multibatch import LLM, SamplingParams
llm = LLM(sys.argv[1], num_threads=2)
ids = [[5, 6, 7]] * int(sys.argv[2])
llm.generate(ids, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False), use_tqdm=False)
print(json.dumps({"modules": sorted(m for m in sys.modules if "." not in m)}))
"""


def test_serving_loads_neither_the_compile_step_nor_transformers(demo_artifact: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(demo_artifact), "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1])["modules"])
    assert not loaded & {"transformers", "multibatch_compile", "rich", "click"}


def test_who_may_read_other_files_may_read_all_of_an_artifact(demo_artifact: Path, tmp_path: Path) -> None:
    """Compiled by one user, served by another: of the weights' writer, safetensors, nobody else could read them."""
    other = tmp_path / "other"
    other.touch()
    readers = {file.name: file.stat().st_mode & 0o444 for file in demo_artifact.rglob("*") if file.is_file()}
    assert "weights.safetensors" in readers
    assert set(readers.values()) == {other.stat().st_mode & 0o444}
