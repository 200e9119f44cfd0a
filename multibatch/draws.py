"""Draws tokens from logits: temperature, min_p, top_k, top_p and one random number a row.

Exponentials are turned into whole numbers, so that no order of summation can change a sum. With PyTorch they are taken on a tensor
of the row's own, since one may round otherwise by where a number lies; the operator `draw_tokens` does the same on all threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch

from multibatch.errors import StepError
from multibatch.logit_passes import CHUNK, DrawOptions, LogitPasses, first_maxima_of
from multibatch.request import random_bits
from multibatch.sampling_row import SamplingRow

_WEIGHT_BITS: Final = 44
_HEAD: Final = 128
"""Likeliest tokens that top_p tries first: they nearly always hold its share, and the answer is the same."""
_MAX_SORTED: Final = 4096
"""Candidates up to this number are sorted as they are; more are first cut down with a histogram."""
_BINS: Final = 2048
_BINS_PER_NAT: Final = 64.0

Found = tuple[torch.Tensor, torch.Tensor]
"""Token ids, ascending, and their scores."""


class Scores:
    """One row's logits over its temperature; only what is asked for is computed."""

    def __init__(self, logits: torch.Tensor, temperature: torch.Tensor, maxima: torch.Tensor) -> None:
        """Of logits [V], whole chunks; a temperature, float32; and the maxima of the chunks of scores, float32[V / CHUNK]."""
        self.maxima, self.peak, self.count = maxima, maxima.max(), logits.shape[0]
        self._logits, self._temperature = logits, temperature

    def all(self) -> torch.Tensor:
        """float32[V]."""
        return self._logits.float() / self._temperature

    def chunks(self, chunks: torch.Tensor) -> torch.Tensor:
        """Those of some chunks, int64[c] -> float32[c, CHUNK]."""
        return self._logits.view(-1, CHUNK)[chunks].float() / self._temperature

    def weights(self, found: Found | None = None) -> torch.Tensor:
        """Of what was found, or of all: exp(score - peak) as whole numbers, int64[k]."""
        scores = self.all() if found is None else found[1]
        return (scores - self.peak).exp_().mul_(_scale(self.count)).long()


def checked(found: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Token ids of `first_maxima_of`; raises StepError where a row has none."""
    token_ids: list[int] = found.tolist()
    if min(token_ids) >= 0:
        return token_ids
    bad = [(i, row.request_id) for i, row in enumerate(rows) if token_ids[i] < 0]
    names = ", ".join(f"{i} ({name})" if name else str(i) for i, name in bad)
    raise StepError(
        f"logits of row {names} have a NaN, an infinite maximum, or no token left to draw; allowed: finite"
        " numbers, and -inf beside them. Loosen allowed_token_ids, bad_words or structured_outputs, if the row has any;"
        " else check the model's dtype, or run it with the eager backend.",
        [name for _, name in bad],
    )


def draw(logits: torch.Tensor, rows: Sequence[SamplingRow], passes: LogitPasses) -> list[int]:
    """Draws from [n, V], each row by its own temperature, min_p, top_k and top_p."""
    if passes.draw_tokens is not None:
        return checked(passes.draw_tokens(logits, draw_options(rows, logits.shape[1])), rows)
    logits = whole_chunks(logits)
    maxima = passes.chunk_maxima(logits, CHUNK)
    found = first_maxima_of(logits, maxima)
    given = [1.0 if row.params.is_greedy else row.params.temperature for row in rows]
    temperatures = torch.tensor(given, device=logits.device)
    maxima = maxima.float() / temperatures[:, None]
    # A logit over a small temperature may be infinite.
    token_ids = checked(torch.where(torch.isfinite(maxima.amax(1)), found, -1), rows)
    for i, row in enumerate(rows):
        if not row.params.is_greedy:
            token_ids[i] = _draw_row(Scores(logits[i], temperatures[i], maxima[i]), row)
    return token_ids


def draw_options(rows: Sequence[SamplingRow], vocabulary: int) -> DrawOptions:
    """How to draw from the logits [n, vocabulary] of these rows."""
    params = [row.params for row in rows]
    return DrawOptions(
        torch.tensor([0.0 if p.is_greedy else p.temperature for p in params]),
        torch.tensor([p.top_k for p in params]),
        torch.tensor([p.top_p for p in params], dtype=torch.float64),
        torch.tensor([math.log(p.min_p) if p.min_p > 0.0 else -math.inf for p in params], dtype=torch.float64),
        torch.tensor([random_bits(row.seed, row.position) for row in rows]),
        _scale(vocabulary),
    )


def _draw_row(scores: Scores, row: SamplingRow) -> int:
    """Draws by inverse transform: one random number, searched in the running sum of the weights."""
    params = row.params
    floor = float(scores.peak) + math.log(params.min_p) if params.min_p > 0.0 else -math.inf
    found = likeliest(scores, params.top_k, floor)
    if params.top_p >= 1.0:
        weights = scores.weights(found)
    elif found is None:
        found, weights = _nucleus_of_all(scores, params.top_p)
    else:
        weights = scores.weights(found)
        _cut_nucleus(weights, found[1], scores.peak, math.ceil(params.top_p * int(weights.sum())))
    running = weights.cumsum_(0)
    target = (random_bits(row.seed, row.position) * int(running[-1])) >> 53
    index = torch.searchsorted(running, target, right=True)
    return int(index if found is None else found[0][index])


def _nucleus_of_all(scores: Scores, top_p: float) -> tuple[Found | None, torch.Tensor]:
    """The tokens to draw from (None: all) and their weights, where top_p alone restricts them."""
    everything = scores.weights()
    needed = math.ceil(top_p * int(everything.sum()))
    found = likeliest(scores, _HEAD, -math.inf)
    weights = scores.weights(found)
    if int(weights.sum()) < needed:
        found, weights = None, everything
    _cut_nucleus(weights, scores.all() if found is None else found[1], scores.peak, needed)
    return found, weights


def likeliest(scores: Scores, top_k: int, floor: float) -> Found | None:
    """The `top_k` highest scores (0: all) that reach `floor`, and all that equal the last of them.

    Only chunks are read whose maximum reaches the k-th highest maximum: at least k scores do, so the k-th does too.

    Returns:
        Ids, ascending, and their scores; None for all of them.
    """
    has_top_k, maxima = 0 < top_k < scores.count, scores.maxima
    if not has_top_k and floor == -math.inf:
        return None
    bound = torch.tensor(floor, device=maxima.device)
    if has_top_k and top_k < maxima.shape[0]:
        bound = torch.maximum(bound, maxima.topk(top_k).values[-1])
    chunks = (maxima >= bound).nonzero().flatten()
    found = scores.chunks(chunks)
    if has_top_k and top_k < found.numel():
        bound = torch.maximum(bound, found.flatten().topk(top_k).values[-1])
    chunk, place = (found >= bound).nonzero(as_tuple=True)
    return chunks[chunk] * CHUNK + place, found[chunk, place]


def _cut_nucleus(weights: torch.Tensor, scores: torch.Tensor, peak: torch.Tensor, needed: int) -> None:
    """Zeroes the weights beyond the fewest highest scores that reach a sum of `needed`; of equals the first ones stay.

    Many scores are first put into bins by distance from the peak, so that only the bin in which the sum is reached
    needs to be sorted, never the vocabulary.
    """
    edge = torch.arange(scores.shape[0], device=scores.device)
    if scores.shape[0] > _MAX_SORTED:
        bins = (peak - scores).mul_(_BINS_PER_NAT).clamp_(max=_BINS - 1).floor_()
        running = weights.new_zeros(_BINS).scatter_add_(0, bins.long(), weights).cumsum_(0)
        last = int(torch.searchsorted(running, needed))
        needed -= int(running[last - 1]) if last else 0
        weights.masked_fill_(bins > last, 0)
        edge = edge[bins == last]
    order = edge[scores[edge].sort(descending=True, stable=True).indices]
    count = int(torch.searchsorted(weights[order].cumsum_(0), needed)) + 1
    weights[order[count:]] = 0


def whole_chunks(logits: torch.Tensor) -> torch.Tensor:
    """[n, V] filled up with -inf; the same tensor where V is whole chunks already."""
    missing = -logits.shape[1] % CHUNK
    return torch.nn.functional.pad(logits, (0, missing), value=-math.inf) if missing else logits


def _scale(vocabulary: int) -> float:
    """By what exponentials are multiplied, so that no sum of weights exceeds int64."""
    return float(2 ** min(_WEIGHT_BITS, 62 - vocabulary.bit_length()))
