"""What the compile step refuses, and that it leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from multibatch.errors import CompileError, ConfigError, MultibatchError, UnsupportedModelError
from multibatch_compile import compile_model
from multibatch_compile.config import make_config


@pytest.mark.parametrize("sizes", [[0], [-1], ["x"], [4.5], [], [True]])
def test_sizes_out_of_range(sizes: list[Any]) -> None:
    with pytest.raises(ConfigError):
        make_config(decoder_batch_sizes=sizes)


def test_a_size_above_max_num_seqs() -> None:
    with pytest.raises(ConfigError, match="8"):
        make_config(decoder_batch_sizes=[8, 1], max_num_seqs=4)


@pytest.mark.parametrize("sizes", [[2], [2, 1, 2]])
def test_the_maximum_is_added_with_a_warning_and_the_list_is_left_alone(sizes: list[int]) -> None:
    before = list(sizes)
    with pytest.warns(UserWarning, match="8"):
        config = make_config(decoder_batch_sizes=sizes, max_num_seqs=8)
    assert config.ladder.sizes[-1] == 8
    assert sizes == before


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": "int3"}, UnsupportedModelError),
        ({"backend": "tensorrt"}, ConfigError),
        ({"device": "cuda"}, UnsupportedModelError),
        ({"block_size": 24}, ConfigError),
        ({"max_seq_len": 1}, ConfigError),
        ({"prefill_chunk_sizes": []}, ConfigError),
        ({"jobs": 0}, ConfigError),
    ],
)
def test_other_options(options: dict[str, Any], error: type[MultibatchError]) -> None:
    with pytest.raises(error):
        make_config(**options)


def _only(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="cannot be loaded"):
        compile_model(tmp_path / "nothing", tmp_path / "out" / "a", backend="eager")
    assert _only(tmp_path / "out") == []


def test_truncated_weights(tmp_path: Path, demo_model: Path) -> None:
    model = shutil.copytree(demo_model, tmp_path / "model")
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CompileError):
        compile_model(model, tmp_path / "a", backend="eager")
    assert _only(tmp_path) == ["model"]


def test_nan_in_the_weights(tmp_path: Path, demo_model: Path) -> None:
    model = shutil.copytree(demo_model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompileError, match="NaN"):
        compile_model(model, tmp_path / "a", backend="eager")


def test_an_unknown_architecture(tmp_path: Path, demo_model: Path) -> None:
    model = shutil.copytree(demo_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch", "architectures": ["Nonesuch"]}))
    with pytest.raises(CompileError, match="nonesuch"):
        compile_model(model, tmp_path / "a", backend="eager")


def test_an_architecture_without_the_attention_interface(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)
    MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises((UnsupportedModelError, CompileError)):
        compile_model(tmp_path / "model", tmp_path / "a", backend="eager")
    assert _only(tmp_path) == ["model"]


def test_dtype_of_the_checkpoint_is_the_default(eager_artifact: Path) -> None:
    assert torch.float32.itemsize == 4
    from multibatch.artifact import Artifact

    assert Artifact.open(eager_artifact).manifest.model.dtype == "float32"
