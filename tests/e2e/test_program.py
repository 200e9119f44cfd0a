"""A compiled program in a process that does other things too."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from multibatch.artifact import Artifact
from multibatch.backends.base import DTYPES
from multibatch.backends.inductor import InductorPrograms
from multibatch.backends.load import check_this_host, load_programs
from multibatch.backends.program import load_program
from multibatch.batch import DecodeRow, ProgramInputs, decode_inputs
from multibatch.kv.block_table import blocks_for
from multibatch.kv.pool import KVPool
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
