"""One answer under several phrasings of its question."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

Pairs = Iterator[tuple[str, str]]
"""Questions as the user asks them, each with its answer."""


def phrase(templates: Iterable[str], answer: str, **fields: object) -> Pairs:
    """The same answer for each template, which `fields` fill."""
    for template in templates:
        yield template.format(**fields), answer
