"""Packs linear weights once into the layout of the operators, and puts modules in the model that use it.

The layout (also in artifacts/README.md): panels of 32 outputs, so that a panel is one contiguous stream for any number of
rows. bfloat16: [ceil(N/32), ceil(K/2), 32, 2], pairs of inputs side by side for the bfloat16 dot product; float32 and
float16: [ceil(N/32), K, 32]. Zeros beyond N and K.
"""

from __future__ import annotations

import torch
from torch import nn

from multibatch.ops import PANEL


def packed_shape(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Shape of a packed [out_features, in_features] weight."""
    panels = -(-out_features // PANEL)
    if dtype == torch.bfloat16:
        return (panels, -(-in_features // 2), PANEL, 2)
    return (panels, in_features, PANEL)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] in float32, bfloat16 or float16 -> the packed layout, same dtype, contiguous."""
    n, k = weight.shape
    if weight.device.type == "meta":
        return weight.new_empty(packed_shape(n, k, weight.dtype))
    rows = -(-n // PANEL) * PANEL
    columns = -(-k // 2) * 2 if weight.dtype == torch.bfloat16 else k
    padded = weight.detach()
    if (rows, columns) != (n, k):
        padded = weight.new_zeros((rows, columns))
        padded[:n, :k] = weight.detach()
    if weight.dtype == torch.bfloat16:
        return padded.view(rows // PANEL, PANEL, columns // 2, 2).permute(0, 2, 1, 3).contiguous()
    return padded.view(rows // PANEL, PANEL, k).permute(0, 2, 1).contiguous()


class PackedLinear(nn.Module):
    """`nn.Linear` over a packed weight."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, out_features: int) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.out_features = out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        y: torch.Tensor = torch.ops.multibatch.packed_linear(x, self.weight, self.bias, self.out_features)
        return y


class PackedEmbedding(nn.Module):
    """`nn.Embedding` that reads its rows from the packed weight of the LM head it is tied to."""

    def __init__(self, weight: nn.Parameter, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.weight = weight
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int[...] -> [..., embedding_dim]."""
        rows: torch.Tensor = torch.ops.multibatch.packed_embedding(
            ids, self.weight, self.num_embeddings, self.embedding_dim
        )
        return rows


def pack_model(model: nn.Module) -> None:
    """Replaces every linear layer of `model`, and an embedding tied to one, in place.

    A tied weight is packed once and stays tied. Modules of another exact type than `nn.Linear`, `nn.Embedding` and
    transformers' `Conv1D` are left as they are: their forward may do more than the plain product.
    """
    from transformers.pytorch_utils import Conv1D

    packed: dict[int, nn.Parameter] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                weight = child.weight
            elif type(child) is Conv1D:
                weight = nn.Parameter(child.weight.detach().t(), requires_grad=False)
            else:
                continue
            if id(child.weight) not in packed:
                packed[id(child.weight)] = nn.Parameter(pack(weight), requires_grad=False)
            parameter = packed[id(child.weight)]
            setattr(parent, name, PackedLinear(parameter, child.bias, weight.shape[0]))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Embedding and id(child.weight) in packed:
                tied = PackedEmbedding(packed[id(child.weight)], child.num_embeddings, child.embedding_dim)
                setattr(parent, name, tied)
