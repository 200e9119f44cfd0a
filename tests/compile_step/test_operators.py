"""The compiled operators against plain PyTorch."""

from __future__ import annotations

import random

import pytest
import torch

from multibatch import ops, reference
from multibatch.artifact import sha256_file
from multibatch.reference import AttentionOptions, StepInputs
from multibatch_compile.operators import operator_library
from multibatch_compile.packing import pack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


@pytest.fixture(scope="module", autouse=True)
def _operators() -> None:
    library = operator_library()
    ops.load_operators(library, sha256_file(library), ops.PROCESS_OPERATORS)
    ops.set_num_threads(2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 96), (3, 33, 70), (13, 128, 32), (40, 17, 1), (25, 64, 33)])
def test_linear_is_right_and_a_row_does_not_depend_on_its_batch(dtype: torch.dtype, m: int, k: int, n: int) -> None:
    torch.manual_seed(m * k + n)
    x, w, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    y = torch.ops.multibatch.packed_linear(x, pack(w), b, n)
    expected = x.double() @ w.double().T + b.double()
    assert float((y.double() - expected).abs().max() / expected.abs().max()) < TOLERANCE[dtype]
    alone = torch.cat([torch.ops.multibatch.packed_linear(x[i : i + 1], pack(w), b, n) for i in range(m)])
    assert torch.equal(y, alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_reads_rows_of_a_packed_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(70, 33).to(dtype)
    ids = torch.tensor([[0, 69, 31, 32]])
    assert torch.equal(torch.ops.multibatch.packed_embedding(ids, pack(weight), 70, 33), weight[ids])
    with pytest.raises(RuntimeError, match="outside the vocabulary of 70"):
        torch.ops.multibatch.packed_embedding(torch.tensor([70]), pack(weight), 70, 33)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"), [(0, 0.0, False), (7, 0.0, False), (0, 5.0, False), (40, 0.0, True)]
)
@pytest.mark.parametrize("seed", range(4))
def test_attention_equals_the_reference(
    dtype: torch.dtype, window: int, softcap: float, sinks: bool, seed: int
) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kv_heads, group, dim, value_dim, size = rng.choice([1, 2]), rng.choice([1, 3, 7]), 24, rng.choice([24, 40]), 16
    # Decode rows, chunks, an empty row, one row beyond a span of 256, and tokens that belong to nobody.
    chunks = [(1, 1), (1, rng.randrange(2, 600)), (5, 9), (20, 300), (0, 1), (33, 33)]
    tables, starts, slots, next_block = [], [0], [], 1
    for count, length in chunks:
        blocks = list(range(next_block, next_block - (-length // size)))
        next_block += len(blocks)
        slots += [blocks[p // size] * size + p % size for p in range(length - count, length)] if count else []
        tables.append(blocks + [0] * (40 - len(blocks)))
        starts.append(len(slots))
    slots += [0] * 3
    t, heads = len(slots), kv_heads * group
    q = torch.randn(1, t, heads, dim).to(dtype).transpose(1, 2)
    k = torch.randn(1, t, kv_heads, dim).to(dtype).transpose(1, 2)
    v = torch.randn(1, kv_heads, t, value_dim).to(dtype)
    keys = torch.randn(next_block, kv_heads, dim, size).to(dtype)
    values = torch.randn(next_block, kv_heads, size, value_dim).to(dtype)
    sink = torch.randn(heads) if sinks else None
    ints = [torch.tensor(x, dtype=torch.int32) for x in (starts, tables, [length for _, length in chunks])]
    step = StepInputs(torch.tensor(slots), *ints, [keys.clone()], [values.clone()])
    options = AttentionOptions(0.2, window, softcap)
    expected = reference.paged_attention(q, k, v, step, 0, options, sink)
    out = torch.ops.multibatch.paged_attention(
        q, k, v, keys, values, step.slot_mapping, *ints, sink, 0.2, window, softcap
    )
    assert float((out.float() - expected.float()).abs().max()) < 10 * TOLERANCE[dtype]
    assert float(out[0, starts[-1] :].abs().max()) == 0.0
    # Block 0 takes the tokens of nobody, in any order; the rest of the pool is written alike.
    assert torch.equal(keys[1:], step.key_pools[0][1:])
    assert torch.equal(values[1:], step.value_pools[0][1:])


def test_an_index_outside_the_pool_is_refused_before_anything_is_written() -> None:
    keys = torch.zeros(2, 1, 16, 16)
    q = torch.ones(1, 1, 1, 16)
    one = torch.tensor([0, 1], dtype=torch.int32)
    table, length = torch.tensor([[5]], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="block 5 of row 0 is outside the pool of 2"):
        torch.ops.multibatch.paged_attention(
            q, q, q, keys, keys.clone().transpose(2, 3).contiguous(), torch.tensor([16]), one, table, length, None, 1.0, 0, 0.0
        )
    assert float(keys.abs().max()) == 0.0
