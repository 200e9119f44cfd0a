"""What the sampler must know of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from multibatch.logits_masks import TokenRules
from multibatch.request import Sequence as RunningSequence
from multibatch.sampling_params import SamplingParams


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
        return self.params.is_greedy and self.is_unchanged

    @property
    def is_unchanged(self) -> bool:
        """Whether the logits count as they came."""
        return (
            self.rules is None
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
