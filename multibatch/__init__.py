"""LLM decoding with programs compiled ahead, one per batch size. Importing it loads no torch; names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multibatch.async_engine import AsyncEngine
    from multibatch.beam_search import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
    from multibatch.errors import MultibatchError
    from multibatch.llm import LLM
    from multibatch.request import CompletionOutput, Logprob, RequestOutput
    from multibatch.sampling_params import RequestOutputKind, SamplingParams
    from multibatch.structured_outputs import StructuredOutputsParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "Logprob",
    "MultibatchError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]

_HOMES = {
    "LLM": "multibatch.llm",
    "AsyncEngine": "multibatch.async_engine",
    "BeamSearchOutput": "multibatch.beam_search",
    "BeamSearchParams": "multibatch.beam_search",
    "BeamSearchSequence": "multibatch.beam_search",
    "CompletionOutput": "multibatch.request",
    "Logprob": "multibatch.request",
    "MultibatchError": "multibatch.errors",
    "RequestOutput": "multibatch.request",
    "RequestOutputKind": "multibatch.sampling_params",
    "SamplingParams": "multibatch.sampling_params",
    "StructuredOutputsParams": "multibatch.structured_outputs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'multibatch' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
