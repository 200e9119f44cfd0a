"""Biases, allowed tokens and bad words: what they do to the logits, and what of them is refused at the door."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multibatch.errors import RequestError
from multibatch.logits_masks import TokenRules
from multibatch.sampling_params import SamplingParams

V = 30


def encode(text: str) -> list[int]:
    """A token per letter, "a" being 10 and a space 1; "b" after a space at the start is token 2 with it."""
    if text.startswith(" b"):
        return [2, *encode(text[2:])]
    return [1 if c == " " else ord(c) - ord("a") + 10 for c in text]


def rules_of(stop_ids: tuple[int, ...] = (), **options: Any) -> TokenRules | None:
    return TokenRules.of(SamplingParams(**options), V, encode, stop_ids)


def applied(output: list[int], **options: Any) -> list[float]:
    rules = rules_of(**options)
    assert rules is not None
    scores = torch.arange(V + 3, dtype=torch.float32)
    rules.apply(scores, output)
    assert scores[V:].tolist() == [V, V + 1, V + 2]  # beyond the vocabulary nothing changes
    return scores[:V].tolist()


def test_nothing_asked_is_no_rules() -> None:
    assert rules_of(temperature=0.5, min_tokens=3, stop_token_ids=[4]) is None
    assert rules_of(bad_words=[], logit_bias={}) is None


def test_biases_are_added_and_cut_off_at_100() -> None:
    expected = [float(i) for i in range(V)]
    expected[3], expected[0], expected[29] = 103.0, -1.5, -71.0
    assert applied([], logit_bias={3: 1e9, 0: -1.5, 29: -math.inf}) == expected


def test_allowed_tokens_are_the_only_ones() -> None:
    scores = applied([5], allowed_token_ids=[7, 2, 7])
    assert [i for i, score in enumerate(scores) if score > -math.inf] == [2, 7]
    assert (scores[2], scores[7]) == (2.0, 7.0)


@pytest.mark.parametrize(
    ("output", "forbidden"),
    [
        ([], {10}),
        ([10], {10, 12}),
        ([11], {10, 13}),
        ([2], {10, 13}),
        ([1, 10], {10, 12}),
        ([10, 5], {10}),
    ],
)
def test_the_last_token_of_a_bad_word_is_forbidden_after_the_others(output: list[int], forbidden: set[int]) -> None:
    scores = applied(output, bad_words=["a", "  ac", "bd"])
    assert {i for i, score in enumerate(scores) if score == -math.inf} == forbidden


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=4),
    st.lists(st.sampled_from([1, 2, 10, 11, 12]), max_size=6),
)
def test_bad_words_are_those_of_the_plain_reading(words: list[str], output: list[int]) -> None:
    found = {i for i, score in enumerate(applied(output, bad_words=words)) if score == -math.inf}
    sequences = [encode(text) for word in words for text in (word, f" {word}")]
    assert found == {ids[-1] for ids in sequences if [*output, ids[-1]][-len(ids) :] == ids}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {29: 1.0, 30: 1.0}}, "logit_bias has token id 30; allowed: 0 to 29"),
        ({"allowed_token_ids": [5, 31]}, "allowed_token_ids has token id 31; allowed: 0 to 29"),
        ({"bad_words": ["~"]}, "bad_words with '~' has token id 39; allowed: 0 to 29"),
        ({"allowed_token_ids": [10], "bad_words": ["a"]}, "allowed_token_ids are 10, and bad_words or min_tokens"),
        ({"allowed_token_ids": [4, 5], "min_tokens": 1, "stop_ids": (4, 5)}, "allowed_token_ids are 4, 5, and"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        rules_of(**options)


def test_a_stop_token_alone_is_allowed_where_it_may_be_drawn() -> None:
    assert rules_of(allowed_token_ids=[4], stop_ids=(4,)) is not None
