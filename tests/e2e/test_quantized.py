"""`--quantization int8` on the trained demo model: still right, the same bits in every batch size, and honest about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from multibatch import LLM
from multibatch.artifact import Artifact
from multibatch.cli import main
from multibatch_compile import add_size, compile_model, verify_artifact


@pytest.fixture(scope="module")
def int8_artifact(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    target = tmp_path_factory.mktemp("artifacts") / "int8"
    compile_model(
        demo_model, target, decoder_batch_sizes=[4], max_seq_len=128, prefill_chunk_sizes=[64], quantization="int8"
    )
    return target


def test_it_still_answers(int8_artifact: Path, share_of_right_answers: Callable[[LLM], float]) -> None:
    assert share_of_right_answers(LLM(int8_artifact, num_threads=2)) >= 0.95


def test_what_it_did_to_the_outputs_is_recorded_and_shown(int8_artifact: Path) -> None:
    found = Artifact.open(int8_artifact).manifest.quantization
    assert found is not None
    assert found.random_tokens is not None
    assert found.own_text is not None
    for agreement in (found.random_tokens, found.own_text):
        assert 0 < agreement.kl_divergence < 0.05
        assert 0.9 < agreement.top1_agreement <= 1
    shown = CliRunner().invoke(main, ["inspect", str(int8_artifact)]).output
    assert "quantised  int8, against bfloat16: on random tokens KL" in shown
    assert len(shown) > 100


def test_weights_take_half_and_sizes_can_be_added(int8_artifact: Path, demo_artifact: Path) -> None:
    before = Artifact.open(int8_artifact).manifest
    # The other artifact is in float32.
    assert before.model.weight_bytes < 0.3 * Artifact.open(demo_artifact).manifest.model.weight_bytes
    after = add_size(int8_artifact, 2).manifest
    assert after.quantization is not None
    assert [p.bit_equal for p in after.decoders.values()] == [True, True]
    assert verify_artifact(int8_artifact) == []
