from __future__ import annotations

from dataclasses import replace

import pytest

from multibatch.manifest import Manifest
from multibatch.roofline import Roofline, best_of, step_bytes, step_products
from tests.runtime.small_artifact import GOLDEN

# 2000 bytes of weights; 700 products per token and 300 per row of logits; one layer of 2 heads with 8 + 8 bfloat16.
MANIFEST = Manifest.from_json(GOLDEN.read_text(encoding="utf-8"))


def test_bytes_are_the_weights_once_and_the_keys_and_values_of_each_row() -> None:
    assert step_bytes(MANIFEST, []) == 2000
    assert step_bytes(MANIFEST, [3, 5]) == 2000 + 8 * 2 * 16 * 2


def test_a_prompt_gives_one_row_of_logits() -> None:
    assert step_products(MANIFEST, 4) == 4 * 1000
    assert step_products(MANIFEST, 4, 10) == 4 * 1000 + 10 * 700 + 300


@pytest.mark.parametrize(
    ("rows", "ms"),
    [(1, 2000 / 1e6), (2, 2000 / 1e6), (8, 8000 / 2e6)],  # few rows wait for the weights, many for the products
)
def test_a_step_takes_the_longer_of_the_two(rows: int, ms: float) -> None:
    assert Roofline(bandwidth_gbps=1.0, gproducts=2.0).step_ms(MANIFEST, [0] * rows) == pytest.approx(ms)


def test_an_unknown_rate_limits_nothing() -> None:
    limit = Roofline(bandwidth_gbps=1.0, gproducts=None)
    assert limit.step_ms(MANIFEST, [0] * 8) == limit.step_ms(replace(MANIFEST), []) == pytest.approx(0.002)


def test_the_best_of_each_rate_counts() -> None:
    found = [Roofline(bandwidth_gbps=b, gproducts=g) for b, g in ((1.0, 5.0), (3.0, 4.0), (2.0, None))]
    assert best_of(found) == Roofline(bandwidth_gbps=3.0, gproducts=5.0)
    assert best_of(found[2:]) == found[2]
