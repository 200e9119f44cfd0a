"""Questions with checkable answers: the text that the demo model is trained and judged on.

Every kind of question is a finite, enumerable set, built in `families/` from tables or from small ranges of numbers and
letters. That makes three things exact: what an answer must be, how many distinct questions there are, and which of them
the training never sees (`is_held_out`). Which kinds there are, how often each is drawn and how each is split is here.

The answers differ in length on purpose, from one token ("E") to several dozen (a long count), so that rows of a batch
finish at different times.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass

from multibatch.demo.families import numeric, ordered, verbal
from multibatch.demo.families.phrasing import Pairs

HELD_OUT_ONE_IN = 10
"""One split key in this many is kept out of the training set."""

_SPLIT_SALT = "multibatch-demo-106"


@dataclass(frozen=True)
class Question:
    """One question with the only reply that counts as right.

    Attributes:
        kind: The kind of question, one of `KINDS`.
        text: What the user says.
        answer: What the model must reply.
    """

    kind: str
    text: str
    answer: str


def is_correct(question: Question, reply: str) -> bool:
    """Whether a reply is exactly the answer, white space at its ends aside."""
    return reply.strip() == question.answer


def is_held_out(question: Question) -> bool:
    """Whether a question is kept out of the training set.

    The choice is a stable hash, the same in every process and on every machine. Questions that
    are computed from numbers or letters are split by these operands, so no phrasing of a held-out
    sum, in either order of its terms, is ever trained. Facts from a table are split by their
    text: a held-out one is trained in its other phrasings only. The one-digit sums and
    differences are such a table.
    """
    key = question.text
    if question.kind in _COMPUTED_KINDS:
        key = " ".join(sorted(re.findall(r"\b(?:\d+|[A-Z])\b", question.text)))
    digest = hashlib.sha256(f"{_SPLIT_SALT}|{question.kind}|{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


@functools.cache
def questions_of(kind: str) -> tuple[Question, ...]:
    """Every distinct question of a kind, in a fixed order.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind not in _BUILDERS:
        raise ValueError(f"unknown kind of question: got {kind!r}, allowed: {', '.join(KINDS)}")
    builder, _ = _BUILDERS[kind]
    return tuple(dict.fromkeys(Question(kind, text, answer) for text, answer in builder()))


@functools.cache
def training_questions(kind: str) -> tuple[Question, ...]:
    """The questions of a kind that the training may see, in a fixed order."""
    return tuple(question for question in questions_of(kind) if not is_held_out(question))


@functools.cache
def held_out_questions(kind: str) -> tuple[Question, ...]:
    """The questions of a kind that the training never sees, in a fixed order."""
    return tuple(question for question in questions_of(kind) if is_held_out(question))


def sample_question(rng: random.Random, kind: str | None = None, held_out: bool | None = None) -> Question:
    """Draws one question.

    Args:
        rng: The source of randomness; the same state gives the same question.
        kind: The kind to draw from; by default a kind is drawn too, the harder ones more often.
        held_out: True for held-out questions only, False for training questions only, None for
            any question.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind is None:
        kind = rng.choices(KINDS, weights=_WEIGHTS)[0]
    if held_out is None:
        return rng.choice(questions_of(kind))
    return rng.choice(held_out_questions(kind) if held_out else training_questions(kind))


# How to list a kind's questions, and how often to draw the kind. Sums and differences have by
# far the most distinct answers to learn, and where a count ends is hard to learn as well.
_BUILDERS: dict[str, tuple[Callable[[], Pairs], float]] = {
    "sum": (numeric.sums, 6.0),
    "difference": (numeric.differences, 5.0),
    "digit_sum": (numeric.digit_sums, 0.8),
    "digit_difference": (numeric.digit_differences, 0.6),
    "larger": (numeric.larger, 1.0),
    "smaller": (numeric.smaller, 1.0),
    "parity": (numeric.parities, 0.5),
    "count_up": (numeric.counts_up, 3.5),
    "count_down": (numeric.counts_down, 3.0),
    "letter_at": (ordered.letters_at_positions, 1.0),
    "letter_after": (ordered.letters_after, 0.6),
    "letter_before": (ordered.letters_before, 0.6),
    "letter_range": (ordered.letter_ranges, 2.0),
    "word_length": (verbal.word_lengths, 1.0),
    "spell": (verbal.spellings, 1.0),
    "repeat": (verbal.repetitions, 1.0),
    "day_after": (ordered.days_after, 0.4),
    "day_before": (ordered.days_before, 0.4),
    "month_after": (ordered.months_after, 0.5),
    "month_before": (ordered.months_before, 0.5),
    "plural": (verbal.plurals, 0.8),
    "opposite": (verbal.opposites, 0.8),
    "capital": (verbal.capitals, 0.8),
    "greeting": (verbal.greetings, 0.2),
}

KINDS: tuple[str, ...] = tuple(_BUILDERS)
"""The kinds of questions, in the order that tables list them."""

_WEIGHTS = tuple(weight for _, weight in _BUILDERS.values())

_COMPUTED_KINDS = frozenset(
    {
        "sum",
        "difference",
        "larger",
        "smaller",
        "parity",
        "count_up",
        "count_down",
        "letter_range",
    }  # fmt: skip
)


@functools.cache
def _by_text() -> dict[str, Question]:
    return {question.text: question for kind in KINDS for question in questions_of(kind)}


def find_question(text: str) -> Question | None:
    """The question with exactly this text, or None where the model was not trained for it."""
    return _by_text().get(text.strip())


SHOWCASE: tuple[Question, ...] = (
    Question("letter_at", "What is the first letter of the English alphabet?", "A"),
    Question("sum", "What is 17 + 25?", "17 + 25 = 42."),
    Question("count_up", "Count from 3 to 9.", "3, 4, 5, 6, 7, 8, 9."),
    Question("larger", "Which is larger, 41 or 17?", "41"),
    Question("word_length", "How many letters are in the word lemon?", "The word lemon has 5 letters."),
    Question("capital", "What is the capital of France?", "Paris"),
    Question("spell", "Spell the word elephant.", "E-L-E-P-H-A-N-T"),
    Question("day_after", "Which day comes after Monday?", "Tuesday"),
    Question(
        "count_down",
        "Count down from 20 to 11.",
        "20, 19, 18, 17, 16, 15, 14, 13, 12, 11.",
    ),
    Question("difference", "What is 93 minus 58?", "93 - 58 = 35."),
    Question("plural", "What is the plural of mouse?", "The plural of mouse is mice."),
    Question("letter_after", "Which letter comes after D?", "E"),
    Question("letter_range", "Say the alphabet from A to Z.", ", ".join(string.ascii_uppercase) + "."),
    Question("opposite", "What is the opposite of hot?", "The opposite of hot is cold."),
    Question("repeat", "Say honey 3 times.", "honey, honey, honey."),
    Question("parity", "Is 64 even or odd?", "64 is even."),
)
"""A fixed, mixed selection for the demo: neighbours differ in the length of their answers."""
