"""The Triton kernels in Triton's interpreter. Run by `test_triton_attention.py` in a process that has set it up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.attention_cases import Case, Shape
from benchmarks.gpu_attention import one_row
from multibatch import ops, triton_attention
from multibatch.backends.flat_model import COMPILED_ATTENTION, REFERENCE_ATTENTION, FlatDecoder
from multibatch.batch import DecodeRow, ProgramInputs, decode_inputs, prefill_inputs
from multibatch_compile.verify import chunk_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIXED = [(1, 1), (5, 9), (0, 1), (23, 43), (1, 40)]
"""A decode row at the start and one behind chunks, chunks with and without a past, an empty row."""
DECODE = [(1, 1), (1, 70), (1, 33)]


@pytest.fixture(autouse=True)
def _short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    # So that rows of a few positions have several.
    monkeypatch.setattr(triton_attention, "SPAN", 32)
    monkeypatch.setattr(triton_attention, "_SPANS_AT_ONCE", 2)


def run(case: Case) -> torch.Tensor:
    arguments: list[Any] = case.arguments()
    out = triton_attention.paged_attention(*arguments)
    assert case.problems(out, arguments[3], arguments[4]) == []
    return out


@pytest.mark.parametrize(
    "shape",
    [
        *(Shape(kv_heads=1, dtype=dtype) for dtype in DTYPES),
        Shape(kv_heads=1, window=7),
        Shape(kv_heads=1, softcap=5.0),
        *(Shape(kv_heads=1, dtype=dtype, window=40, sinks=True) for dtype in DTYPES),
    ],
)
@pytest.mark.parametrize(("rows", "num_padded"), [(MIXED, 3), (DECODE, 0)])
def test_attention_equals_the_reference(shape: Shape, rows: list[tuple[int, int]], num_padded: int) -> None:
    run(Case(shape, rows, num_padded))


@pytest.mark.parametrize(
    "shape",
    [
        Shape(kv_heads=1, group=1, dim=16, value_dim=16),
        Shape(kv_heads=1, group=20, dim=8, value_dim=8),  # more heads than a decode tile has queries
        Shape(kv_heads=1, group=2, block_size=48),  # no power of two
        Shape(kv_heads=3, group=2, dim=65, value_dim=33),
    ],
)
def test_shapes(shape: Shape) -> None:
    run(Case(shape, [(1, 5), (9, 60)], 0))
    run(Case(shape, [(1, 5), (1, 60)], 0))


shapes = st.builds(
    Shape,
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 5),
    dim=st.sampled_from([8, 16, 40]),
    value_dim=st.sampled_from([8, 24]),
    block_size=st.sampled_from([16, 32]),
    window=st.one_of(st.just(0), st.integers(1, 50)),
    softcap=st.sampled_from([0.0, 3.0]),
    sinks=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
chunks = st.builds(lambda new, past: (new, max(1, new + past)), st.integers(0, 9), st.integers(0, 40))
decode_rows = st.lists(st.integers(1, 80).map(lambda length: (1, length)), min_size=2, max_size=4)


@settings(max_examples=12)
@given(shape=shapes, rows=st.lists(chunks, min_size=1, max_size=4), num_padded=st.integers(1, 4))
def test_any_chunks(shape: Shape, rows: list[tuple[int, int]], num_padded: int) -> None:
    run(Case(shape, rows, num_padded))


@settings(max_examples=6)
@given(shape=shapes, rows=decode_rows)
def test_a_decode_row_has_the_same_bits_alone(shape: Shape, rows: list[tuple[int, int]]) -> None:
    case = Case(shape, rows, 0)
    together = run(case)
    for index in range(len(rows)):
        assert torch.equal(one_row(case, index)[0, 0], together[0, index])


@pytest.mark.parametrize("rows", [[(1, 20), (1, 37)], [(4, 20), (7, 37)]])
def test_what_is_not_finite_elsewhere_in_the_pool_is_not_seen(rows: list[tuple[int, int]]) -> None:
    case = Case(Shape(), rows, 0)
    size = case.shape.block_size
    for row, (_, length) in enumerate(rows):
        behind = int(case.block_tables[row, (length - 1) // size])
        case.keys[behind, :, :, (length - 1) % size + 1 :] = float("nan")
        case.values[behind, :, (length - 1) % size + 1 :] = float("nan")
    case.keys[0], case.values[0] = float("nan"), float("nan")
    arguments: list[Any] = case.arguments()
    out = triton_attention.paged_attention(*arguments)
    assert float((out - case.expected()[0]).abs().max()) < 2e-5


def another(*arguments: Any) -> torch.Tensor:
    raise AssertionError("the operator's first code on a device has to stay")


def test_a_model_over_the_operator_is_the_model_over_the_reference(demo_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    triton_attention.register("CPU")
    ops.implement_paged_attention(another, "CPU")
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32, num_hidden_layers=2).eval()
    config = model.config
    size, head_dim, heads = 16, config.hidden_size // config.num_attention_heads, config.num_key_value_heads
    ids = list(range(5, 45))
    calls: list[ProgramInputs] = [
        prefill_inputs([chunk_of(ids[:30], [1, 2]), chunk_of(ids[:7], [3])], 40, 2, 4, size),
        decode_inputs([DecodeRow(9, 30, [1, 2]), DecodeRow(8, 7, [3])], 4, 4, size),
    ]
    logits: dict[str, list[torch.Tensor]] = {}
    for attention in (COMPILED_ATTENTION, REFERENCE_ATTENTION):
        decoder = FlatDecoder(model, attention)
        keys = [torch.zeros(4, heads, head_dim, size) for _ in range(config.num_hidden_layers)]
        values = [x.transpose(2, 3).contiguous() for x in keys]
        with torch.inference_mode():
            logits[attention] = [decoder(*inputs.tensors(), keys, values)[:2] for inputs in calls]
    for ours, expected in zip(logits[COMPILED_ATTENTION], logits[REFERENCE_ATTENTION], strict=True):
        assert float((ours - expected).abs().max()) < 1e-4 * float(expected.abs().max())
