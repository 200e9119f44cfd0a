"""Measures what steps cost on this machine, over a grid of context length, decode rows and prompt tokens.

Inputs, program calls and greedy sampling are timed as the engine runs them; what its queues and outputs take by the number of
rows is timed apart, with an engine that computes nothing, and added. Text is not made.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterator

from multibatch.artifact import Artifact
from multibatch.backends.base import LoadedPrograms
from multibatch.backends.load import load_programs
from multibatch.config import EngineConfig
from multibatch.cost_table import CostRow, CostTable
from multibatch.engine import Engine
from multibatch.errors import ConfigError
from multibatch.kv.block_table import blocks_for
from multibatch.launch import Launch
from multibatch.manifest import Manifest
from multibatch.request import Request, Sequence
from multibatch.sampler import SampledRows
from multibatch.sampling_params import SamplingParams
from multibatch.scheduled_step import PrefillChunk, ScheduledStep

_IDLE_STEPS = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Where to measure; None chooses by the artifact.

    Raises:
        ConfigError: an empty list, or a number below 1 (for chunk_sizes: 0).
    """

    ctx_lens: tuple[int, ...] | None = None
    """Tokens that each decode row attends to; by default 128, four times as many and so on, and the longest."""
    d_nums: tuple[int, ...] | None = None
    """Decode rows; by default the sizes of the ladder, or powers of two, and the most that may run."""
    chunk_sizes: tuple[int, ...] | None = None
    """Prompt tokens, 0 being a step of decode rows alone; by default the prefill programs, or powers of two from 16."""
    repeats: int = 5
    """The median of so many, one round over the whole grid after the other."""

    def __post_init__(self) -> None:
        for name, least in {"ctx_lens": 1, "d_nums": 1, "chunk_sizes": 0}.items():
            values = getattr(self, name)
            if values is not None and (not values or min(values) < least):
                raise ConfigError(f"{name} is {values}; allowed: one or more ints, each {least} or more")
        if self.repeats < 1:
            raise ConfigError(f"repeats is {self.repeats}; allowed: 1 or more")


def calibrate(
    artifact: Artifact, grid: Grid, progress: Callable[[int, int], None] = lambda done, total: None
) -> CostTable:
    """Measures every point of the grid that the engine could meet.

    Args:
        artifact: what to measure; it is not changed.
        grid: where.
        progress: called with the steps timed so far and in all.

    Raises:
        ConfigError: a point beyond what the artifact was compiled for.
    """
    programs = load_programs(artifact)
    engine = Engine(artifact, EngineConfig(enable_prefix_caching=False), programs)
    costs = _measure(artifact, engine, programs, list(_points(engine, grid)), grid.repeats, progress)
    return CostTable(CostRow(*point, round(cost, 4)) for point, cost in costs.items()).monotone()


Point = tuple[int, int, int]
"""ctx_len, d_num, chunk_size."""


def _measure(
    artifact: Artifact,
    engine: Engine,
    programs: LoadedPrograms,
    points: list[Point],
    repeats: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Point, float]:
    """Milliseconds of the steps at these points, what is around them included: medians, one round after the other."""
    times: dict[Point, list[float]] = {point: [] for point in points}
    total = len(points) * (repeats + 1)
    for turn in range(repeats + 1):
        for i, point in enumerate(points):
            ms = _time_step(engine, _step(engine.manifest, *point))
            if turn:  # the first round warms up
                times[point].append(ms)
            progress(turn * len(points) + i + 1, total)
    around = _times_around(artifact, programs, sorted({d_num for _, d_num, _ in points}))
    return {point: statistics.median(taken) + around[point[1]] for point, taken in times.items()}


class _IdleEngine(Engine):
    """An engine whose steps compute nothing."""

    def compute(self, step: ScheduledStep, launch: Launch | None = None) -> SampledRows:
        """See `Engine.compute`."""
        return SampledRows([1] * len(step.sampled), [None] * len(step.sampled))


def _times_around(artifact: Artifact, programs: LoadedPrograms, d_nums: list[int]) -> dict[int, float]:
    """Median ms of a step without its computation, by decode rows."""
    found = {}
    engine = _IdleEngine(artifact, EngineConfig(enable_prefix_caching=False, async_scheduling=False), programs)
    params = SamplingParams(max_tokens=_IDLE_STEPS, ignore_eos=True, detokenize=False)
    for d_num in d_nums:
        for row in range(max(d_num, 1)):
            engine.add_request(str(row), [1], params)
        times = []
        while engine.has_unfinished:
            start = time.perf_counter()
            engine.step()
            times.append((time.perf_counter() - start) * 1000)
        found[d_num] = statistics.median(times)
    return found


def _points(engine: Engine, grid: Grid) -> Iterator[Point]:
    manifest = engine.manifest
    longest = min(manifest.max_prefill_tokens, manifest.max_seq_len - 1)
    ladder = tuple(manifest.decoders) or _steps_up(1, 2, manifest.max_num_seqs)
    prompts = tuple(n for n in manifest.prefill_chunk_sizes if n <= longest) or _steps_up(16, 2, longest)
    ctx_lens = _within("ctx_lens", grid.ctx_lens or _steps_up(128, 4, manifest.max_seq_len), manifest.max_seq_len)
    d_nums = _within("d_nums", grid.d_nums or ladder, manifest.max_num_seqs)
    chunks = _within("chunk_sizes", grid.chunk_sizes or (0, *prompts), longest)
    yield from ((ctx_lens[0], 0, chunk) for chunk in chunks if chunk)
    for ctx_len in ctx_lens:
        for d_num in d_nums:
            # what the pool cannot hold does not come up
            fitting = (c for c in chunks if _num_blocks(manifest, ctx_len, d_num, c) < engine.pool.num_blocks)
            yield from ((ctx_len, d_num, chunk) for chunk in fitting)


def _within(name: str, values: tuple[int, ...], most: int) -> list[int]:
    if max(values) > most:
        raise ConfigError(f"{name} has {max(values)}; the artifact allows at most {most}")
    return sorted(set(values))


def _steps_up(first: int, factor: int, last: int) -> tuple[int, ...]:
    values = []
    while first < last:
        values.append(first)
        first *= factor
    return (*values, last)


def _num_blocks(manifest: Manifest, ctx_len: int, d_num: int, chunk_size: int) -> int:
    size = manifest.kv.block_size
    return d_num * blocks_for(ctx_len, size) + blocks_for(chunk_size, size)


def _step(manifest: Manifest, ctx_len: int, d_num: int, chunk_size: int) -> ScheduledStep:
    """Decode rows at their last position, and a whole prompt, all of random tokens, in blocks of their own."""
    rng, next_block = random.Random(0), 1

    def sequence(name: str, num_tokens: int) -> Sequence:
        nonlocal next_block
        ids = tuple(rng.randrange(manifest.model.vocab_size) for _ in range(num_tokens))
        params = SamplingParams(temperature=0.0, max_tokens=1)
        made = Sequence(Request(request_id=name, prompt_token_ids=ids, params=params, seed=0))
        made.num_computed_tokens = num_tokens
        count = blocks_for(num_tokens, manifest.kv.block_size)
        made.block_ids = list(range(next_block, next_block + count))
        next_block += count
        return made

    decode = tuple(sequence(f"row {row}", ctx_len) for row in range(d_num))
    prefill = (PrefillChunk(sequence("prompt", chunk_size), 0, chunk_size),) if chunk_size else ()
    return ScheduledStep(prefill, decode)


def _time_step(engine: Engine, step: ScheduledStep) -> float:
    start = time.perf_counter()
    engine.compute(step)
    engine.runner.records.clear()
    return (time.perf_counter() - start) * 1000
