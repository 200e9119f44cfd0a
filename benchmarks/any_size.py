"""One program for any size against programs for fixed sizes, call by call and in turn.

usage: python -m benchmarks.any_size FIXED ANY, two artifacts of one model: FIXED with --decoder-batch-sizes and
--prefill-chunk-sizes, ANY with neither.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch

from multibatch.artifact import Artifact
from multibatch.backends.base import DTYPES, LoadedPrograms
from multibatch.backends.load import load_programs
from multibatch.batch import DecodeRow, ProgramInputs, decode_inputs, prefill_inputs, step_inputs
from multibatch.kv.block_table import blocks_for
from multibatch.kv.pool import KVPool
from multibatch.manifest import STEP, Manifest, decoder_name, prefill_name
from multibatch.selector import select_chunk
from multibatch_compile.verify import chunk_of

CONTEXT = 128
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16)
PROMPTS = (16, 32, 100, 128, 200, 512)
REPEATS = 15


def main() -> None:
    """Prints a line per call shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fixed", metavar="FIXED")
    parser.add_argument("any", metavar="ANY")
    arguments = parser.parse_args()
    fixed, free = Artifact.open(arguments.fixed), Artifact.open(arguments.any)
    manifest = fixed.manifest
    programs = load_programs(fixed), load_programs(free)
    each = blocks_for(CONTEXT, manifest.kv.block_size)
    blocks = 1 + max(each * max(ROWS), blocks_for(max(PROMPTS), manifest.kv.block_size))
    pool = KVPool.allocate(manifest.kv, blocks, DTYPES[manifest.model.dtype])
    print(f"{manifest.model.id}, {manifest.model.dtype}, {manifest.build.cpu_model}, torch {torch.__version__}")
    print(f"{'call':>12} {'program of fixed size':>24} {'ms':>9} {'any size, ms':>13} {'fixed / any':>12}")
    for rows in ROWS:
        if rows <= manifest.max_num_seqs:
            size = next(n for n in manifest.decoder_batch_sizes if n >= rows)
            inputs = decode(manifest, rows, size), decode(manifest, rows, rows)
            report(f"{rows} rows", decoder_name(size), inputs, programs, pool)
    for tokens in PROMPTS:
        size = select_chunk(tokens, manifest.prefill_chunk_sizes)
        inputs = prompt(manifest, tokens, size), prompt(manifest, tokens, 0)
        report(f"{tokens} tokens", prefill_name(size), inputs, programs, pool)


def decode(manifest: Manifest, num_rows: int, size: int) -> ProgramInputs:
    """Rows of CONTEXT positions, padded to `size`."""
    block_size, rng = manifest.kv.block_size, random.Random(0)
    each = blocks_for(CONTEXT, block_size)
    rows = [
        DecodeRow(rng.randrange(manifest.model.vocab_size), CONTEXT - 1, range(1 + r * each, 1 + (r + 1) * each))
        for r in range(num_rows)
    ]
    return decode_inputs(rows, size, blocks_for(manifest.max_seq_len, block_size), block_size)


def prompt(manifest: Manifest, num_tokens: int, size: int) -> ProgramInputs:
    """One prompt, padded to `size`, or as it is."""
    block_size, rng = manifest.kv.block_size, random.Random(0)
    ids = [rng.randrange(manifest.model.vocab_size) for _ in range(num_tokens)]
    chunk = chunk_of(ids, list(range(1, 1 + blocks_for(num_tokens, block_size))))
    max_blocks = blocks_for(manifest.max_seq_len, block_size)
    if size:
        return prefill_inputs([chunk], size, manifest.prefills[size].batch_size, max_blocks, block_size)
    return step_inputs([chunk], (), max_blocks, block_size)


def report(
    what: str,
    program: str,
    inputs: tuple[ProgramInputs, ProgramInputs],
    programs: tuple[LoadedPrograms, LoadedPrograms],
    pool: KVPool,
) -> None:
    """Times both in turn."""
    calls: list[Callable[[], torch.Tensor]] = [
        lambda: programs[0].run(program, inputs[0], pool),
        lambda: programs[1].run(STEP, inputs[1], pool),
    ]
    times: list[list[float]] = [[], []]
    with programs[0].own_threads():
        for call in calls:
            call()
        for _ in range(REPEATS):
            for call, taken in zip(calls, times, strict=True):
                start = time.perf_counter()
                call()
                taken.append((time.perf_counter() - start) * 1000)
    one, other = (statistics.median(taken) for taken in times)
    print(f"{what:>12} {program:>24} {one:9.2f} {other:13.2f} {one / other:12.2f}", flush=True)


if __name__ == "__main__":
    main()
