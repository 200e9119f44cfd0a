"""A compiled program in a process that does other things too."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from multibatch import ops
from multibatch.artifact import Artifact
from multibatch.backends.base import DTYPES
from multibatch.backends.inductor import InductorPrograms
from multibatch.backends.load import check_this_host, load_programs
from multibatch.backends.program import load_program
from multibatch.batch import DecodeRow, ProgramInputs, decode_inputs
from multibatch.kv.block_table import blocks_for
from multibatch.kv.pool import KVPool
from multibatch.logit_passes import DrawOptions
from multibatch.manifest import Manifest, decoder_name


def call_of(manifest: Manifest) -> tuple[ProgramInputs, KVPool]:
    """A decode row that has just begun, and a pool for it."""
    max_blocks = blocks_for(manifest.max_seq_len, manifest.kv.block_size)
    inputs = decode_inputs([DecodeRow(5, 0, [1])], 1, max_blocks, manifest.kv.block_size)
    return inputs, KVPool.allocate(manifest.kv, 2, DTYPES[manifest.model.dtype])


@pytest.fixture
def kept_lock() -> Iterator[None]:
    """Threads give Python's lock back of themselves only."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("kept_lock")
def test_other_threads_move_on_while_it_runs(demo_artifact: Path) -> None:
    artifact = Artifact.open(demo_artifact)
    loaded = load_programs(artifact, 2)
    inputs, pool = call_of(artifact.manifest)
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=tick)
    thread.start()
    moved, until = False, time.monotonic() + 60
    while not moved and time.monotonic() < until:
        before = ticks[0]
        loaded.run(decoder_name(1), inputs, pool)
        moved = ticks[0] != before
    stop.set()
    thread.join()
    assert moved


def test_a_library_without_programs_leaves_them_to_pytorch(
    demo_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = Artifact.open(demo_artifact)
    isa = check_this_host(artifact.manifest)
    inputs, pool = call_of(artifact.manifest)
    ours = InductorPrograms(artifact, isa, 2, only=[decoder_name(1)]).run(decoder_name(1), inputs, pool)
    monkeypatch.setattr(torch._C, "_get_custom_class_python_wrapper", lambda *_: None)
    file = artifact.manifest.decoder_for(1).file
    assert file is not None
    assert not isinstance(load_program(artifact.file(file)), torch.ScriptObject)
    theirs = InductorPrograms(artifact, isa, 2, only=[decoder_name(1)]).run(decoder_name(1), inputs, pool)
    assert torch.equal(ours, theirs)


def started(folder: Path, num_threads: int) -> tuple[InductorPrograms, str, tuple[ProgramInputs, KVPool]]:
    artifact = Artifact.open(folder)
    loaded = InductorPrograms(artifact, check_this_host(artifact.manifest), num_threads, only=[decoder_name(1)])
    assert loaded.can_start
    return loaded, decoder_name(1), call_of(artifact.manifest)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_started_it_gives_what_it_gives_when_called(demo_artifact: Path, num_threads: int) -> None:
    loaded, name, (inputs, pool) = started(demo_artifact, num_threads)
    expected = loaded.run(name, inputs, pool)
    for pause in (0.0, 0.0, 0.05):  # at the end of the program, or after it
        call = loaded.start(name, inputs, pool)
        time.sleep(pause)
        result = call.finish()
        assert torch.equal(result.logits, expected)
        assert torch.equal(result.tokens, loaded.passes.highest(expected))
        assert 0 < result.seconds < 60
    assert torch.equal(loaded.run(name, inputs, pool), expected)


def test_it_runs_by_itself_once_it_is_started(demo_artifact: Path) -> None:
    loaded, name, (inputs, pool) = started(demo_artifact, 2)
    loaded.run(name, inputs, pool)
    layer = pool.keys[0]
    layer.zero_()
    call = loaded.start(name, inputs, pool)
    until = time.monotonic() + 60
    while not layer.any() and time.monotonic() < until:
        time.sleep(0.001)
    assert layer.any()
    call.finish()


def test_each_call_uses_the_pool_that_it_is_given(demo_artifact: Path) -> None:
    loaded, name, (inputs, first) = started(demo_artifact, 2)
    _, second = call_of(Artifact.open(demo_artifact).manifest)
    loaded.run(name, inputs, first)
    assert not second.keys[0].any()
    first.keys[0].zero_()
    loaded.start(name, inputs, second).finish()
    assert second.keys[0].any()
    assert not first.keys[0].any()


def test_what_is_wrong_with_a_started_call_is_raised_by_finish(demo_artifact: Path) -> None:
    loaded, name, (inputs, pool) = started(demo_artifact, 2)
    expected = loaded.run(name, inputs, pool)
    wrong = dataclasses.replace(inputs, block_tables=inputs.block_tables + 10**6)
    call = loaded.start(name, wrong, pool)
    with pytest.raises(RuntimeError, match="block"):
        call.finish()
    assert torch.equal(loaded.start(name, inputs, pool).finish().logits, expected)


def test_two_calls_at_once_are_refused_and_one_that_is_forgotten_ends(demo_artifact: Path) -> None:
    loaded, name, (inputs, pool) = started(demo_artifact, 2)
    expected = loaded.run(name, inputs, pool)
    call = loaded.start(name, inputs, pool)
    with pytest.raises(RuntimeError, match="finish it first"):
        loaded.start(name, inputs, pool)
    with pytest.raises(RuntimeError, match="finish it first"):
        loaded.run(name, inputs, pool)
    assert torch.equal(call.finish().logits, expected)
    with pytest.raises(RuntimeError, match="not started"):
        call.finish()
    forgotten = loaded.start(name, inputs, pool)
    loaded.settle()
    assert torch.equal(loaded.run(name, inputs, pool), expected)
    call = loaded.start(name, inputs, pool)
    with pytest.raises(RuntimeError, match="not started, or is finished"):
        forgotten.finish()
    call.finish()
    loaded.start(name, inputs, pool)
    del loaded, call  # waits for it, as its weights go with it
    again, name, _ = started(demo_artifact, 2)
    assert torch.equal(again.run(name, inputs, pool), expected)


def behind(inputs: ProgramInputs) -> ProgramInputs:
    """The row of `call_of` one token on."""
    return dataclasses.replace(
        inputs,
        token_ids=torch.zeros_like(inputs.token_ids),
        positions=inputs.positions + 1,
        slot_mapping=inputs.slot_mapping + 1,
        seq_lens=inputs.seq_lens + 1,
    )


@pytest.mark.parametrize("num_threads", [2, 3])
def test_a_call_that_follows_gets_its_token_from_the_one_before(demo_artifact: Path, num_threads: int) -> None:
    loaded, name, (inputs, pool) = started(demo_artifact, num_threads)
    expected, step = [loaded.run(name, inputs, pool)], inputs
    for _ in range(3):
        step = behind(step)
        step.token_ids[0, 0] = expected[-1].argmax()
        expected.append(loaded.run(name, step, pool))
    call, given = loaded.start(name, inputs, pool), inputs
    for number, logits in enumerate(expected):
        given = behind(given)
        is_offered = number < 3 and call.follow(given, 1, [])
        result = call.finish()
        assert torch.equal(result.logits, logits)
        assert result.late_seconds >= 0
        if result.followed is None:  # it had ended before it was told
            assert number == 3 or is_offered
            given.token_ids[0, 0] = result.tokens[0]
            call = loaded.start(name, given, pool) if number < 3 else call
        else:
            assert given.token_ids.item() == logits.argmax()
            call = result.followed
    assert torch.equal(loaded.run(name, inputs, pool), expected[0])


def drawn(bits: int) -> DrawOptions:
    """How one row is drawn, by these bits."""
    doubles = torch.ones(1, dtype=torch.float64)
    return DrawOptions(
        torch.tensor([3.0]), torch.tensor([0]), doubles, -torch.inf * doubles, torch.tensor([bits]), 2.0**40
    )


def test_tokens_may_be_drawn_by_the_call(demo_artifact: Path) -> None:
    loaded, name, (inputs, pool) = started(demo_artifact, 2)
    assert loaded.passes.draw_tokens is not None
    first, second, seen = loaded.run(name, inputs, pool), behind(inputs), set()
    for share in range(8):
        draws, next_draws = drawn(share * 2**50 + 7), drawn((7 - share) * 2**50 + 5)
        token = loaded.passes.draw_tokens(first, draws)
        seen.add(int(token))
        call = loaded.start(name, inputs, pool, draws)
        call.follow(second, 1, [], next_draws)
        result = call.finish()
        assert torch.equal(result.tokens, token)
        if result.followed is not None:
            assert torch.equal(second.token_ids[0], token)
            result = result.followed.finish()
            assert torch.equal(result.tokens, loaded.passes.draw_tokens(result.logits, next_draws))
        assert loaded.start(name, inputs, pool).finish().tokens == first.argmax()  # without
    assert len(seen) > 1
    with pytest.raises(RuntimeError, match="2 options of draws; allowed: 5 or none"):
        loaded._programs[name].start(inputs.tensors(), [torch.ones(1)] * 2, 1.0)  # type: ignore[attr-defined]
    assert torch.equal(loaded.run(name, inputs, pool), first)


def test_calls_do_follow(demo_artifact: Path) -> None:
    loaded, name, (inputs, pool) = started(demo_artifact, 2)
    until = time.monotonic() + 60
    num_followed = 0
    while num_followed < 20 and time.monotonic() < until:
        call = loaded.start(name, inputs, pool)
        call.follow(behind(inputs), 1, [])
        followed = call.finish().followed
        if followed is not None:
            followed.finish()
            num_followed += 1
    assert num_followed == 20


def test_nothing_follows_a_token_that_ends_a_row_or_a_call_that_failed_or_what_was_withdrawn(
    demo_artifact: Path,
) -> None:
    loaded, name, (inputs, pool) = started(demo_artifact, 2)
    expected = loaded.run(name, inputs, pool)
    token = int(expected.argmax())
    for _ in range(20):
        call = loaded.start(name, inputs, pool)
        assert call.follow(behind(inputs), 1, [token + 1, token, token - 1])
        assert call.finish().followed is None
    is_followed, until = True, time.monotonic() + 60
    while is_followed and time.monotonic() < until:  # where it came in time
        call = loaded.start(name, inputs, pool)
        assert call.follow(behind(inputs), 1, [])
        call.withdraw()
        is_followed = call.finish().followed is not None
        loaded.settle()
    assert not is_followed
    call = loaded.start(name, inputs, pool)
    assert call.follow(behind(inputs), 1, [token])
    call.withdraw()
    assert not call.follow(behind(inputs), 1, [])  # what was withdrawn may still be read
    assert call.finish().followed is None
    wrong = dataclasses.replace(inputs, block_tables=inputs.block_tables + 10**6)
    for _ in range(20):
        call = loaded.start(name, wrong, pool)
        assert call.follow(behind(inputs), 1, [])
        with pytest.raises(RuntimeError, match="block"):
            call.finish()
    assert torch.equal(loaded.run(name, inputs, pool), expected)


def test_what_follows_is_refused_where_it_cannot(demo_artifact: Path) -> None:
    loaded, name, (inputs, pool) = started(demo_artifact, 2)
    call = loaded.start(name, inputs, pool)
    for num_rows in (0, 2):
        with pytest.raises(RuntimeError, match=f"{num_rows} tokens for the first input of 1; allowed: int64, 1 to"):
            call.follow(behind(inputs), num_rows, [])
    token = int(loaded.passes.highest(call.finish().logits)[0])
    with pytest.raises(RuntimeError, match="not started"):
        call.follow(behind(inputs), 1, [])
    call = loaded.start(name, inputs, pool)
    assert call.follow(behind(inputs), 1, [token])
    with pytest.raises(RuntimeError, match="follows already"):
        call.follow(behind(inputs), 1, [token])
    call.finish()
    alone, name, _ = started(demo_artifact, 1)  # nobody but the caller
    call = alone.start(name, inputs, pool)
    assert not call.follow(behind(inputs), 1, [])
    assert call.finish().followed is None


def test_calls_that_follow_and_are_forgotten_end(demo_artifact: Path) -> None:
    loaded, name, (inputs, pool) = started(demo_artifact, 2)
    expected = loaded.run(name, inputs, pool)
    for _ in range(50):
        loaded.start(name, inputs, pool).follow(behind(inputs), 1, [])
        loaded.settle()
        assert torch.equal(loaded.run(name, inputs, pool), expected)
    for _ in range(50):
        call = loaded.start(name, inputs, pool)
        call.follow(behind(inputs), 1, [])
        if call.finish().followed is not None:
            with pytest.raises(RuntimeError, match="finish it first"):
                loaded.run(name, inputs, pool)
            with pytest.raises(RuntimeError, match="not started, or is finished"):
                call.finish()  # it would get what the next one gives
        loaded.settle()
        assert torch.equal(loaded.run(name, inputs, pool), expected)
    loaded.start(name, inputs, pool).follow(behind(inputs), 1, [])
    del loaded, call
    again, name, _ = started(demo_artifact, 2)
    assert torch.equal(again.run(name, inputs, pool), expected)


def test_torch_has_its_threads_again_however_those_who_rest_them_overlap() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        first, second = ops.one_torch_thread(), ops.one_torch_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_num_threads() == 1
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_two_engines_of_one_process_start_calls_side_by_side(demo_artifact: Path) -> None:
    first, name, (inputs, pool) = started(demo_artifact, 3)
    second, _, (_, other_pool) = started(demo_artifact, 3)
    expected = first.run(name, inputs, pool)
    for _ in range(50):
        calls = [first.start(name, inputs, pool), second.start(name, inputs, other_pool)]
        assert all(torch.equal(call.finish().logits, expected) for call in calls)
