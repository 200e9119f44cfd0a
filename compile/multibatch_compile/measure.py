"""Times the programs."""

from __future__ import annotations

import random
import statistics
import time

from multibatch.backends.base import LoadedPrograms
from multibatch.batch import DecodeRow, decode_inputs, prefill_inputs
from multibatch.kv.block_table import blocks_for
from multibatch.manifest import Manifest, ProgramSpec

from .model import pool_of
from .verify import chunk_of

_CONTEXT = 128
_BUDGET_S = 3.0


def measure_program(manifest: Manifest, spec: ProgramSpec, programs: LoadedPrograms) -> float:
    """Median ms of one call with every row live; decode rows have min(128, max_seq_len) positions."""
    size = manifest.kv.block_size
    max_blocks = blocks_for(manifest.max_seq_len, size)
    rng = random.Random(0)
    if spec.kind == "decode":
        length = min(_CONTEXT, manifest.max_seq_len)
        each = blocks_for(length, size)
        rows = [
            DecodeRow(rng.randrange(manifest.model.vocab_size), length - 1, range(1 + r * each, 1 + (r + 1) * each))
            for r in range(spec.batch_size)
        ]
        inputs = decode_inputs(rows, spec.batch_size, max_blocks, size)
        num_blocks = 1 + each * spec.batch_size
    else:
        ids = [rng.randrange(manifest.model.vocab_size) for _ in range(min(spec.num_tokens, manifest.max_seq_len))]
        num_blocks = 1 + blocks_for(len(ids), size)
        chunk = chunk_of(ids, list(range(1, num_blocks)))
        inputs = prefill_inputs([chunk], spec.num_tokens, spec.batch_size, max_blocks, size)
    pool = pool_of(manifest.kv, num_blocks, manifest.model.dtype)
    times: list[float] = []
    with programs.own_threads():
        programs.run(spec.name, inputs, pool)
        started = time.perf_counter()
        while len(times) < 5 or (time.perf_counter() - started < _BUDGET_S and len(times) < 50):
            start = time.perf_counter()
            programs.run(spec.name, inputs, pool)
            times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)
