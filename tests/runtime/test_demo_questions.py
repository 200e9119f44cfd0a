"""The demo's questions: answers that are right by other means, a stable and disjoint split."""

from __future__ import annotations

import itertools
import operator
import random
import re
import string
import subprocess
import sys

import pytest

from multibatch.demo.questions import (
    KINDS,
    SHOWCASE,
    Question,
    find_question,
    held_out_questions,
    is_correct,
    is_held_out,
    questions_of,
    sample_question,
    training_questions,
)

TABLE_KINDS = tuple(kind for kind in KINDS if len(questions_of(kind)) <= 640)


def numbers_of(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def word_of(text: str) -> str:
    """The word that a question asks about: its last one that is no number and no unit."""
    words: list[str] = [w for w in re.findall(r"[a-z]+", text) if w not in ("times", "have")]
    return words[-1]


@pytest.mark.parametrize("kind", ["sum", "digit_sum", "difference", "digit_difference"])
def test_arithmetic(kind: str) -> None:
    sign, compute = ("+", operator.add) if kind.endswith("sum") else ("-", operator.sub)
    for question in questions_of(kind):
        a, b = numbers_of(question.text)
        if question.text.startswith("Subtract"):
            a, b = b, a
        assert question.answer == f"{a} {sign} {b} = {compute(a, b)}."
        assert compute(a, b) >= 0


@pytest.mark.parametrize(("kind", "index"), [("larger", 1), ("smaller", 0)])
def test_comparisons(kind: str, index: int) -> None:
    for question in questions_of(kind):
        assert int(question.answer) == sorted(numbers_of(question.text))[index]


def test_parity() -> None:
    for question in questions_of("parity"):
        (n,) = numbers_of(question.text)
        assert question.answer == f"{n} is {'even' if str(n)[-1] in '02468' else 'odd'}."


@pytest.mark.parametrize(("kind", "step"), [("count_up", 1), ("count_down", -1)])
def test_counts(kind: str, step: int) -> None:
    for question in questions_of(kind):
        first, last = numbers_of(question.text)
        counted = numbers_of(question.answer)
        assert (counted[0], counted[-1]) == (first, last)
        assert all(b - a == step for a, b in itertools.pairwise(counted))
        assert re.fullmatch(r"\d+(, \d+)+\.", question.answer)


def test_letters_at_positions() -> None:
    words = ["first", "second", "third", "fourth", "fifth"]
    words += ["sixth", "seventh", "eighth", "ninth", "tenth"]
    for question in questions_of("letter_at"):
        numbers = numbers_of(question.text)
        if numbers:
            position = numbers[0]
            assert re.search(rf"\b{position}(st|nd|rd|th)\b", question.text)
        elif "last" in question.text:
            position = 26
        else:
            (position,) = (i for i, word in enumerate(words, 1) if word in question.text.split())
        assert ord(question.answer) == ord("A") + position - 1


def test_ordinal_suffixes() -> None:
    texts = " ".join(question.text for question in questions_of("letter_at"))
    assert {"1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "23rd"} <= set(texts.split())
    assert not {"11st", "12nd", "13rd", "21th"} & set(texts.split())


@pytest.mark.parametrize(("kind", "step"), [("letter_after", 1), ("letter_before", -1)])
def test_neighbouring_letters(kind: str, step: int) -> None:
    for question in questions_of(kind):
        (letter,) = re.findall(r"\b[A-Z]\b", question.text)
        assert ord(question.answer) - ord(letter) == step


def test_letter_ranges() -> None:
    for question in questions_of("letter_range"):
        first, last = re.findall(r"\b[A-Z]\b", question.text)
        letters = question.answer.removesuffix(".").split(", ")
        assert (letters[0], letters[-1]) == (first, last)
        assert "".join(letters) in string.ascii_uppercase


@pytest.mark.parametrize(("unit", "names"), [
    ("day", "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    (
        "month",
        "January February March April May June "
        "July August September October November December",
    ),
])  # fmt: skip
def test_neighbouring_days_and_months(unit: str, names: str) -> None:
    ring = names.split()
    for kind, step in ((f"{unit}_after", 1), (f"{unit}_before", -1)):
        for question in questions_of(kind):
            (name,) = (name for name in ring if name in question.text)
            assert question.answer == ring[(ring.index(name) + step) % len(ring)]


def test_words() -> None:
    for question in questions_of("word_length"):
        word = word_of(question.text)
        assert question.answer == f"The word {word} has {len(word)} letters."
    for question in questions_of("spell"):
        assert question.answer.replace("-", "").lower() == word_of(question.text)
        assert len(question.answer) == 2 * len(word_of(question.text)) - 1
    for question in questions_of("repeat"):
        (times,) = numbers_of(question.text)
        assert question.answer.removesuffix(".").split(", ") == [word_of(question.text)] * times


def test_opposites_go_both_ways() -> None:
    pairs = {tuple(re.findall(r"of (\w+) is (\w+)", q.answer)[0]) for q in questions_of("opposite")}
    assert pairs == {pair[::-1] for pair in pairs}
    assert len({word for word, _ in pairs}) == len(pairs)


@pytest.mark.parametrize("answer", [
    "The plural of mouse is mice.",
    "The plural of city is cities.",
    "The plural of sheep is sheep.",
])  # fmt: skip
def test_plurals(answer: str) -> None:
    assert answer in {question.answer for question in questions_of("plural")}


@pytest.mark.parametrize("kind", KINDS)
def test_split_is_disjoint_and_leaves_both_sides(kind: str) -> None:
    training, held_out = training_questions(kind), held_out_questions(kind)
    assert {q.text for q in training}.isdisjoint(q.text for q in held_out)
    assert len(training) + len(held_out) == len(questions_of(kind))
    assert 0.03 < len(held_out) / len(questions_of(kind)) < 0.25
    assert len(held_out) >= 3


@pytest.mark.parametrize("kind", ["sum", "difference", "larger", "smaller", "count_up", "count_down"])
def test_held_out_numbers_are_trained_in_no_phrasing_and_no_order(kind: str) -> None:
    trained = {tuple(sorted(numbers_of(q.text))) for q in training_questions(kind)}
    assert trained.isdisjoint(tuple(sorted(numbers_of(q.text))) for q in held_out_questions(kind))


@pytest.mark.parametrize("kind", [k for k in TABLE_KINDS if k not in ("parity", "repeat")])
def test_every_fact_is_trained_in_some_phrasing(kind: str) -> None:
    assert {q.answer for q in training_questions(kind)} == {q.answer for q in questions_of(kind)}


def test_split_and_samples_do_not_depend_on_the_process() -> None:
    code = (
        "import random; from multibatch.demo.questions import *;"
        "rng = random.Random(7); qs = [sample_question(rng) for _ in range(50)];"
        "print([(q.text, is_held_out(q)) for q in qs])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1]


def test_texts_are_unique_and_many() -> None:
    texts = [question.text for kind in KINDS for question in questions_of(kind)]
    assert len(texts) == len(set(texts))
    assert len(texts) > 100_000


def test_sampling_respects_kind_and_split() -> None:
    rng = random.Random(0)
    assert {sample_question(rng).kind for _ in range(2000)} == set(KINDS)
    for kind in KINDS:
        assert sample_question(rng, kind).kind == kind
        assert is_held_out(sample_question(rng, kind, held_out=True))
        assert not is_held_out(sample_question(rng, kind, held_out=False))


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got 'riddle', allowed: sum, .*greeting"):
        questions_of("riddle")


def test_is_correct() -> None:
    question = Question("sum", "What is 17 + 25?", "17 + 25 = 42.")
    assert is_correct(question, "17 + 25 = 42.")
    assert is_correct(question, " 17 + 25 = 42.\n")
    for wrong in ("", "42", "17 + 25 = 43.", "17 + 25 = 42. 17", "17 + 25 = 42", "17 + 26 = 42."):
        assert not is_correct(question, wrong)


def test_another_questions_answer_is_wrong() -> None:
    for question in questions_of("capital"):
        others = {q.answer for q in questions_of("capital")} - {question.answer}
        assert not any(is_correct(question, other) for other in others)


def test_showcase_is_right_and_varied() -> None:
    assert all(find_question(question.text) == question for question in SHOWCASE)
    assert len({question.kind for question in SHOWCASE}) >= 12
    lengths = [len(question.answer) for question in SHOWCASE]
    assert min(lengths) == 1
    assert max(lengths) > 60


def test_unknown_text_is_not_found() -> None:
    assert find_question("What is the meaning of life?") is None
