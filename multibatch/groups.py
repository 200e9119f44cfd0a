"""A request as its caller sees it while it runs, one prompt and n completions, and the outputs made of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from multibatch.grammar import Matcher
from multibatch.logits_masks import TokenRules
from multibatch.request import CompletionOutput, Logprob, RequestMetrics, RequestOutput, Sequence
from multibatch.sampling_params import RequestOutputKind, SamplingParams
from multibatch.sampling_row import SamplingRow
from multibatch.tokenizer import Detokenizer


@dataclass(slots=True)
class Completion:
    """One of a request's n continuations while it runs."""

    sequence: Sequence
    detokenizer: Detokenizer | None
    matcher: Matcher | None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    num_sent_tokens: int = 0
    num_sent_characters: int = 0
    scheduled_ts: float | None = None
    first_token_ts: float | None = None
    last_token_ts: float | None = None
    known_row: SamplingRow | None = None
    """What the sampler is told, once the logits count as they come for good; its position is that of some earlier token."""


@dataclass(slots=True)
class Group:
    """A request as its caller sees it: one prompt, n completions."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    completions: list[Completion]
    rules: TokenRules | None
    prompt_logprobs: list[dict[int, Logprob] | None]
    arrival_time: float
    queued_ts: float

    @property
    def is_finished(self) -> bool:
        """Whether all completions are."""
        return all(completion.sequence.is_finished for completion in self.completions)


def output_of(group: Group) -> RequestOutput:
    """What there is to say of a request now; of DELTA outputs, what was not said before."""
    finished = group.is_finished
    prompt_logprobs = None if group.params.prompt_logprobs is None else group.prompt_logprobs
    if prompt_logprobs is not None and group.params.output_kind is RequestOutputKind.DELTA:
        is_due = finished or len(prompt_logprobs) == len(group.prompt_token_ids)
        prompt_logprobs, group.prompt_logprobs = (prompt_logprobs, []) if is_due else ([], prompt_logprobs)
    return RequestOutput(
        group.request_id,
        group.prompt,
        group.prompt_token_ids,
        prompt_logprobs,
        [_completion_output(i, completion, group.params) for i, completion in enumerate(group.completions)],
        finished,
        _metrics(group),
        num_cached_tokens=group.completions[0].sequence.num_cached_tokens,
    )


def _metrics(group: Group) -> RequestMetrics:
    completions = group.completions
    first = min(_known(c.first_token_ts for c in completions), default=None)
    return RequestMetrics(
        num_generation_tokens=sum(c.sequence.num_output_tokens for c in completions),
        num_preemptions=sum(c.sequence.num_preemptions for c in completions),
        arrival_time=group.arrival_time,
        queued_ts=group.queued_ts,
        scheduled_ts=min(_known(c.scheduled_ts for c in completions), default=None),
        first_token_ts=first,
        last_token_ts=max(_known(c.last_token_ts for c in completions), default=None),
        first_token_latency=None if first is None else first - group.queued_ts,
        num_cached_tokens=completions[0].sequence.num_cached_tokens,
    )


def _known(times: Iterable[float | None]) -> list[float]:
    return [moment for moment in times if moment is not None]


def _completion_output(index: int, completion: Completion, params: SamplingParams) -> CompletionOutput:
    sequence, detokenizer = completion.sequence, completion.detokenizer
    text = detokenizer.visible(sequence.is_finished) if detokenizer else ""
    token_ids = sequence.output_token_ids
    first_token, first_character = 0, 0
    if params.output_kind is RequestOutputKind.DELTA:
        first_token, first_character = completion.num_sent_tokens, completion.num_sent_characters
        completion.num_sent_tokens, completion.num_sent_characters = len(token_ids), max(first_character, len(text))
    wanted = params.logprobs is not None
    return CompletionOutput(
        index=index,
        text=text[first_character:],
        token_ids=token_ids[first_token:],
        cumulative_logprob=completion.cumulative_logprob if wanted else None,
        logprobs=completion.logprobs[first_token:] if wanted else None,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )
