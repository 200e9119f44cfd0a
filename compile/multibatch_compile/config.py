"""What a compile is asked for, checked before anything is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from multibatch.errors import ConfigError, UnsupportedModelError
from multibatch.hardware import usable_cores
from multibatch.ladder import DecoderLadder, resolve_ladder

Dtype = Literal["bfloat16", "float16", "float32"]
Backend = Literal["inductor", "eager"]
Quantization = Literal["none", "int8", "int4"]

ANY = "any"
"""In place of batch sizes: no decoder for one size, the step program serves them all."""

_MAX_PREFILL_ROWS = 16
_DEFAULT_MAX_NUM_SEQS = 8
_DEFAULT_BATCHED_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileConfig:
    """Options of one compile, complete and valid."""

    ladder: DecoderLadder | None
    """Batch sizes that get a decoder each; None: the step program serves every batch size."""
    max_num_seqs: int
    max_seq_len: int
    block_size: int
    """Tokens per KV block; a multiple of 16, which is one vector of the attention operator."""
    prefill_chunk_sizes: tuple[int, ...]
    """Tokens of each prefill program, ascending; empty: the step program takes prompts of any length."""
    prefill_rows: int
    """Prompts that share one prefill call."""
    max_num_batched_tokens: int
    """Prompt tokens of one call of the step program."""
    dtype: Dtype | None
    """None: the checkpoint's own."""
    quantization: Quantization
    backend: Backend
    portable: bool
    """Whether machines without this one's newer CPU features are served too."""
    device: str
    jobs: int
    """Programs built at once."""


def make_config(
    *,
    decoder_batch_sizes: Iterable[object] | str = ANY,
    max_num_seqs: int | None = None,
    max_seq_len: int = 2048,
    block_size: int = 32,
    prefill_chunk_sizes: Iterable[object] | None = None,
    max_num_batched_tokens: int | None = None,
    dtype: str | None = None,
    quantization: str = "none",
    backend: str = "inductor",
    portable: bool = False,
    device: str = "cpu",
    jobs: int | None = None,
) -> CompileConfig:
    """Checks and completes the options of a compile.

    Raises:
        ConfigError: a value outside what is allowed.
        UnsupportedModelError: a dtype or device that is not built, by name.
    """
    ladder, max_num_seqs = _ladder(decoder_batch_sizes, max_num_seqs)
    _int("max_seq_len", max_seq_len, 2)
    _int("block_size", block_size, 16)
    if block_size % 16:
        raise ConfigError(f"block_size is {block_size}; allowed: multiples of 16")
    chunks = sorted({_int("a prefill chunk size", size, 1) for size in prefill_chunk_sizes or ()})
    if prefill_chunk_sizes is not None:
        if not chunks:
            raise ConfigError("prefill_chunk_sizes is empty; give at least one size, or leave it out")
        if ladder is None or max_num_batched_tokens is not None:
            other = "decoder_batch_sizes any" if ladder is None else "max_num_batched_tokens"
            raise ConfigError(f"prefill_chunk_sizes and {other} exclude each other; give one of them")
    if max_num_batched_tokens is None:
        max_num_batched_tokens = min(_DEFAULT_BATCHED_TOKENS, max_seq_len)
    _int("max_num_batched_tokens", max_num_batched_tokens, 1)
    if dtype is not None and dtype not in get_args(Dtype):
        raise UnsupportedModelError(f"dtype {dtype!r}; allowed: {', '.join(get_args(Dtype))}")
    if quantization not in get_args(Quantization):
        raise UnsupportedModelError(f"quantization {quantization!r}; allowed: {', '.join(get_args(Quantization))}")
    if quantization != "none" and backend == "eager":
        raise ConfigError(f"quantization {quantization} needs compiled programs; allowed: --backend inductor")
    if backend not in get_args(Backend):
        raise ConfigError(f"backend {backend!r}; allowed: {', '.join(get_args(Backend))}")
    if device != "cpu":
        raise UnsupportedModelError(f"device {device!r} is not built yet; allowed: cpu")
    return CompileConfig(
        ladder=ladder,
        max_num_seqs=max_num_seqs,
        max_seq_len=max_seq_len,
        block_size=block_size,
        prefill_chunk_sizes=tuple(chunks),
        prefill_rows=min([max_num_seqs, _MAX_PREFILL_ROWS, *chunks]),
        max_num_batched_tokens=max_num_batched_tokens,
        dtype=dtype,  # type: ignore[arg-type]
        quantization=quantization,  # type: ignore[arg-type]
        backend=backend,  # type: ignore[arg-type]
        portable=portable,
        device=device,
        jobs=_int("jobs", jobs, 1) if jobs is not None else usable_cores(),
    )


def _ladder(sizes: Iterable[object] | str, max_num_seqs: int | None) -> tuple[DecoderLadder | None, int]:
    if sizes == ANY:
        given = _DEFAULT_MAX_NUM_SEQS if max_num_seqs is None else max_num_seqs
        return None, _int("max_num_seqs", given, 1)
    resolved = resolve_ladder(sizes, max_num_seqs)
    if resolved.warning:
        warnings.warn(resolved.warning, stacklevel=4)
    return resolved.ladder, resolved.max_num_seqs


def _int(name: str, value: object, lowest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ConfigError(f"{name} is {value!r}; allowed: an int >= {lowest}")
    return value
