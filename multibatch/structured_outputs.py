"""What form an output may be asked to have: vLLM's `StructuredOutputsParams`, checked and in one form.

How the form is kept to while tokens are drawn is in `multibatch.grammar`.
"""

from __future__ import annotations

import json as json_
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from multibatch.checks import boolean, refusal
from multibatch.errors import ConfigError

_CONSTRAINTS: Final = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """One form for the whole output; equal ones are compiled once by an engine.

    Raises:
        ConfigError: not exactly one form is given, a value is of the wrong type, or an option does not go with the form.
    """

    json: str | Mapping[str, Any] | None = None
    """A JSON schema: text, or the dict it stands for. Reads as text."""
    regex: str | None = None
    """A regular expression that the whole output matches (Rust's `regex` syntax; no look-around, no back references)."""
    choice: Sequence[str] | None = None
    """Strings, one of which the output is. Reads as a tuple."""
    grammar: str | None = None
    """A context-free grammar: Lark's notation as llguidance reads it, or llama.cpp's GBNF."""
    json_object: bool | None = None
    """True: any JSON object."""
    disable_any_whitespace: bool = field(default=False, kw_only=True)
    """JSON without white space between its parts."""
    disable_additional_properties: bool = field(default=False, kw_only=True)
    """Objects of the schema have no properties but those that it lists, where it does not say itself."""
    whitespace_pattern: str | None = field(default=None, kw_only=True)
    """A regular expression for the white space between JSON's parts; None: any amount of it."""

    def __post_init__(self) -> None:
        given = [name for name in _CONSTRAINTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"structured_outputs has {' and '.join(given) or 'no form'}; allowed: exactly one of {', '.join(_CONSTRAINTS)}"
            )
        _check_value(given[0], getattr(self, given[0]))
        if given[0] == "json":
            object.__setattr__(self, "json", _schema_text(self.json))
        elif given[0] == "choice":
            object.__setattr__(self, "choice", tuple(self.choice or ()))
        boolean("disable_any_whitespace", self.disable_any_whitespace)
        boolean("disable_additional_properties", self.disable_additional_properties)
        if self.whitespace_pattern is not None and not isinstance(self.whitespace_pattern, str):
            raise refusal("whitespace_pattern", self.whitespace_pattern, "a regular expression, or None")
        _check_options(self, given[0])


def _check_value(name: str, value: object) -> None:
    if name in ("regex", "grammar") and not (isinstance(value, str) and value):
        raise refusal(name, value, "a string that is not empty")
    if name == "json_object" and value is not True:
        raise refusal(name, value, "True or None")
    if name == "choice" and not (
        isinstance(value, (list, tuple)) and value and all(isinstance(s, str) and s for s in value)
    ):
        raise refusal(name, value, "a list of strings, at least one and none of them empty")


def _check_options(params: StructuredOutputsParams, form: str) -> None:
    options = {
        "disable_any_whitespace": (params.disable_any_whitespace, ("json", "json_object")),
        "whitespace_pattern": (params.whitespace_pattern, ("json", "json_object")),
        "disable_additional_properties": (params.disable_additional_properties, ("json",)),
    }
    for name, (value, forms) in options.items():
        if value and form not in forms:
            raise refusal(name, value, f"nothing with {form}", f"It goes with {' and '.join(forms)}; leave it out.")
    if params.disable_any_whitespace and params.whitespace_pattern is not None:
        raise refusal("whitespace_pattern", params.whitespace_pattern, "None with disable_any_whitespace=True")


def _schema_text(value: object) -> str:
    """A schema as JSON text, keys in the order they came: it is the order of the properties in the output."""
    allowed = "a JSON schema: a dict, or its JSON text"
    try:
        schema = json_.loads(value) if isinstance(value, str) else value
        if not isinstance(schema, Mapping):
            raise refusal("json", value, allowed)
        return json_.dumps(dict(schema), ensure_ascii=False)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise refusal("json", value, allowed, f"It is no JSON: {error}.") from error
