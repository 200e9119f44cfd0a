"""The padded and the exact inputs of a program call hold the same rows."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from multibatch.batch import DecodeRow, InputBuffers, decode_inputs, decode_row, prefill_inputs, step_inputs
from multibatch.request import Request, Sequence
from multibatch.sampling_params import SamplingParams
from multibatch.scheduled_step import PrefillChunk


def chunk(prompt: list[int], blocks: list[int], start: int, num_tokens: int) -> PrefillChunk:
    request = Request(request_id="r", prompt_token_ids=tuple(prompt), params=SamplingParams(), seed=0)
    return PrefillChunk(Sequence(request, num_computed_tokens=start, block_ids=blocks), start, num_tokens)


WHOLE = chunk([5, 6, 7], [4], 0, 3)
BEGUN = chunk([9] * 10, [1, 2, 3], 4, 5)
ROWS = [DecodeRow(11, 2, [7]), DecodeRow(12, 5, [8, 9])]


def test_chunks_come_first_then_decode_rows() -> None:
    inputs = step_inputs([WHOLE, BEGUN], ROWS, max_blocks=3, block_size=4)
    assert inputs.token_ids.tolist() == [[5, 6, 7, 9, 9, 9, 9, 9, 11, 12]]
    assert inputs.positions.tolist() == [[0, 1, 2, 4, 5, 6, 7, 8, 2, 5]]
    assert inputs.slot_mapping.tolist() == [16, 17, 18, 8, 9, 10, 11, 12, 30, 37]
    assert inputs.cu_seqlens.tolist() == [0, 3, 8, 9, 10]
    assert inputs.block_tables.tolist() == [[4, 0, 0], [1, 2, 3], [7, 0, 0], [8, 9, 0]]
    assert inputs.seq_lens.tolist() == [3, 9, 3, 6]


def test_logits_are_asked_for_only_where_a_token_is_sampled() -> None:
    assert step_inputs([BEGUN, WHOLE], ROWS, 3, 4).logits_to_keep.tolist() == [7, 8, 9]
    nothing = step_inputs([BEGUN], (), 3, 4).logits_to_keep
    assert nothing.shape == (0,) and nothing.dtype == torch.int64


def test_without_padding_both_forms_are_the_same() -> None:
    exact = step_inputs([WHOLE], (), 3, 4).tensors()
    padded = prefill_inputs([WHOLE], 3, 1, 3, 4).tensors()
    assert all(torch.equal(a, b) for a, b in zip(exact, padded, strict=True))
    exact, padded = step_inputs([], ROWS, 3, 4).tensors(), decode_inputs(ROWS, 2, 3, 4).tensors()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(exact, padded, strict=True))


def test_padded_rows_stand_on_the_scratch_block() -> None:
    inputs = decode_inputs(ROWS, 4, max_blocks=3, block_size=4)
    assert [x.tolist() for x in inputs.tensors()] == [
        [[11, 12, 0, 0]],
        [[2, 5, 0, 0]],
        [30, 37, 0, 0],
        [0, 1, 2, 3, 4],
        [[7, 0, 0], [8, 9, 0], [0, 0, 0], [0, 0, 0]],
        [3, 6, 1, 1],
        [0, 1, 2, 3],
    ]


def test_prompt_logprobs_ask_for_the_positions_before_prompt_tokens() -> None:
    def asking(num_prompt: int, num_output: int, start: int, num_tokens: int) -> PrefillChunk:
        params = SamplingParams(prompt_logprobs=1)
        request = Request(request_id="r", prompt_token_ids=(5,) * num_prompt, params=params, seed=0)
        sequence = Sequence(request, token_ids=[5] * (num_prompt + num_output), block_ids=[1, 2, 3])
        return PrefillChunk(sequence, start, num_tokens)

    assert asking(10, 0, 0, 4).prompt_positions == range(4)
    assert asking(10, 0, 4, 6).prompt_positions == range(4, 9)  # the last one's logits are of the first new token
    assert len(asking(10, 0, 9, 1).prompt_positions) == 0
    assert len(asking(10, 2, 0, 12).prompt_positions) == 0  # preempted: they were given
    assert len(WHOLE.prompt_positions) == 0
    # Sampled tokens first, then every position asked for.
    chunks = [BEGUN, asking(10, 0, 4, 6), WHOLE]
    assert step_inputs(chunks, ROWS, 3, 4).logits_to_keep.tolist() == [10, 13, 14, 15, 5, 6, 7, 8, 9]
    assert step_inputs([asking(9, 0, 0, 3)], (), 3, 4).logits_to_keep.tolist() == [0, 1, 2]


def test_buffers_hold_the_call_at_hand_and_no_trace_of_the_one_before() -> None:
    buffers = InputBuffers(max_shapes=2)

    one, other = decoding([3, 6], 4), decoding([2, 1], 4)
    for rows, size in ((other, 2), (one, 4), (other, 4), (one, 3), (other, 2)):  # three shapes where two have room
        kept = buffers.decode_inputs(rows, size, 3, 4)
        fresh = decode_inputs([decode_row(row) for row in rows], size, 3, 4)
        for got, expected in zip(kept.tensors(), fresh.tensors(), strict=True):
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected)
    assert buffers.decode_inputs(other, 2, 3, 4) is buffers.decode_inputs(one, 2, 3, 4)


def decoding(num_tokens: list[int], block_size: int) -> tuple[Sequence, ...]:
    """Sequences whose newest token is to be computed."""
    made = []
    for row, count in enumerate(num_tokens):
        request = Request(
            request_id=str(row), prompt_token_ids=tuple(range(row, row + count)), params=SamplingParams(), seed=0
        )
        blocks = [10 * row + i for i in range(-(-count // block_size))]
        made.append(Sequence(request, num_computed_tokens=count, block_ids=blocks))
    return tuple(made)


def grow(sequence: Sequence, token_id: int, block_size: int) -> None:
    """As a decode step does."""
    sequence.token_ids.append(token_id)
    sequence.num_computed_tokens += 1
    if sequence.num_computed_tokens > len(sequence.block_ids) * block_size:
        sequence.block_ids.append(500 + token_id)


def test_a_row_that_is_one_token_ahead_of_its_step_waits_for_its_id() -> None:
    buffers, one = InputBuffers(), decoding([3, 6], 4)
    now = [x.tolist() for x in buffers.decode_inputs(one, 2, 3, 4).tensors()]
    assert now[:3] == [[[2, 6]], [[2, 5]], [2, 11 * 4 + 1]]
    ahead = buffers.decode_inputs(one, 2, 3, 4, ahead=1)
    assert [x.tolist() for x in ahead.tensors()][:3] == [[[0, 0]], [[3, 6]], [3, 11 * 4 + 2]]
    assert ahead.seq_lens.tolist() == [4, 7]
    ahead.token_ids[0, :] = torch.tensor([77, 78])  # as a program writes them
    for row in one:
        row.token_ids += [77]
        row.num_computed_tokens += 2
        row.token_ids += [78]
    one[0].block_ids.append(3)
    again = buffers.decode_inputs(one, 2, 3, 4)  # two on
    fresh = decode_inputs([decode_row(row) for row in one], 2, 3, 4)
    assert all(torch.equal(a, b) for a, b in zip(again.tensors(), fresh.tensors(), strict=True))


def test_a_row_that_lost_its_blocks_is_written_anew() -> None:
    buffers, (row,) = InputBuffers(), decoding([6], 4)
    buffers.decode_inputs((row,), 1, 3, 4)
    row.num_preemptions, row.block_ids, row.num_computed_tokens = 1, [8, 9], 7
    row.token_ids += [70]
    found = buffers.decode_inputs((row,), 1, 3, 4)
    assert found.block_tables.tolist() == [[8, 9, 0]]
    assert found.slot_mapping.tolist() == [9 * 4 + 2]


@given(data=st.data())
def test_rows_that_go_on_are_written_as_new_ones_are(data: st.DataObject) -> None:
    size, max_blocks = 4, 12
    sequences = decoding(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)), size)
    buffers = InputBuffers()
    for turn in range(8):
        live = sequences if data.draw(st.booleans()) else sequences[1:] or sequences
        for row, sequence in enumerate(live):
            grow(sequence, 20 * turn + row, size)
        if data.draw(st.integers(0, 4)) == 0:  # a prompt's step comes between
            buffers.decode_inputs(sequences[:1], 5, max_blocks, size)
        batch_size = len(live) + data.draw(st.integers(0, 1))
        found = buffers.decode_inputs(live, batch_size, max_blocks, size)
        expected = decode_inputs([decode_row(s) for s in live], batch_size, max_blocks, size)
        assert all(torch.equal(a, b) for a, b in zip(found.tensors(), expected.tensors(), strict=True))
