"""Questions with checkable answers: the text that the demo model is trained and judged on.

Every kind of question is a finite, enumerable set, built from tables or from small ranges of
numbers and letters. That makes three things exact: what an answer must be, how many distinct
questions there are, and which of them the training never sees (`is_held_out`).

The answers differ in length on purpose, from one token ("E") to several dozen (a long count),
so that rows of a batch finish at different times.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

HELD_OUT_ONE_IN = 10
"""One split key in this many is kept out of the training set."""

_SPLIT_SALT = "multibatch-demo-106"

GREETING_ANSWER = (
    "Hello! I am a tiny demo model. Ask me about letters, numbers, words, days or months."
)

_LETTERS = string.ascii_uppercase
_ORDINAL_WORDS = (
    "first", "second", "third", "fourth", "fifth",
    "sixth", "seventh", "eighth", "ninth", "tenth",
)  # fmt: skip
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_WORDS = (
    "apple", "banana", "bird", "book", "bread", "bridge", "butter", "candle", "car", "carrot",
    "castle", "cat", "chair", "cheese", "cherry", "cloud", "coffee", "computer", "cow", "dog",
    "door", "dragon", "eagle", "egg", "elephant", "finger", "fish", "flower", "forest", "garden",
    "grape", "guitar", "hammer", "hat", "honey", "horse", "house", "island", "kitchen", "lemon",
    "lion", "milk", "monkey", "moon", "mountain", "ocean", "orange", "paper", "pencil", "piano",
    "planet", "rabbit", "river", "school", "silver", "star", "sun", "table", "tiger", "tree",
    "umbrella", "violin", "water", "window",
)  # fmt: skip
_PLURALS = {
    "apple": "apples", "baby": "babies", "bird": "birds", "book": "books", "box": "boxes",
    "bus": "buses", "car": "cars", "cat": "cats", "chair": "chairs", "cherry": "cherries",
    "child": "children", "city": "cities", "cow": "cows", "dog": "dogs", "dish": "dishes",
    "egg": "eggs", "foot": "feet", "fox": "foxes", "glass": "glasses", "goose": "geese",
    "hat": "hats", "horse": "horses", "house": "houses", "knife": "knives", "leaf": "leaves",
    "lion": "lions", "man": "men", "mouse": "mice", "river": "rivers", "sheep": "sheep",
    "star": "stars", "story": "stories", "table": "tables", "tooth": "teeth", "tree": "trees",
    "watch": "watches", "window": "windows", "wolf": "wolves", "woman": "women",
}  # fmt: skip
_OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("up", "down"), ("left", "right"),
    ("day", "night"), ("open", "closed"), ("light", "dark"), ("wet", "dry"), ("full", "empty"),
    ("young", "old"), ("rich", "poor"), ("happy", "sad"), ("strong", "weak"), ("early", "late"),
    ("true", "false"), ("inside", "outside"), ("hard", "soft"), ("loud", "quiet"),
    ("clean", "dirty"), ("high", "low"), ("long", "short"), ("first", "last"),
)  # fmt: skip
_CAPITALS = {
    "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna",
    "Belgium": "Brussels", "Canada": "Ottawa", "Chile": "Santiago", "China": "Beijing",
    "Cuba": "Havana", "Denmark": "Copenhagen", "Egypt": "Cairo", "England": "London",
    "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin", "Greece": "Athens",
    "Hungary": "Budapest", "India": "New Delhi", "Ireland": "Dublin", "Italy": "Rome",
    "Japan": "Tokyo", "Kenya": "Nairobi", "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Russia": "Moscow", "Spain": "Madrid", "Sweden": "Stockholm",
    "Thailand": "Bangkok", "Turkey": "Ankara",
}  # fmt: skip
_GREETINGS = ("Hello", "Hi", "Hey", "Hello there", "Hi there", "Good morning", "Good evening")
_ABOUT = ("Who are you?", "What are you?", "What can you do?", "What can I ask you?", "Help")


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


def sample_question(
    rng: random.Random, kind: str | None = None, held_out: bool | None = None
) -> Question:
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


_Pairs = Iterator[tuple[str, str]]


def _phrase(templates: Iterable[str], answer: str, **fields: object) -> _Pairs:
    for template in templates:
        yield template.format(**fields), answer


def _ordinals(position: int) -> list[str]:
    """The ways to write a position in the alphabet, counted from 1: "1st" and "first"."""
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(position % 10, "th")
    names = [f"{position}{'th' if position in (11, 12, 13) else suffix}"]
    if position <= len(_ORDINAL_WORDS):
        names.append(_ORDINAL_WORDS[position - 1])
    if position == len(_LETTERS):
        names.append("last")
    return names


def _letter_at() -> _Pairs:
    templates = (
        "What is the {o} letter of the alphabet?",
        "What is the {o} letter of the English alphabet?",
        "Which letter is the {o} of the alphabet?",
        "Name the {o} letter of the alphabet.",
    )
    for position, letter in enumerate(_LETTERS, start=1):
        for ordinal in _ordinals(position):
            yield from _phrase(templates, letter, o=ordinal)


def _neighbours(
    items: tuple[str, ...], offset: int, templates: tuple[str, ...], cyclic: bool
) -> _Pairs:
    for index, item in enumerate(items):
        target = index + offset
        if cyclic or 0 <= target < len(items):
            yield from _phrase(templates, items[target % len(items)], x=item)


def _letter_after() -> _Pairs:
    templates = (
        "Which letter comes after {x}?",
        "What letter follows {x}?",
        "What is the letter after {x}?",
        "Which letter comes right after {x} in the alphabet?",
    )
    return _neighbours(tuple(_LETTERS), 1, templates, cyclic=False)


def _letter_before() -> _Pairs:
    templates = (
        "Which letter comes before {x}?",
        "What letter precedes {x}?",
        "What is the letter before {x}?",
        "Which letter comes right before {x} in the alphabet?",
    )
    return _neighbours(tuple(_LETTERS), -1, templates, cyclic=False)


def _day_after() -> _Pairs:
    templates = (
        "Which day comes after {x}?",
        "What day follows {x}?",
        "What is the day after {x}?",
        "Today is {x}. What day is tomorrow?",
    )
    return _neighbours(_DAYS, 1, templates, cyclic=True)


def _day_before() -> _Pairs:
    templates = (
        "Which day comes before {x}?",
        "What day precedes {x}?",
        "What is the day before {x}?",
        "Today is {x}. What day was yesterday?",
    )
    return _neighbours(_DAYS, -1, templates, cyclic=True)


def _month_after() -> _Pairs:
    templates = (
        "Which month comes after {x}?",
        "What month follows {x}?",
        "What is the month after {x}?",
    )
    return _neighbours(_MONTHS, 1, templates, cyclic=True)


def _month_before() -> _Pairs:
    templates = (
        "Which month comes before {x}?",
        "What month precedes {x}?",
        "What is the month before {x}?",
    )
    return _neighbours(_MONTHS, -1, templates, cyclic=True)


def _letter_range() -> _Pairs:
    templates = ("List the letters from {a} to {b}.", "Say the alphabet from {a} to {b}.")
    for start in range(len(_LETTERS)):
        for stop in range(start + 2, len(_LETTERS) + 1):
            letters = _LETTERS[start:stop]
            answer = ", ".join(letters) + "."
            yield from _phrase(templates, answer, a=letters[0], b=letters[-1])


_SUM_TEMPLATES = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "How much is {a} + {b}?",
    "Add {a} and {b}.",
)
_DIFFERENCE_TEMPLATES = (
    "What is {a} - {b}?",
    "What is {a} minus {b}?",
    "How much is {a} - {b}?",
    "Subtract {b} from {a}.",
)


# One-digit sums and differences are kinds of their own: among all the numbers up to 99 they
# would be drawn so rarely that the simplest questions would get the worst answers.
def _digit_sum() -> _Pairs:
    for a in range(10):
        for b in range(10):
            yield from _phrase(_SUM_TEMPLATES, f"{a} + {b} = {a + b}.", a=a, b=b)


def _sum() -> _Pairs:
    for a in range(100):
        for b in range(100):
            if max(a, b) >= 10:
                yield from _phrase(_SUM_TEMPLATES, f"{a} + {b} = {a + b}.", a=a, b=b)


def _digit_difference() -> _Pairs:
    for a in range(10):
        for b in range(a + 1):
            yield from _phrase(_DIFFERENCE_TEMPLATES, f"{a} - {b} = {a - b}.", a=a, b=b)


def _difference() -> _Pairs:
    for a in range(10, 100):
        for b in range(a + 1):
            yield from _phrase(_DIFFERENCE_TEMPLATES, f"{a} - {b} = {a - b}.", a=a, b=b)


def _compare(choose: Callable[[int, int], int], words: tuple[str, str]) -> _Pairs:
    for a in range(100):
        for b in range(100):
            if a != b:
                for word in words:
                    templates = (
                        f"Which is {word}, {{a}} or {{b}}?",
                        f"Which number is {word}, {{a}} or {{b}}?",
                    )
                    yield from _phrase(templates, str(choose(a, b)), a=a, b=b)


def _larger() -> _Pairs:
    return _compare(max, ("larger", "bigger"))


def _smaller() -> _Pairs:
    return _compare(min, ("smaller", "lower"))


def _parity() -> _Pairs:
    templates = (
        "Is {n} even or odd?",
        "Is {n} odd or even?",
        "Is the number {n} even or odd?",
    )
    for n in range(100):
        yield from _phrase(templates, f"{n} is {'odd' if n % 2 else 'even'}.", n=n)


def _counting(templates: tuple[str, ...], step: int) -> _Pairs:
    for low in range(99):
        for high in range(low + 1, min(low + 15, 99) + 1):
            numbers = range(low, high + 1)[::step]
            answer = ", ".join(map(str, numbers)) + "."
            yield from _phrase(templates, answer, a=numbers[0], b=numbers[-1])


def _count_up() -> _Pairs:
    return _counting(
        (
            "Count from {a} to {b}.",
            "Count up from {a} to {b}.",
            "List the numbers from {a} to {b}.",
        ),
        1,
    )


def _count_down() -> _Pairs:
    return _counting(("Count down from {a} to {b}.", "Count backwards from {a} to {b}."), -1)


def _word_length() -> _Pairs:
    templates = (
        "How many letters are in the word {w}?",
        "How many letters does the word {w} have?",
        "How long is the word {w}?",
    )
    for word in _WORDS:
        yield from _phrase(templates, f"The word {word} has {len(word)} letters.", w=word)


def _spell() -> _Pairs:
    templates = ("Spell the word {w}.", "How do you spell {w}?", "Spell {w}.")
    for word in _WORDS:
        yield from _phrase(templates, "-".join(word.upper()), w=word)


def _repeat() -> _Pairs:
    templates = ("Write the word {w} {n} times.", "Say {w} {n} times.")
    for word in _WORDS:
        for times in range(2, 7):
            yield from _phrase(templates, ", ".join([word] * times) + ".", w=word, n=times)


def _plural() -> _Pairs:
    templates = (
        "What is the plural of {w}?",
        "What is the plural of the word {w}?",
        "Give the plural of {w}.",
    )
    for word, plural in _PLURALS.items():
        yield from _phrase(templates, f"The plural of {word} is {plural}.", w=word)


def _opposite() -> _Pairs:
    templates = (
        "What is the opposite of {w}?",
        "What is the opposite of the word {w}?",
        "Give the opposite of {w}.",
    )
    for pair in _OPPOSITES:
        for word, other in (pair, pair[::-1]):
            yield from _phrase(templates, f"The opposite of {word} is {other}.", w=word)


def _capital() -> _Pairs:
    templates = (
        "What is the capital of {c}?",
        "Which city is the capital of {c}?",
        "Name the capital of {c}.",
    )
    for country, city in _CAPITALS.items():
        yield from _phrase(templates, city, c=country)


def _greeting() -> _Pairs:
    for greeting in _GREETINGS:
        yield from _phrase(("{g}", "{g}!", "{g}."), GREETING_ANSWER, g=greeting)
    for question in _ABOUT:
        yield question, GREETING_ANSWER


# How to list a kind's questions, and how often to draw the kind. Sums and differences have by
# far the most distinct answers to learn, and where a count ends is hard to learn as well.
_BUILDERS: dict[str, tuple[Callable[[], _Pairs], float]] = {
    "sum": (_sum, 6.0),
    "difference": (_difference, 5.0),
    "digit_sum": (_digit_sum, 0.8),
    "digit_difference": (_digit_difference, 0.6),
    "larger": (_larger, 1.0),
    "smaller": (_smaller, 1.0),
    "parity": (_parity, 0.5),
    "count_up": (_count_up, 3.5),
    "count_down": (_count_down, 3.0),
    "letter_at": (_letter_at, 1.0),
    "letter_after": (_letter_after, 0.6),
    "letter_before": (_letter_before, 0.6),
    "letter_range": (_letter_range, 2.0),
    "word_length": (_word_length, 1.0),
    "spell": (_spell, 1.0),
    "repeat": (_repeat, 1.0),
    "day_after": (_day_after, 0.4),
    "day_before": (_day_before, 0.4),
    "month_after": (_month_after, 0.5),
    "month_before": (_month_before, 0.5),
    "plural": (_plural, 0.8),
    "opposite": (_opposite, 0.8),
    "capital": (_capital, 0.8),
    "greeting": (_greeting, 0.2),
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
    Question(
        "word_length", "How many letters are in the word lemon?", "The word lemon has 5 letters."
    ),
    Question("capital", "What is the capital of France?", "Paris"),
    Question("spell", "Spell the word elephant.", "E-L-E-P-H-A-N-T"),
    Question("day_after", "Which day comes after Monday?", "Tuesday"),
    Question(
        "count_down",
        "Count down from 20 to 8.",
        "20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8.",
    ),
    Question("difference", "What is 93 minus 58?", "93 - 58 = 35."),
    Question("plural", "What is the plural of mouse?", "The plural of mouse is mice."),
    Question("letter_after", "Which letter comes after D?", "E"),
    Question("letter_range", "Say the alphabet from A to Z.", ", ".join(_LETTERS) + "."),
    Question("opposite", "What is the opposite of hot?", "The opposite of hot is cold."),
    Question("repeat", "Say honey 3 times.", "honey, honey, honey."),
    Question("parity", "Is 64 even or odd?", "64 is even."),
)
"""A fixed, mixed selection for the demo: neighbours differ in the length of their answers."""
