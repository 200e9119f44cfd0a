"""Logits of the live rows in, one token id per row out, and log-probabilities where asked.

Nothing of a row's result depends on the rows beside it. Over the whole batch run only operations that round the same
wherever a number lies (+, -, x, /, maxima, comparisons), or whose operator rounds so.

When a row stops, and what its text is, is decided elsewhere.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from multibatch.draws import Scores, checked, draw, likeliest, whole_chunks
from multibatch.errors import StepError
from multibatch.logit_passes import CHUNK, LogitPasses, chunk_maxima_of
from multibatch.logits_masks import barrier
from multibatch.sampling_row import SamplingRow


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

    def __init__(self, passes: LogitPasses | None = None) -> None:
        """Takes what reads every logit; default: PyTorch."""
        self._passes = passes or LogitPasses()

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
        token_ids = checked(self._passes.highest(logits), rows)
        logprobs: list[RowLogprobs | None] = [None] * len(rows)
        drawn = [i for i, row in enumerate(rows) if not row.is_plain]
        asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        if drawn or asked:
            with torch.inference_mode():
                for i, token_id in self._drawn(logits, rows, drawn):
                    token_ids[i] = token_id
                for i in asked:
                    logprobs[i] = row_logprobs(logits[i], token_ids[i], rows[i].params.logprobs or 0)
        return SampledRows(token_ids, logprobs)

    def take(self, token_ids: torch.Tensor, rows: Sequence[SamplingRow]) -> SampledRows:
        """What `sample` gives of rows that ask for no log-probabilities, their tokens being drawn already: int64[n].

        Raises:
            StepError: rows (named) have a NaN or an infinite maximum.
        """
        return SampledRows(checked(token_ids, rows), [None] * len(rows))

    def _drawn(
        self, logits: torch.Tensor, rows: Sequence[SamplingRow], drawn: Sequence[int]
    ) -> Iterator[tuple[int, int]]:
        """Places and tokens of the rows at `drawn`: those whose logits count as they came, then the others."""
        for is_unchanged in (True, False):
            places = [i for i in drawn if rows[i].is_unchanged is is_unchanged]
            if not places:
                continue
            scores, mine = logits if len(places) == len(rows) else logits[places], [rows[i] for i in places]
            token_ids = draw(scores if is_unchanged else _changed(scores, mine), mine, self._passes)
            yield from zip(places, token_ids, strict=True)


def _changed(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """[n, V] in float32, filled up to whole chunks, with what each row's form, rules, penalties and forbidden tokens do to it."""
    scores = whole_chunks(logits.to(torch.float32, copy=True))
    for i, row in enumerate(rows):
        if row.grammar_mask is not None:
            scores[i, : row.grammar_mask.shape[0]] += barrier(row.grammar_mask)
        if row.rules is not None:
            row.rules.apply(scores[i], row.output_token_ids)
        if row.params.needs_history:
            _penalise(scores[i], row)
        if row.forbidden_token_ids:
            scores[i, _known(row.forbidden_token_ids, scores[i])] = -math.inf
    return scores


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
        filled = whole_chunks(logprobs[None])
        scores = Scores(filled[0], torch.tensor(1.0), chunk_maxima_of(filled, CHUNK)[0])
        found, likely = likeliest(scores, wanted, -math.inf) or (torch.arange(scores.count), filled[0])
        likely, order = likely.sort(descending=True, stable=True)
        others = found[order][:wanted].tolist()
        kept = [i for i, other in enumerate(others) if other != token_id]
        best = likely[:wanted].tolist()
        ids += [others[i] for i in kept]
        values += [best[i] for i in kept]
        ranks += [i + 1 for i in kept]
    return RowLogprobs(ids, values, ranks)
