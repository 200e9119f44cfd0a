"""How long an event loop stands still beside an `AsyncEngine` that serves: streams of tokens, and a timer of one millisecond.

usage: python -m benchmarks.event_loop ARTIFACT [--requests 16] [--input-len 512] [--output-len 64]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time

from multibatch import AsyncEngine, SamplingParams
from multibatch.artifact import Artifact
from multibatch.sampling_params import RequestOutputKind
from multibatch.trace import percentile

_TIMER_S = 0.001


async def tick(gaps: list[float], stop: asyncio.Event) -> None:
    """Notes by how many milliseconds each sleep of one took longer."""
    while not stop.is_set():
        start = time.perf_counter()
        await asyncio.sleep(_TIMER_S)
        gaps.append((time.perf_counter() - start - _TIMER_S) * 1000)


async def stream(engine: AsyncEngine, name: str, prompt: list[int], output_len: int) -> int:
    """Tokens of one request, streamed."""
    params = SamplingParams(
        temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    return sum([len(output.outputs[0].token_ids) async for output in engine.generate(prompt, params, name)])


async def measure(arguments: argparse.Namespace) -> None:
    """Prints one line: all requests at once, after one alone."""
    rng = random.Random(0)
    vocabulary = Artifact.open(arguments.artifact).manifest.model.vocab_size
    async with AsyncEngine(arguments.artifact, enable_prefix_caching=False) as engine:
        prompts = [[rng.randrange(vocabulary) for _ in range(arguments.input_len)] for _ in range(arguments.requests)]
        await stream(engine, "first", prompts[0], 4)
        gaps, stop = list[float](), asyncio.Event()
        timer = asyncio.create_task(tick(gaps, stop))
        start = time.perf_counter()
        each = [stream(engine, str(i), prompt, arguments.output_len) for i, prompt in enumerate(prompts)]
        tokens = sum(await asyncio.gather(*each))
        seconds = time.perf_counter() - start
        stop.set()
        await timer
    print(
        f"{tokens / seconds:.1f} tokens/s; the loop was late by {percentile(gaps, 50):.1f} ms at the median,"
        f" {percentile(gaps, 99):.1f} at the 99th percentile, {max(gaps):.1f} at most"
    )


def main() -> None:
    """See the module's documentation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=64)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
