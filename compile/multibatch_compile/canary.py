"""The canary: a greedy continuation recorded when an artifact is built, and replayed to prove that it still serves."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from multibatch.artifact import Artifact
from multibatch.config import EngineConfig
from multibatch.engine import Engine
from multibatch.errors import ConfigError
from multibatch.kv.block_table import blocks_for
from multibatch.manifest import Canary
from multibatch.sampling_params import SamplingParams
from multibatch.scheduled_step import ScheduledStep

from .verify import chunk_of

_CANARY_TOKENS = 12
_LIKELIEST = 8
"""Tokens whose logprobs are looked at: a recorded one that is not among them is not nearly the likeliest."""
_TOLERANCE = {"float32": 1e-4, "bfloat16": 2**-5, "float16": 2**-8}
"""Largest difference of a logprob relative to the largest logit: four steps of the dtype there."""


def record_canary(artifact: Artifact, programs: Any = None) -> Canary:
    """A greedy continuation of a fixed prompt, with the logprob of each token."""
    manifest = artifact.manifest
    length = max(1, min(16, manifest.max_seq_len - _CANARY_TOKENS))
    tokens = max(1, min(_CANARY_TOKENS, manifest.max_seq_len - length))
    prompt = [(7919 * i + 13) % manifest.model.vocab_size for i in range(length)]
    engine = _engine(artifact, programs)
    steps = _continue(engine, prompt, tokens)
    return Canary(
        prompt_token_ids=tuple(prompt),
        token_ids=tuple(step.token_id for step in steps),
        logprobs=tuple(round(step.likely[step.token_id], 6) for step in steps),
        tolerance=_TOLERANCE[manifest.model.dtype] * max(1.0, _largest_logit(engine, prompt)),
    )


def replay_canary(artifact: Artifact) -> list[str]:
    """Every way in which the artifact's answer differs from its canary, as a sentence.

    Another build of the operators rounds otherwise, so of two tokens that are as likely as each other within the canary's
    tolerance it may draw the other one. Where it does, it goes on from the recorded one.

    Raises:
        ConfigError: it has none.
    """
    recorded = artifact.manifest.canary
    if recorded is None:
        raise ConfigError(f"{artifact.path} has no canary; compile it again")
    engine = _engine(artifact)
    expected, problems, place = recorded.token_ids, list[str](), 0
    while place < len(expected) and not problems:
        steps = _continue(engine, [*recorded.prompt_token_ids, *expected[:place]], len(expected) - place)
        for step in steps:
            problems += _differences(step, place, recorded)
            place += 1
            if problems or step.token_id != expected[place - 1]:
                break
    return problems


@dataclass(frozen=True, slots=True)
class _Step:
    """A token of a greedy continuation, and the logprobs of the likeliest tokens at its place."""

    token_id: int
    likely: Mapping[int, float]


def _engine(artifact: Artifact, programs: Any = None) -> Engine:
    """With room for one sequence, and no blocks that outlive it: a replay computes all that it compares."""
    manifest = artifact.manifest
    one = blocks_for(manifest.max_seq_len, manifest.kv.block_size)
    return Engine(artifact, EngineConfig(num_kv_blocks=one, enable_prefix_caching=False), programs)


def _largest_logit(engine: Engine, prompt: list[int]) -> float:
    """Magnitude of the largest logit after as much of `prompt` as one call takes."""
    manifest = engine.manifest
    ids = prompt[: manifest.max_prefill_tokens]
    chunk = chunk_of(ids, list(range(1, 1 + blocks_for(len(ids), manifest.kv.block_size))))
    return float(engine.runner.run(ScheduledStep(prefill=(chunk,))).abs().max())


def _continue(engine: Engine, prompt: list[int], num_tokens: int) -> list[_Step]:
    """Tokens drawn greedily after `prompt`."""
    params = SamplingParams(
        temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=_LIKELIEST, detokenize=False
    )
    engine.add_request("canary", prompt, params)
    completion = engine.run_all()["canary"].outputs[0]
    assert completion.logprobs is not None
    return [
        _Step(token_id, {other: entry.logprob for other, entry in entries.items()})
        for token_id, entries in zip(completion.token_ids, completion.logprobs, strict=True)
    ]


def _differences(step: _Step, place: int, recorded: Canary) -> list[str]:
    """What is wrong with the token at a place of the continuation, after the recorded ones."""
    token_id, logprob = recorded.token_ids[place], recorded.logprobs[place]
    found = step.likely.get(token_id, -math.inf)
    if not abs(found - logprob) <= recorded.tolerance:
        return [
            f"canary: token {place} is {token_id} with a logprob of {found:.6g}, expected {logprob:.6g};"
            f" allowed {recorded.tolerance} more or less"
        ]
    ahead = step.likely[step.token_id] - found
    if not ahead <= recorded.tolerance:
        return [
            f"canary: token {place} is {step.token_id}, expected {token_id}, which is less likely by {ahead:.3g} nats;"
            f" allowed {recorded.tolerance}"
        ]
    return []


def verify_artifact(path: str | os.PathLike[str]) -> list[str]:
    """Re-checks hashes, the host and the canary of an artifact; every mismatch as a sentence, none if it is whole."""
    return replay_canary(Artifact.open(path, verify="hashes"))
