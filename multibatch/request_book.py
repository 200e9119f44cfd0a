"""The requests that are being served: what their tokens make of them, and what their callers are told."""

from __future__ import annotations

import time
from collections.abc import Iterable

from multibatch.errors import RequestError, StepError
from multibatch.groups import Completion, Group, output_of
from multibatch.request import FinishReason, Logprob, RequestOutput, Sequence
from multibatch.sampler import RowLogprobs
from multibatch.sampling_params import RequestOutputKind
from multibatch.scheduler import Scheduler
from multibatch.stats import CompletionTimes, EngineStats
from multibatch.tokenizer import TokenizerFolder


class RequestBook:
    """Knows of each sequence that the scheduler has whose it is."""

    def __init__(self, scheduler: Scheduler, stats: EngineStats, tokenizer: TokenizerFolder) -> None:
        """Starts empty.

        Args:
            scheduler: gets every sequence, and is told of those that end by their text.
            stats: counts tokens and ends.
            tokenizer: names the tokens of log-probabilities.
        """
        self._scheduler = scheduler
        self._stats = stats
        self._tokenizer = tokenizer
        self._groups: dict[str, Group] = {}
        self._owner: dict[str, tuple[Group, Completion]] = {}
        self.num_added = 0
        """Requests since the start."""
        self.failure: StepError | None = None
        """Why sequences ended with the reason ERROR, the latest time."""

    def get(self, request_id: str) -> Group | None:
        """The request of this id; None where it is not being served."""
        return self._groups.get(request_id)

    def owner_of(self, sequence: Sequence) -> tuple[Group, Completion] | None:
        """None where the request was ended while its step ran, whoever has its id now."""
        owner = self._owner.get(sequence.request_id)
        return owner if owner is not None and owner[1].sequence is sequence else None

    def add(self, group: Group) -> None:
        """Queues a request.

        Raises:
            RequestError: it can never run here, or an id is in use; nothing was queued.
        """
        for name in (group.request_id, *(completion.sequence.request_id for completion in group.completions)):
            if name in self._groups or name in self._owner:
                raise RequestError(f"request {name!r} is being served already; give each request its own id")
        added: list[Completion] = []
        try:
            for completion in group.completions:
                self._scheduler.add(completion.sequence)
                added.append(completion)
        except RequestError:
            for completion in added:
                self._scheduler.abort(completion.sequence.request_id)
            raise
        self.num_added += 1
        self._groups[group.request_id] = group
        self._owner |= {c.sequence.request_id: (group, c) for c in group.completions}

    def abort(self, group: Group) -> RequestOutput | None:
        """Ends a request; its last output."""
        for completion in group.completions:
            self._scheduler.abort(completion.sequence.request_id)
        return self._output(group)

    def note_scheduled(self, sequences: Iterable[Sequence], now: float) -> None:
        """Notes when these were first in a step, of `time.monotonic`."""
        for sequence in sequences:
            owner = self.owner_of(sequence)
            if owner is not None and owner[1].scheduled_ts is None:
                owner[1].scheduled_ts = now

    def accept(self, sequence: Sequence, token: int, logprobs: RowLogprobs | None, now: float) -> float | None:
        """Takes in a token that `sequence` has got; the seconds since the one before, or None for the first."""
        group, completion = self._owner[sequence.request_id]
        before, completion.last_token_ts = completion.last_token_ts, now
        if before is None:
            completion.first_token_ts = now
            cached = sequence.num_cached_tokens or 0
            self._stats.first_token(sequence.num_prompt_tokens, cached, now - group.queued_ts)
        if logprobs is not None:
            entries = self.named(logprobs)
            completion.logprobs.append(entries)
            completion.cumulative_logprob += entries[token].logprob
        self._write(completion, token)
        self._advance(completion, token)
        return None if before is None else now - before

    def _write(self, completion: Completion, token: int) -> None:
        """Adds the token's text, and ends a sequence whose text has a stop string."""
        sequence, detokenizer = completion.sequence, completion.detokenizer
        if detokenizer is None:
            return
        params = sequence.request.params
        is_stop_token = sequence.finish_reason is FinishReason.STOP
        if is_stop_token and not params.include_stop_str_in_output:
            return
        stop = detokenizer.add(token)
        if stop is not None and not is_stop_token and sequence.num_output_tokens > params.min_tokens:
            detokenizer.cut(stop, keep=params.include_stop_str_in_output)
            self._scheduler.finish(sequence, FinishReason.STOP, stop)

    def _advance(self, completion: Completion, token: int) -> None:
        """Tells the matcher of a drawn token; ends an output that is complete where no token stands for the end."""
        matcher, sequence = completion.matcher, completion.sequence
        if matcher is None or sequence.is_finished:
            return
        try:
            matcher.advance(token)
            if matcher.is_exhausted():
                self._scheduler.finish(sequence, FinishReason.STOP)
        except StepError as error:
            self.end_alone(error)

    def named(self, row: RowLogprobs) -> dict[int, Logprob]:
        """Log-probabilities as they are handed out, with the tokens' text where there is a tokenizer."""
        name = self._tokenizer.get().decode_token if self._tokenizer.exists else None
        return {
            token: Logprob(logprob, rank, name(token) if name else None)
            for token, logprob, rank in zip(row.token_ids, row.logprobs, row.ranks, strict=True)
        }

    def end_alone(self, error: StepError) -> None:
        """Ends the sequences that an error names and no others; one that names none is of the whole step, and raised."""
        if not error.request_ids:
            raise error
        for name in error.request_ids:
            self._scheduler.finish(self._owner[name][1].sequence, FinishReason.ERROR)
        self.failure = error

    def fail(self, sequences: Iterable[Sequence], error: Exception) -> list[RequestOutput]:
        """Tells of the requests whose sequences an error of the whole step has ended."""
        names = list(dict.fromkeys(self._owner[sequence.request_id][0].request_id for sequence in sequences))
        self.failure = StepError(f"a step failed: {error}", names)
        self.failure.__cause__ = error
        return self._outputs(names)

    def outputs_of(self, sequences: Iterable[Sequence]) -> list[RequestOutput]:
        """What is to be told of the requests of these sequences, once for each."""
        owners = [owner for sequence in sequences if (owner := self.owner_of(sequence)) is not None]
        return self._outputs(group.request_id for group, _ in owners)

    def _outputs(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        found = [self._output(self._groups[name]) for name in dict.fromkeys(request_ids)]
        return [output for output in found if output is not None]

    def _output(self, group: Group) -> RequestOutput | None:
        if group.is_finished:
            self._forget(group)
        elif group.params.output_kind is RequestOutputKind.FINAL_ONLY:
            return None
        return output_of(group)

    def _forget(self, group: Group) -> None:
        """Counts a request that has ended; its id is free again."""
        now = time.monotonic()
        del self._groups[group.request_id]
        for completion in group.completions:
            sequence = completion.sequence
            del self._owner[sequence.request_id]
            times = CompletionTimes(
                queued=group.queued_ts,
                scheduled=completion.scheduled_ts,
                first_token=completion.first_token_ts,
                last_token=completion.last_token_ts,
                ended=now,
            )
            assert sequence.finish_reason is not None
            self._stats.completion_ended(
                sequence.finish_reason, sequence.num_prompt_tokens, sequence.num_output_tokens, times
            )
        self._stats.request_ended(group.params.n, group.params.max_tokens)
