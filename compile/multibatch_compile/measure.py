"""Times the programs."""

from __future__ import annotations

import random
import statistics
import time

from multibatch.backends.base import LoadedPrograms
from multibatch.batch import DecodeRow, ProgramInputs, decode_inputs, prefill_inputs, step_inputs
from multibatch.kv.block_table import blocks_for
from multibatch.manifest import Manifest, ProgramSpec, Timing

from .model import pool_of
from .verify import chunk_of

_CONTEXT = 128
_BUDGET_S = 3.0


def measure_program(manifest: Manifest, spec: ProgramSpec, programs: LoadedPrograms) -> float:
    """Median ms of one call with every row and token of the program live."""
    if spec.kind == "decode":
        return _decode_ms(manifest, spec.name, spec.batch_size, programs)
    if spec.kind == "prefill":
        return _prompt_ms(manifest, spec, spec.num_tokens, programs)
    return _prompt_ms(manifest, spec, manifest.max_prefill_tokens, programs)


def measure_timings(manifest: Manifest, spec: ProgramSpec, programs: LoadedPrograms) -> tuple[Timing, ...]:
    """Calls of a step program that are smaller than its largest: decode rows at sizes of a ladder, and prompts."""
    rows = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n < spec.batch_size] + [spec.batch_size]
    timings = [Timing(n, n, round(_decode_ms(manifest, spec.name, n, programs), 4)) for n in rows]
    lengths = [n for n in (32, 128) if rows[-1] < n < manifest.max_prefill_tokens]
    return (*timings, *(Timing(1, n, round(_prompt_ms(manifest, spec, n, programs), 4)) for n in lengths))


def _decode_ms(manifest: Manifest, program: str, num_rows: int, programs: LoadedPrograms) -> float:
    """Each row has min(128, max_seq_len) positions."""
    size, rng = manifest.kv.block_size, random.Random(0)
    length = min(_CONTEXT, manifest.max_seq_len)
    each = blocks_for(length, size)
    rows = [
        DecodeRow(rng.randrange(manifest.model.vocab_size), length - 1, range(1 + r * each, 1 + (r + 1) * each))
        for r in range(num_rows)
    ]
    inputs = decode_inputs(rows, num_rows, blocks_for(manifest.max_seq_len, size), size)
    return _median_ms(manifest, program, inputs, 1 + each * num_rows, programs)


def _prompt_ms(manifest: Manifest, spec: ProgramSpec, num_tokens: int, programs: LoadedPrograms) -> float:
    """One prompt, as long as the call and the model allow."""
    size, rng = manifest.kv.block_size, random.Random(0)
    ids = [rng.randrange(manifest.model.vocab_size) for _ in range(min(num_tokens, manifest.max_seq_len))]
    num_blocks = 1 + blocks_for(len(ids), size)
    chunk, max_blocks = chunk_of(ids, list(range(1, num_blocks))), blocks_for(manifest.max_seq_len, size)
    if spec.kind == "prefill":
        inputs = prefill_inputs([chunk], spec.num_tokens, spec.batch_size, max_blocks, size)
    else:
        inputs = step_inputs([chunk], (), max_blocks, size)
    return _median_ms(manifest, spec.name, inputs, num_blocks, programs)


def _median_ms(
    manifest: Manifest, program: str, inputs: ProgramInputs, num_blocks: int, programs: LoadedPrograms
) -> float:
    pool = pool_of(manifest.kv, num_blocks, manifest.model.dtype)
    times: list[float] = []
    with programs.own_threads():
        programs.run(program, inputs, pool)
        started = time.perf_counter()
        while len(times) < 5 or (time.perf_counter() - started < _BUDGET_S and len(times) < 50):
            start = time.perf_counter()
            programs.run(program, inputs, pool)
            times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)
