"""Declares the operators that compiled programs call; the artifact's operator library supplies their CPU code.

Programs reach attention and linear layers through these operators only, so that their code is built once, weights are
packed once, and every program of a ladder shares both. What an operator computes is written in plain PyTorch in
`multibatch.reference`, which the tests compare it with.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from multibatch.errors import ArtifactError, CapacityError
from multibatch.logit_passes import DrawOptions, LogitPasses

PANEL = 32
"""Outputs of a packed weight that lie side by side."""

QUANTIZED = {"int8": torch.int8, "int4": torch.uint8}
"""The dtype of a packed weight that is quantised."""

# The one Library object of the process: PyTorch drops the operators when it is collected.
_LIBRARY = torch.library.Library("multibatch", "DEF")
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? scales, Tensor? sums, int out_features) -> Tensor"
)
_LIBRARY.define(
    "gated_linear(Tensor gate_up, Tensor weight, Tensor? bias, Tensor? scales, Tensor? sums, int out_features,"
    " str activation) -> Tensor"
)
_LIBRARY.define(
    "normed_linear(Tensor x, Tensor norm, float epsilon, float offset, bool round_first, Tensor weight, Tensor? bias,"
    " Tensor? scales, Tensor? sums, int out_features) -> Tensor"
)
_LIBRARY.define(
    "residual_linear(Tensor residual, Tensor x, Tensor weight, Tensor? bias, Tensor? scales, Tensor? sums,"
    " int out_features) -> Tensor"
)
_LIBRARY.define(
    "gated_residual_linear(Tensor residual, Tensor gate_up, Tensor weight, Tensor? bias, Tensor? scales, Tensor? sums,"
    " int out_features, str activation) -> Tensor"
)
_LIBRARY.define(
    "gated_mlp(Tensor x, Tensor? residual, Tensor? norm, float epsilon, float offset, bool round_first, Tensor gate_up,"
    " Tensor? gate_up_bias, Tensor? gate_up_scales, Tensor? gate_up_sums, Tensor down, Tensor? down_bias,"
    " Tensor? down_scales, Tensor? down_sums, int intermediate_size, int out_features, str activation) -> Tensor"
)
_LIBRARY.define("rms_norm(Tensor x, Tensor weight, float epsilon, float offset, bool round_first) -> Tensor")
_LIBRARY.define(
    "packed_embedding(Tensor ids, Tensor weight, Tensor? scales, int num_embeddings, int embedding_dim,"
    " ScalarType dtype) -> Tensor"
)
_LIBRARY.define(
    "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) key_pool,"
    " Tensor(b!) value_pool, Tensor slot_mapping, Tensor cu_seqlens, Tensor block_tables,"
    " Tensor seq_lens, Tensor? sinks, float scale, int sliding_window, float softcap) -> Tensor"
)
_LIBRARY.define(
    "rotary_attention(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor(a!) key_pool,"
    " Tensor(b!) value_pool, Tensor slot_mapping, Tensor cu_seqlens, Tensor block_tables,"
    " Tensor seq_lens, Tensor? sinks, float scale, int sliding_window, float softcap) -> Tensor"
)
_LIBRARY.define("chunk_maxima(Tensor scores, int chunk) -> Tensor")
_LIBRARY.define("first_maxima(Tensor scores) -> Tensor")
_LIBRARY.define(
    "draw_tokens(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor log_min_p, Tensor random,"
    " float scale) -> Tensor"
)
_LIBRARY.define("set_num_threads(int num_threads) -> int")
_LIBRARY.define("peak_rate(ScalarType weight, float seconds) -> float")


@torch.library.register_fake("multibatch::packed_linear", lib=_LIBRARY)
def _packed_linear_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    sums: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("multibatch::gated_linear", lib=_LIBRARY)
def _gated_linear_fake(
    gate_up: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    sums: torch.Tensor | None,
    out_features: int,
    activation: str,
) -> torch.Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], out_features))


@torch.library.register_fake("multibatch::normed_linear", lib=_LIBRARY)
def _normed_linear_fake(
    x: torch.Tensor,
    norm: torch.Tensor,
    epsilon: float,
    offset: float,
    round_first: bool,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    sums: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("multibatch::residual_linear", lib=_LIBRARY)
@torch.library.register_fake("multibatch::gated_residual_linear", lib=_LIBRARY)
def _residual_fake(residual: torch.Tensor, *_: Any) -> torch.Tensor:
    return residual.new_empty(residual.shape)


@torch.library.register_fake("multibatch::gated_mlp", lib=_LIBRARY)
def _gated_mlp_fake(x: torch.Tensor, *others: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], others[-2]))


@torch.library.register_fake("multibatch::rms_norm", lib=_LIBRARY)
def _rms_norm_fake(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float, round_first: bool
) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("multibatch::packed_embedding", lib=_LIBRARY)
def _packed_embedding_fake(
    ids: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return weight.new_empty((*ids.shape, embedding_dim), dtype=dtype)


@torch.library.register_fake("multibatch::paged_attention", lib=_LIBRARY)
@torch.library.register_fake("multibatch::rotary_attention", lib=_LIBRARY)
def _attention_fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))


def load_operators(path: Path, sha256: str, loaded: dict[str, Path]) -> None:
    """Makes the operators of an artifact's library callable in this process.

    Args:
        path: the shared library.
        sha256: its hash from the manifest; a process holds one such library.
        loaded: hash -> path of what this process loaded so far (`PROCESS_OPERATORS`); changed in place.

    Raises:
        CapacityError: another version of the library is loaded already; PyTorch cannot replace operators.
        ArtifactError: the library cannot be loaded on this machine.
    """
    if sha256 in loaded:
        return
    if loaded:
        (other,) = loaded.values()
        raise CapacityError(
            f"operators of {path} differ from those of {other}, which this process has loaded;"
            " one version can be open in a process: recompile one artifact, or use two processes"
        )
    try:
        torch.ops.load_library(str(path))
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # programs call its C functions, and find them only so
    except OSError as error:
        raise ArtifactError(
            f"operator library {path} does not load here: {error}; recompile the artifact on this machine"
        ) from error
    loaded[sha256] = path


# PyTorch's operator table is one per process, so the record of what is in it must be too.
PROCESS_OPERATORS: dict[str, Path] = {}


def implement_paged_attention(function: Callable[..., torch.Tensor], dispatch_key: str) -> None:
    """Gives `multibatch::paged_attention` its code on one kind of device; the first one stays, as PyTorch has it.

    Args:
        function: takes what the operator takes.
        dispatch_key: "CUDA", or another name that PyTorch's dispatcher has for a device.
    """
    if not torch._C._dispatch_has_kernel_for_dispatch_key("multibatch::paged_attention", dispatch_key):
        _LIBRARY.impl("paged_attention", function, dispatch_key)


def logit_passes() -> LogitPasses:
    """The sampler's passes on the operators' threads: OpenMP's would spin beside them, on the same cores.

    Older libraries do not know `first_maxima`, or not `draw_tokens`.
    """
    known = torch._C._dispatch_has_kernel_for_dispatch_key
    passes = torch.ops.multibatch
    return LogitPasses(
        passes.chunk_maxima,
        passes.first_maxima if known("multibatch::first_maxima", "CPU") else None,
        _draw_tokens if known("multibatch::draw_tokens", "CPU") else None,
    )


def _draw_tokens(logits: torch.Tensor, options: DrawOptions) -> torch.Tensor:
    tokens: torch.Tensor = torch.ops.multibatch.draw_tokens(logits, *options.tensors(), options.scale)
    return tokens


class _Resting(threading.local):
    """How many wait for the threads of torch to rest, and how many there were; two engines of one thread may overlap."""

    depth = 0
    before = 1


_RESTING = _Resting()


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Torch's own threads rest meanwhile: after a job they spin for milliseconds, on the cores of the operators' threads."""
    if not _RESTING.depth:
        _RESTING.before = torch.get_num_threads()
        torch.set_num_threads(1)
    _RESTING.depth += 1
    try:
        yield
    finally:
        _RESTING.depth -= 1
        if not _RESTING.depth:
            torch.set_num_threads(_RESTING.before)


def set_num_threads(num_threads: int) -> None:
    """Sets how many threads the operators use, the calling one included. They are shared by the whole process."""
    torch.ops.multibatch.set_num_threads(num_threads)


def peak_rate(weight: torch.dtype, seconds: float) -> float:
    """Products per second of the linear kernel on all threads of the operators, with operands in the first cache.

    Args:
        weight: float32, bfloat16, float16, int8, or uint8 for int4.
        seconds: how long to measure.
    """
    rate: float = torch.ops.multibatch.peak_rate(weight, seconds)
    return rate
