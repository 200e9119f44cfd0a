"""An artifact for lesser processors: the best build of the operators that a machine can run, and the same answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from multibatch import LLM, SamplingParams
from multibatch.artifact import Artifact
from multibatch.backends.inductor import best_library
from multibatch.errors import ConfigError, IncompatibleError
from multibatch.hardware import portable_isa, read_cpu_info
from multibatch_compile import compile_model

PROMPT = "Which day comes after Monday?"
LESSER = ",".join(portable_isa(read_cpu_info().architecture))


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    target = tmp_path_factory.mktemp("artifacts") / "portable"
    compile_model(demo_model, target, max_num_seqs=2, max_seq_len=128, portable=True)
    return target


def generate(artifact: Path, isa: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "multibatch",
        "generate",
        str(artifact),
        "--chat",
        "--prompt",
        PROMPT,
        "--max-tokens",
        "16",
    ]
    environment = {**os.environ, "MULTIBATCH_ISA": isa}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_lesser_processor_gives_the_same_answer(portable: Path) -> None:
    here = LLM(portable, num_threads=2).chat(
        [{"role": "user", "content": PROMPT}], SamplingParams(temperature=0.0, max_tokens=16), use_tqdm=False
    )
    there = generate(portable, LESSER)
    assert there.returncode == 0, there.stderr
    assert there.stdout.strip() == here[0].outputs[0].text == "Tuesday"


def test_each_machine_gets_the_best_build_that_it_can_run(portable: Path) -> None:
    manifest = Artifact.open(portable).manifest
    assert manifest.build.isa == portable_isa(manifest.build.cpu_architecture)
    assert best_library(manifest, read_cpu_info().isa).file.path == "ops/multibatch_ops_native.so"
    assert best_library(manifest, LESSER.split(",")).file.path == "ops/multibatch_ops_portable.so"
    with pytest.raises(IncompatibleError, match="operators need"):
        best_library(manifest, ())


def test_an_artifact_that_is_not_portable_is_refused_there_by_name(demo_artifact: Path) -> None:
    refused = generate(demo_artifact, LESSER)
    assert refused.returncode != 0
    missing = next(x for x in read_cpu_info().isa if x not in LESSER.split(","))
    assert missing in refused.stderr
    assert "--force" in refused.stderr


def test_features_that_the_processor_does_not_have_are_refused(portable: Path) -> None:
    refused = generate(portable, "avx2,avx1024")
    assert refused.returncode != 0
    assert "avx1024" in refused.stderr
    assert ConfigError.__name__ not in refused.stderr
