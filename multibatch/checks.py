"""Checks of what a caller gave for an option: the value in its final type, or an error that says what is allowed."""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from collections.abc import Callable, Mapping

from multibatch.errors import ConfigError


def refusal(name: str, got: object, allowed: str, advice: str = "") -> ConfigError:
    """The error for a value that is not allowed."""
    return ConfigError(f"{name} is {reprlib.repr(got)}; allowed: {allowed}. {advice}".rstrip())


def boolean(name: str, value: object) -> bool:
    """True or False and nothing that counts as them."""
    if isinstance(value, bool):
        return value
    raise refusal(name, value, "True or False")


def index(value: object) -> int | None:
    """Returns an integer of any library as an int; None for anything else, bool included."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def integer(name: str, value: object, lowest: int, highest: int | None, *, optional: bool) -> int | None:
    """An int in a range, or None where it is `optional`."""
    if value is None and optional:
        return None
    allowed = f"an integer from {lowest}" + (f" to {highest}" if highest is not None else "")
    number_ = index(value)
    if number_ is None or number_ < lowest or (highest is not None and number_ > highest):
        raise refusal(name, value, allowed + (", or None" if optional else ""))
    return number_


def number(name: str, value: object, is_allowed: Callable[[float], bool], allowed: str) -> float:
    """A real number of any library as a float, if `is_allowed`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise refusal(name, value, allowed)
    number_ = float(value)
    if not is_allowed(number_):
        raise refusal(name, value, allowed)
    return number_


def token_ids(name: str, value: object) -> list[int]:
    """Token ids without duplicates; None is none."""
    given = [] if value is None else value
    ids = [index(v) for v in given] if isinstance(given, (list, tuple)) else [None]
    if any(i is None or i < 0 for i in ids):
        raise refusal(name, value, "a list of token ids, each 0 or more")
    return list(dict.fromkeys(i for i in ids if i is not None))


def biases(name: str, value: object, limit: float) -> dict[int, float] | None:
    """A number per token id, cut off at `limit` either side; ids may be decimal strings, as in JSON. Empty is None."""
    allowed = "a dict of token ids, each 0 or more, and numbers; or None"
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise refusal(name, value, allowed)
    found: dict[int, float] = {}
    for key, bias in value.items():
        token_id = int(key) if isinstance(key, str) and key.isdecimal() else index(key)
        if token_id is None or token_id < 0 or isinstance(bias, bool) or not isinstance(bias, numbers.Real):
            raise refusal(name, value, allowed)
        if math.isnan(bias):
            raise refusal(name, value, allowed, f"The bias of token {token_id} is not a number.")
        found[token_id] = max(-limit, min(limit, float(bias)))
    return found or None
