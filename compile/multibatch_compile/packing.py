"""Packs linear weights once into the layout of the operators, and puts modules in the model that use it.

The layout (also in artifacts/README.md): panels of 32 outputs, so that a panel is one contiguous stream for any number of
rows. As many inputs lie side by side as one dot-product instruction takes: bfloat16 [ceil(N/32), ceil(K/2), 32, 2], int8
[ceil(N/32), ceil(K/4), 32, 4], float32 and float16 [ceil(N/32), K, 32]. Of four bits, uint8 [ceil(N/32), ceil(K/64), 2, 576]:
groups of 32 inputs, 512 bytes of their weights (two in a byte) and 32 scales in bfloat16. Zeros beyond N and K.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, Self, cast

import torch
from torch import nn

from multibatch.errors import UnsupportedModelError
from multibatch.ops import PANEL
from multibatch.reference import GROUP, quantize_weight, quantize_weight_by_group, weight_of_groups

METADATA_KEY = "packing"
"""Where weights.safetensors holds a `Packing`."""

_UNIT = {torch.bfloat16: 2, torch.int8: 4}


@dataclass(frozen=True, slots=True)
class Packing:
    """How a model's linear layers are packed. Kept with the weights, so that a program can be added later."""

    quantization: Literal["none", "int8", "int4"] = "none"
    """int8: a signed byte per weight with one scale per output. int4: four bits with a scale for every 32 inputs of an output, and
    int8 for the LM head. Activations get a scale per token at run time."""
    fused: tuple[tuple[str, ...], ...] = ()
    """Names of linear layers that get one input, in the order of their calls: packed as one."""

    def to_metadata(self) -> dict[str, str]:
        """For the header of weights.safetensors."""
        return {METADATA_KEY: json.dumps(asdict(self))}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Self:
        """The inverse of `to_metadata`."""
        record = json.loads(metadata[METADATA_KEY])
        return cls(record["quantization"], tuple(tuple(names) for names in record["fused"]))


def packed_shape(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Shape of a packed [out_features, in_features] weight."""
    panels, unit = -(-out_features // PANEL), _UNIT.get(dtype, 1)
    if unit == 1:
        return (panels, in_features, PANEL)
    return (panels, -(-in_features // unit), PANEL, unit)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] in float32, bfloat16, float16 or int8 -> the packed layout, same dtype, contiguous."""
    n, k = weight.shape
    shape = packed_shape(n, k, weight.dtype)
    if weight.device.type == "meta":
        return weight.new_empty(shape)
    unit = _UNIT.get(weight.dtype, 1)
    rows, columns = shape[0] * PANEL, shape[1] * unit
    padded = weight.detach()
    if (rows, columns) != (n, k):
        padded = weight.new_zeros((rows, columns))
        padded[:n, :k] = weight.detach()
    return padded.view(shape[0], PANEL, shape[1], unit).permute(0, 2, 1, 3).reshape(shape).contiguous()


def pack_groups(rounded: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """int8[N, K] of -8 to 7 and bfloat16[N, ceil(K/32)] -> uint8 [ceil(N/32), ceil(K/64), 2, 576]."""
    n, k = rounded.shape
    panels, units = -(-n // PANEL), -(-k // (2 * GROUP))
    if rounded.device.type == "meta":
        return rounded.new_empty((panels, units, 2, PANEL * (GROUP // 2 + 2)), dtype=torch.uint8)
    padded = rounded.new_zeros((panels * PANEL, units * 2 * GROUP))
    padded[:n, :k] = rounded
    # [panel, output, group, p, half, byte]: a byte has input 8 p + byte and the one four further on.
    parts = padded.view(panels, PANEL, 2 * units, 4, 2, 4).to(torch.uint8)
    both = (parts[..., 0, :] & 15) | (parts[..., 1, :] << 4)
    weights = both.permute(0, 2, 3, 1, 4).reshape(panels, 2 * units, PANEL * GROUP // 2)
    wide = scales.new_zeros((panels * PANEL, 2 * units))
    wide[:n, : scales.shape[1]] = scales
    own = wide.view(panels, PANEL, 2 * units).transpose(1, 2).contiguous().view(torch.uint8)
    return torch.cat([weights, own], dim=2).view(panels, units, 2, -1)


class PackedLinear(nn.Module):
    """`nn.Linear` over a packed weight."""

    weight: nn.Parameter
    scales: torch.Tensor | None
    sums: torch.Tensor | None

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, quantization: str, same: PackedLinear | None = None
    ) -> None:
        """Packs `weight`, [N, K], unless `same` has that weight already."""
        super().__init__()
        self.out_features = weight.shape[0]
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        if same is not None:
            self.weight, self.scales, self.sums = same.weight, same.scales, same.sums
            return
        packed, scales, sums = quantize_and_pack(weight, quantization)
        self.register_buffer("scales", scales)
        self.register_buffer("sums", sums)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        y: torch.Tensor = torch.ops.multibatch.packed_linear(
            x, self.weight, self.bias, self.scales, self.sums, self.out_features
        )
        return y


def quantize_and_pack(
    weight: torch.Tensor, quantization: str
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """[N, K] -> what the operators take of it: the packed weight, scales and sums.

    The sums are of an output's weights: what 128, added to every activation byte to make it unsigned, adds to it 128 times. int8:
    float32[N] scales, and int32[N] sums of bytes. int4: the scales lie with the weights, and the sums are float32[N].
    """
    if quantization == "none":
        return pack(weight), None, None
    if quantization == "int8":
        rounded, scales = quantize_weight(weight)
        return pack(rounded), scales, rounded.sum(dim=1, dtype=torch.int32)
    rounded, scales = quantize_weight_by_group(weight)
    return pack_groups(rounded, scales), None, weight_of_groups(rounded, scales).double().sum(dim=1).float()


class FusedLinear(nn.Module):
    """The first of several linear layers with one input: computes all, and keeps the others' parts for their modules."""

    def __init__(self, linear: PackedLinear, sizes: list[int]) -> None:
        super().__init__()
        self.linear = linear
        self.sizes = sizes
        self.kept: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., sizes[0]]."""
        parts = self.linear(x).split(self.sizes, dim=-1)
        self.kept = (x, parts)
        first: torch.Tensor = parts[0]
        return first


class FusedPart(nn.Module):
    """One of the others."""

    def __init__(self, first: FusedLinear, index: int, name: str) -> None:
        super().__init__()
        self._first = (first,)  # in a tuple, so that its weights are not registered here once more
        self._index = index
        self._is_last = index == len(first.sizes) - 1
        self._name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., sizes[index]]."""
        kept = self._first[0].kept
        if kept is None or kept[0] is not x:
            raise UnsupportedModelError(f"{self._name} does not always get the input of the layers it was packed with")
        if self._is_last:
            self._first[0].kept = None
        return kept[1][self._index]


class PackedEmbedding(nn.Module):
    """`nn.Embedding` that reads its rows from the packed weight of the LM head it is tied to."""

    def __init__(self, head: PackedLinear, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = head.weight
        self.register_buffer("scales", head.scales)
        self.dtype = embedding.weight.dtype
        self.num_embeddings = embedding.num_embeddings
        self.embedding_dim = embedding.embedding_dim

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int[...] -> [..., embedding_dim]."""
        rows: torch.Tensor = torch.ops.multibatch.packed_embedding(
            ids, self.weight, self.scales, self.num_embeddings, self.embedding_dim, self.dtype
        )
        return rows


def pack_model(model: nn.Module, packing: Packing) -> None:
    """Replaces every linear layer of `model`, and an embedding tied to one, in place.

    A tied weight is packed once and stays tied. Modules of another exact type than `nn.Linear`, `nn.Embedding` and
    transformers' `Conv1D` are left as they are: their forward may do more than the plain product.
    """
    _fuse(model, packing)
    head = head_of(model)
    packed: dict[torch.Tensor, PackedLinear] = {}
    for parent, name, child in _children(model):
        weight = linear_weight(child)
        if weight is None:
            continue
        source = cast(torch.Tensor, child.weight)
        scheme = scheme_of(packing.quantization, is_head=child is head)
        linear = PackedLinear(weight, cast(torch.Tensor | None, child.bias), scheme, packed.get(source))
        packed.setdefault(source, linear)
        setattr(parent, name, linear)
    for parent, name, child in _children(model):
        if type(child) is nn.Embedding and child.weight in packed:
            setattr(parent, name, PackedEmbedding(packed[child.weight], child))


def _fuse(model: nn.Module, packing: Packing) -> None:
    for names in packing.fused:
        layers = cast(list[nn.Linear], [model.get_submodule(name) for name in names])
        weights = [layer.weight for layer in layers]
        bias = None
        if any(layer.bias is not None for layer in layers):
            zeros = [weight.new_zeros(weight.shape[0]) for weight in weights]
            bias = torch.cat([z if x.bias is None else x.bias for x, z in zip(layers, zeros, strict=True)])
        linear = PackedLinear(torch.cat(weights), bias, packing.quantization)
        first = FusedLinear(linear, [weight.shape[0] for weight in weights])
        for index, name in enumerate(names):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, first if index == 0 else FusedPart(first, index, name))


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in list(model.modules()):
        if not isinstance(parent, PackedLinear | FusedLinear | FusedPart):
            for name, child in list(parent.named_children()):
                yield parent, name, child


def head_of(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits."""
    of = getattr(model, "get_output_embeddings", None)
    return cast(nn.Module | None, of()) if of else None


def scheme_of(quantization: str, *, is_head: bool) -> str:
    """How a layer is quantised where the model is so: the LM head, and an embedding tied to it, keep eight bits."""
    return "int8" if quantization == "int4" and is_head else quantization


def linear_weight(module: nn.Module) -> torch.Tensor | None:
    """[N, K], or None where the module is no plain linear layer."""
    from transformers.pytorch_utils import Conv1D

    if type(module) is nn.Linear:
        return module.weight
    if type(module) is Conv1D:
        weight: torch.Tensor = module.weight.t()
        return weight
    return None
