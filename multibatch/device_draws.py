"""Draws the tokens of many rows at once without waiting for a value, so that they may stay on a device.

The same whole numbers as in `multibatch.draws`, over sorted vocabularies: a device that runs ahead of its host must not be
asked what it found, so nothing is cut down to the tokens that count.
"""

from __future__ import annotations

import torch

from multibatch.logit_passes import CHUNK, DrawOptions, chunk_maxima_of, first_maxima_of

_LOW27 = (1 << 27) - 1
_LOW31 = (1 << 31) - 1

_LOGITS_AT_ONCE = 1 << 22
"""That are sorted at once. What is held meanwhile takes some 55 bytes for each, 220 to 250 MiB in all."""


def draw_rows(logits: torch.Tensor, options: DrawOptions) -> torch.Tensor:
    """See `multibatch.logit_passes.DrawTokens`; the options may be on the host.

    Rows are taken in groups whose memory follows from `_LOGITS_AT_ONCE`, not from the size of the batch.
    """
    tensors = [t.to(logits.device, non_blocking=True) for t in options.tensors()]
    rows_at_once = max(1, _LOGITS_AT_ONCE // logits.shape[1])
    parts = zip(*(t.split(rows_at_once) for t in (logits, *tensors)), strict=True)
    return torch.cat([_draw_group(part, own, options.scale) for part, *own in parts])


def _draw_group(logits: torch.Tensor, options: list[torch.Tensor], scale: float) -> torch.Tensor:
    temperature, top_k, top_p, log_min_p, random = options
    highest = first_maxima_of(logits, chunk_maxima_of(logits, CHUNK))
    is_greedy = temperature == 0.0
    scores = logits.float() / torch.where(is_greedy, 1.0, temperature)[:, None]
    peak = scores.amax(1, keepdim=True)
    weights = (scores - peak).exp_().mul_(scale).long()
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    vocabulary = logits.shape[1]
    last = torch.where((top_k > 0) & (top_k < vocabulary), top_k, vocabulary) - 1
    bound = torch.maximum(ordered.gather(1, last[:, None]), (peak.double() + log_min_p[:, None]).float())
    weights.masked_fill_(scores < bound, 0)
    running = weights.gather(1, order).cumsum_(1)
    needed = (top_p[:, None] * running[:, -1:].double()).ceil_().long()
    # The fewest of the highest that reach what is needed: those before which the sum is below it.
    before = running - weights.gather(1, order)
    is_kept = (before < needed) | (top_p[:, None] >= 1.0)
    weights.scatter_(1, order, torch.where(is_kept, weights.gather(1, order), 0))
    running = weights.cumsum_(1)
    found = torch.searchsorted(running, _share(random[:, None], running[:, -1:]), right=True).flatten()
    # A logit over a small temperature may be infinite.
    is_drawn = torch.isfinite(peak.flatten()) & (highest >= 0)
    return torch.where(is_greedy, highest, torch.where(is_drawn, found.clamp_(max=vocabulary - 1), -1))


def _share(bits: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """(bits x total) >> 53 of 53 bits and up to 62, which 64 do not hold at once."""
    bits_high, bits_low, total_high, total_low = bits >> 27, bits & _LOW27, total >> 31, total & _LOW31
    middle = bits_high * total_low + (bits_low * total_high << 4) + (bits_low * total_low >> 27)
    return (bits_high * total_high << 5) + (middle >> 26)
