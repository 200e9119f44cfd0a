"""The ladder covers every n, and a user's sizes become one or are refused with what to do."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multibatch.errors import CapacityError, ConfigError
from multibatch.ladder import DecoderLadder, parse_batch_sizes, resolve_ladder

size_lists = st.lists(st.integers(1, 200), min_size=1, max_size=12)


@given(sizes=size_lists, max_extra=st.none() | st.integers(0, 50))
def test_every_n_fits_and_no_smaller_size_would(sizes: list[int], max_extra: int | None) -> None:
    max_num_seqs = None if max_extra is None else max(sizes) + max_extra
    resolved = resolve_ladder(sizes, max_num_seqs)
    ladder = resolved.ladder
    assert ladder.max == resolved.max_num_seqs
    for n in range(1, ladder.max + 1):
        fitting = ladder.smallest_fitting(n)
        assert fitting in ladder.sizes
        assert fitting >= n
        assert not [size for size in ladder.sizes if n <= size < fitting]


@given(sizes=size_lists)
def test_order_and_repetitions_do_not_matter_and_the_callers_list_stays(sizes: list[int]) -> None:
    before = list(sizes)
    ladder = resolve_ladder(sizes, None).ladder
    assert sizes == before
    assert ladder.sizes == tuple(sorted(set(sizes)))
    assert ladder == resolve_ladder(reversed(sizes), None).ladder
    assert ladder == resolve_ladder(sizes + sizes, None).ladder
    assert DecoderLadder(ladder.sizes[::-1]) == ladder


@given(sizes=size_lists)
def test_what_is_printed_with_commas_is_read_back(sizes: list[int]) -> None:
    assert parse_batch_sizes(",".join(map(str, sizes))) == sizes


def test_too_many_rows_says_what_to_do() -> None:
    ladder = DecoderLadder([8, 4, 1])
    with pytest.raises(CapacityError) as caught:
        ladder.smallest_fitting(9)
    message = str(caught.value)
    assert message.startswith("9 live rows, largest compiled batch size is 8; recompile with")
    assert "--decoder-batch-sizes 9,8,4,1" in message


@pytest.mark.parametrize("n", [0, -1])
def test_fewer_rows_than_one_are_refused(n: int) -> None:
    with pytest.raises(ConfigError, match="1 to 8"):
        DecoderLadder([8]).smallest_fitting(n)


@pytest.mark.parametrize("sizes", [[], [0], [4, -1], [True], [4.0], ["4"], [4, 4]])
def test_what_is_no_ladder_is_refused(sizes: list[int]) -> None:
    with pytest.raises(ConfigError):
        DecoderLadder(sizes)


def test_a_ladder_is_a_value() -> None:
    ladder = DecoderLadder([1, 8])
    assert pickle.loads(pickle.dumps(ladder)) == ladder
    assert hash(ladder) == hash(DecoderLadder([8, 1]))
    with pytest.raises(AttributeError):
        ladder.sizes = (3,)  # type: ignore[misc]


def test_with_size_adds_one_and_leaves_the_old_ladder() -> None:
    ladder = DecoderLadder([8, 1])
    assert ladder.with_size(4).sizes == (1, 4, 8)
    assert ladder.with_size(16).max == 16
    assert ladder.sizes == (1, 8)
    with pytest.raises(ConfigError, match="already"):
        ladder.with_size(8)
    with pytest.raises(ConfigError, match="0 is no decode batch size"):
        ladder.with_size(0)


def test_without_size_keeps_at_least_one() -> None:
    ladder = DecoderLadder([8, 4, 1])
    assert ladder.without_size(4).sizes == (1, 8)
    assert ladder.sizes == (1, 4, 8)
    with pytest.raises(ConfigError, match="2 is not in the ladder"):
        ladder.without_size(2)
    with pytest.raises(ConfigError, match="only one"):
        DecoderLadder([8]).without_size(8)


def test_losing_the_largest_is_said() -> None:
    ladder = DecoderLadder([8, 4, 1])
    warning = ladder.max_warning(ladder.without_size(8))
    assert warning is not None
    assert "from 8 to 4" in warning
    assert ladder.max_warning(ladder.without_size(1)) is None
    assert ladder.max_warning(ladder.with_size(16)) is None


@pytest.mark.parametrize("sizes", [[4, 1], [4], [1]])
def test_the_maximum_is_added_with_a_warning(sizes: list[int]) -> None:
    resolved = resolve_ladder(sizes, 8)
    assert resolved.ladder.sizes == (*sorted(sizes), 8)
    assert resolved.added == (8,)
    assert resolved.max_num_seqs == 8
    assert resolved.warning is not None
    assert "batch size 8 was added" in resolved.warning


@pytest.mark.parametrize("max_num_seqs", [None, 8])
def test_nothing_is_added_where_the_maximum_is_listed(max_num_seqs: int | None) -> None:
    resolved = resolve_ladder((8, 4, 8), max_num_seqs)
    assert (resolved.ladder.sizes, resolved.max_num_seqs) == ((4, 8), 8)
    assert resolved.added == ()
    assert resolved.warning is None


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([0], "0 is no decode batch size"),
        ([8, -1], "-1 is no decode batch size"),
        (["x"], "'x' is no decode batch size"),
        ([4.5], "4.5 is no decode batch size"),
        ([True, 4], "True is no decode batch size"),
        ([None], "None is no decode batch size"),
        ([], "no decode batch size given"),
        ([16, 4], "16 is larger than max_num_seqs 8"),
        ([16], "16 is larger than max_num_seqs 8"),
    ],
)
def test_sizes_that_cannot_be_compiled_are_refused(sizes: list[object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve_ladder(sizes, 8)


@pytest.mark.parametrize("max_num_seqs", [0, -1, True])
def test_a_max_num_seqs_that_is_none_is_refused(max_num_seqs: int) -> None:
    with pytest.raises(ConfigError, match="max_num_seqs is"):
        resolve_ladder([1], max_num_seqs)


def test_spaces_around_commas_are_allowed() -> None:
    assert parse_batch_sizes(" 8, 4 ,1") == [8, 4, 1]


@pytest.mark.parametrize(
    "text",
    ["", " ", "x", "4.5", "8,", ",8", "8,,1", "-1", "+4", "0", "1_0", "٣", "8 4", "9" * 5000],
)
def test_text_that_lists_no_sizes_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="whole numbers >= 1"):
        parse_batch_sizes(text)
