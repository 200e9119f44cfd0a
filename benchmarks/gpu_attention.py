"""Paged attention on a device: right over a grid, a decode row's bits alone, and how fast it reads the pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.attention_cases import Case, Rows, Shape
from benchmarks.gpu_machine import Machine
from multibatch import triton_attention
from multibatch.batch import DecodeRow, decode_inputs

LLAMA = Shape(kv_heads=8, group=4, dim=128, value_dim=128, block_size=32, dtype=torch.bfloat16)
QWEN = Shape(kv_heads=2, group=7, dim=64, value_dim=64, block_size=32, dtype=torch.bfloat16)
ODD = Shape(kv_heads=2, group=3, dim=24, value_dim=40, block_size=16)
WIDE = Shape(kv_heads=1, group=4, dim=256, value_dim=256, block_size=32, dtype=torch.bfloat16)
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"window": 100}, {"softcap": 5.0}, {"sinks": True, "window": 700})
GRID = (
    *(replace(ODD, dtype=dtype, **options) for dtype in (torch.float32, torch.float16) for options in OPTIONS),
    *(replace(QWEN, **options) for options in OPTIONS),
    LLAMA,
    WIDE,
)
MIXED: Rows = ((1, 1), (5, 9), (200, 1300), (0, 1), (333, 333), (1, 900))
"""Decode rows before and behind chunks, chunks with and without a past, an empty row."""
DECODE: Rows = ((1, 1), (1, 2000), (1, 256), (1, 257), (1, 31), (1, 512))


def check_attention(
    device: torch.device, grid: Sequence[Shape] = GRID, mixed: Rows = MIXED, decode: Rows = DECODE
) -> dict[str, Any]:
    """Every shape of the grid against the reference, and each decode row against itself alone, bit for bit."""
    wrong: list[str] = []
    largest: dict[str, float] = {}
    for shape in grid:
        for name, rows, num_padded in (("mixed", mixed, 3), ("decode", decode, 0)):
            case = Case(shape, rows, num_padded, device=str(device))
            arguments: list[Any] = case.arguments()
            out = triton_attention.paged_attention(*arguments)
            what = f"{name}, {shape}"
            wrong += [f"{what}: {problem}" for problem in case.problems(out, arguments[3], arguments[4])]
            dtype = str(shape.dtype).removeprefix("torch.")
            largest[dtype] = max(largest.get(dtype, 0.0), case.error(out))
            if name == "decode":
                alone = [torch.equal(one_row(case, row), out[:, row : row + 1]) for row in range(len(rows))]
                wrong += [f"{what}: row {row} has other bits alone" for row, same in enumerate(alone) if not same]
    return {"ok": not wrong, "num_cases": 2 * len(grid), "wrong": wrong[:20], "largest_error": largest}


def one_row(case: Case, row: int) -> torch.Tensor:
    """The output of one decode row in a call of its own."""
    arguments: list[Any] = case.arguments()
    only = slice(row, row + 1)
    # Memory of its own for each: Triton compiles other kernels for addresses that are not aligned.
    arguments[:3] = [x[:, :, only].clone() for x in arguments[:3]]
    arguments[5], arguments[6] = case.slot_mapping[only].clone(), torch.tensor([0, 1]).to(case.cu_seqlens)
    arguments[7], arguments[8] = case.block_tables[only].clone(), case.seq_lens[only].clone()
    return triton_attention.paged_attention(*arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadCase:
    """Decode rows of one context length over the pools of several layers, so that no cache holds what is read."""

    shape: Shape = LLAMA
    num_layers: int = 32
    context: int = 1024
    max_seq_len: int = 2048


def attention_rates(
    machine: Machine, bandwidth_gbps: float, row_counts: Sequence[int] = (1, 8, 32), case: ReadCase = ReadCase()
) -> dict[str, Any]:
    """GB/s of keys and values that decode attention reads, all layers in one captured graph."""
    return {str(rows): _rate(machine, rows, case, bandwidth_gbps) for rows in row_counts}


def _rate(machine: Machine, num_rows: int, case: ReadCase, bandwidth_gbps: float) -> dict[str, float]:
    shape, size, device = case.shape, case.shape.block_size, machine.device
    each = -(-case.context // size)
    rows = [DecodeRow(0, case.context - 1, range(1 + r * each, 1 + (r + 1) * each)) for r in range(num_rows)]
    inputs = decode_inputs(rows, num_rows, -(-case.max_seq_len // size), size)
    indices = [x.to(device) for x in (inputs.slot_mapping, inputs.cu_seqlens, inputs.block_tables, inputs.seq_lens)]

    def random(*dims: int) -> torch.Tensor:
        return torch.randn(dims, device=device, dtype=shape.dtype)

    blocks = 1 + num_rows * each
    layers = range(case.num_layers)
    keys = [random(blocks, shape.kv_heads, shape.dim, size) for _ in layers]
    values = [random(blocks, shape.kv_heads, size, shape.value_dim) for _ in layers]
    query = random(1, shape.kv_heads * shape.group, num_rows, shape.dim)
    key, value = random(1, shape.kv_heads, num_rows, shape.dim), random(1, shape.kv_heads, num_rows, shape.value_dim)

    def call() -> torch.Tensor:
        for key_pool, value_pool in zip(keys, values, strict=True):
            out = triton_attention.paged_attention(
                query, key, value, key_pool, value_pool, *indices, None, shape.dim**-0.5, 0, 0.0
            )
        return out

    graph, _ = machine.graphs.capture(call, machine.graphs.new_pool())
    seconds = machine.seconds(graph.replay)
    per_position = shape.kv_heads * (shape.dim + shape.value_dim) * shape.dtype.itemsize
    rate = case.num_layers * num_rows * case.context * per_position / seconds / 1e9
    return {
        "us_per_layer": seconds / case.num_layers * 1e6,
        "gbps": rate,
        "share_of_copy_bandwidth": rate / bandwidth_gbps,
    }
