"""Strict JSON: text into dataclasses, where whatever the annotations do not allow is an error that names its place.

Knows nothing of what the fields mean: their rules are in `manifest.py`, whose dataclasses check themselves when made.
"""

from __future__ import annotations

import functools
import json
import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from multibatch.errors import ArtifactError

# How messages call the outermost object, which has no key.
_WHOLE: Final = "the manifest"


def parse(text: str) -> Any:
    """What `json.loads` gives, but no object may hold a key twice.

    Raises:
        ArtifactError: a key comes twice.
        ValueError: not JSON, or a number with too many digits.
        RecursionError: nested too deep.
    """
    return json.loads(text, object_pairs_hook=_object)


def decode(kind: Any, value: Any, where: str = "") -> Any:
    """Build `kind` from parsed JSON; no value is converted but an int where a float stands.

    Args:
        kind: a dataclass, or what an annotation of its fields may be: int, float, str, bool, a tuple of any length,
            a mapping from str, a union, a Literal of strings.
        value: of `parse`.
        where: dotted path to the value, for messages; "" for the outermost object.

    Raises:
        ArtifactError: a key unknown or missing, a value of the wrong type, or what the dataclasses themselves refuse.
        OverflowError: an int too large for the float it stands for.
    """
    origin = get_origin(kind)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        return _decode_object(kind, value, where)
    if origin is tuple and isinstance(value, list):
        item = get_args(kind)[0]
        return tuple(decode(item, x, f"{where}[{i}]") for i, x in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        item = get_args(kind)[1]
        return {key: decode(item, x, f"{where}.{key}") for key, x in value.items()}
    if origin in (Union, types.UnionType):
        return _decode_union(get_args(kind), value, where)
    if origin is Literal and isinstance(value, str) and value in get_args(kind):
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind in (int, float, str, bool) and type(value) is kind and _is_finite(value):
        return value
    raise _wrong_type(where, value, kind)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise _wrong("keys of one object", twice, "each once")
    return dict(pairs)


@functools.cache
def _field_kinds(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _decode_object(kind: type, value: dict[str, Any], where: str) -> Any:
    kinds = _field_kinds(kind)
    names = [x.name for x in fields(kind)]
    place = where or _WHOLE
    if unknown := [key for key in value if key not in kinds]:
        raise _wrong(f"unknown key in {place}", unknown, f"only {', '.join(names)}")
    if missing := [name for name in names if name not in value]:
        raise _wrong(f"missing key in {place}", list(value), f"also {', '.join(missing)}")
    prefix = where and where + "."
    decoded = {name: decode(kinds[name], value[name], prefix + name) for name in names}
    try:
        return kind(**decoded)
    except ArtifactError as error:
        raise ArtifactError(f"{where}: {error}" if where else str(error)) from error


def _decode_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not types.NoneType]
    if len(others) == 1:
        return decode(others[0], value, where)
    if type(value) in others and _is_finite(value):
        return value
    raise _wrong_type(where, value, kinds)


def _is_finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _wrong(what: str, got: object, allowed: str) -> ArtifactError:
    return ArtifactError(f"{what}: got {got!r}, expected {allowed}")


def _wrong_type(where: str, value: object, kind: Any) -> ArtifactError:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    names = [x.__name__ if isinstance(x, type) else str(x) for x in kinds]
    got = f"{value!r:.80} ({type(value).__name__})"
    return ArtifactError(f"{where or _WHOLE}: got {got}, expected {' or '.join(names)}")
