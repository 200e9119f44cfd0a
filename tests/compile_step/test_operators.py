"""The compiled operators against plain PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from multibatch import ops, reference
from multibatch.logit_passes import chunk_maxima_of, first_maxima_of
from multibatch.sampler import Sampler
from multibatch.sampling_params import SamplingParams
from multibatch.sampling_row import SamplingRow
from multibatch_compile.packing import pack, quantize_and_pack

pytestmark = pytest.mark.usefixtures("operators")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


# Rows of one group, two and many; inputs beyond one range; outputs that do not fill a panel.
SHAPES = [
    (1, 64, 96),
    (3, 33, 70),
    (13, 128, 32),
    (16, 1030, 40),
    (13, 90, 64),
    (24, 257, 70),
    (40, 17, 1),
    (25, 64, 33),
    (150, 9000, 33),  # longer than one range of a block, in every dtype, where the second cache is of 1 MiB
    (130, 900, 300),
]


Packed = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def packed(weight: torch.Tensor, bias: torch.Tensor | None, quantization: str) -> Packed:
    """What the operators take of a layer: its weight packed, its bias, the scales and sums of quantised weights."""
    quantized, scales, sums = quantize_and_pack(weight, quantization)
    return quantized, bias, scales, sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_linear_is_right_and_a_row_does_not_depend_on_its_batch(dtype: torch.dtype, m: int, k: int, n: int) -> None:
    torch.manual_seed(m * k + n)
    x, w, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    y = torch.ops.multibatch.packed_linear(x, pack(w), b, None, None, n)
    expected = x.double() @ w.double().T + b.double()
    allowed = TOLERANCE[dtype] * max(1.0, k / 1030) ** 0.5  # sums of more numbers round more often
    assert float((y.double() - expected).abs().max() / expected.abs().max()) < allowed
    alone = torch.cat([torch.ops.multibatch.packed_linear(x[i : i + 1], pack(w), b, None, None, n) for i in range(m)])
    assert torch.equal(y, alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_int8_linear_is_what_the_reference_says_and_close_to_the_original(
    dtype: torch.dtype, m: int, k: int, n: int
) -> None:
    torch.manual_seed(m * k + n)
    x, w, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    rounded, scales = reference.quantize_weight(w)
    rest = (*packed(w, b, "int8"), n)
    y = torch.ops.multibatch.packed_linear(x, *rest)
    expected = reference.int8_linear(x, rounded, scales, b)
    # One step of the dtype: the sums are the same integers.
    step = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert bool(((y.float() - expected.float()).abs() <= step * expected.float().abs().clamp(min=1)).all())
    exact = x.double() @ w.double().T + b.double()
    assert float((y.double() - exact).abs().max() / exact.abs().max()) < 0.03
    alone = torch.cat([torch.ops.multibatch.packed_linear(x[i : i + 1], *rest) for i in range(m)])
    assert torch.equal(y, alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_int4_linear_is_what_the_reference_says(dtype: torch.dtype, m: int, k: int, n: int) -> None:
    torch.manual_seed(m * k + n)
    x, w, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    rest = (*packed(w, b, "int4"), n)
    y = torch.ops.multibatch.packed_linear(x, *rest)
    expected = reference.int4_linear(x, *reference.quantize_weight_by_group(w), b)
    # One step of the dtype; sums of groups are floats, and round as numbers of the size of all outputs do.
    step = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    size = float(expected.float().square().mean().sqrt())
    assert bool(((y.float() - expected.float()).abs() <= step * expected.float().abs().clamp(min=size)).all())
    alone = torch.cat([torch.ops.multibatch.packed_linear(x[i : i + 1], *rest) for i in range(m)])
    assert torch.equal(y, alone)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_row_that_is_not_finite_is_shown_and_the_others_are_spared(quantization: str) -> None:
    x = torch.ones(3, 64)
    x[1, 5], x[2] = float("inf"), 0.0
    y = torch.ops.multibatch.packed_linear(x, *packed(torch.ones(32, 64), None, quantization), 32)
    assert torch.allclose(y[0], torch.full((32,), 64.0))
    assert bool(y[1].isnan().all())
    assert float(y[2].abs().max()) == 0.0


def test_a_quantised_weight_without_its_scales_or_sums_is_refused() -> None:
    x, linear = torch.ones(1, 64), torch.ops.multibatch.packed_linear
    eight, _, scales, sums = packed(torch.ones(32, 64), None, "int8")
    four = packed(torch.ones(32, 64), None, "int4")[0]
    with pytest.raises(RuntimeError, match="needs 32 float32 scales"):
        linear(x, eight, None, None, sums, 32)
    with pytest.raises(RuntimeError, match="a weight of Char needs 32 sums of Int"):
        linear(x, eight, None, scales, None, 32)
    for wrong in (None, sums):
        with pytest.raises(RuntimeError, match="a weight of Byte needs 32 sums of Float"):
            linear(x, four, None, None, wrong, 32)
    with pytest.raises(RuntimeError, match="weight of 1152 bytes does not hold 32 x 65"):
        linear(torch.ones(1, 65), four, None, None, torch.ones(32), 32)
    with pytest.raises(RuntimeError, match="a weight of Byte gives no rows of another dtype"):
        torch.ops.multibatch.packed_embedding(torch.tensor([0]), four, None, 32, 64, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(1, 64), (3, 33), (40, 900), (70, 257)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_linear_is_the_gate_and_then_the_linear(dtype: torch.dtype, m: int, k: int, activation: str) -> None:
    torch.manual_seed(k)
    gate_up, w = (torch.randn(m, 2 * k) * 4).to(dtype), torch.randn(40, k).to(dtype)
    gate_up[0, :2] = torch.tensor([-80.0, 80.0])
    y = torch.ops.multibatch.gated_linear(gate_up, pack(w), None, None, None, 40, activation)
    expected = torch.ops.multibatch.packed_linear(reference.gate(gate_up, activation), pack(w), None, None, None, 40)
    assert float((y - expected).abs().max() / expected.abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(1, 64), (3, 33), (40, 900), (5, 257)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("round_first", [False, True])
def test_rms_norm(dtype: torch.dtype, m: int, k: int, offset: float, round_first: bool) -> None:
    torch.manual_seed(k)
    x, w = (torch.randn(m, k) * 3).to(dtype), torch.randn(k).to(dtype)
    y = torch.ops.multibatch.rms_norm(x, w, 1e-6, offset, round_first)
    expected = reference.rms_norm(x, w, 1e-6, offset, round_first)
    assert float((y.float() - expected.float()).abs().max()) <= 2 * TOLERANCE[dtype] * float(expected.abs().max())
    alone = torch.cat([torch.ops.multibatch.rms_norm(x[i : i + 1], w, 1e-6, offset, round_first) for i in range(m)])
    assert torch.equal(y, alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(1, 64), (3, 33), (14, 1030), (40, 900)])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_normed_linear_is_the_norm_and_then_the_linear(dtype: torch.dtype, m: int, k: int, quantization: str) -> None:
    torch.manual_seed(k)
    x, norm, w = (torch.randn(m, k) * 3).to(dtype), torch.randn(k).to(dtype), torch.randn(70, k).to(dtype)
    rest = (*packed(w, None, quantization), 70)
    y = torch.ops.multibatch.normed_linear(x, norm, 1e-6, 1.0, True, *rest)
    expected = torch.ops.multibatch.packed_linear(torch.ops.multibatch.rms_norm(x, norm, 1e-6, 1.0, True), *rest)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 96), (3, 33, 70), (14, 1030, 40), (40, 900, 33)])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_residual_linear_rounds_the_linear_and_then_the_sum(
    dtype: torch.dtype, m: int, k: int, n: int, quantization: str
) -> None:
    torch.manual_seed(k)
    x, w, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    residual, gate_up = (torch.randn(m, n) * 9).to(dtype), torch.randn(m, 2 * k).to(dtype)
    rest, operators = (*packed(w, b, quantization), n), torch.ops.multibatch
    assert torch.equal(operators.residual_linear(residual, x, *rest), residual + operators.packed_linear(x, *rest))
    gated = operators.gated_residual_linear(residual, gate_up, *rest, "silu")
    assert torch.equal(gated, residual + operators.gated_linear(gate_up, *rest, "silu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
# Rows of one group and of many; an intermediate size beyond one range, and one that is no whole number of panels.
@pytest.mark.parametrize(
    ("m", "k", "between"), [(1, 64, 96), (16, 64, 96), (25, 90, 64), (130, 900, 1056), (30, 64, 70)]
)
@pytest.mark.parametrize(("activation", "with_rest"), [("silu", True), ("silu", False), ("gelu_tanh", True)])
def test_gated_mlp_is_what_its_parts_are(
    dtype: torch.dtype, quantization: str, m: int, k: int, between: int, activation: str, with_rest: bool
) -> None:
    torch.manual_seed(m + between)
    operators, n = torch.ops.multibatch, 40
    x, norm = (torch.randn(m, k) * 3).to(dtype), torch.randn(k).to(dtype) if with_rest else None
    residual = (torch.randn(m, n) * 9).to(dtype) if with_rest else None
    weights = []
    for out_features, in_features in ((2 * between, k), (n, between)):
        w = (torch.randn(out_features, in_features) / in_features**0.5).to(dtype)
        bias = torch.randn(out_features).to(dtype) if with_rest else None
        weights.append(packed(w, bias, quantization))
    first, second = weights
    normed = x if norm is None else operators.rms_norm(x, norm, 1e-6, 1.0, True)
    gate_up = operators.packed_linear(normed, *first, 2 * between)
    expected = operators.gated_linear(gate_up, *second, n, activation)
    if residual is not None:
        expected = residual + expected

    def mlp(rows: slice) -> torch.Tensor:
        added = None if residual is None else residual[rows]
        y: torch.Tensor = operators.gated_mlp(
            x[rows], added, norm, 1e-6, 1.0, True, *first, *second, between, n, activation
        )
        return y

    assert torch.equal(mlp(slice(None)), expected)
    assert torch.equal(torch.cat([mlp(slice(i, i + 1)) for i in range(m)]), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
# All of x is more than a core's cache, of one range and of several; rows then stay there while the weights go by.
@pytest.mark.parametrize(("m", "k", "n"), [(4000, 900, 448), (1000, 4500, 448)])
def test_rows_that_no_cache_holds_are_what_few_rows_are(
    dtype: torch.dtype, quantization: str, m: int, k: int, n: int
) -> None:
    torch.manual_seed(m)
    operators = torch.ops.multibatch
    x, residual, rest = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype), []
    for out_features, in_features in ((n, k), (k, n // 2)):
        w = (torch.randn(out_features, in_features) / in_features**0.5).to(dtype)
        rest.append(packed(w, torch.randn(out_features).to(dtype), quantization))

    def both(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        y = operators.residual_linear(residual[rows], x[rows], *rest[0], n)
        return y, operators.gated_mlp(x[rows], x[rows], None, 0.0, 0.0, True, *rest[0], *rest[1], n // 2, k, "silu")

    some = [both(slice(i, i + 40)) for i in range(0, m, 40)]
    for i, all_rows in enumerate(both(slice(None))):
        assert torch.equal(all_rows, torch.cat([each[i] for each in some]))


def test_a_residual_of_another_shape_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"the residual must be Float\[3, 32\]"):
        torch.ops.multibatch.residual_linear(
            torch.ones(3, 31), torch.ones(3, 64), pack(torch.ones(32, 64)), None, None, None, 32
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 127, 128, 129, 20000])
def test_chunk_maxima(dtype: torch.dtype, vocabulary: int) -> None:
    torch.manual_seed(vocabulary)
    scores = torch.randn(3, vocabulary).to(dtype)
    scores[1, vocabulary // 2] = float("nan")
    scores[2, :] = -float("inf")
    out = torch.ops.multibatch.chunk_maxima(scores, 128)
    assert torch.equal(out.nan_to_num(9e4), chunk_maxima_of(scores, 128).nan_to_num(9e4))
    assert int(out.isnan().sum()) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 8192, 8193, 20000])
def test_first_maxima(dtype: torch.dtype, vocabulary: int) -> None:
    torch.manual_seed(vocabulary)
    scores = torch.randn(40, vocabulary).to(dtype)  # bfloat16 and float16 have ties among so many
    scores[1, vocabulary // 2] = float("nan")
    scores[2, :] = -float("inf")
    scores[3, vocabulary // 3] = float("inf")
    scores[4, : vocabulary - 1] = -float("inf")
    scores[5, :] = -1.5
    out = torch.ops.multibatch.first_maxima(scores)
    assert out.tolist() == first_maxima_of(scores, chunk_maxima_of(scores, 128)).tolist()
    assert out[1:6].tolist() == [-1, -1, -1, vocabulary - 1, 0]


def draw_tokens(logits: torch.Tensor, bits: list[int], temperature: float = 1.0, scale: float = 2.0**40) -> list[int]:
    """One row of logits, as many draws as there are random bits; nothing but the temperature restricts them."""
    n = len(bits)
    doubles = torch.ones(n, dtype=torch.float64)
    integers = torch.zeros(n, dtype=torch.int64), torch.tensor(bits)
    options = (torch.full((n,), temperature), integers[0], doubles, -torch.inf * doubles, integers[1])
    found: list[int] = torch.ops.multibatch.draw_tokens(logits.expand(n, -1), *options, scale).tolist()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 129, 20000])
def test_draws_are_the_inverse_of_the_running_sum(dtype: torch.dtype, vocabulary: int) -> None:
    torch.manual_seed(vocabulary)
    logits = (torch.randn(vocabulary) * 3).to(dtype)
    logits[1::3] = -torch.inf
    shares = (logits.double() / 0.7).softmax(0).cumsum(0)
    uniforms = [0.0, 0.25, 0.5, 0.9, 0.999, 1 - 2**-53]
    drawn = draw_tokens(logits, [int(u * 2**53) for u in uniforms], 0.7)
    for token, u in zip(drawn, uniforms, strict=True):
        # An exponent is a float near the exact one, and so is its power.
        assert float(shares[token]) > u - 1e-5
        assert (0.0 if token == 0 else float(shares[token - 1])) < u + 1e-5
        assert torch.isfinite(logits[token])


def test_a_row_without_a_finite_maximum_has_no_draw() -> None:
    for wrong in (torch.inf, torch.nan):
        assert draw_tokens(torch.tensor([1.0, wrong, 2.0]), [5]) == [-1]
    assert draw_tokens(torch.full((3,), -torch.inf), [5]) == [-1]
    assert draw_tokens(torch.tensor([3e38, 0.0]), [5], temperature=0.01) == [-1]


def test_draws_refuse_options_that_do_not_fit() -> None:
    with pytest.raises(RuntimeError, match=r"draw_tokens: logits .*allowed: \[n, V\]"):
        torch.ops.multibatch.draw_tokens(torch.zeros(3), *[torch.zeros(3)] * 5, 1.0)
    with pytest.raises(RuntimeError, match=r"draw_tokens: options .*one for each of 2 rows"):
        torch.ops.multibatch.draw_tokens(torch.zeros(2, 3), *[torch.zeros(3)] * 5, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 100, 128, 5000])
@pytest.mark.parametrize("nats", [0.0, 1.0, 5.0])
def test_draws_of_the_operators_are_those_of_pytorch(dtype: torch.dtype, vocabulary: int, nats: float) -> None:
    torch.manual_seed(vocabulary)
    options: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 7}, {"top_k": 20, "top_p": 0.5}, {"min_p": 0.1}]
    options += [{"temperature": 0.0}, {"repetition_penalty": 1.5}, {"top_p": 0.7, "min_p": 0.01}, {"temperature": 0.3}]
    options += [{"temperature": 0.0, "repetition_penalty": 1.2}, {"top_k": 100000}, {"top_p": 1e-6}, {"top_k": 1}]
    rows = [
        SamplingRow(params=SamplingParams(**each), seed=i, position=i, output_token_ids=[1, 2])
        for i, each in enumerate(options)
    ]
    logits = (torch.randn(len(rows), vocabulary) * nats).to(dtype)
    operators = Sampler(ops.logit_passes())
    assert operators.sample(logits, rows) == Sampler().sample(logits, rows)
    alone = [operators.sample(logits[i : i + 1], [row]).token_ids[0] for i, row in enumerate(rows)]
    assert alone == operators.sample(logits, rows).token_ids


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_reads_rows_of_a_packed_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(70, 33).to(dtype)
    ids = torch.tensor([[0, 69, 31, 32]])
    embed = torch.ops.multibatch.packed_embedding
    assert torch.equal(embed(ids, pack(weight), None, 70, 33, dtype), weight[ids])
    rounded, scales = reference.quantize_weight(weight)
    expected = (rounded.float() * scales[:, None]).to(dtype)[ids]
    assert torch.equal(embed(ids, pack(rounded), scales, 70, 33, dtype), expected)
    with pytest.raises(RuntimeError, match="outside the vocabulary of 70"):
        embed(torch.tensor([70]), pack(weight), None, 70, 33, dtype)


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8])
def test_the_peak_rate_is_measured_for_as_long_as_asked(weight: torch.dtype) -> None:
    start = time.perf_counter()
    rate = ops.peak_rate(weight, 0.05)
    seconds = time.perf_counter() - start
    assert seconds >= 0.05
    # At least one round of 64 products of a panel by every row, and no more than 10^13 a second.
    assert 64 * 32 / seconds < rate < 1e13


def test_the_peak_rate_of_another_type_is_refused() -> None:
    with pytest.raises(RuntimeError, match="peak_rate: dtype Int; allowed: float32"):
        ops.peak_rate(torch.int32, 0.01)


def test_threads_that_are_put_aside_and_resized_lose_no_tile() -> None:
    import multiprocessing

    torch.manual_seed(0)
    x, w = torch.randn(4, 512), pack(torch.randn(6000, 512))
    expected = torch.ops.multibatch.packed_linear(x, w, None, None, None, 6000)
    neighbours = [multiprocessing.get_context("fork").Process(target=_spin, daemon=True) for _ in range(4)]
    for neighbour in neighbours:
        neighbour.start()
    try:
        until = time.monotonic() + 3
        rounds = 0
        while time.monotonic() < until or rounds < 20:
            ops.set_num_threads(1 + rounds // 8 % 4)
            assert torch.equal(torch.ops.multibatch.packed_linear(x, w, None, None, None, 6000), expected)
            rounds += 1
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.join()
        ops.set_num_threads(2)


def _spin() -> None:
    while True:
        pass


@pytest.mark.skipif("MULTIBATCH_TEST_OPERATORS" in os.environ, reason="this is the run that the test starts")
def test_the_build_for_lesser_processors_passes_the_same_tests() -> None:
    files = [Path(__file__), Path(__file__).with_name("test_attention_operators.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)],
        env={**os.environ, "MULTIBATCH_TEST_OPERATORS": "portable"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
