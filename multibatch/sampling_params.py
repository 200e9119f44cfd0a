"""Owns what a caller may ask of one generation: `SamplingParams`, with the names, order and defaults of vLLM 0.33.

Everything is checked and normalised when the object is made; what multibatch has not built is refused by name.
How tokens are drawn is in `multibatch.sampler`.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import reprlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from multibatch import checks
from multibatch.checks import refusal
from multibatch.errors import ConfigError
from multibatch.structured_outputs import StructuredOutputsParams

_MAX_SEQUENCES: Final = 16384
_MAX_BIAS: Final = 100.0
_GREEDY_BELOW: Final = 1e-5
_LOWEST_TEMPERATURE: Final = 0.01


class RequestOutputKind(enum.Enum):
    """What each output of a request that still runs contains."""

    CUMULATIVE = 0
    """The whole text so far, every time."""
    DELTA = 1
    """Only what is new since the last output."""
    FINAL_ONLY = 2
    """Nothing until the request ends."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled and when it stops.

    Compatible with `vllm.SamplingParams` 0.33, except that it is frozen and its later fields are keyword-only.

    Raises:
        ConfigError: a value is of the wrong type, out of range, contradicts another, or asks for something
            that is not built yet.
    """

    n: int = 1
    """How many completions of the prompt to return."""
    presence_penalty: float = 0.0
    """Subtracted once from every token in the output so far; in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted from a token for every time it is in the output so far; in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides (or multiplies, below zero) logits of tokens in the prompt or the output; above 0."""
    temperature: float = 1.0
    """In [0, 2]; 0 is greedy, which resets top_p, top_k and min_p."""
    watermarking: object = None
    """Not built."""
    top_p: float = 1.0
    """Keeps the most likely tokens that together reach this probability; in (0, 1], 1 keeps all."""
    top_k: int = 0
    """Keeps this many of the most likely tokens, and any equal to the last; 0 (or -1) keeps all."""
    min_p: float = 0.0
    """Keeps tokens at least this likely relative to the likeliest; in [0, 1], 0 keeps all."""
    seed: int | None = None
    """The request's own random stream; None (or -1) lets the engine choose."""
    stop: Sequence[str] = ()
    """Strings that end the output. One string or several; None is none. Reads as a list."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the output. None is none. Reads as a list without duplicates."""
    ignore_eos: bool = False
    """Goes on after the end-of-sequence token."""
    max_tokens: int | None = 16
    """Tokens to generate at most; None is as many as fit in the model's longest sequence."""
    min_tokens: int = 0
    """Tokens before which neither end-of-sequence nor stop_token_ids may be drawn."""
    logprobs: int | None = None
    """Likeliest tokens to report per position, besides the drawn one; -1 is the whole vocabulary."""
    prompt_logprobs: int | None = None
    """Likeliest tokens to report per position of the prompt, besides its own token; -1 is the whole vocabulary."""
    prompt_logprob_token_ids: Sequence[int] | None = None
    """Not built."""
    prompt_logprob_start: int | None = None
    """Not built."""
    logprob_token_ids: Sequence[int] | None = None
    """Not built."""
    flat_logprobs: bool = False
    """Only False is built."""
    detokenize: bool = True
    """Turns the tokens into text; needed by stop strings."""
    skip_special_tokens: bool = True
    """Leaves special tokens out of the text."""
    spaces_between_special_tokens: bool = True
    """Only True is built."""
    include_stop_str_in_output: bool = False
    """Leaves the stop string that matched at the end of the text."""
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    """What the outputs of a running request contain."""
    stream_interval: int | None = None
    """Not built."""
    skip_clone: bool = False
    """Lets `clone` return the object itself, which is frozen apart from its two lists."""
    # vLLM has internal fields at this place, so positions further on would not mean the same.
    structured_outputs: StructuredOutputsParams | None = field(default=None, kw_only=True)
    """The form that the whole output has to have: a JSON schema, a regular expression, a choice or a grammar."""
    logit_bias: Mapping[int, float] | None = field(default=None, kw_only=True)
    """Added to these tokens' logits, cut off at -100 and 100; empty is none."""
    allowed_token_ids: Sequence[int] | None = field(default=None, kw_only=True)
    """The only tokens that may be drawn, end-of-sequence included if it may be; None is all. Reads as a list."""
    extra_args: Mapping[str, Any] | None = field(default=None, kw_only=True)
    """Not built; empty is none."""
    bad_words: Sequence[str] | None = field(default=None, kw_only=True)
    """Words whose tokens, with or without a space before, are never completed in the output; empty is none.

    The same letters may still come about from other tokens, as in vLLM. Reads as a list.
    """
    skip_reading_prefix_cache: bool | None = field(default=None, kw_only=True)
    """Computes the whole prompt even where the pool has a part of it; None is False, with prompt_logprobs True."""
    thinking_token_budget: int | None = field(default=None, kw_only=True)
    """Not built."""
    repetition_detection: object = field(default=None, kw_only=True)
    """Not built."""
    routed_experts_prompt_start: int = field(default=0, kw_only=True)
    """Not built."""
    trace_decode_token_ids: Sequence[int] | None = field(default=None, kw_only=True)
    """Not built."""

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in _checked(values).items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_optional(cls, **options: Any) -> Self:
        """Makes parameters from a request's optional fields: None stands for the default.

        The exception is max_tokens, where None means without a limit, as in vLLM.
        """
        given = {k: v for k, v in options.items() if v is not None or k == "max_tokens"}
        return cls(**given)

    def clone(self) -> Self:
        """Returns a copy that shares no list with this one, or itself if `skip_clone` is set."""
        return self if self.skip_clone else dataclasses.replace(self)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken instead of drawing one."""
        return self.temperature < _GREEDY_BELOW

    @property
    def needs_history(self) -> bool:
        """Whether drawing a token needs to know the tokens before it, that is, any penalty is active."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


_WAIT: Final = "Leave it out, or run this request on an engine that has it."
_NOT_BUILT: Final[Mapping[str, tuple[object, str]]] = {
    "watermarking": (None, _WAIT),
    "prompt_logprob_token_ids": (None, "Use `prompt_logprobs`, -1 being the whole vocabulary."),
    "prompt_logprob_start": (None, "Use `prompt_logprobs`, which covers the whole prompt."),
    "logprob_token_ids": (None, "Use `logprobs`, -1 being the whole vocabulary."),
    "flat_logprobs": (False, "Leave it out and read `logprobs` as a list of dicts."),
    "spaces_between_special_tokens": (True, "Leave it out, or join the tokens yourself."),
    "stream_interval": (None, "Leave it out and gather the outputs yourself."),
    "extra_args": (None, "Leave it out; there are no plug-ins that would read it."),
    "thinking_token_budget": (None, "Leave it out; `max_tokens` bounds the whole output."),
    "repetition_detection": (None, "Leave it out; `max_tokens` bounds the whole output."),
    "routed_experts_prompt_start": (0, "Leave it out; routed experts are not returned."),
    "trace_decode_token_ids": (None, _WAIT),
}
_EMPTY_IS_NONE: Final = ("extra_args",)
_BOOLS: Final = ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output", "skip_clone")
_INTS: Final[Mapping[str, tuple[int, int | None, bool]]] = {  # lowest, highest, may be None
    "n": (1, _MAX_SEQUENCES, False),
    "top_k": (-1, None, False),
    "seed": (-(2**63), 2**64 - 1, True),
    "max_tokens": (1, None, True),
    "min_tokens": (0, None, False),
    "logprobs": (-1, None, True),
    "prompt_logprobs": (-1, None, True),
}
_FLOATS: Final[Mapping[str, tuple[Callable[[float], bool], str]]] = {
    "presence_penalty": (lambda x: -2.0 <= x <= 2.0, "a number in [-2, 2]"),
    "frequency_penalty": (lambda x: -2.0 <= x <= 2.0, "a number in [-2, 2]"),
    "repetition_penalty": (lambda x: 0.0 < x < math.inf, "a finite number above 0"),
    "temperature": (lambda x: 0.0 <= x <= 2.0, "a number in [0, 2]"),
    "top_p": (lambda x: 0.0 < x <= 1.0, "a number in (0, 1]"),
    "min_p": (lambda x: 0.0 <= x <= 1.0, "a number in [0, 1]"),
}


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """Returns what `values` mean, every field with its final type and value."""
    for name, (default, advice) in _NOT_BUILT.items():
        values[name] = _refuse_unless_default(name, values[name], default, advice)
    for name, (lowest, highest, optional) in _INTS.items():
        if name in ("logprobs", "prompt_logprobs") and values[name] is True:
            values[name] = 1
        values[name] = checks.integer(name, values[name], lowest, highest, optional=optional)
    for name, (is_allowed, allowed) in _FLOATS.items():
        values[name] = checks.number(name, values[name], is_allowed, allowed)
    for name in _BOOLS:
        checks.boolean(name, values[name])
    if not isinstance(values["skip_reading_prefix_cache"], bool | None):
        raise refusal("skip_reading_prefix_cache", values["skip_reading_prefix_cache"], "True, False or None")
    if not isinstance(values["output_kind"], RequestOutputKind):
        raise refusal("output_kind", values["output_kind"], "a RequestOutputKind")
    if not isinstance(values["structured_outputs"], StructuredOutputsParams | None):
        raise refusal("structured_outputs", values["structured_outputs"], "a StructuredOutputsParams, or None")
    values["stop"] = _stop_strings(values["stop"])
    values["stop_token_ids"] = checks.token_ids("stop_token_ids", values["stop_token_ids"])
    values["logit_bias"] = checks.biases("logit_bias", values["logit_bias"], _MAX_BIAS)
    values["allowed_token_ids"] = _allowed_token_ids(values["allowed_token_ids"])
    values["bad_words"] = _bad_words(values["bad_words"])
    values["seed"] = None if values["seed"] == -1 else values["seed"]
    values["top_k"] = max(values["top_k"], 0)
    _normalise_temperature(values)
    _check_together(values)
    if values["prompt_logprobs"] is not None:
        values["skip_reading_prefix_cache"] = True
    return values


def _normalise_temperature(values: dict[str, Any]) -> None:
    temperature = values["temperature"]
    if 0.0 < temperature < _LOWEST_TEMPERATURE:
        warnings.warn(
            f"temperature {temperature} is raised to {_LOWEST_TEMPERATURE}, the lowest that is sampled;"
            " use 0 for greedy",
            stacklevel=5,
        )
        values["temperature"] = _LOWEST_TEMPERATURE
    elif temperature < _GREEDY_BELOW:
        values.update(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)


def _check_together(values: dict[str, Any]) -> None:
    max_tokens, min_tokens = values["max_tokens"], values["min_tokens"]
    if max_tokens is not None and min_tokens > max_tokens:
        raise refusal("min_tokens", min_tokens, f"at most max_tokens, which is {max_tokens}")
    if values["temperature"] == 0.0 and values["n"] > 1:
        allowed = "1 with temperature 0, as greedy completions would all be the same"
        raise refusal("n", values["n"], allowed, "Raise the temperature, or ask for one.")
    if values["stop"] and not values["detokenize"]:
        allowed = "none with detokenize=False, as strings are found in the text"
        raise refusal("stop", values["stop"], allowed, "Use stop_token_ids, or detokenize=True.")
    if values["prompt_logprobs"] is not None and values["skip_reading_prefix_cache"] is False:
        allowed = "True or None with prompt_logprobs, as what is read from the pool gives no logits"
        raise refusal("skip_reading_prefix_cache", False, allowed)
    if values["structured_outputs"] is not None:
        for name, default in (("ignore_eos", False), ("min_tokens", 0)):
            if values[name] != default:
                allowed = f"{default} with structured_outputs, as a form that is complete leaves only the end"
                raise refusal(name, values[name], allowed)


def _refuse_unless_default(name: str, value: object, default: object, advice: str) -> object:
    if value is default or (type(value) is type(default) and value == default):
        return default
    if name in _EMPTY_IS_NONE and isinstance(value, (dict, list, tuple)) and not value:
        return default
    got = reprlib.repr(value)
    raise ConfigError(f"{name} is {got}, which is not built yet; allowed: {default!r}. {advice}")


def _stop_strings(value: object) -> list[str]:
    given = [] if value is None else [value] if isinstance(value, str) else value
    if isinstance(given, (list, tuple)) and all(isinstance(s, str) and s for s in given):
        return list(given)
    raise refusal("stop", value, "a string or a list of strings, none of them empty")


def _allowed_token_ids(value: object) -> list[int] | None:
    if value is None:
        return None
    if isinstance(value, (list, tuple)) and not value:
        raise refusal("allowed_token_ids", value, "at least one token id, or None for all")
    return checks.token_ids("allowed_token_ids", value)


def _bad_words(value: object) -> list[str] | None:
    given = [] if value is None else value
    if isinstance(given, (list, tuple)) and all(isinstance(s, str) and s.strip() for s in given):
        return list(given) or None
    raise refusal("bad_words", value, "a list of strings, each with more than white space; or None")
