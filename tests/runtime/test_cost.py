"""Costs are looked up by size, and a time that cannot be one is refused."""

from __future__ import annotations

import pytest

from multibatch.cost import CostModel
from multibatch.errors import ConfigError


def test_costs_are_looked_up_by_size() -> None:
    cost = CostModel.from_mapping({8: 20.0, 1: 10.0})
    assert cost.steps == ((1, 10.0), (8, 20.0))
    assert cost.ms(8) == 20.0
    assert cost.ms(4) is None


def test_tokens_per_second_count_every_row() -> None:
    cost = CostModel.from_mapping({1: 10.0, 8: 20.0})
    assert cost.tokens_per_second_at_full(1) == pytest.approx(100.0)
    assert cost.tokens_per_second_at_full(8) == pytest.approx(400.0)
    assert cost.tokens_per_second_at_full(4) is None


def test_nothing_measured_is_a_cost_model_too() -> None:
    assert CostModel().ms(1) is None


@pytest.mark.parametrize("ms", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_time_is_refused(ms: float) -> None:
    with pytest.raises(ConfigError, match="batch size 4"):
        CostModel.from_mapping({4: ms})


@pytest.mark.parametrize("size", [0, -1, True])
def test_what_is_no_size_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="sizes are ints >= 1"):
        CostModel.from_mapping({size: 1.0})


@pytest.mark.parametrize("steps", [((4, 1.0), (4, 2.0)), ((4, 1.0), (1, 2.0))])
def test_pairs_have_to_ascend(steps: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ConfigError, match="ascend"):
        CostModel(steps)
