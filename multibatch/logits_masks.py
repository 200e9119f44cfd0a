"""What a request's options do to its logits before a token is drawn: biases, allowed tokens, bad words.

Everything is checked and turned into tensors once per request; a step only reads them. Forms of the output, which
change with every token, are in `multibatch.grammar`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from multibatch.errors import RequestError
from multibatch.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TokenRules:
    """The rules of one request, for a vocabulary of V tokens."""

    biased_ids: torch.Tensor | None = None
    """int64[n]: the tokens whose logits get a bias."""
    biases: torch.Tensor | None = None
    """float32[n]."""
    barrier: torch.Tensor | None = None
    """float32[V]: what keeps the draw to `allowed_token_ids`."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that the output may not contain."""

    @classmethod
    def of(
        cls,
        params: SamplingParams,
        vocab_size: int,
        encode: Callable[[str], list[int]],
        stop_ids: Iterable[int] = (),
    ) -> Self | None:
        """The rules that `params` ask for; None where they ask for none.

        Args:
            params: the request's.
            vocab_size: V.
            encode: text to token ids, without special tokens; called only for bad words.
            stop_ids: tokens that may not be drawn before min_tokens.

        Raises:
            RequestError: a token id is beyond the vocabulary, or no token is left that could be drawn.
        """
        bias, allowed = params.logit_bias, params.allowed_token_ids
        if bias is None and allowed is None and params.bad_words is None:
            return None
        _refuse_beyond("logit_bias", bias or (), vocab_size)
        _refuse_beyond("allowed_token_ids", allowed or (), vocab_size)
        words = _encoded(params.bad_words or (), vocab_size, encode)
        never = {ids[0] for ids in words if len(ids) == 1} | set(stop_ids if params.min_tokens else ())
        kept = None
        if allowed is not None:
            if never.issuperset(allowed):
                raise RequestError(
                    f"allowed_token_ids are {_shown(allowed)}, and bad_words or min_tokens forbid every one of them;"
                    " allowed: at least one token that may be drawn. Allow more, or forbid less."
                )
            kept = torch.zeros(vocab_size, dtype=torch.bool)
            kept[torch.tensor(allowed)] = True
        return cls(
            biased_ids=torch.tensor(list(bias)) if bias else None,
            biases=torch.tensor(list(bias.values()), dtype=torch.float32) if bias else None,
            barrier=None if kept is None else barrier(kept),
            bad_words=words,
        )

    def apply(self, scores: torch.Tensor, output_token_ids: Sequence[int]) -> None:
        """Changes the scores, float32[V or more], of the token after `output_token_ids`, which only bad words read."""
        if self.barrier is not None:
            scores[: self.barrier.shape[0]] += self.barrier
        ending = [ids[-1] for ids in self.bad_words if _ends_with(output_token_ids, ids[:-1])]
        if ending:
            scores[torch.tensor(ending)] = -math.inf
        if self.biased_ids is not None and self.biases is not None:
            scores[self.biased_ids] += self.biases


def barrier(allowed: torch.Tensor) -> torch.Tensor:
    """bool[V] to float32[V]: 0 for tokens that are allowed, -inf for the others.

    Making and adding it takes a fraction of the time of PyTorch's `masked_fill_` on a CPU, which is not vectorised.
    """
    return 1.0 - allowed.to(torch.float32).reciprocal_()


def _ends_with(token_ids: Sequence[int], tail: tuple[int, ...]) -> bool:
    return not tail or tuple(token_ids[-len(tail) :]) == tail


def _encoded(words: Sequence[str], vocab_size: int, encode: Callable[[str], list[int]]) -> tuple[tuple[int, ...], ...]:
    """Every word's tokens at the start of a text and after a space; a tokenizer may give the two the same."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(), f" {word.lstrip()}"):
            ids = tuple(encode(text))
            _refuse_beyond(f"bad_words with {word!r}", ids, vocab_size)
            if ids:
                found[ids] = None
    return tuple(found)


def _refuse_beyond(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    beyond = [t for t in token_ids if t >= vocab_size]
    if beyond:
        raise RequestError(f"{name} has token id {beyond[0]}; allowed: 0 to {vocab_size - 1}, the model's vocabulary")


def _shown(token_ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, token_ids[:4]))
    return f"{shown}, …" if len(token_ids) > 4 else shown
