"""Architectures of transformers through the compiled path, token for token with transformers' own greedy generate.

Tiny random models in float32, whatever modelling code transformers has for them: ragged prompts, more requests than rows
so that sequences join and leave midway, sizes 8 and 1.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from multibatch import LLM, SamplingParams
from multibatch.hardware import usable_cores

ROOT = Path(__file__).parents[2]

_BASE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": 12},
    "Gemma2": {"head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 16},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 16},
    "Phi3": {},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 64},
}


def make_model(name: str, folder: Path) -> Any:
    """A tiny random model of the architecture, saved to `folder`."""
    import transformers

    torch.manual_seed(sum(map(ord, name)))
    options = {**_BASE, **ARCHITECTURES[name]}
    config = getattr(transformers, f"{name}Config")(**options)
    stem = "Gemma3" if name == "Gemma3Text" else name
    model = getattr(transformers, f"{stem}ForCausalLM")(config).float().eval()
    # The default deviation of 0.02 makes every logit alike; near ties would test rounding and not the path.
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Any, Path, Future[str]]]]:
    """Model, artifact and what was wrong with its compile, by architecture; as many compiles at once as there are cores."""
    folder = tmp_path_factory.mktemp("parity")
    wanted = [item.callspec.params["name"] for item in request.session.items if item.fspath == request.fspath]
    with ThreadPoolExecutor(usable_cores()) as pool:
        made = {name: make_model(name, folder / name) for name in wanted}
        yield {
            name: (model, folder / f"{name}.out", pool.submit(_compile, name, folder)) for name, model in made.items()
        }


def _compile(name: str, folder: Path) -> str:
    # One program for 1 to 8 rows and for prompts; for one architecture decoders of fixed sizes too.
    sizes = "8,1" if name == "Llama" else "any"
    options = ["--decoder-batch-sizes", sizes, "--max-num-seqs", "8", "--max-seq-len", "96", "--jobs", "1"]
    command = [sys.executable, "-m", "multibatch", "compile", folder / name, "-o", folder / f"{name}.out", *options]
    done = subprocess.run(
        [*command, "--max-num-batched-tokens", "24"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return "" if done.returncode == 0 else done.stderr


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_equal_transformers(
    name: str,
    compiled: dict[str, tuple[Any, Path, Future[str]]],
    greedy: Callable[[Any, list[int], int], list[int]],
) -> None:
    model, artifact, compiling = compiled[name]
    assert compiling.result() == ""
    llm = LLM(artifact, num_threads=2)
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 160) for _ in range(rng.randrange(1, 50))] for _ in range(11)]
    lengths = [rng.randrange(1, 40) for _ in prompts]
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, length, output in zip(prompts, lengths, outputs, strict=True):
        assert output.outputs[0].token_ids == greedy(model, prompt, length)
