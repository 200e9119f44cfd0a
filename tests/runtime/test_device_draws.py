"""Draws of all rows at once are those of one row after the other."""

from __future__ import annotations

import math
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multibatch import device_draws
from multibatch.device_draws import _share, draw_rows
from multibatch.draws import draw, draw_options
from multibatch.errors import StepError
from multibatch.logit_passes import LogitPasses
from multibatch.sampling_params import SamplingParams
from multibatch.sampling_row import SamplingRow


@st.composite
def rows(draw: st.DrawFn) -> list[SamplingRow]:
    params = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.01, 0.7, 1.0, 2.0]),
        top_k=st.sampled_from([0, 1, 2, 40, 10**6]),
        top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3, 1e-6]),
        min_p=st.sampled_from([0.0, 0.0, 0.05, 1.0]),
    )
    row = st.builds(SamplingRow, params=params, seed=st.integers(0, 2**64 - 1), position=st.integers(0, 10**6))
    return draw(st.lists(row, min_size=1, max_size=6))


@settings(max_examples=150, deadline=None)
@given(
    rows=rows(),
    seed=st.integers(0, 10**6),
    vocabulary=st.sampled_from([1, 2, 127, 128, 5000]),
    at_once=st.sampled_from([1, 2 * 128, 4 * 128 + 1, 1 << 22]),
)
def test_each_row_gets_the_token_that_it_gets_alone(
    rows: list[SamplingRow], seed: int, vocabulary: int, at_once: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), vocabulary, generator=generator) * 4
    logits = logits.round() if seed % 3 == 0 else logits  # many equal ones
    logits[:, ::7] = logits[:, ::7].masked_fill(torch.rand(logits[:, ::7].shape, generator=generator) < 0.5, -torch.inf)
    logits[:, -1] = 0.0
    expected = draw(logits, rows, LogitPasses())
    with mock.patch.object(device_draws, "_LOGITS_AT_ONCE", at_once):
        assert draw_rows(logits, draw_options(rows, vocabulary)).tolist() == expected


def test_a_row_without_a_finite_maximum_gets_none_and_the_others_theirs() -> None:
    logits = torch.zeros(5, 200)
    logits[0, 3], logits[1, 4], logits[2] = math.inf, math.nan, -math.inf
    logits[3, 5], logits[4, 6] = 3e38, 9.0
    rows = [SamplingRow(params=SamplingParams(temperature=t), seed=1, position=2) for t in (1.0, 0.0, 1.0, 0.01, 0.0)]
    assert draw_rows(logits, draw_options(rows, 200)).tolist() == [-1, -1, -1, -1, 6]
    for i in range(4):
        try:
            draw(logits[i : i + 1], rows[i : i + 1], LogitPasses())
        except StepError:
            continue
        raise AssertionError(f"row {i} was drawn")


@given(bits=st.integers(0, 2**53 - 1), total=st.integers(0, 2**62 - 1))
def test_products_of_more_than_64_bits_are_whole(bits: int, total: int) -> None:
    assert int(_share(torch.tensor(bits), torch.tensor(total))) == bits * total >> 53
