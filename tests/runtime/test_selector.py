"""Slots cover the live rows once, in decoders that exist, by each policy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multibatch.cost import CostModel
from multibatch.errors import CapacityError, ConfigError
from multibatch.ladder import DecoderLadder
from multibatch.selector import MARGIN, Selector, SelectorPolicy, Slot, select_chunk

POLICIES: tuple[SelectorPolicy, ...] = ("cheapest", "nearest", "pad_to_max", "one_by_one")
ladders = st.lists(st.integers(2, 40), max_size=5, unique=True).map(lambda s: DecoderLadder([1, *s]))


@given(ladder=ladders, policy=st.sampled_from(POLICIES))
def test_slots_partition_the_live_rows(ladder: DecoderLadder, policy: SelectorPolicy) -> None:
    selector = Selector(ladder, policy)
    for n in range(1, ladder.max + 1):
        slots = selector.select(n)
        assert [row for slot in slots for row in range(slot.start, slot.stop)] == list(range(n))
        assert all(slot.batch_size in ladder.sizes for slot in slots)
        assert all(slot.num_live >= 1 and slot.num_padded >= 0 for slot in slots)
        assert all(slot.num_live + slot.num_padded == slot.batch_size for slot in slots)


@pytest.mark.parametrize(("n", "size"), [(1, 1), (2, 4), (4, 4), (5, 8), (8, 8)])
def test_nearest_takes_the_smallest_that_fits(n: int, size: int) -> None:
    assert Selector(DecoderLadder([8, 4, 1])).select(n) == (Slot(size, 0, n),)


@given(ladder=ladders)
def test_nearest_pads_least_of_all_single_calls(ladder: DecoderLadder) -> None:
    selector = Selector(ladder, "nearest")
    for n in range(1, ladder.max + 1):
        (slot,) = selector.select(n)
        assert slot.num_padded == min(size - n for size in ladder.sizes if size >= n)


def test_cheapest_splits_where_that_was_measured_to_pay() -> None:
    cost = CostModel.from_mapping({1: 32.0, 2: 32.0, 4: 35.0, 8: 42.0, 16: 80.0})
    selector = Selector(DecoderLadder([16, 8, 4, 2, 1]), "cheapest", cost)
    assert selector.select(9) == (Slot(8, 0, 8), Slot(1, 8, 9))  # 74 for 80
    assert selector.select(10) == (Slot(8, 0, 8), Slot(2, 8, 10))
    assert selector.select(11) == (Slot(16, 0, 11),)  # 77 is not cheaper by the margin
    assert selector.select(5) == (Slot(8, 0, 5),)
    assert selector.select(16) == (Slot(16, 0, 16),)


def test_cheapest_is_nearest_where_nothing_was_measured_or_it_ties() -> None:
    ladder = DecoderLadder([8, 4, 1])
    for cost in (None, CostModel(), CostModel.from_mapping({1: 1.0, 4: 4.0, 8: 8.0})):
        for n in range(1, 9):
            if cost is None or not cost.steps or n in (1, 4, 8):
                assert Selector(ladder, "cheapest", cost).select(n) == Selector(ladder).select(n)
    # 5 rows: 4 and 1 take 5 ms, the decoder of 8 takes 8
    cost = CostModel.from_mapping({1: 1.0, 4: 4.0, 8: 8.0})
    assert Selector(ladder, "cheapest", cost).select(5) == (Slot(4, 0, 4), Slot(1, 4, 5))


@given(ladder=ladders, data=st.data())
def test_cheapest_never_costs_more_than_nearest_and_covers_the_rows(ladder: DecoderLadder, data: st.DataObject) -> None:
    times = {size: data.draw(st.floats(0.5, 100)) for size in ladder.sizes if data.draw(st.booleans())}
    cost = CostModel.from_mapping(times)
    selector = Selector(ladder, "cheapest", cost)
    for n in range(1, ladder.max + 1):
        slots = selector.select(n)
        assert [row for slot in slots for row in range(slot.start, slot.stop)] == list(range(n))
        assert all(slot.num_live >= 1 for slot in slots)
        nearest = ladder.smallest_fitting(n)
        if len(slots) > 1:
            assert sum(times[slot.batch_size] for slot in slots) < times[nearest] * (1 - MARGIN) + 1e-9
        else:
            assert slots[0].batch_size == nearest


def test_pad_to_max_always_takes_the_largest() -> None:
    selector = Selector(DecoderLadder([8, 4, 1]), "pad_to_max")
    assert [selector.select(n) for n in (1, 8)] == [(Slot(8, 0, 1),), (Slot(8, 0, 8),)]
    assert selector.select(1)[0].num_padded == 7


def test_one_by_one_runs_each_row_alone() -> None:
    selector = Selector(DecoderLadder([8, 1]), "one_by_one")
    assert selector.select(3) == (Slot(1, 0, 1), Slot(1, 1, 2), Slot(1, 2, 3))


def test_one_by_one_needs_size_one() -> None:
    with pytest.raises(ConfigError, match="needs a decoder of batch size 1; the ladder has 4, 8"):
        Selector(DecoderLadder([8, 4]), "one_by_one")


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="'fastest'; choose one of cheapest, nearest, pad_to_max, one_by"):
        Selector(DecoderLadder([1]), "fastest")  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_outside_the_ladder_are_refused(policy: SelectorPolicy) -> None:
    selector = Selector(DecoderLadder([8, 1]), policy)
    with pytest.raises(CapacityError, match="9 live rows"):
        selector.select(9)
    for n in (0, -1):
        with pytest.raises(ConfigError, match="live rows"):
            selector.select(n)


@pytest.mark.parametrize(("tokens", "size"), [(1, 32), (32, 32), (33, 128), (128, 128)])
def test_the_smallest_prefill_program_is_taken(tokens: int, size: int) -> None:
    assert select_chunk(tokens, (128, 32)) == size


def test_a_chunk_that_no_prefill_program_holds_is_refused() -> None:
    with pytest.raises(CapacityError, match=r"129 prefill tokens.* 32, 128"):
        select_chunk(129, (128, 32))
    with pytest.raises(CapacityError, match="none"):
        select_chunk(1, ())
    with pytest.raises(ConfigError, match="at least 1"):
        select_chunk(0, (32,))
