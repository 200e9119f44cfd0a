"""Numbers below 100: adding, subtracting, comparing and counting."""

from __future__ import annotations

from collections.abc import Callable

from multibatch.demo.families.phrasing import Pairs, phrase

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
def digit_sums() -> Pairs:
    """Sums of two digits."""
    for a in range(10):
        for b in range(10):
            yield from phrase(_SUM_TEMPLATES, f"{a} + {b} = {a + b}.", a=a, b=b)


def sums() -> Pairs:
    """Sums with at least one term of two digits."""
    for a in range(100):
        for b in range(100):
            if max(a, b) >= 10:
                yield from phrase(_SUM_TEMPLATES, f"{a} + {b} = {a + b}.", a=a, b=b)


def digit_differences() -> Pairs:
    """Differences of two digits that are not negative."""
    for a in range(10):
        for b in range(a + 1):
            yield from phrase(_DIFFERENCE_TEMPLATES, f"{a} - {b} = {a - b}.", a=a, b=b)


def differences() -> Pairs:
    """Differences from a number of two digits that are not negative."""
    for a in range(10, 100):
        for b in range(a + 1):
            yield from phrase(_DIFFERENCE_TEMPLATES, f"{a} - {b} = {a - b}.", a=a, b=b)


def _compare(choose: Callable[[int, int], int], words: tuple[str, str]) -> Pairs:
    for a in range(100):
        for b in range(100):
            if a != b:
                for word in words:
                    templates = (
                        f"Which is {word}, {{a}} or {{b}}?",
                        f"Which number is {word}, {{a}} or {{b}}?",
                    )
                    yield from phrase(templates, str(choose(a, b)), a=a, b=b)


def larger() -> Pairs:
    """The larger one of two numbers."""
    return _compare(max, ("larger", "bigger"))


def smaller() -> Pairs:
    """The smaller one of two numbers."""
    return _compare(min, ("smaller", "lower"))


def parities() -> Pairs:
    """Whether a number is even or odd."""
    templates = (
        "Is {n} even or odd?",
        "Is {n} odd or even?",
        "Is the number {n} even or odd?",
    )
    for n in range(100):
        yield from phrase(templates, f"{n} is {'odd' if n % 2 else 'even'}.", n=n)


def _counting(templates: tuple[str, ...], step: int) -> Pairs:
    # At most ten numbers: the last digit alone then says where to stop, which a small model learns in minutes and not hours.
    for low in range(99):
        for high in range(low + 1, min(low + 9, 99) + 1):
            numbers = range(low, high + 1)[::step]
            answer = ", ".join(map(str, numbers)) + "."
            yield from phrase(templates, answer, a=numbers[0], b=numbers[-1])


def counts_up() -> Pairs:
    """Counts of 2 to 10 numbers, each one more than the last."""
    return _counting(
        (
            "Count from {a} to {b}.",
            "Count up from {a} to {b}.",
            "List the numbers from {a} to {b}.",
        ),
        1,
    )


def counts_down() -> Pairs:
    """Counts of 2 to 10 numbers, each one less than the last."""
    return _counting(("Count down from {a} to {b}.", "Count backwards from {a} to {b}."), -1)
