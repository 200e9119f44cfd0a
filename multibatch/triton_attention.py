"""Paged attention on CUDA: the code of the operator `multibatch::paged_attention`, launched as Triton kernels.

One kernel writes the new keys and values into the pool, one attends, and where a call is decode a third merges the spans into
which each row was split, as in flash-decoding (Dao et al. 2023). A tile of queries holds all heads that share a KV head, for
one or several tokens of one row, so a block of the pool is read once for all of them; that the grid covers rows of any length
without asking the host is vLLM's idea (its unified Triton attention).

What is launched follows from the tensors' shapes alone, never from their values, so a CUDA graph may hold it. Spans have a
fixed number of positions, so that a decode row's bits do not depend on the rows beside it. The sizes below were chosen
without a GPU: see docs/cuda.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from multibatch import ops
from multibatch.triton_kernels import attend_kernel, merge_kernel, write_kernel

SPAN = 256
"""Positions of a row that one program of a decode call reads, rounded to whole blocks."""
_DECODE_TILE = 16
"""Queries of a decode tile at least, one per head; `tl.dot` takes no fewer."""
_PREFILL_TILE = 64
"""Queries of a prefill tile at least, one per head and token."""
_LEAST_ROWS = 64
"""Rows that a kernel is compiled for at least: decoders of fewer share it."""
_SPANS_AT_ONCE = 16
"""Spans that the merge loads together."""


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    slot_mapping: torch.Tensor,
    cu_seqlens: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    sliding_window: int,
    softcap: float,
) -> torch.Tensor:
    """Writes the new keys and values into the pool, then attends; sums in float32.

    A call of as many rows as tokens is taken for decode: right for any rows, and quick where each has one token. Indices
    are not checked, since that would need the host.

    Args:
        query: [1, H, T, D], as key and value in the pool's dtype.
        key: [1, H_kv, T, D].
        value: [1, H_kv, T, D_v].
        key_pool: [num_blocks, H_kv, D, block_size], contiguous; changed in place.
        value_pool: [num_blocks, H_kv, block_size, D_v], contiguous; changed in place.
        slot_mapping: int64[T].
        cu_seqlens: int32[R + 1].
        block_tables: int32[R, M].
        seq_lens: int32[R].
        sinks: float[H] or None.
        scale: of the scores.
        sliding_window: positions that a query sees, its own included; 0: all before it.
        softcap: scores become softcap * tanh(score / softcap); 0: unchanged.

    Returns:
        [1, T, H, D_v], zero for tokens that belong to no row.
    """
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    num_heads, num_tokens, num_rows = query.shape[1], query.shape[2], seq_lens.shape[0]
    num_kv_heads, dim, block_size, value_dim = *key_pool.shape[1:], value_pool.shape[3]
    group = num_heads // num_kv_heads
    tiling = tiling_of(num_tokens, num_rows, group, block_size, block_tables.shape[1])
    # Multiply-add is said here, because Triton's own choice differs between its versions.
    values = {"DV": value_dim, "DV_PADDED": _padded(value_dim), "enable_fp_fusion": True}
    sizes = {"KV_HEADS": num_kv_heads, "BLOCK_SIZE": block_size, "D": dim, "D_PADDED": _padded(dim), **values}
    rows = {
        "ROWS_PADDED": max(_LEAST_ROWS, triton.next_power_of_2(num_rows)),
        "WINDOW": sliding_window,
        "SINKS": sinks is not None,
    }
    write_kernel[(num_tokens, num_kv_heads)](
        key, value, key_pool, value_pool, slot_mapping,
        key.stride(1), key.stride(2), value.stride(1), value.stride(2), **sizes,
    )  # fmt: skip
    out = query.new_empty((1, num_tokens, num_heads, value_dim))
    parts, maxima, sums = out, out, out
    if tiling.is_split:
        parts = out.new_empty((num_tokens, num_heads, tiling.num_spans, value_dim), dtype=torch.float32)
        maxima, sums = out.new_empty((2, num_tokens, num_heads, tiling.num_spans), dtype=torch.float32)
    attend_kernel[(tiling.num_tiles, num_kv_heads, tiling.num_spans)](
        query, key_pool, value_pool, cu_seqlens, block_tables, seq_lens, sinks, parts, maxima, sums,
        num_tokens, num_rows, tiling.num_spans, scale, block_tables.stride(0), query.stride(1), query.stride(2),
        GROUP=group, TOKENS=tiling.tokens, M=tiling.queries, BLOCK_PADDED=_padded(block_size),
        SPAN_BLOCKS=tiling.span_blocks, SOFTCAP=softcap, SPLIT=tiling.is_split,
        # The interpreter, which runs on a CPU, cannot multiply bfloat16.
        WIDEN=query.device.type == "cpu" and query.dtype == torch.bfloat16, **rows, **sizes,
    )  # fmt: skip
    if tiling.is_split:
        merge_kernel[(num_tokens, num_heads)](
            parts, maxima, sums, cu_seqlens, seq_lens, sinks, out, num_rows, tiling.num_spans,
            HEADS=num_heads, SPAN=tiling.span_blocks * block_size, SPANS_AT_ONCE=_SPANS_AT_ONCE, **rows, **values,
        )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a call is cut into programs, for every KV head alike."""

    tokens: int
    """Of one row, in a tile at most."""
    queries: int
    """Rows of a tile's matrices: every query head of the KV head for each of its tokens, and padding."""
    num_tiles: int
    span_blocks: int
    """Blocks that a program reads of a row that is split."""
    num_spans: int

    @property
    def is_split(self) -> bool:
        """Whether several programs share a row, so that their results have to be merged."""
        return self.num_spans > 1


def tiling_of(num_tokens: int, num_rows: int, group: int, block_size: int, max_blocks: int) -> Tiling:
    """The tiles of T tokens in R rows, `group` query heads per KV head, block tables of M columns."""
    is_decode = num_tokens == num_rows
    span_blocks = max(1, SPAN // block_size)
    queries = max(_DECODE_TILE if is_decode else _PREFILL_TILE, triton.next_power_of_2(group))
    tokens = 1 if is_decode else queries // group
    # Each row may need a tile more than its share; `triton_kernels.row_of` has them find their row.
    num_tiles = num_tokens // tokens + (num_rows if tokens > 1 else 0)
    return Tiling(tokens, queries, num_tiles, span_blocks, -(-max_blocks // span_blocks) if is_decode else 1)


def _padded(size: int) -> int:
    """The next power of two, and no less than `tl.dot` takes."""
    power: int = triton.next_power_of_2(size)
    return max(16, power)


def register(dispatch_key: str = "CUDA") -> None:
    """Makes `paged_attention` the operator's code on CUDA; calling it again changes nothing.

    Called when programs for CUDA are loaded, so that nothing else needs Triton. The operators of linear layers have no CUDA
    code: programs for CUDA use PyTorch's.
    """
    ops.implement_paged_attention(paged_attention, dispatch_key)
