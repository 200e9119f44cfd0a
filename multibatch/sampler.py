"""Owns the draw: logits of the live rows in, one token id per row out, and log-probabilities where asked.

Nothing of a row's result depends on the rows beside it. Over the whole batch run only operations that round the same
wherever a number lies (+, -, x, /, maxima, comparisons); exponentials are taken on a tensor of the row's own, and
probabilities are integers from there on, so that no order of summation can change a sum.

When a row stops, and what its text is, is decided elsewhere.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Self

import torch

from multibatch.errors import StepError
from multibatch.logits_masks import TokenRules, barrier
from multibatch.request import Sequence as RunningSequence
from multibatch.request import random_bits
from multibatch.sampling_params import SamplingParams

_CHUNK: Final = 128
"""Logits per maximum: `torch.argmax` takes 8 times as long as `amax` over chunks and a search in the best one."""
_WEIGHT_BITS: Final = 44
_HEAD: Final = 128
"""Likeliest tokens that top_p tries first: they nearly always hold its share, and the answer is the same."""
_MAX_SORTED: Final = 4096
"""Candidates up to this number are sorted as they are; more are first cut down with a histogram."""
_BINS: Final = 2048
_BINS_PER_NAT: Final = 64.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    """What the sampler must know of one live row."""

    params: SamplingParams
    seed: int
    """The request's random stream, 64 bits."""
    position: int
    """Index of the token being drawn, in the sequence; the draw is a function of (seed, position, logits)."""
    prompt_token_ids: Sequence[int] = ()
    """Read only if `params.needs_history`."""
    output_token_ids: Sequence[int] = ()
    """Read only if `params.needs_history`, or by `rules` with bad words."""
    forbidden_token_ids: Sequence[int] = ()
    """Tokens that may not be drawn now: the stop tokens while min_tokens is not reached."""
    rules: TokenRules | None = None
    """What the request's biases, allowed tokens and bad words do."""
    grammar_mask: torch.Tensor | None = None
    """bool[V]: the tokens that the form of the output allows now."""
    request_id: str = ""
    """Named in errors."""

    @property
    def is_plain(self) -> bool:
        """Whether the row's token is the maximum of the logits as they came."""
        return (
            self.params.is_greedy
            and self.rules is None
            and self.grammar_mask is None
            and not self.forbidden_token_ids
            and not self.params.needs_history
        )

    @classmethod
    def from_sequence(
        cls,
        sequence: RunningSequence,
        rules: TokenRules | None = None,
        grammar_mask: torch.Tensor | None = None,
    ) -> Self:
        """Describes the next token of `sequence`; its history is copied only if a penalty or a bad word needs it."""
        request, params = sequence.request, sequence.request.params
        is_early = sequence.num_output_tokens < params.min_tokens
        needs_output = params.needs_history or (rules is not None and rules.bad_words)
        return cls(
            params=params,
            seed=request.seed,
            position=sequence.num_tokens,
            prompt_token_ids=request.prompt_token_ids if params.needs_history else (),
            output_token_ids=sequence.output_token_ids if needs_output else (),
            forbidden_token_ids=(*request.eos_token_ids, *params.stop_token_ids) if is_early else (),
            rules=rules,
            grammar_mask=grammar_mask,
            request_id=request.request_id,
        )


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Log-probabilities of one row as three lists of equal length: the drawn token, then the likeliest others."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]
    """1 is the likeliest; of equal ones the lowest id comes first."""


@dataclass(frozen=True, slots=True)
class SampledRows:
    """One entry per row, in the order of the rows."""

    token_ids: list[int]
    logprobs: list[RowLogprobs | None]
    """None where `SamplingParams.logprobs` did not ask."""


class Sampler:
    """Draws one token per row, each by its own parameters.

    Order of the transforms (vLLM's): form of the output, allowed tokens, bad words, biases, repetition penalty, frequency
    and presence penalty, forbidden tokens, temperature, min_p, top_k, top_p. Log-probabilities are of the logits as they
    came (vLLM's "raw_logprobs").
    """

    def __init__(
        self,
        chunk_maxima: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
        first_maxima: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Takes what reads every logit: `chunk_maxima_of` and `first_maxima_of`, or what does the same faster."""
        self._chunk_maxima = chunk_maxima or chunk_maxima_of
        self._first_maxima = first_maxima or (
            lambda scores: first_maxima_of(scores, self._chunk_maxima(scores, _CHUNK))
        )

    def sample(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> SampledRows:
        """Draws a token for every row.

        Args:
            logits: float[n, V], any float dtype; not changed.
            rows: n descriptions, in the order of `logits`.

        Raises:
            StepError: the shapes do not fit, or rows (named) have a NaN, an infinite maximum or nothing left to draw.
        """
        if logits.ndim != 2 or logits.shape[0] != len(rows) or logits.shape[1] < 1:
            raise StepError(
                f"logits of shape {list(logits.shape)} for {len(rows)} rows; allowed:"
                f" [{len(rows)}, vocabulary]. Strip the padded rows before sampling.",
                [row.request_id for row in rows],
            )
        if not rows:
            return SampledRows([], [])
        token_ids = _checked(self._first_maxima(logits), rows)
        logprobs: list[RowLogprobs | None] = [None] * len(rows)
        changed = [i for i, row in enumerate(rows) if not row.is_plain]
        asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        if changed or asked:
            with torch.inference_mode():
                if changed:
                    scores = logits[changed] if len(changed) < len(rows) else logits
                    drawn = _draw(scores, [rows[i] for i in changed], self._chunk_maxima)
                    for i, token_id in zip(changed, drawn, strict=True):
                        token_ids[i] = token_id
                for i in asked:
                    logprobs[i] = row_logprobs(logits[i], token_ids[i], rows[i].params.logprobs or 0)
        return SampledRows(token_ids, logprobs)


def chunk_maxima_of(scores: torch.Tensor, chunk: int) -> torch.Tensor:
    """The maximum of every `chunk` neighbours; [n, V] -> [n, ceil(V / chunk)]; a NaN stays one."""
    n, vocabulary = scores.shape
    whole = vocabulary // chunk * chunk
    maxima = scores[:, :whole].reshape(n, whole // chunk, chunk).amax(-1)
    if whole == vocabulary:
        return maxima
    return torch.cat([maxima, scores[:, whole:].amax(-1, keepdim=True)], dim=1)


def _chunk_members(chunks: torch.Tensor) -> torch.Tensor:
    """Indices in the chunks, int64[c] -> int64[c, _CHUNK]; of the last chunk some may be beyond the vocabulary."""
    return chunks[:, None] * _CHUNK + torch.arange(_CHUNK, device=chunks.device)


def first_maxima_of(scores: torch.Tensor, maxima: torch.Tensor) -> torch.Tensor:
    """The lowest index of the highest score, or -1 where that is no finite number; [n, V], its `chunk_maxima_of` -> int64[n]."""
    members = _chunk_members(maxima.argmax(-1)).clamp_(max=scores.shape[1] - 1)
    inside = scores.gather(1, members)
    best = inside.argmax(-1, keepdim=True)
    return torch.where(torch.isfinite(inside.gather(1, best)), members.gather(1, best), -1).flatten()


def _checked(found: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
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


def _draw(
    logits: torch.Tensor, rows: Sequence[SamplingRow], chunk_maxima: Callable[[torch.Tensor, int], torch.Tensor]
) -> list[int]:
    """Draws from a copy of [n, V] in float32, filled up with -inf to whole chunks."""
    n, vocabulary = logits.shape
    scores = torch.empty(n, -(-vocabulary // _CHUNK) * _CHUNK, device=logits.device)
    scores[:, :vocabulary] = logits
    scores[:, vocabulary:] = -math.inf
    for i, row in enumerate(rows):
        if row.grammar_mask is not None:
            scores[i, : row.grammar_mask.shape[0]] += barrier(row.grammar_mask)
        if row.rules is not None:
            row.rules.apply(scores[i], row.output_token_ids)
        if row.params.needs_history:
            _penalise(scores[i], row)
        if row.forbidden_token_ids:
            scores[i, _known(row.forbidden_token_ids, scores[i])] = -math.inf
    temperatures = [1.0 if row.params.is_greedy else row.params.temperature for row in rows]
    scores /= torch.tensor(temperatures, device=scores.device)[:, None]
    maxima = chunk_maxima(scores, _CHUNK)
    token_ids = _checked(first_maxima_of(scores, maxima), rows)
    for i, row in enumerate(rows):
        if not row.params.is_greedy:
            token_ids[i] = _draw_row(scores[i], maxima[i], row)
    return token_ids


def _penalise(scores: torch.Tensor, row: SamplingRow) -> None:
    """Changes the scores [V] of the tokens that `row` has seen."""
    params, counts = row.params, Counter(row.output_token_ids)
    if params.repetition_penalty != 1.0:
        seen = _known({*row.prompt_token_ids, *counts}, scores)
        found = scores[seen]
        scores[seen] = torch.where(found > 0, found / params.repetition_penalty, found * params.repetition_penalty)
    if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
        seen = _known(counts, scores)
        times = torch.tensor([counts[t] for t in seen.tolist()], dtype=scores.dtype, device=scores.device)
        scores[seen] = scores[seen] - times * params.frequency_penalty - params.presence_penalty


def _known(token_ids: Iterable[int], scores: torch.Tensor) -> torch.Tensor:
    """Ids that have a score, ascending; a placeholder in a prompt, or a stop id beyond the vocabulary, has none."""
    known = sorted(t for t in token_ids if 0 <= t < scores.shape[0])
    return torch.tensor(known, dtype=torch.int64, device=scores.device)


def _draw_row(scores: torch.Tensor, maxima: torch.Tensor, row: SamplingRow) -> int:
    """Draws from float32[V] by inverse transform: one random number, searched in the running sum of the weights."""
    params, peak = row.params, maxima.max()
    floor = float(peak) + math.log(params.min_p) if params.min_p > 0.0 else -math.inf
    token_ids, kept = _likeliest(scores, maxima, params.top_k, floor)
    bits = min(_WEIGHT_BITS, 62 - scores.shape[0].bit_length())  # so that no sum exceeds int64
    weights = (kept - peak).exp_().mul_(2.0**bits).long()
    if params.top_p < 1.0:
        needed = math.ceil(params.top_p * int(weights.sum()))
        if token_ids is None:
            head_ids, head = _likeliest(scores, maxima, _HEAD, -math.inf)
            if head_ids is not None and int(weights[head_ids].sum()) >= needed:
                token_ids, kept, weights = head_ids, head, weights[head_ids]
        _cut_nucleus(weights, kept, peak, needed)
    running = weights.cumsum_(0)
    target = (random_bits(row.seed, row.position) * int(running[-1])) >> 53
    index = torch.searchsorted(running, target, right=True)
    return int(index if token_ids is None else token_ids[index])


def _likeliest(
    scores: torch.Tensor, maxima: torch.Tensor, top_k: int, floor: float
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The `top_k` highest scores (0: all) that reach `floor`, and all that equal the last of them.

    Only chunks are read whose maximum reaches the k-th highest maximum: at least k scores do, so the k-th does too.

    Returns:
        Ids, ascending, or None for all of them; and their scores.
    """
    has_top_k = 0 < top_k < scores.shape[0]
    if not has_top_k and floor == -math.inf:
        return None, scores
    bound = torch.tensor(floor, device=scores.device)
    if has_top_k and top_k < maxima.shape[0]:
        bound = torch.maximum(bound, maxima.topk(top_k).values[-1])
    chunks = (maxima >= bound).nonzero().flatten()
    found = scores.view(-1, _CHUNK)[chunks]
    if has_top_k and top_k < found.numel():
        bound = torch.maximum(bound, found.flatten().topk(top_k).values[-1])
    chunk, place = (found >= bound).nonzero(as_tuple=True)
    return chunks[chunk] * _CHUNK + place, found[chunk, place]


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


def row_logprobs(logits: torch.Tensor, token_id: int, top: int) -> RowLogprobs:
    """Log-probabilities of `token_id` and the `top` likeliest (-1: all), from the raw logits [V]."""
    vocabulary = logits.shape[0]
    logprobs = logits.to(torch.float32, copy=True).log_softmax(0)
    drawn = logprobs[token_id]
    rank = int((logprobs > drawn).sum() + (logprobs[:token_id] == drawn).sum()) + 1
    ids, values = [token_id], [float(drawn)]
    ranks = [rank]
    if top != 0:
        wanted = vocabulary if top == -1 else min(top, vocabulary)
        scores = torch.nn.functional.pad(logprobs, (0, -vocabulary % _CHUNK), value=-math.inf)
        found, likely = _likeliest(scores, chunk_maxima_of(scores[None], _CHUNK)[0], wanted, -math.inf)
        likely, order = likely.sort(descending=True, stable=True)
        others = (order if found is None else found[order])[:wanted].tolist()
        kept = [i for i, other in enumerate(others) if other != token_id]
        best = likely[:wanted].tolist()
        ids += [others[i] for i in kept]
        values += [best[i] for i in kept]
        ranks += [i + 1 for i in kept]
    return RowLogprobs(ids, values, ranks)
