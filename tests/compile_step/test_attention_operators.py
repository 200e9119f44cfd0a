"""The compiled attention operators against the reference."""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks.attention_cases import Case, Shape
from multibatch import reference

pytestmark = pytest.mark.usefixtures("operators")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
# Head dimensions of keys and values: that fill vectors, that do not, and an odd one.
HEADS = [(24, 40), (32, 32), (17, 24), (64, 80)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"), [(0, 0.0, False), (7, 0.0, False), (0, 5.0, False), (40, 0.0, True)]
)
@pytest.mark.parametrize("seed", range(4))
def test_attention_equals_the_reference(
    dtype: torch.dtype, window: int, softcap: float, sinks: bool, seed: int
) -> None:
    rng = random.Random(seed)
    dim, value_dim = HEADS[seed]
    heads = {"kv_heads": rng.choice([1, 2]), "group": rng.choice([1, 3, 7]), "dim": dim, "value_dim": value_dim}
    block_size = rng.choice([16, 32, 48])
    shape = Shape(**heads, block_size=block_size, window=window, softcap=softcap, sinks=sinks, dtype=dtype)
    # Decode rows, chunks of one tile and of many, an empty row, rows beyond a span of 256, and tokens that belong to nobody.
    rows = [(1, 1), (1, rng.randrange(2, 600)), (5, 9), (20, 300), (0, 1), (33, 33), (150, 700), (160, 160)]
    case = Case(shape, rows, num_padded=3, seed=seed)
    arguments = case.arguments()
    out = torch.ops.multibatch.paged_attention(*arguments)
    assert case.problems(out, *arguments[3:5]) == []


def test_attention_of_a_chunk_whose_past_is_too_long_to_be_laid_out_for_all() -> None:
    # More than the 64 MiB of SharedSpans; the row before it stays below.
    case = Case(Shape(kv_heads=8, group=1, dim=256, value_dim=256), [(150, 150), (150, 4000)], num_padded=0)
    arguments = case.arguments()
    out = torch.ops.multibatch.paged_attention(*arguments)
    assert case.problems(out, *arguments[3:5]) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_goes_where_its_slot_says_though_its_row_reads_another(dtype: torch.dtype) -> None:
    case = Case(Shape(dtype=dtype), [(1, 20), (1, 300), (1, 7), (2, 18)], num_padded=0)
    case.slot_mapping[:2] = case.slot_mapping[:2].flip(0)
    arguments = case.arguments()
    out = torch.ops.multibatch.paged_attention(*arguments)
    assert case.problems(out, *arguments[3:5]) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "value_dim"), HEADS)
@pytest.mark.parametrize(("block_size", "window"), [(16, 0), (48, 0), (48, 50)])
def test_a_position_has_the_same_bits_alone_and_in_chunks_of_any_size(
    dtype: torch.dtype, dim: int, value_dim: int, block_size: int, window: int
) -> None:
    shape = Shape(dim=dim, value_dim=value_dim, group=7, block_size=block_size, window=window, dtype=dtype)
    case = Case(shape, [(45, 300)], num_padded=0)
    query, key, value, keys, values, slots, _, tables, lengths, *options = case.arguments()

    def chunks_of(size: int) -> torch.Tensor:
        """Attention of the 45 tokens, so many in a call."""
        starts = torch.tensor([0, size], dtype=torch.int32)
        parts = [
            torch.ops.multibatch.paged_attention(
                *(x[:, :, first : first + size] for x in (query, key, value)),
                *(keys, values, slots[first : first + size], starts, tables, lengths - 45 + first + size, *options),
            )
            for first in range(0, 45, size)
        ]
        return torch.cat(parts, 1)

    alone = chunks_of(1)
    # Tiles of a chunk lay keys and values out for themselves where there are few, and once for all where there are many.
    for size in (3, 15, 45):
        assert torch.equal(chunks_of(size), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "value_dim"), HEADS)
def test_what_lies_behind_the_end_of_a_row_is_never_multiplied(dtype: torch.dtype, dim: int, value_dim: int) -> None:
    rows = [(1, 19), (12, 35), (1, 300), (55, 301)]
    case = Case(Shape(dim=dim, value_dim=value_dim, dtype=dtype), rows, num_padded=0)
    clean = torch.ops.multibatch.paged_attention(*case.arguments())
    for row, (_, length) in enumerate(rows):
        last = int(case.block_tables[row, length // 16])
        case.keys[last, :, :, length % 16 :] = torch.nan
        case.values[last, :, length % 16 :] = torch.nan
    assert torch.equal(torch.ops.multibatch.paged_attention(*case.arguments()), clean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [24, 16, 2])
def test_rotary_attention_is_the_rotation_and_then_the_attention(dtype: torch.dtype, dims: int) -> None:
    torch.manual_seed(dims)
    q, k = torch.randn(1, 6, 9, 24).to(dtype), torch.randn(1, 9, 2, 24).to(dtype).transpose(1, 2)
    v = torch.randn(1, 2, 9, 24).to(dtype)
    angles = torch.rand(1, 1, 9, dims) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    # A decode row behind 20 positions, one that has just begun, and a chunk.
    ints = [[0, 1, 2, 9], [[1, 2], [3, 0], [4, 0]], [21, 1, 7]]
    starts, tables, lengths = (torch.tensor(x, dtype=torch.int32) for x in ints)
    slots = torch.tensor([2 * 16 + 4, 3 * 16, *range(4 * 16, 4 * 16 + 7)])
    pools = torch.randn(5, 2, 24, 16).to(dtype), torch.randn(5, 2, 16, 24).to(dtype)
    rest = (slots, starts, tables, lengths, None, 0.2, 0, 0.0)
    keys, values = (pool.clone() for pool in pools)
    out = torch.ops.multibatch.rotary_attention(q, k, v, cos, sin, keys, values, *rest)
    turned = reference.rotate(q, cos, sin), reference.rotate(k, cos, sin)
    expected = torch.ops.multibatch.paged_attention(*turned, v, *pools, *rest)
    assert float((out.float() - expected.float()).abs().max()) < 10 * TOLERANCE[dtype]
    assert float((keys.float() - pools[0].float()).abs().max()) < 4 * TOLERANCE[dtype]
    assert torch.equal(values, pools[1])


@pytest.mark.parametrize(
    ("dims", "dtype", "message"),
    [(26, torch.float32, "an even number up to 24"), (3, torch.float32, "even"), (8, torch.bfloat16, "must be Float")],
)
def test_angles_that_do_not_fit_the_heads_are_refused(dims: int, dtype: torch.dtype, message: str) -> None:
    q, angles = torch.ones(1, 1, 1, 24), torch.ones(1, 1, 1, dims, dtype=dtype)
    one = torch.tensor([0, 1], dtype=torch.int32)
    keys, values = torch.zeros(2, 1, 24, 16), torch.zeros(2, 1, 16, 24)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.multibatch.rotary_attention(
            q, q, q, angles, angles, keys, values, torch.tensor([16]), one, one[None, 1:], one[1:], None, 1.0, 0, 0.0
        )
    assert float(keys.abs().max()) == 0.0


def test_an_index_outside_the_pool_is_refused_before_anything_is_written() -> None:
    keys = torch.zeros(2, 1, 16, 16)
    q = torch.ones(1, 1, 1, 16)
    one = torch.tensor([0, 1], dtype=torch.int32)
    table, length = torch.tensor([[5]], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="block 5 of row 0 is outside the pool of 2"):
        torch.ops.multibatch.paged_attention(
            q,
            q,
            q,
            keys,
            keys.clone().transpose(2, 3).contiguous(),
            torch.tensor([16]),
            one,
            table,
            length,
            None,
            1.0,
            0,
            0.0,
        )
    assert float(keys.abs().max()) == 0.0
