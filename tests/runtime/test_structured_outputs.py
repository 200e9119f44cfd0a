"""Forms of an output: what may be asked, and that every walk through allowed tokens keeps to it."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from multibatch.errors import ConfigError, RequestError, StepError
from multibatch.grammar import Grammars
from multibatch.structured_outputs import StructuredOutputsParams
from multibatch.tokenizer import Tokenizer

EOS = 2
VOCAB_SIZE = 768
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "day": {"enum": ["Monday", "Sunday"]},
        "properties": {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}},
    },
    "required": ["day", "properties"],
}


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer(demo_model)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCAB_SIZE, [EOS])


def walk(grammars: Grammars, tokenizer: Tokenizer, seed: int, **form: Any) -> str | None:
    """The text of allowed tokens drawn at random until the end; None where that did not come."""
    rng = random.Random(seed)
    matcher = grammars.matcher(StructuredOutputsParams(**form), "r")
    tokens: list[int] = []
    for _ in range(200):
        allowed = matcher.allowed().nonzero().flatten().tolist()
        if EOS in allowed:
            allowed = [EOS]
        token = rng.choice(allowed)
        if token == EOS:
            return tokenizer.decode(tokens, skip_special_tokens=False)
        tokens.append(token)
        matcher.advance(token)
    return None


def test_exactly_one_form_is_given() -> None:
    with pytest.raises(ConfigError, match=r"structured_outputs has no form; allowed: exactly one of json, regex"):
        StructuredOutputsParams()
    with pytest.raises(ConfigError, match="structured_outputs has regex and choice; allowed: exactly one"):
        StructuredOutputsParams(regex="a", choice=["b"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("json", v) for v in ("{", "3", "[]", "true", True, 3, ["a"], {"a": object()}, {"a": float})],
        *[("regex", v) for v in ("", 3, ["a"])],
        *[("grammar", v) for v in ("", 3)],
        *[("choice", v) for v in ([], "ab", [""], [1], {"a"})],
        *[("json_object", v) for v in (False, 1, "yes")],
    ],
)
def test_a_form_of_another_type_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is .*; allowed: "):
        StructuredOutputsParams(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"json": {}, "disable_any_whitespace": 1}, "disable_any_whitespace"),
        ({"json": {}, "disable_additional_properties": None}, "disable_additional_properties"),
        ({"json": {}, "whitespace_pattern": 5}, "whitespace_pattern"),
        ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "whitespace_pattern"),
        ({"regex": "a", "disable_any_whitespace": True}, "disable_any_whitespace"),
        ({"choice": ["a"], "whitespace_pattern": " "}, "whitespace_pattern"),
        ({"json_object": True, "disable_additional_properties": True}, "disable_additional_properties"),
    ],
)
def test_options_that_do_not_go_with_the_form_are_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is .*; allowed: "):
        StructuredOutputsParams(**options)


def test_equal_forms_are_equal_and_can_be_keys() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    params = StructuredOutputsParams(json=schema)
    assert params.json == '{"type": "object", "properties": {"b": {}, "a": {}}}'
    schema["type"] = "array"  # what the caller does later changes nothing
    assert params == StructuredOutputsParams(json='{"type":"object","properties":{"b":{},"a":{}}}')
    assert len({params, StructuredOutputsParams(choice=["a"]), StructuredOutputsParams(choice=("a",))}) == 2
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == dataclasses.replace(params) == params


@pytest.mark.parametrize("seed", range(5))
def test_json_is_of_the_schema(grammars: Grammars, tokenizer: Tokenizer, seed: int) -> None:
    text = walk(grammars, tokenizer, seed, json=SCHEMA, disable_any_whitespace=True, disable_additional_properties=True)
    assert text is not None
    found = json.loads(text)
    assert " " not in text
    assert list(found) == ["day", "properties"]  # a property of that name is not taken for the keyword
    assert found["day"] in ("Monday", "Sunday")
    assert set(found["properties"]) <= {"n"}
    assert 0 <= found["properties"].get("n", 0) <= 99


def test_white_space_is_as_asked(grammars: Grammars, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"], "additionalProperties": False}
    texts = {walk(grammars, tokenizer, seed, json=schema, whitespace_pattern=" ") for seed in range(8)}
    assert texts == {'{ "a" : null }'} or {text.replace(" ", "") for text in texts if text} == {'{"a":null}'}
    assert walk(grammars, tokenizer, 0, json=schema, disable_any_whitespace=True) == '{"a":null}'


def test_any_object(grammars: Grammars, tokenizer: Tokenizer) -> None:
    texts = [walk(grammars, tokenizer, seed, json_object=True, disable_any_whitespace=True) for seed in range(12)]
    found = [json.loads(text) for text in texts if text is not None]
    assert found
    assert {type(value) for value in found} == {dict}


@pytest.mark.parametrize("pattern", [r"[a-c]{3,6}-\d\d", "(Mon|Sun)day", r"[^a-z\n]{2}", "ü+é"])
def test_a_regular_expression_matches_the_whole_output(grammars: Grammars, tokenizer: Tokenizer, pattern: str) -> None:
    for seed in range(5):
        text = walk(grammars, tokenizer, seed, regex=pattern)
        assert text is not None
        assert re.fullmatch(pattern, text)


def test_a_choice_is_one_of_its_strings(grammars: Grammars, tokenizer: Tokenizer) -> None:
    choices = ["Monday", "Mon", 'a "quoted" \\ line\n', "größer", "/x/"]
    found = {walk(grammars, tokenizer, seed, choice=choices) for seed in range(40)}
    assert found == set(choices)


@pytest.mark.parametrize(
    "grammar", ['start: "yes" | NUMBER\nNUMBER: /[0-9]{1,3}/', 'root ::= "yes" | digit\ndigit ::= [0-9]']
)
def test_a_grammar_in_either_notation(grammars: Grammars, tokenizer: Tokenizer, grammar: str) -> None:
    found = {walk(grammars, tokenizer, seed, grammar=grammar) for seed in range(30)}
    assert "yes" in found
    assert all(text is not None and (text == "yes" or text.isdecimal()) for text in found)
    assert len(found) > 2


@pytest.mark.parametrize(
    "form",
    [
        {"json": {"type": "strin"}},
        {"json": {"$ref": "#/nowhere"}},
        {"json": {"type": "object"}, "whitespace_pattern": "("},
        {"json": {"type": "array", "uniqueItems": True}},
        {"regex": "(a"},
        {"regex": r"[^\s\S]"},
        {"regex": r"(a)\1"},
        {"grammar": "start: nothing"},
        {"grammar": "%%%"},
    ],
)
def test_what_does_not_compile_is_refused_by_name(grammars: Grammars, form: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=rf"^structured_outputs: {next(iter(form))} does not compile: .+; correct"):
        grammars.matcher(StructuredOutputsParams(**form), "r")


def test_a_form_is_compiled_once_and_its_matchers_share_no_state(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = StructuredOutputsParams(regex="x[0-9]y")
    first = grammars.matcher(form, "a")
    monkeypatch.setattr(grammars, "_compile", lambda params: pytest.fail("compiled again"))
    second = grammars.matcher(StructuredOutputsParams(regex="x[0-9]y"), "b")
    before = second.allowed().tolist()
    first.advance(int(first.allowed().nonzero()[0]))
    assert second.allowed().tolist() == before
    assert first.allowed().tolist() != before


def test_a_token_outside_the_form_is_an_error_of_its_request(grammars: Grammars) -> None:
    matcher = grammars.matcher(StructuredOutputsParams(choice=["yes"]), "mine")
    with pytest.raises(StepError, match="request 'mine'") as caught:
        matcher.advance(30)
    assert caught.value.request_ids == ("mine",)
    with pytest.raises(StepError, match="request 'mine'"):
        matcher.allowed()


def test_without_an_end_token_a_complete_output_allows_nothing(tokenizer: Tokenizer) -> None:
    matcher = Grammars(tokenizer, VOCAB_SIZE, ()).matcher(StructuredOutputsParams(choice=["yes"]), "r")
    for token in tokenizer.encode_bare("yes"):
        assert not matcher.is_exhausted()
        assert bool(matcher.allowed()[token])
        matcher.advance(token)
    assert matcher.is_exhausted()


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE + 37, 300])
def test_logits_may_be_more_or_fewer_than_the_tokenizers_tokens(tokenizer: Tokenizer, vocab_size: int) -> None:
    matcher = Grammars(tokenizer, vocab_size, [EOS]).matcher(StructuredOutputsParams(regex="[a-z]{1,4}"), "r")
    allowed = matcher.allowed()
    assert allowed.shape == (vocab_size,)
    assert not allowed[VOCAB_SIZE:].any()
    assert allowed.any()


def test_without_the_library_the_error_says_what_to_install(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install 'multibatch\[structured\]'"):
        Grammars(tokenizer, VOCAB_SIZE, [EOS])
