"""The forms in which a caller may give a prompt, and what they are as token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from multibatch.errors import RequestError

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}; a dict may have a "cache_salt"."""

_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the engine takes it."""

    text: str | None
    """None where the caller gave ids."""
    token_ids: list[int]
    cache_salt: str | None = None
    """See `multibatch.request.Request`."""


def is_text(prompt: Any) -> bool:
    """Whether `encode_prompt` will need the tokenizer."""
    return isinstance(prompt, str) or (isinstance(prompt, Mapping) and "prompt_token_ids" not in prompt)


def encode_prompt(prompt: Any, encode: Callable[[str], list[int]]) -> EncodedPrompt:
    """Checks a prompt of any form; `encode` turns text into ids.

    Raises:
        RequestError: it has another form, or no tokens.
    """
    salt = None
    if isinstance(prompt, Mapping):
        if not set(prompt) <= set(_KEYS) or not set(prompt) & set(_KEYS[:2]):
            raise RequestError(
                f"a prompt with the keys {', '.join(map(str, prompt))}; allowed: {', '.join(_KEYS)}, one of the first two"
            )
        salt = prompt.get("cache_salt")
        if salt is not None and (not isinstance(salt, str) or not salt):
            raise RequestError(f"cache_salt is {salt!r}; allowed: a string that is not empty, or None")
        if "prompt_token_ids" in prompt:
            return EncodedPrompt(prompt.get("prompt"), _token_ids(prompt["prompt_token_ids"]), salt)
        prompt = prompt["prompt"]
    if isinstance(prompt, str):
        ids = encode(prompt)
        if not ids:
            raise RequestError("a prompt of 0 tokens; allowed: 1 or more")
        return EncodedPrompt(prompt, ids, salt)
    return EncodedPrompt(None, _token_ids(prompt), salt)


def listed_prompts(prompts: Any) -> list[Any]:
    """One prompt as a list of one, several as they are."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    given = list(prompts)
    if given and all(isinstance(x, int) and not isinstance(x, bool) for x in given):
        return [given]
    return given


def _token_ids(value: Any) -> list[int]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise RequestError(
            f"a prompt of type {type(value).__name__}; allowed: str, list of token ids, or a dict of them"
        )
    wrong = [x for x in value if isinstance(x, bool) or not isinstance(x, int)]
    if wrong:
        raise RequestError(f"token id {wrong[0]!r} in a prompt; allowed: ints")
    if not value:
        raise RequestError("a prompt of 0 tokens; allowed: 1 or more")
    return list(value)
