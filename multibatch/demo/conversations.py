"""Questions as training data: conversations of several turns in token ids, with labels on the answers only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from multibatch.demo.questions import Question, sample_question
from multibatch.demo.tokenizer import TURN_END, TURN_START

IGNORED = -100
"""The label of a position that carries no loss."""

# The lengths that training conversations are filled up to, and how often each is used. A turn
# takes about 30 tokens, so a row holds two to twelve turns, and its first turn has no history.
_ROW_LENGTHS = (128, 192, 384)
_ROW_LENGTH_WEIGHTS = (6.0, 3.0, 1.0)


class ConversationEncoder:
    """Turns questions into token ids and labels, as the chat template writes them."""

    def __init__(self, tokenizer: Any) -> None:
        """Keeps the tokenizer and the tokens that every turn shares."""
        self._tokenizer = tokenizer
        self.pad_id: int = tokenizer.pad_token_id

    def encode(self, turns: Sequence[Question]) -> tuple[list[int], list[int]]:
        """The token ids of a conversation, and its labels: the answers with their end marks."""
        ids: list[int] = []
        labels: list[int] = []
        for turn in turns:
            prompt = self._ids(f"{TURN_START}user\n{turn.text}{TURN_END}\n{TURN_START}assistant\n")
            answer = self._ids(f"{turn.answer}{TURN_END}")
            newline = self._ids("\n")
            ids += prompt + answer + newline
            labels += [IGNORED] * len(prompt) + answer + [IGNORED] * len(newline)
        return ids, labels

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _fill(self, rng: random.Random, length: int) -> tuple[list[int], list[int]]:
        """A conversation of at least one turn, ended by the first turn that would not fit."""
        ids: list[int] = []
        labels: list[int] = []
        while True:
            turn_ids, turn_labels = self.encode([sample_question(rng, held_out=False)])
            if ids and len(ids) + len(turn_ids) > length:
                return ids, labels
            ids += turn_ids
            labels += turn_labels

    def batch(self, rng: random.Random, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws one batch of conversations, each of as many turns as fit into its row.

        Args:
            rng: The source of randomness.
            tokens: About how many tokens the batch may hold.

        Returns:
            The token ids and the labels, both (rows, length) and padded on the right. The mask
            of a causal model hides padding on the right by itself.
        """
        length = rng.choices(_ROW_LENGTHS, weights=_ROW_LENGTH_WEIGHTS)[0]
        rows = [self._fill(rng, length) for _ in range(max(1, tokens // length))]
        longest = max(len(row_ids) for row_ids, _ in rows)
        ids = torch.full((len(rows), longest), self.pad_id)
        labels = torch.full((len(rows), longest), IGNORED)
        for row, (row_ids, row_labels) in enumerate(rows):
            ids[row, : len(row_ids)] = torch.tensor(row_ids)
            labels[row, : len(row_labels)] = torch.tensor(row_labels)
        return ids, labels
