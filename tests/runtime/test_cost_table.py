"""Cost tables: read, written, looked up and interpolated."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multibatch.cost_table import CostRow, CostTable, Slowdown
from multibatch.errors import ConfigError


def linear_table() -> CostTable:
    rows = [CostRow(128, 0, chunk, 5 + 0.5 * chunk) for chunk in (16, 64)]
    rows += [
        CostRow(ctx, d_num, chunk, 10 + 0.01 * ctx + 2 * d_num + 0.5 * chunk)
        for ctx in (128, 512)
        for d_num in (1, 4)
        for chunk in (0, 16, 64)
    ]
    return CostTable(reversed(rows))


def test_a_table_survives_its_csv() -> None:
    table = linear_table()
    text = table.to_csv()
    assert text.splitlines()[0] == "ctx_len,d_num,chunk_size,cost"
    assert CostTable.from_csv(text).rows == table.rows


def test_further_columns_are_ignored_and_their_order_is_free() -> None:
    table = CostTable.from_csv("cost,note,chunk_size,d_num,ctx_len\n1.5,x,0,1,128\n")
    assert table.rows == (CostRow(128, 1, 0, 1.5),)


@given(ctx=st.floats(1, 2000), d_num=st.integers(1, 8), chunk=st.integers(0, 200))
def test_predictions_are_exact_where_costs_are_linear(ctx: float, d_num: int, chunk: int) -> None:
    expected = 10 + 0.01 * max(ctx, 128) + 2 * d_num + 0.5 * chunk
    assert math.isclose(linear_table().predict(ctx, d_num, chunk), expected, rel_tol=1e-9)


def test_prompts_alone_have_a_prediction_of_their_own() -> None:
    assert linear_table().predict(0.0, 0, 40) == pytest.approx(25.0)
    assert linear_table().predict(0.0, 0, 128) == pytest.approx(69.0)
    with pytest.raises(ConfigError, match="no steps of prompts alone"):
        CostTable([CostRow(128, 1, 0, 1.0)]).predict(0.0, 0, 16)


@pytest.mark.parametrize(
    ("ctx", "d_num", "target", "chunk"),
    [
        (128, 1, 21.28, 16),
        (128, 1, 21.27, 0),
        (129, 1, 21.28, 0),  # as for 512
        (128, 2, 21.28, 0),  # as for 4
        (512, 4, 1000, 64),
        (513, 1, 1000, None),
        (128, 5, 1000, None),
        (128, 1, 1, None),
    ],
)
def test_look_up_takes_the_next_that_was_measured(ctx: int, d_num: int, target: float, chunk: int | None) -> None:
    assert linear_table().largest_chunk(ctx, d_num, target) == chunk


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no column ctx_len, d_num, chunk_size, cost"),
        ("ctx_len,d_num,cost\n1,1,1\n", "has no column chunk_size"),
        ("ctx_len,d_num,chunk_size,cost\n", "without rows"),
        ("ctx_len,d_num,chunk_size,cost\n128,1,16,5\n128,1,x,5\n", "table.csv, line 3: .*'x'"),
        ("ctx_len,d_num,chunk_size,cost\n128,1,16\n", "table.csv, line 2"),
        ("ctx_len,d_num,chunk_size,cost\n128,1,16,5\n128,1,16,6\n", "two rows for ctx_len 128, d_num 1, chunk_size 16"),
        ("ctx_len,d_num,chunk_size,cost\n128,-1,16,5\n", "d_num -1"),
        ("ctx_len,d_num,chunk_size,cost\n128,1,16,0\n", "cost of 0.0 ms"),
        ("ctx_len,d_num,chunk_size,cost\n128,1,16,nan\n", "cost of nan ms"),
        ("ctx_len,d_num,chunk_size,cost\n128,0,0,5\n", "that is no step"),
    ],
)
def test_a_table_that_cannot_be_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CostTable.from_csv(text, "table.csv")


def test_a_table_in_an_artifact_is_checked(eager_artifact: Any, tmp_path: Any) -> None:
    import shutil

    from multibatch.artifact import Artifact
    from multibatch.errors import ArtifactCorruptError
    from multibatch.publish import store_cost_table

    folder = tmp_path / "artifact"
    shutil.copytree(eager_artifact, folder)
    assert Artifact.open(folder).cost_table() is None
    for table in (linear_table(), CostTable([CostRow(128, 1, 0, 1.0)])):
        store_cost_table(folder, table)
        stored = Artifact.open(folder, verify="hashes").cost_table()
        assert stored is not None
        assert stored.rows == table.rows
    file = folder / "cost_table.csv"
    file.write_text(file.read_text().replace("1.0", "2.0"))
    with pytest.raises(ArtifactCorruptError, match=r"cost_table.csv"):
        Artifact.open(folder).cost_table()


def test_a_scaled_table_tells_steps_with_prompts_from_those_without() -> None:
    rows = [CostRow(128, 1, 0, 10.0), CostRow(128, 1, 64, 40.0), CostRow(128, 0, 64, 30.0)]
    scaled = CostTable(rows).scaled(Slowdown(decode=2.0, prompts=0.5))
    assert [(row.d_num, row.chunk_size, row.cost) for row in scaled.rows] == [
        (0, 64, 15.0),
        (1, 0, 20.0),
        (1, 64, 20.0),
    ]


@given(st.lists(st.floats(1.0, 100.0), min_size=18, max_size=18))
def test_a_monotone_table_never_falls_and_leaves_alone_what_did_not(costs: list[float]) -> None:
    grid = [(ctx, d, chunk) for ctx in (128, 512) for d in (1, 2, 4) for chunk in (0, 16, 32)]
    rows = [CostRow(*point, cost) for point, cost in zip(grid, costs, strict=True)]
    once = CostTable([*rows, CostRow(128, 0, 16, 3.0)]).monotone()
    for small in once.rows:
        for large in once.rows:
            if small.is_within(large):
                assert small.cost <= large.cost
    assert min(costs + [3.0]) <= once.rows[0].cost <= once.rows[-1].cost <= max(costs + [3.0])
    for before, after in zip(once.rows, once.monotone().rows, strict=True):
        assert after.cost == pytest.approx(before.cost)


def test_a_step_of_prompts_alone_is_within_steps_of_any_context() -> None:
    alone, mixed = CostRow(128, 0, 16, 50.0), CostRow(64, 1, 16, 30.0)
    assert alone.is_within(mixed)
    assert not mixed.is_within(alone)
    assert {row.cost for row in CostTable([alone, mixed]).monotone().rows} == {40.0}
