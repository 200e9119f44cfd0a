"""How weights are rounded to fewer bits."""

from __future__ import annotations

import pytest
import torch

from multibatch.reference import GROUP, int4_linear, quantize_weight_by_group, weight_of_groups


def test_multiples_of_a_scale_are_kept_exactly() -> None:
    torch.manual_seed(0)
    steps = torch.randint(-8, 8, (5, 96)).float()
    steps[:, ::GROUP] = -8
    scales = torch.tensor([0.5, -2.0, 2.0**-100, 2.0**100, 0.0])[:, None]
    rounded, found = quantize_weight_by_group(steps * scales)
    assert torch.equal(weight_of_groups(rounded, found), steps * scales)
    assert int(rounded.min()) >= -8
    assert int(rounded.max()) <= 7


@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("k", [1, 31, 32, 33, 100])
def test_no_group_is_further_off_than_with_its_largest_number_as_minus_8(k: int, magnitude: float) -> None:
    torch.manual_seed(k)
    weight = torch.nn.functional.pad(torch.randn(20, k) * magnitude, (0, -k % GROUP))
    rounded, scales = quantize_weight_by_group(weight[:, :k])
    assert tuple(rounded.shape) == (20, k)
    assert tuple(scales.shape) == (20, -(-k // GROUP))
    groups = weight.view(20, -1, GROUP)
    plain = (groups.gather(2, groups.abs().argmax(2, keepdim=True)) / -8).bfloat16().float()
    errors = (((groups / plain).round().clamp(-8, 7) * plain - groups) / magnitude).square().sum(2)
    ours = torch.nn.functional.pad(weight_of_groups(rounded, scales), (0, -k % GROUP)).view(20, -1, GROUP)
    ours = (ours - groups) / magnitude
    assert bool((ours.square().sum(2) <= errors * (1 + 1e-5) + 1e-12).all())
    if k >= GROUP:
        assert float(ours.square().sum()) < 0.97 * float(errors.sum())


def test_four_bits_are_near_the_original() -> None:
    torch.manual_seed(1)
    x, weight, bias = torch.randn(7, 900), torch.randn(50, 900), torch.randn(50)
    exact = x @ weight.T + bias
    y = int4_linear(x, *quantize_weight_by_group(weight), bias)
    assert 0.05 < float((y - exact).norm() / exact.norm()) < 0.1
