"""Builds artifacts: a Hugging Face causal LM becomes a folder of decoders, one per batch size."""

from .build import add_size, cache_name, compile_model, prune
from .canary import verify_artifact

__all__ = ["add_size", "cache_name", "compile_model", "prune", "verify_artifact"]
