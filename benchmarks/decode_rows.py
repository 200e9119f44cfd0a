"""Requests that only decode: what scripts put into an engine to time its decode steps."""

from __future__ import annotations

import random

from multibatch import SamplingParams
from multibatch.engine import Engine
from multibatch.sampling_params import RequestOutputKind

_PROMPT_TOKENS = 128


def add_rows(engine: Engine, rows: int, tokens: int, name: str, temperature: float = 0.0) -> None:
    """Adds requests and runs them up to their first decode step.

    Args:
        engine: idle.
        rows: requests, each with a prompt of 128 random ids of its own.
        tokens: that each generates.
        name: begins their request ids, and seeds their prompts.
        temperature: of the draws.
    """
    rng = random.Random(name)
    params = SamplingParams(
        temperature=temperature,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    for i in range(rows):
        prompt = [rng.randrange(engine.manifest.model.vocab_size) for _ in range(_PROMPT_TOKENS)]
        engine.add_request(f"{name}-{i}", prompt, params)
    while engine.scheduler.waiting or not all(s.num_output_tokens for s in engine.scheduler.running):
        engine.step()
