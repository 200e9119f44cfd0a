"""`--quantization` on the trained demo model: still right, the same bits in every batch size, and honest about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from multibatch import LLM
from multibatch.artifact import Artifact
from multibatch.cli import main
from multibatch_compile import add_size, compile_model, verify_artifact


@dataclass(frozen=True)
class Quantized:
    """An artifact, and what may be expected of it."""

    scheme: str
    path: Path
    kl_divergence: float
    top1_agreement: float
    size: float
    """Of the weights, beside the same in float32."""


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Quantized:
    scheme = request.param
    target = tmp_path_factory.mktemp("artifacts") / scheme
    options = {"decoder_batch_sizes": [4], "max_seq_len": 128, "prefill_chunk_sizes": [64], "quantization": scheme}
    compile_model(demo_model, target, **options)
    if scheme == "int8":
        return Quantized(scheme, target, kl_divergence=0.05, top1_agreement=0.9, size=0.3)
    return Quantized(scheme, target, kl_divergence=0.2, top1_agreement=0.85, size=0.17)


def test_it_still_answers(quantized: Quantized, share_of_right_answers: Callable[[LLM], float]) -> None:
    assert share_of_right_answers(LLM(quantized.path, num_threads=2)) >= 0.95


def test_what_it_did_to_the_outputs_is_recorded_and_shown(quantized: Quantized) -> None:
    found = Artifact.open(quantized.path).manifest.quantization
    assert found is not None
    assert found.scheme == quantized.scheme
    assert found.random_tokens is not None
    assert found.own_text is not None
    for agreement in (found.random_tokens, found.own_text):
        assert 0 < agreement.kl_divergence < quantized.kl_divergence
        assert quantized.top1_agreement < agreement.top1_agreement <= 1
    shown = CliRunner().invoke(main, ["inspect", str(quantized.path)]).output
    assert f"quantised  {quantized.scheme}, against bfloat16: on random tokens KL" in shown
    assert len(shown) > 100


def test_weights_are_smaller_and_sizes_can_be_added(quantized: Quantized, demo_artifact: Path) -> None:
    before = Artifact.open(quantized.path).manifest
    # The other artifact is in float32.
    assert before.model.weight_bytes < quantized.size * Artifact.open(demo_artifact).manifest.model.weight_bytes
    after = add_size(quantized.path, 2).manifest
    assert after.quantization is not None
    assert [p.bit_equal for p in after.decoders.values()] == [True, True]
    assert verify_artifact(quantized.path) == []
