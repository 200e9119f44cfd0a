"""What comes where: letters of the alphabet, days of the week, months of the year."""

from __future__ import annotations

import string

from multibatch.demo.families.phrasing import Pairs, phrase

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


def _ordinals(position: int) -> list[str]:
    """The ways to write a position in the alphabet, counted from 1: "1st" and "first"."""
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(position % 10, "th")
    names = [f"{position}{'th' if position in (11, 12, 13) else suffix}"]
    if position <= len(_ORDINAL_WORDS):
        names.append(_ORDINAL_WORDS[position - 1])
    if position == len(_LETTERS):
        names.append("last")
    return names


def letters_at_positions() -> Pairs:
    """The letter at each position of the alphabet."""
    templates = (
        "What is the {o} letter of the alphabet?",
        "What is the {o} letter of the English alphabet?",
        "Which letter is the {o} of the alphabet?",
        "Name the {o} letter of the alphabet.",
    )
    for position, letter in enumerate(_LETTERS, start=1):
        for ordinal in _ordinals(position):
            yield from phrase(templates, letter, o=ordinal)


def _neighbours(items: tuple[str, ...], offset: int, templates: tuple[str, ...], cyclic: bool) -> Pairs:
    for index, item in enumerate(items):
        target = index + offset
        if cyclic or 0 <= target < len(items):
            yield from phrase(templates, items[target % len(items)], x=item)


def letters_after() -> Pairs:
    """The letter after each but the last."""
    templates = (
        "Which letter comes after {x}?",
        "What letter follows {x}?",
        "What is the letter after {x}?",
        "Which letter comes right after {x} in the alphabet?",
    )
    return _neighbours(tuple(_LETTERS), 1, templates, cyclic=False)


def letters_before() -> Pairs:
    """The letter before each but the first."""
    templates = (
        "Which letter comes before {x}?",
        "What letter precedes {x}?",
        "What is the letter before {x}?",
        "Which letter comes right before {x} in the alphabet?",
    )
    return _neighbours(tuple(_LETTERS), -1, templates, cyclic=False)


def days_after() -> Pairs:
    """The day after each, Monday after Sunday."""
    templates = (
        "Which day comes after {x}?",
        "What day follows {x}?",
        "What is the day after {x}?",
        "Today is {x}. What day is tomorrow?",
    )
    return _neighbours(_DAYS, 1, templates, cyclic=True)


def days_before() -> Pairs:
    """The day before each, Sunday before Monday."""
    templates = (
        "Which day comes before {x}?",
        "What day precedes {x}?",
        "What is the day before {x}?",
        "Today is {x}. What day was yesterday?",
    )
    return _neighbours(_DAYS, -1, templates, cyclic=True)


def months_after() -> Pairs:
    """The month after each, January after December."""
    templates = (
        "Which month comes after {x}?",
        "What month follows {x}?",
        "What is the month after {x}?",
    )
    return _neighbours(_MONTHS, 1, templates, cyclic=True)


def months_before() -> Pairs:
    """The month before each, December before January."""
    templates = (
        "Which month comes before {x}?",
        "What month precedes {x}?",
        "What is the month before {x}?",
    )
    return _neighbours(_MONTHS, -1, templates, cyclic=True)


def letter_ranges() -> Pairs:
    """The letters between two of them, at least two, both ends included."""
    templates = ("List the letters from {a} to {b}.", "Say the alphabet from {a} to {b}.")
    for start in range(len(_LETTERS)):
        for stop in range(start + 2, len(_LETTERS) + 1):
            letters = _LETTERS[start:stop]
            answer = ", ".join(letters) + "."
            yield from phrase(templates, answer, a=letters[0], b=letters[-1])
