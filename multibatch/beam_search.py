"""Beam search over an engine, with vLLM's names and its algorithm: every round asks one token of every beam.

A round is a request of one token per beam, all at once; the engine's prefix cache holds what they have in common.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from multibatch import checks
from multibatch.errors import RequestError
from multibatch.request import FinishReason, Logprob, RequestOutput
from multibatch.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from multibatch.engine import Engine


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """How one beam search goes; vLLM's fields, order and defaults.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    beam_width: int
    """Beams that are kept from round to round, and returned."""
    max_tokens: int
    """Tokens that a beam gets at most."""
    ignore_eos: bool = False
    """Goes on after the end-of-sequence token."""
    temperature: float = 0.0
    """As vLLM does, a round draws one token per beam, a candidate beside the likeliest; at 0 it is the likeliest."""
    length_penalty: float = 1.0
    """A beam's score is its log-probability over its length, prompt included, to this power."""
    include_stop_str_in_output: bool = False
    """Leaves the end-of-sequence token at the end of a beam's tokens."""
    skip_special_tokens: bool = True
    """Leaves special tokens out of the text."""

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            object.__setattr__(self, name, checks.integer(name, getattr(self, name), 1, None, optional=False))
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            checks.boolean(name, getattr(self, name))
        temperature = checks.number("temperature", self.temperature, lambda x: 0.0 <= x <= 2.0, "a number in [0, 2]")
        object.__setattr__(self, "temperature", temperature)
        penalty = checks.number(
            "length_penalty", self.length_penalty, lambda x: abs(x) <= 50.0, "a number in [-50, 50]"
        )
        object.__setattr__(self, "length_penalty", penalty)


@dataclass(frozen=True, slots=True)
class BeamSearchSequence:
    """One beam."""

    tokens: list[int]
    """Prompt and output, as in vLLM."""
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    """The candidates of every round, the beam's own token among them."""
    cum_logprob: float = 0.0
    """Log-probability of the output."""
    text: str | None = None
    """Of all its tokens; None where the artifact has no tokenizer."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The end-of-sequence token that ended it."""


@dataclass(frozen=True, slots=True)
class BeamSearchOutput:
    """What a prompt's search found."""

    sequences: list[BeamSearchSequence]
    """The best beams, the best first."""


@dataclass(slots=True)
class _Search:
    """One prompt's search while it runs."""

    prompt_token_ids: list[int]
    cache_salt: str | None
    beams: list[BeamSearchSequence]
    completed: list[BeamSearchSequence] = field(default_factory=list)


def beam_search(
    engine: Engine, prompts: Iterable[tuple[list[int], str | None]], params: BeamSearchParams
) -> list[BeamSearchOutput]:
    """Searches from every prompt, all at once, on an engine that serves nothing else meanwhile.

    Args:
        engine: that runs the requests.
        prompts: token ids and cache salt of each.
        params: of all of them.

    Raises:
        RequestError: a prompt with its longest beam can never run here; nothing was run.
        StepError: a step failed.
    """
    searches = [_Search(ids, salt, [BeamSearchSequence(ids)]) for ids, salt in prompts]
    for search in searches:
        total = len(search.prompt_token_ids) + params.max_tokens
        if search.prompt_token_ids and total > engine.max_seq_len:
            raise RequestError(
                f"a prompt of {len(search.prompt_token_ids)} tokens and max_tokens {params.max_tokens} make {total};"
                f" allowed: max_seq_len {engine.max_seq_len} in all. Lower max_tokens, or shorten the prompt"
            )
    eos = () if params.ignore_eos else engine.manifest.model.eos_token_ids
    for _ in range(params.max_tokens):
        outputs = _ask(engine, searches, params)
        if not outputs:
            break
        for number, search in enumerate(searches):
            found = [outputs[_name(number, beam)] for beam in range(len(search.beams))]
            _extend(search, found, eos, params)
    return [BeamSearchOutput(_best(engine, search, params)) for search in searches]


def _name(search: int, beam: int) -> str:
    return f"beam-{search}-{beam}"


def _ask(engine: Engine, searches: Sequence[_Search], params: BeamSearchParams) -> dict[str, RequestOutput]:
    """One token of every beam, with the candidates; by name."""
    added: list[str] = []
    try:
        for number, search in enumerate(searches):
            for i, beam in enumerate(search.beams):
                name = _name(number, i)
                sampling = SamplingParams(
                    max_tokens=1,
                    temperature=params.temperature,
                    seed=i,
                    logprobs=2 * params.beam_width,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                engine.add_request(name, beam.tokens, sampling, cache_salt=search.cache_salt)
                added.append(name)
        return engine.run_all()
    finally:
        for name in added:
            engine.abort(name)


def _extend(search: _Search, outputs: Sequence[RequestOutput], eos: Sequence[int], params: BeamSearchParams) -> None:
    """Replaces the beams of a search by the likeliest of their continuations; those that end are set aside."""
    going: list[BeamSearchSequence] = []
    for beam, output in zip(search.beams, outputs, strict=True):
        candidates = (output.outputs[0].logprobs or [{}])[0]
        for token_id, entry in candidates.items():
            is_end = token_id in eos
            keeps_token = not is_end or params.include_stop_str_in_output
            longer = BeamSearchSequence(
                [*beam.tokens, token_id] if keeps_token else beam.tokens,
                [*beam.logprobs, candidates],
                beam.cum_logprob + entry.logprob,
                finish_reason=FinishReason.STOP if is_end else None,
                stop_reason=token_id if is_end else None,
            )
            (search.completed if is_end else going).append(longer)
    search.beams = sorted(going, key=lambda beam: beam.cum_logprob, reverse=True)[: params.beam_width]


def _best(engine: Engine, search: _Search, params: BeamSearchParams) -> list[BeamSearchSequence]:
    """The best of the beams that ended and those that go on, with their texts."""

    def score(beam: BeamSearchSequence) -> float:
        # The end-of-sequence token has a probability and no length (vLLM, beam_search.py, after transformers).
        is_long = beam.finish_reason is FinishReason.STOP and params.include_stop_str_in_output
        length = float(len(beam.tokens) - is_long)
        return beam.cum_logprob / math.pow(length, params.length_penalty)

    best = sorted([*search.completed, *search.beams], key=score, reverse=True)[: params.beam_width]
    return [
        BeamSearchSequence(
            list(beam.tokens),
            beam.logprobs,
            beam.cum_logprob,
            engine.tokenizer.decode(beam.tokens, skip_special_tokens=params.skip_special_tokens)
            if engine.has_tokenizer
            else None,
            beam.finish_reason or FinishReason.LENGTH,
            beam.stop_reason,
        )
        for beam in best
    ]
