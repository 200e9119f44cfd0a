"""Keeps outputs to the form they were asked to have, with llguidance: which tokens may come next, token by token.

A form is compiled once per engine and copied for every request that asks for it. A copy's state follows from the
request's output tokens alone, so neither the batch nor a preemption matters to it.
"""

from __future__ import annotations

import json
import textwrap
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

from multibatch.errors import RequestError, StepError
from multibatch.structured_outputs import StructuredOutputsParams
from multibatch.tokenizer import Tokenizer

_MAX_COMPILED: Final = 256
"""Forms that are kept; of more, those not asked for the longest are compiled again."""


_MAX_REASON: Final = 300
"""Characters of llguidance's own words in an error."""
_NAMED_SCHEMAS: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords of a JSON schema whose value has a schema under each name."""
_NO_SCHEMAS: Final = ("const", "enum", "default", "examples")
"""Keywords whose value is data, whatever it looks like."""


class Grammars:
    """Compiles forms for one tokenizer and one model."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Reads the tokenizer's vocabulary, which takes a moment.

        Args:
            tokenizer: of the artifact.
            vocab_size: entries of the model's logits.
            eos_token_ids: tokens that end an output; without any, an output that can only end is ended by the engine.

        Raises:
            RequestError: llguidance is not installed, or does not know this kind of tokenizer.
        """
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise RequestError(
                "structured_outputs need llguidance, which is not installed; run pip install 'multibatch[structured]',"
                " or leave them out"
            ) from error
        self._llguidance: Any = llguidance
        self._vocab_size = vocab_size
        self._has_end = bool(eos_token_ids)
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(
                tokenizer.hf, n_vocab=max(vocab_size, len(tokenizer.hf)), eos_token=list(eos_token_ids) or None
            )
        except ValueError as error:
            raise RequestError(
                f"structured_outputs do not work with this artifact's tokenizer: {error}; leave them out"
            ) from error
        self._compiled: OrderedDict[StructuredOutputsParams, Any] = OrderedDict()

    def matcher(self, params: StructuredOutputsParams, request_id: str) -> Matcher:
        """A matcher at the start of an output; `request_id` is named in errors.

        Raises:
            RequestError: the schema, expression or grammar does not compile.
        """
        compiled = self._compiled.get(params)
        if compiled is None:
            compiled = self._compiled[params] = self._compile(params)
            if len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(params)
        removed = () if self._has_end else tuple(self._tokenizer.eos_tokens)
        return Matcher(compiled.deep_copy(), self._vocab_size, removed, request_id)

    def _compile(self, params: StructuredOutputsParams) -> Any:
        try:
            grammar = _grammar_text(self._llguidance, params)
        except ValueError as error:
            raise _does_not_compile(params, str(error)) from error
        matcher = self._llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _does_not_compile(params, matcher.get_error())
        matcher.compute_bitmask()
        if matcher.is_error():
            raise _does_not_compile(params, f"no text has this form ({_first_line(matcher.get_error())})")
        return matcher


class Matcher:
    """Where one output is in its form."""

    def __init__(self, matcher: Any, vocab_size: int, removed_ids: Sequence[int], request_id: str) -> None:
        """Starts before the first token; `removed_ids` are never allowed."""
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._removed_ids = list(removed_ids)
        self._request_id = request_id
        self._allowed: torch.Tensor | None = None

    def allowed(self) -> torch.Tensor:
        """bool[V]: the tokens that may come next; not to be changed.

        Raises:
            StepError: the form is too complex to go on.
        """
        if self._allowed is None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            self._check()
            flags = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
            flags[[t for t in self._removed_ids if t < self._vocab_size]] = 0
            self._allowed = torch.from_numpy(flags).to(torch.bool)
        return self._allowed

    def advance(self, token_id: int) -> None:
        """Takes in the token that was drawn, unless it ended the output.

        Raises:
            StepError: it is not in the form, or the form is too complex to go on.
        """
        self._allowed = None
        self._matcher.consume_token(token_id)
        self._check()

    def is_exhausted(self) -> bool:
        """Whether no token may come next: only where nothing stands for the end."""
        return bool(self._removed_ids) and not bool(self.allowed().any())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise StepError(
                f"request {self._request_id!r}: its output cannot be kept to structured_outputs any longer:"
                f" {_first_line(self._matcher.get_error())}; simplify the schema or grammar",
                [self._request_id],
            )


def _grammar_text(llguidance: Any, params: StructuredOutputsParams) -> str:
    """A form in llguidance's own notation."""
    if params.json is not None or params.json_object:
        schema: Any = {"type": "object"} if params.json is None else json.loads(str(params.json))
        if params.disable_additional_properties:
            schema = _closed(schema)
        options: dict[str, Any] = {"whitespace_flexible": not params.disable_any_whitespace}
        if params.whitespace_pattern is not None:
            options["whitespace_pattern"] = params.whitespace_pattern
        text = json.dumps(schema, ensure_ascii=False)
        return str(llguidance.LLMatcher.grammar_from_json_schema(text, overrides=options))
    if params.regex is not None:
        return str(llguidance.grammar_from("regex", params.regex))
    if params.choice is not None:
        return str(llguidance.grammar_from("choice", json.dumps(params.choice)))
    return str(llguidance.grammar_from("grammar", params.grammar))


def _closed(schema: Any) -> Any:
    """The schema with `additionalProperties` false in every object that lists properties and does not say."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED_SCHEMAS and isinstance(value, dict):
            closed[key] = {name: _closed(named) for name, named in value.items()}
        else:
            closed[key] = value if key in _NO_SCHEMAS else _closed(value)
    if "properties" in closed and not {"additionalProperties", "patternProperties"} & set(closed):
        closed["additionalProperties"] = False
    return closed


def _does_not_compile(params: StructuredOutputsParams, why: str) -> RequestError:
    name = next(n for n in ("json", "regex", "choice", "grammar", "json_object") if getattr(params, n) is not None)
    return RequestError(
        f"structured_outputs: {name} does not compile: {_in_one_line(why)}; correct it, or leave it out"
    )


def _in_one_line(text: str) -> str:
    return textwrap.shorten(text, _MAX_REASON, placeholder=" …")


def _first_line(text: str) -> str:
    # What follows is llguidance's inner state.
    return text.partition("\n")[0]
