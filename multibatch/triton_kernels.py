"""Triton kernels of paged attention; `triton_attention.py` launches them and says what each is for.

Sizes in capitals are fixed when a kernel is compiled; a size that ends in _PADDED is the next power of two, which Triton's
ranges need. Numbers of tokens and rows are not fixed, so that the decoders of a ladder share their kernels. Importing this file
imports Triton, which decides then whether its interpreter runs the kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_of(tile, cu_seqlens, num_rows, TOKENS: tl.constexpr, ROWS_PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row that a tile of TOKENS tokens belongs to, its first token, and the token behind the row's last.

    Row r's tiles begin at cu_seqlens[r] // TOKENS + r, which leaves room for its tokens whatever their number. Tiles of one
    token need no such room, and a row's begin at cu_seqlens[r].
    """
    rows = tl.arange(0, ROWS_PADDED)
    starts = tl.load(cu_seqlens + rows, mask=rows < num_rows, other=0)
    first_tiles = starts
    if TOKENS > 1:
        first_tiles = starts // TOKENS + rows
    # Empty rows share their start with the next one: the last that begins at or before the tile is the one that has it.
    row = tl.sum(((rows < num_rows) & (first_tiles <= tile)).to(tl.int32), axis=0) - 1
    start = tl.load(cu_seqlens + row)
    first_tile = start
    if TOKENS > 1:
        first_tile = start // TOKENS + row
    return row, start + (tile - first_tile) * TOKENS, tl.load(cu_seqlens + row + 1)


@triton.jit
def write_kernel(  # type: ignore[no-untyped-def]
    key, value, key_pool, value_pool, slot_mapping, key_head, key_token, value_head, value_token,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
):  # fmt: skip
    """Writes one token's key and value of one KV head into the pool. Grid: (T, H_kv)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_mapping + token)
    page, offset = (slot // BLOCK_SIZE) * KV_HEADS + head, slot % BLOCK_SIZE
    d, dv = tl.arange(0, D_PADDED), tl.arange(0, DV_PADDED)
    new_key = tl.load(key + head * key_head + token * key_token + d, mask=d < D)
    tl.store(key_pool + (page * D + d) * BLOCK_SIZE + offset, new_key, mask=d < D)
    new_value = tl.load(value + head * value_head + token * value_token + dv, mask=dv < DV)
    tl.store(value_pool + (page * BLOCK_SIZE + offset) * DV + dv, new_value, mask=dv < DV)


@triton.jit
def scores_of(  # type: ignore[no-untyped-def]
    q, keys, position, other, is_inside, scale,
    BLOCK_SIZE: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_PADDED: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Queries [M, D] at `position` against one block of keys at the positions `other`; -inf where one is hidden."""
    d, offset = tl.arange(0, D_PADDED)[:, None], tl.arange(0, BLOCK_PADDED)[None, :]
    k = tl.load(keys + d * BLOCK_SIZE + offset, mask=(d < D) & (offset < BLOCK_SIZE), other=0.0)
    if WIDEN:
        k = k.to(tl.float32)
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if SOFTCAP > 0:
        # tanh, which Triton's language does not have.
        scores = SOFTCAP * (1 - 2 / (tl.exp(scores * (2 / SOFTCAP)) + 1))
    visible = is_inside[None, :] & (other[None, :] <= position[:, None])
    if WINDOW > 0:
        visible = visible & (other[None, :] > position[:, None] - WINDOW)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def add_block(  # type: ignore[no-untyped-def]
    best, total, mixed, scores, values, is_inside,
    BLOCK_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One block more in a running softmax: maxima [M], sums [M] and mixed values [M, DV] of all blocks so far."""
    offset, dv = tl.arange(0, BLOCK_PADDED)[:, None], tl.arange(0, DV_PADDED)[None, :]
    new_best = tl.maximum(best, tl.max(scores, axis=1))
    # A query that has seen nothing yet has no maximum to subtract.
    shift = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights, decay = tl.exp(scores - shift[:, None]), tl.exp(best - shift)
    # What lies behind the row may be another request's and not finite; a weight of 0 would not hide that.
    v = tl.load(values + offset * DV + dv, mask=is_inside[:, None] & (dv < DV), other=0.0)
    total = total * decay + tl.sum(weights, axis=1)
    weights = weights.to(v.dtype)
    if WIDEN:
        weights, v = weights.to(tl.float32), v.to(tl.float32)
    mixed = mixed * decay[:, None] + tl.dot(weights, v, input_precision="ieee")
    return new_best, total, mixed


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def attend_kernel(  # type: ignore[no-untyped-def]
    query, key_pool, value_pool, cu_seqlens, block_tables, seq_lens, sinks, out, maxima, sums,
    num_tokens, num_rows, num_spans, scale, table_row, query_head, query_token,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, M: tl.constexpr, ROWS_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_PADDED: tl.constexpr, SPAN_BLOCKS: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One tile of queries over one span of its row's blocks, or over all of them. Grid: (tiles, H_kv, spans).

    out is [T, H, DV] in the query's dtype. With SPLIT it is float32[T, H, spans, DV], not yet divided by the softmax's sum,
    and maxima and sums are float32[T, H, spans]; spans that a tile does not see stay unwritten.
    """
    tile, kv_head, span = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, first_token, stop = row_of(tile, cu_seqlens, num_rows, TOKENS, ROWS_PADDED)
    length = tl.load(seq_lens + row)
    # The tile sees positions [lowest, limit): nothing where it lies behind its row.
    limit = tl.where(first_token < stop, length - stop + tl.minimum(first_token + TOKENS, stop), 0)
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(length - stop + first_token - WINDOW + 1, 0)
    first_block, last_block = lowest // BLOCK_SIZE, (limit + BLOCK_SIZE - 1) // BLOCK_SIZE
    # Tokens behind the last row count as its own, so that somebody writes their zeros; with SPLIT, `merge_kernel` does.
    end = tl.where(row == num_rows - 1, num_tokens, stop)
    is_idle = first_token >= end
    if SPLIT:
        first_block = tl.maximum(first_block, span * SPAN_BLOCKS)
        last_block = tl.minimum(last_block, (span + 1) * SPAN_BLOCKS)
        is_idle = first_block >= last_block
    if is_idle:
        return

    m, d, dv, offset = tl.arange(0, M), tl.arange(0, D_PADDED), tl.arange(0, DV_PADDED), tl.arange(0, BLOCK_PADDED)
    token, head = (first_token + m // GROUP).to(tl.int64), kv_head * GROUP + m % GROUP
    is_row = (m < TOKENS * GROUP) & (token < end)
    position = tl.where(is_row & (token < stop), length - stop + first_token + m // GROUP, -1)
    from_query = query + token * query_token + head * query_head
    q = tl.load(from_query[:, None] + d[None, :], mask=is_row[:, None] & (d[None, :] < D), other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, DV_PADDED], tl.float32)
    for index in range(first_block, last_block):
        page = tl.load(block_tables + row * table_row + index).to(tl.int64) * KV_HEADS + kv_head
        other = index * BLOCK_SIZE + offset
        is_inside = (other < limit) & (offset < BLOCK_SIZE)
        scores = scores_of(
            q, key_pool + page * (D * BLOCK_SIZE), position, other, is_inside, scale,
            BLOCK_SIZE, D, D_PADDED, BLOCK_PADDED, WINDOW, SOFTCAP, WIDEN,
        )  # fmt: skip
        best, total, mixed = add_block(
            best, total, mixed, scores, value_pool + page * (BLOCK_SIZE * DV), is_inside,
            BLOCK_PADDED, DV, DV_PADDED, WIDEN,
        )  # fmt: skip

    place = (token * (KV_HEADS * GROUP) + head) * num_spans + span
    if SPLIT:
        tl.store(maxima + place, best, mask=is_row)
        tl.store(sums + place, total, mask=is_row)
    else:
        if SINKS:
            sink = tl.load(sinks + head, mask=is_row, other=0.0).to(tl.float32)
            # It takes part as a position without a value would. Relative to the greater of both, nothing overflows.
            shift = tl.maximum(best, sink)
            mixed = mixed * tl.exp(best - shift)[:, None]
            total = total * tl.exp(best - shift) + tl.exp(sink - shift)
        mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    is_out = is_row[:, None] & (dv[None, :] < DV)
    tl.store(out + place[:, None] * DV + dv[None, :], mixed.to(out.dtype.element_ty), mask=is_out)


@triton.jit(do_not_specialize=["num_rows"])
def merge_kernel(  # type: ignore[no-untyped-def]
    parts, maxima, sums, cu_seqlens, seq_lens, sinks, out, num_rows, num_spans,
    HEADS: tl.constexpr, ROWS_PADDED: tl.constexpr, SPAN: tl.constexpr, SPANS_AT_ONCE: tl.constexpr,
    DV: tl.constexpr, DV_PADDED: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One token's head from the spans that `attend_kernel` left; zeros for a token behind the last row. Grid: (T, H)."""
    token, head = tl.program_id(0), tl.program_id(1)
    row, _, stop = row_of(token, cu_seqlens, num_rows, 1, ROWS_PADDED)
    limit = tl.where(token < stop, tl.load(seq_lens + row) - stop + token + 1, 0)
    first_span = 0
    if WINDOW > 0:
        first_span = tl.maximum(limit - WINDOW, 0) // SPAN
    last_span = (limit + SPAN - 1) // SPAN
    place = (token.to(tl.int64) * HEADS + head) * num_spans
    dv, several = tl.arange(0, DV_PADDED), tl.arange(0, SPANS_AT_ONCE)
    best = float("-inf")
    total = 0.0
    if SINKS:
        best = tl.load(sinks + head).to(tl.float32)
        total = 1.0
    mixed = tl.zeros([DV_PADDED], tl.float32)
    for first in range(first_span, last_span, SPANS_AT_ONCE):
        span = first + several
        is_span = span < last_span
        span_best = tl.load(maxima + place + span, mask=is_span, other=float("-inf"))
        span_total = tl.load(sums + place + span, mask=is_span, other=0.0)
        from_part = parts + (place + span)[:, None] * DV + dv[None, :]
        part = tl.load(from_part, mask=is_span[:, None] & (dv[None, :] < DV), other=0.0)
        new_best = tl.maximum(best, tl.max(span_best, axis=0))
        weights, decay = tl.exp(span_best - new_best), tl.exp(best - new_best)
        total = total * decay + tl.sum(span_total * weights, axis=0)
        mixed = mixed * decay + tl.sum(part * weights[:, None], axis=0)
        best = new_best
    mixed = mixed / tl.where(total > 0, total, 1.0)
    tl.store(out + (token * HEADS + head) * DV + dv, mixed.to(out.dtype.element_ty), mask=dv < DV)
