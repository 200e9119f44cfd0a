"""Which part of a model computes the wanted tokens alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from multibatch.manifest import KVLayer, KVLayout
from multibatch_compile.export import ProgramShape, export_model
from multibatch_compile.fusion import replace_norms
from multibatch_compile.packing import Packing, pack_model
from multibatch_compile.selection import select_early

TOKENS, WANTED = 7, torch.tensor([2, 6])


class Decoder(nn.Module):
    """Something over all tokens, then a block over each of them, then a head over those that are wanted."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mixed = x.cumsum(1)
        y = mixed + self.block[2](self.block[0](mixed) * 2.0)
        if self.form == "mixed again":
            y = y.flip(1)
        if self.form == "one number for each token":
            y = y * torch.arange(TOKENS, dtype=torch.float32)[None, :, None]
        if self.form == "numbers that come from nothing":
            y = y + torch.ones(1, TOKENS, 8)
        if self.form == "a row of numbers for all":
            y = y * self.head.weight[0]
        if self.form == "two of them":
            return self.head(y[:, wanted]), y[:, wanted]
        return self.head(y[:, wanted]), y if self.form == "needed elsewhere" else mixed


def exported(form: str, wanted: torch.Tensor = WANTED) -> Any:
    torch.manual_seed(0)
    return torch.export.export(Decoder(form).eval(), (torch.randn(1, TOKENS, 8), wanted), strict=False)


def tokens_of(program: Any, target: Any) -> list[int]:
    return [node.meta["val"].shape[1] for node in program.graph.nodes if node.target is target]


@pytest.mark.parametrize(
    ("form", "moved"),
    [
        ("plain", 4),  # layer_norm, mul, gelu and add
        ("a row of numbers for all", 5),
        ("one number for each token", 5),
        ("numbers that come from nothing", 5),
        ("mixed again", 0),
        ("needed elsewhere", 0),
        ("two of them", 0),
    ],
)
def test_what_computes_token_by_token_computes_the_wanted_ones(form: str, moved: int) -> None:
    program = exported(form)
    x = torch.randn(1, TOKENS, 8)
    before = program.module()(x, WANTED)
    assert select_early(program.graph) == moved
    program.graph.lint()
    program.graph_module.recompile()
    after = program.module()(x, WANTED)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert tokens_of(program, torch.ops.aten.gelu.default) == [2 if moved else TOKENS]
    assert tokens_of(program, torch.ops.aten.cumsum.default) == [TOKENS]


def test_where_all_tokens_are_wanted_nothing_moves() -> None:
    assert select_early(exported("plain", torch.arange(TOKENS)).graph) == 0


def test_a_norm_over_tokens_stays() -> None:
    class Normed(nn.Module):
        def forward(self, x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return nn.functional.layer_norm(x, (TOKENS, 8))[:, wanted]

    program = torch.export.export(Normed(), (torch.randn(1, TOKENS, 8), WANTED), strict=False)
    assert select_early(program.graph) == 0


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
GATED = {**SIZES, "num_key_value_heads": 4, "intermediate_size": 48}
NEOX = {**SIZES, "intermediate_size": 48, "use_parallel_residual": True}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("Llama", GATED), ("Gemma2", {**GATED, "head_dim": 8}), ("GPT2", SIZES), ("GPTNeoX", NEOX)],
)
@pytest.mark.parametrize("latest_operators", [True, False])
def test_of_models_the_last_layer_computes_the_wanted_tokens(
    name: str, sizes: dict[str, int], latest_operators: bool
) -> None:
    model: Any = getattr(transformers, f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")
    model = model(getattr(transformers, f"{name}Config")(**sizes)).eval().requires_grad_(False)
    pack_model(model, Packing())
    replace_norms(model)
    kv = KVLayout(16, 2, tuple(KVLayer(4, 8, 8) for _ in range(2)))
    shape = ProgramShape("step", "step", 4, 64, 4)
    program = export_model(model, shape, kv, "float32", latest_operators)
    linear = [node for node in program.graph.nodes if "linear.default" in str(node.target)]
    counts = [str(node.meta["val"].shape[1]) for node in linear]
    wanted, num_tokens = counts[-1], counts[0]
    assert wanted != num_tokens
    # The first layer, and of the last one the queries, keys and values, which other tokens attend to.
    assert counts == [num_tokens] * counts.count(num_tokens) + [wanted] * counts.count(wanted)
    per_layer = (len(linear) - 1) // 2
    assert counts.count(wanted) == 1 + per_layer - (3 if name in ("Llama", "Gemma2") else 1)
