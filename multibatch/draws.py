"""Draws tokens from logits: temperature, min_p, top_k, top_p and one random number a row.

Exponentials are turned into whole numbers, so that no order of summation can change a sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch

from multibatch.errors import StepError
from multibatch.logit_passes import CHUNK, LogitPasses, TokenWeights, chunk_members, first_maxima_of
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
    """One row's logits over its temperature, and the weights that follow; only what is asked for is computed."""

    def __init__(
        self, logits: torch.Tensor, temperature: torch.Tensor, maxima: torch.Tensor, token_weights: TokenWeights | None
    ) -> None:
        """Of logits [1, V], whole chunks; temperature float32[1]; maxima of the chunks of scores, float32[V / CHUNK]."""
        self.maxima, self.peak, self.count = maxima, maxima.max(), logits.shape[1]
        self._logits, self._temperature, self._token_weights = logits, temperature, token_weights
        self._scale = 2.0 ** _weight_bits(self.count)

    def all(self) -> torch.Tensor:
        """float32[V]."""
        return self._logits[0].float() / self._temperature

    def chunks(self, chunks: torch.Tensor) -> torch.Tensor:
        """Those of some chunks, int64[c] -> float32[c, CHUNK]."""
        return self._logits.view(-1, CHUNK)[chunks].float() / self._temperature

    def weights(self, found: Found | None = None) -> torch.Tensor:
        """Of what was found, or of all: exp(score - peak) as whole numbers, int64[k]."""
        if self._token_weights is None:
            scores = self.all() if found is None else found[1]
            return (scores - self.peak).exp_().mul_(self._scale).long()
        logits = self._logits if found is None else self._logits[:, found[0]]
        return self._token_weights(logits, self._temperature, self.peak[None], 1, self._scale)[0]

    def total_weight(self) -> int:
        """The sum of all weights."""
        if self._token_weights is None:
            return int(self.weights().sum())
        return int(self._token_weights(self._logits, self._temperature, self.peak[None], CHUNK, self._scale).sum())


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
    logits = whole_chunks(logits)
    maxima = passes.chunk_maxima(logits, CHUNK)
    found = first_maxima_of(logits, maxima)
    temperatures = torch.tensor(
        [1.0 if row.params.is_greedy else row.params.temperature for row in rows], device=logits.device
    )
    maxima = maxima.float() / temperatures[:, None]
    token_ids = checked(torch.where(torch.isfinite(maxima.amax(1)), found, -1), rows)
    for i, row in enumerate(rows):
        if not row.params.is_greedy:
            one = slice(i, i + 1)
            token_ids[i] = _draw_row(Scores(logits[one], temperatures[one], maxima[i], passes.token_weights), row)
    return token_ids


def draw_free(logits: torch.Tensor, peaks: torch.Tensor, rows: Sequence[SamplingRow], passes: LogitPasses) -> list[int]:
    """As `draw`, for rows with a temperature and nothing else: first a chunk is drawn, then a token of it.

    Args:
        logits: [n, V].
        peaks: int64[n], the likeliest token of each.
        rows: n of them.
        passes: with `token_weights`.
    """
    assert passes.token_weights is not None
    vocabulary = logits.shape[1]
    scale = 2.0 ** _weight_bits(vocabulary)
    temperatures = torch.tensor([row.params.temperature for row in rows], device=logits.device)
    highest = logits.gather(1, peaks[:, None])[:, 0].float() / temperatures
    checked(torch.where(torch.isfinite(highest), peaks, -1), rows)  # a logit over a small temperature may be infinite
    sums = passes.token_weights(logits, temperatures, highest, CHUNK, scale)
    running = sums.cumsum(1)
    totals: list[int] = running[:, -1].tolist()
    drawn = [random_bits(row.seed, row.position) * total >> 53 for row, total in zip(rows, totals, strict=True)]
    targets = torch.tensor(drawn, device=logits.device)[:, None]
    chunks = torch.searchsorted(running, targets, right=True)
    members = chunk_members(chunks[:, 0])
    inside = logits.gather(1, members.clamp(max=vocabulary - 1)).masked_fill_(members >= vocabulary, -math.inf)
    weights = passes.token_weights(inside, temperatures, highest, 1, scale)
    before = running.gather(1, chunks) - sums.gather(1, chunks)
    places = torch.searchsorted(weights.cumsum(1), targets - before, right=True)
    token_ids: list[int] = members.gather(1, places)[:, 0].tolist()
    return token_ids


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
    needed = math.ceil(top_p * scores.total_weight())
    found = likeliest(scores, _HEAD, -math.inf)
    weights = scores.weights(found)
    if found is not None and int(weights.sum()) < needed:
        found, weights = None, scores.weights()
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


def _weight_bits(vocabulary: int) -> int:
    """So many that no sum of weights exceeds int64."""
    return min(_WEIGHT_BITS, 62 - vocabulary.bit_length())
