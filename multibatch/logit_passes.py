"""What of sampling reads every logit, and may run on a backend's own threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

CHUNK: Final = 128
"""Logits per maximum: `torch.argmax` takes 8 times as long as `amax` over chunks and a search in the best one."""


def chunk_maxima_of(scores: torch.Tensor, chunk: int) -> torch.Tensor:
    """The maximum of every `chunk` neighbours; [n, V] -> [n, ceil(V / chunk)]; a NaN stays one."""
    n, vocabulary = scores.shape
    whole = vocabulary // chunk * chunk
    maxima = scores[:, :whole].reshape(n, whole // chunk, chunk).amax(-1)
    if whole == vocabulary:
        return maxima
    return torch.cat([maxima, scores[:, whole:].amax(-1, keepdim=True)], dim=1)


def chunk_members(chunks: torch.Tensor) -> torch.Tensor:
    """Indices in the chunks, int64[c] -> int64[c, CHUNK]; of the last chunk some may be beyond the vocabulary."""
    return chunks[:, None] * CHUNK + torch.arange(CHUNK, device=chunks.device)


def first_maxima_of(scores: torch.Tensor, maxima: torch.Tensor) -> torch.Tensor:
    """The lowest index of the highest score, or -1 where that is no finite number; [n, V], its `chunk_maxima_of` -> int64[n]."""
    members = chunk_members(maxima.argmax(-1)).clamp_(max=scores.shape[1] - 1)
    inside = scores.gather(1, members)
    best = inside.argmax(-1, keepdim=True)
    return torch.where(torch.isfinite(inside.gather(1, best)), members.gather(1, best), -1).flatten()


@dataclass(frozen=True, slots=True)
class DrawOptions:
    """How the tokens of n rows are drawn."""

    temperature: torch.Tensor
    """float32[n]; 0: the first of the highest."""
    top_k: torch.Tensor
    """int64[n]; 0 or less: all."""
    top_p: torch.Tensor
    """float64[n]"""
    log_min_p: torch.Tensor
    """float64[n]: the logarithm of min_p."""
    random: torch.Tensor
    """int64[n]: 53 random bits."""
    scale: float
    """By what the exponentials are multiplied before they are rounded down."""

    def tensors(self) -> list[torch.Tensor]:
        """In the order in which the operator takes them."""
        return [self.temperature, self.top_k, self.top_p, self.log_min_p, self.random]


DrawTokens = Callable[[torch.Tensor, DrawOptions], torch.Tensor]
"""Logits [n, V] -> the tokens that `draws.draw` gives, int64[n], -1 where the highest score is no finite number."""


@dataclass(frozen=True, slots=True)
class LogitPasses:
    """The passes of one backend; by default PyTorch's."""

    chunk_maxima: Callable[[torch.Tensor, int], torch.Tensor] = chunk_maxima_of
    first_maxima: Callable[[torch.Tensor], torch.Tensor] | None = None
    """As `first_maxima_of`; None: by way of `chunk_maxima`."""
    draw_tokens: DrawTokens | None = None
    """None: PyTorch, row by row."""

    def highest(self, scores: torch.Tensor) -> torch.Tensor:
        """`first_maxima_of` by the fastest way there is."""
        if self.first_maxima is not None:
            return self.first_maxima(scores)
        return first_maxima_of(scores, self.chunk_maxima(scores, CHUNK))
