"""What is found in a model by what it computes, and what is left alone because it computes something else."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from multibatch.backends.flat_model import REFERENCE_ATTENTION, FlatDecoder
from multibatch_compile.fusion import (
    NormOptions,
    fuse_gates,
    fuse_mlps,
    fuse_norms,
    fuse_residuals,
    fuse_rotary,
    norm_options,
)
from multibatch_compile.model import find_fused
from multibatch_compile.packing import PackedLinear, Packing, pack, pack_groups, packed_shape


class Scaled(nn.Module):
    """One weight and an epsilon, and no normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(24))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.eps


class Gate(nn.Module):
    """A gated layer over halves of one tensor, with what may be wrong about it."""

    def __init__(self, *, swapped: bool = False, sizes: tuple[int, int] = (16, 16), activation: str = "silu") -> None:
        super().__init__()
        self.swapped, self.sizes, self.activation = swapped, sizes, activation
        self.down = PackedLinear(torch.randn(8, 16), None, "none")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.split(list(self.sizes), dim=-1)
        if self.swapped:
            gate, up = up, gate
        act = {"silu": nn.functional.silu, "gelu": nn.functional.gelu, "tanh": torch.tanh}[self.activation]
        y: torch.Tensor = self.down(act(gate) * up)
        return y


def tiny(name: str, **options: Any) -> Any:
    import transformers

    base = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = getattr(transformers, f"{name}Config")(**base, **options)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_models_are_recognised(dtype: torch.dtype) -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    llama = norm_options(LlamaRMSNorm(96, eps=3e-5).to(dtype))
    gemma = norm_options(Gemma2RMSNorm(96, eps=2e-6).to(dtype))
    assert llama is not None
    assert gemma is not None
    assert (llama.epsilon, llama.offset) == (3e-5, 0.0)
    assert (gemma.epsilon, gemma.offset) == (2e-6, 1.0)
    if dtype == torch.bfloat16:
        assert llama == NormOptions(3e-5, 0.0, round_first=True)
        assert gemma == NormOptions(2e-6, 1.0, round_first=False)


def test_a_norm_without_memory_is_recognised_too() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    with torch.device("meta"):
        norm = LlamaRMSNorm(96).bfloat16()
    assert norm_options(norm) is not None


@pytest.mark.parametrize(
    "module", [Scaled(), nn.LayerNorm(24), nn.Embedding(4, 24), nn.Linear(24, 24, bias=False), nn.ReLU()]
)
def test_what_is_no_norm_is_left_alone(module: nn.Module) -> None:
    assert norm_options(module) is None


@pytest.mark.parametrize(
    ("gate", "count"),
    [
        (Gate(), 1),
        (Gate(activation="gelu"), 0),
        (Gate(activation="tanh"), 0),
        (Gate(swapped=True), 0),
    ],
)
def test_only_gates_over_halves_in_order_are_rewritten(gate: Gate, count: int) -> None:
    x = torch.randn(3, 32)
    program = torch.export.export(gate, (x,), strict=False)
    assert fuse_gates(program.graph) == count


class Normed(nn.Module):
    """A linear layer behind a normalisation, whose result something else may need too."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.shared = shared
        self.weight = nn.Parameter(torch.ones(16))
        self.linear = PackedLinear(torch.randn(8, 16), None, "none")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed = torch.ops.multibatch.rms_norm(x, self.weight, 1e-6, 0.0, True)
        return self.linear(normed), normed if self.shared else x + 1


@pytest.mark.parametrize(("shared", "count"), [(False, 1), (True, 0)])
def test_only_norms_for_a_linear_layer_alone_are_rewritten(shared: bool, count: int) -> None:
    program = torch.export.export(Normed(shared=shared), (torch.randn(3, 16),), strict=False)
    assert fuse_norms(program.graph) == count
    targets = [node.target for node in program.graph.nodes]
    assert (torch.ops.multibatch.rms_norm.default in targets) is shared


class Residual(nn.Module):
    """A linear layer whose result is added to something, in one of several ways."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.linear = PackedLinear(torch.randn(16, 16), None, "none")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.linear(x)
        added = {
            "behind": lambda: x + y,
            "before": lambda: y + x,
            "twice": lambda: y + y,
            "row": lambda: y + x[:1],
            "number": lambda: y + 1.0,
            "double": lambda: y + x.double(),
            "scaled": lambda: torch.add(x, y, alpha=2),
            "shared": lambda: x + y,
        }[self.form]()
        return added, y if self.form == "shared" else x


@pytest.mark.parametrize(
    ("form", "count"),
    [
        ("behind", 1),
        ("before", 1),
        ("twice", 0),
        ("row", 0),
        ("number", 0),
        ("double", 0),
        ("scaled", 0),
        ("shared", 0),
    ],
)
def test_only_sums_of_one_shape_and_one_use_are_rewritten(form: str, count: int) -> None:
    program = torch.export.export(Residual(form), (torch.randn(3, 16),), strict=False)
    assert fuse_residuals(program.graph) == count
    program.graph.lint()
    targets = [node.target for node in program.graph.nodes]
    assert (torch.ops.multibatch.packed_linear.default in targets) is (count == 0)


class GatedMlp(nn.Module):
    """A block's gated layers, with or without what stands around them."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.weight = nn.Parameter(torch.ones(16))
        self.gate_up = PackedLinear(torch.randn(64, 16), None, "none")
        self.down = PackedLinear(torch.randn(16, 32), None, "none")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed = x if self.form == "bare" else torch.ops.multibatch.rms_norm(x, self.weight, 1e-6, 1.0, True)
        gate_up = x.repeat(1, 4) if self.form == "no layer" else self.gate_up(normed)
        gate, up = gate_up.split([32, 32], dim=-1)
        y = self.down(torch.nn.functional.silu(gate) * up)
        return (y if self.form in ("bare", "alone") else x + y), gate_up if self.form == "shared" else x


@pytest.mark.parametrize(("form", "count"), [("whole", 1), ("alone", 1), ("bare", 1), ("shared", 0), ("no layer", 0)])
def test_only_gated_layers_with_the_layer_of_their_gates_for_themselves_are_rewritten(form: str, count: int) -> None:
    program = torch.export.export(GatedMlp(form), (torch.randn(3, 16),), strict=False)
    for fuse in (fuse_gates, fuse_norms, fuse_residuals):
        fuse(program.graph)
    assert fuse_mlps(program.graph) == count
    program.graph.lint()
    found = [node for node in program.graph.nodes if node.target is torch.ops.multibatch.gated_mlp.default]
    assert len(found) == count
    if not found:
        return
    names = [str(argument) for argument in found[0].args]
    around = {
        "whole": ["x", "x", "p_weight", "1e-06", "1.0", "True"],
        "alone": ["x", "None", "p_weight", "1e-06", "1.0", "True"],
    }
    assert names[:6] == around.get(form, ["x", "None", "None", "0.0", "0.0", "False"])
    assert names[6::4][:2] == ["p_gate_up_weight", "p_down_weight"]
    assert found[0].args[-3:] == (32, 16, "silu")
    assert found[0].meta["val"].shape == (3, 16)


class Rotated(nn.Module):
    """Attention over queries and keys that are rotated as transformers' models do it, or nearly so."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        turned = self.turn(q, cos, sin), self.turn(k, sin if self.form == "other angles" else cos, sin)
        out: torch.Tensor = torch.ops.multibatch.paged_attention(*turned, k, *rest, None, 1.0, 0, 0.0)
        return out

    def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        dims = cos.shape[-1]
        head, tail = x[..., :dims], x[..., dims:]
        if self.form == "pairs":  # GPT-J's: neighbours, and not halves
            crossed = torch.stack([-head[..., 1::2], head[..., ::2]], -1).flatten(-2)
        else:
            first, second = head[..., : dims // 2], head[..., dims // 2 :]
            crossed = torch.cat([second, -first] if self.form == "backwards" else [-second, first], -1)
        turned = head * cos + crossed * sin
        return torch.cat([turned, tail], -1) if dims < x.shape[-1] else turned


@pytest.mark.parametrize(
    ("form", "dims", "count"),
    [
        ("halves", 16, 1),
        ("halves", 8, 1),
        ("backwards", 16, 0),
        ("pairs", 16, 0),
        ("other angles", 16, 0),
    ],
)
def test_only_rotations_of_two_halves_by_the_same_angles_are_rewritten(form: str, dims: int, count: int) -> None:
    q, k, angles = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(1, 3, dims)
    pools = torch.zeros(2, 2, 16, 16), torch.zeros(2, 2, 16, 16)
    ints = [torch.tensor(x, dtype=torch.int32) for x in ([0, 3], [[1]], [3])]
    arguments = (q, k, angles, *pools, torch.arange(16, 19), *ints)
    program = torch.export.export(Rotated(form), arguments, strict=False)
    assert fuse_rotary(program.graph) == count
    targets = [node.target for node in program.graph.nodes]
    assert (torch.ops.aten.cat.default in targets) is (count == 0 and form != "pairs")
    assert (torch.ops.multibatch.paged_attention.default in targets) is (count == 0)


@pytest.mark.parametrize(
    ("name", "per_layer"),
    [
        ("Llama", [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]),
        ("Phi3", []),
        ("OPT", [("q_proj", "k_proj", "v_proj")]),
    ],
)
def test_layers_that_share_an_input_are_found(name: str, per_layer: list[tuple[str, ...]]) -> None:
    options = {"ffn_dim": 48, "word_embed_proj_dim": 32} if name == "OPT" else {"pad_token_id": 0}
    decoder = FlatDecoder(tiny(name, **options), REFERENCE_ATTENTION)
    found = [tuple(n.rpartition(".")[2] for n in group) for group in find_fused(decoder)]
    assert sorted(found) == sorted(per_layer * 2)


def test_packing_survives_the_header_of_the_weights() -> None:
    for packing in (Packing("int8", (("a.q", "a.k"), ("b.gate", "b.up"))), Packing("int4")):
        assert Packing.from_metadata(packing.to_metadata()) == packing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_packed_layout(dtype: torch.dtype) -> None:
    n, k = 70, 9
    weight = torch.randint(-99, 99, (n, k)).to(dtype)
    unit = {torch.bfloat16: 2, torch.int8: 4}.get(dtype, 1)
    packed = pack(weight)
    assert tuple(packed.shape) == packed_shape(n, k, dtype)
    flat = packed.flatten()
    depth = -(-k // unit) * unit
    for i, j in [(0, 0), (69, 8), (33, 5), (31, 2)]:
        place = i // 32 * 32 * depth + j // unit * unit * 32 + i % 32 * unit + j % unit
        assert flat[place] == weight[i, j]
    assert int((flat != 0).sum()) == int((weight != 0).sum())


def test_packed_layout_of_four_bits() -> None:
    n, k = 70, 90
    rounded, scales = torch.randint(-8, 8, (n, k), dtype=torch.int8), torch.rand(n, 3).bfloat16()
    packed = pack_groups(rounded, scales)
    assert tuple(packed.shape) == (3, 2, 2, 576)
    whole, factors = torch.zeros(96, 128, dtype=torch.int8), torch.zeros(96, 4, dtype=torch.bfloat16)
    whole[:n, :k], factors[:n, :3] = rounded, scales  # zeros beyond
    groups = packed.tolist()
    for i, j in itertools.product(range(96), range(128)):
        byte = groups[i // 32][j // 64][j % 64 // 32][(j % 32 // 8 * 32 + i % 32) * 4 + j % 4]
        half = byte >> 4 if j % 8 >= 4 else byte & 15
        assert (half ^ 8) - 8 == whole[i, j]
        assert packed[i // 32, j // 64, j % 64 // 32, 512:].view(torch.bfloat16)[i % 32] == factors[i, j // 32]
    assert pack_groups(rounded.to("meta"), scales.to("meta")).shape == packed.shape
