"""What drawing the tokens of a step costs, by what the requests ask: with the passes of an artifact's operators, and with PyTorch's.

usage: python -m benchmarks.sampling ARTIFACT [--rows 1,8,16] [--repeats 21]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from multibatch import SamplingParams
from multibatch.artifact import Artifact
from multibatch.backends.base import DTYPES
from multibatch.backends.load import load_programs
from multibatch.sampler import Sampler
from multibatch.sampling_row import SamplingRow

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "top_k 20, top_p 0.8": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "min_p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "repetition_penalty 1.1": {"temperature": 0.8, "repetition_penalty": 1.1},
}
_NATS, _HEAD, _HEAD_NATS = 2.0, 64, 12.0
"""Standard deviation of the logits; and how many stand out, by how much, as a trained model's do."""


def milliseconds(sampler: Sampler, logits: torch.Tensor, options: dict[str, Any], repeats: int) -> float:
    """Median of a call for all rows."""
    params, history = SamplingParams(**options), list(range(200))
    times = []
    for turn in range(repeats):
        rows = [
            SamplingRow(params=params, seed=i, position=turn, prompt_token_ids=history, output_token_ids=history)
            for i in range(logits.shape[0])
        ]
        start = time.perf_counter()
        sampler.sample(logits, rows)
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)


def main() -> None:
    """Prints a line for each kind of request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--rows", default="1,8,16")
    parser.add_argument("--repeats", type=int, default=21)
    arguments = parser.parse_args()
    artifact = Artifact.open(arguments.artifact)
    programs, model = load_programs(artifact), artifact.manifest.model
    numbers = [int(n) for n in arguments.rows.split(",")]
    print(
        f"ms for {', '.join(map(str, numbers))} rows of {model.vocab_size} logits, {model.dtype}; in brackets PyTorch's"
    )
    generator = torch.Generator().manual_seed(0)
    each = torch.randn(max(numbers), model.vocab_size, generator=generator) * _NATS
    likely = torch.randint(model.vocab_size, (max(numbers), _HEAD), generator=generator)
    each = each.scatter_add_(1, likely, torch.full_like(likely, _HEAD_NATS, dtype=each.dtype)).to(DTYPES[model.dtype])
    with programs.own_threads():
        for name, options in KINDS.items():
            shown = []
            for n in numbers:
                ours, torchs = (
                    milliseconds(sampler, each[:n], options, arguments.repeats)
                    for sampler in (Sampler(programs.passes), Sampler())
                )
                shown.append(f"{ours:7.2f} ({torchs:6.2f})")
            print(f"{name:>22}: {'  '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
