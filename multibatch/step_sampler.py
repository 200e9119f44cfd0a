"""Draws the tokens of a step for the requests that it serves: what each row asks, in; tokens and ended rows, out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as AnySequence

import torch

from multibatch.draws import draw_options
from multibatch.errors import StepError
from multibatch.logit_passes import DrawOptions, LogitPasses
from multibatch.request import Sequence
from multibatch.request_book import RequestBook
from multibatch.runner import StepResult
from multibatch.sampler import SampledRows, Sampler, row_logprobs
from multibatch.sampling_row import SamplingRow
from multibatch.scheduled_step import ScheduledStep


class StepSampler:
    """Between the sampler, which knows rows, and the requests, which are whole."""

    def __init__(self, passes: LogitPasses, vocabulary: int, book: RequestBook) -> None:
        """Draws with `passes` from logits [n, vocabulary], for the requests of `book`."""
        self._sampler = Sampler(passes)
        self._can_draw = passes.draw_tokens is not None
        self._vocabulary = vocabulary
        self._book = book

    def known_rows(self, step: ScheduledStep, ahead: int = 0) -> list[SamplingRow] | None:
        """Of `step.sampled`, where the logits of all count as they come and nothing but a token is asked; of their next tokens, or of those
        so many behind.
        """
        rows = []
        for sequence in step.sampled:
            owner = self._book.owner_of(sequence)
            if owner is None or owner[1].known_row is None or owner[0].params.logprobs is not None:
                return None
            row = owner[1].known_row
            if not row.is_plain:
                if not self._can_draw:
                    return None
                row = dataclasses.replace(row, position=sequence.num_tokens + ahead)
            rows.append(row)
        return rows or None

    def draws(self, rows: AnySequence[SamplingRow] | None) -> DrawOptions | None:
        """How the tokens of known rows are drawn; None where each is the maximum of its logits, or there are none."""
        if rows is None or all(row.is_plain for row in rows):
            return None
        return draw_options(rows, self._vocabulary)

    def take(self, step: ScheduledStep, rows: list[SamplingRow], result: StepResult) -> SampledRows | None:
        """Takes the tokens that the step found itself; None where there is more to it.

        Args:
            step: that ran.
            rows: its `known_rows`.
            result: what came of it.
        """
        # More logits than rows: prompt_logprobs asked.
        if result.tokens is None or len(result.logits) != len(rows) or any(s.is_finished for s in step.sampled):
            return None
        try:
            return self._sampler.take(result.tokens, rows)
        except StepError:  # of single rows; `sample` ends those
            return None

    def sample(self, step: ScheduledStep, logits: torch.Tensor) -> SampledRows:
        """Draws a token for each of `step.sampled`; one that can have none ends alone, with the reason ERROR.

        It gets token 0, which nobody reads, as the sequence is finished.

        Args:
            step: that ran.
            logits: [n, V]: of `step.sampled`, then of every chunk's `prompt_positions`, which are taken in too.
        """
        num_sampled = len(step.sampled)
        if logits.shape[0] > num_sampled:
            self._note_prompt_logprobs(step, logits[num_sampled:])
            logits = logits[:num_sampled]
        return self._sample(step.sampled, logits)

    def _sample(self, sequences: AnySequence[Sequence], logits: torch.Tensor) -> SampledRows:
        drawn = SampledRows([0] * len(sequences), [None] * len(sequences))
        while live := [i for i, sequence in enumerate(sequences) if not sequence.is_finished]:
            is_whole = len(live) == len(sequences)
            try:
                rows = [self._row(sequences[i]) for i in live]
                sampled = self._sampler.sample(logits if is_whole else logits[live], rows)
            except StepError as error:
                self._book.end_alone(error)
                continue
            if is_whole:
                return sampled
            for i, token_id, logprobs in zip(live, sampled.token_ids, sampled.logprobs, strict=True):
                drawn.token_ids[i], drawn.logprobs[i] = token_id, logprobs
            break
        return drawn

    def _row(self, sequence: Sequence) -> SamplingRow:
        owner = self._book.owner_of(sequence)
        if owner is None:  # a step that is only timed
            return SamplingRow.from_sequence(sequence)
        group, completion = owner
        if completion.known_row is not None and completion.known_row.is_plain:
            return completion.known_row
        mask = None if completion.matcher is None else completion.matcher.allowed()
        row = SamplingRow.from_sequence(sequence, group.rules, mask)
        if row.is_unchanged and completion.matcher is None:
            completion.known_row = row
        return row

    def _note_prompt_logprobs(self, step: ScheduledStep, logits: torch.Tensor) -> None:
        """Takes in the logits of every chunk's `prompt_positions`, one chunk after the other."""
        row = 0
        for chunk in step.prefill:
            owner = self._book.owner_of(chunk.sequence) if chunk.prompt_positions else None
            if owner is None:
                row += len(chunk.prompt_positions)
                continue
            group, top = owner[0], owner[0].params.prompt_logprobs
            for position in chunk.prompt_positions:
                # Others were given before a preemption.
                if top is not None and position + 1 == len(group.prompt_logprobs):
                    token_id = group.prompt_token_ids[position + 1]
                    group.prompt_logprobs.append(self._book.named(row_logprobs(logits[row], token_id, top)))
                row += 1
