"""The canary: a greedy continuation recorded when an artifact is built, and replayed to prove that it still serves."""

from __future__ import annotations

import os
from typing import Any

from multibatch.artifact import Artifact
from multibatch.config import EngineConfig
from multibatch.engine import Engine
from multibatch.errors import ConfigError
from multibatch.kv.block_table import blocks_for
from multibatch.manifest import Canary
from multibatch.sampling_params import SamplingParams

_CANARY_TOKENS = 12


def record_canary(artifact: Artifact, programs: Any = None) -> Canary:
    """A greedy continuation of a fixed prompt, with the logprob of each token."""
    manifest = artifact.manifest
    length = max(1, min(16, manifest.max_seq_len - _CANARY_TOKENS))
    tokens = max(1, min(_CANARY_TOKENS, manifest.max_seq_len - length))
    prompt = [(7919 * i + 13) % manifest.model.vocab_size for i in range(length)]
    one = blocks_for(manifest.max_seq_len, manifest.kv.block_size)
    engine = Engine(artifact, EngineConfig(num_kv_blocks=one), programs)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False)
    engine.add_request("canary", prompt, params)
    completion = engine.run_all()["canary"].outputs[0]
    assert completion.logprobs is not None
    logprobs = [entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)]
    return Canary(
        prompt_token_ids=tuple(prompt),
        token_ids=tuple(completion.token_ids),
        logprobs=tuple(round(x, 6) for x in logprobs),
        tolerance=1e-4 if manifest.model.dtype == "float32" else 5e-2,
    )


def replay_canary(artifact: Artifact) -> list[str]:
    """Every way in which the artifact's answer differs from its canary, as a sentence.

    Raises:
        ConfigError: it has none.
    """
    recorded = artifact.manifest.canary
    if recorded is None:
        raise ConfigError(f"{artifact.path} has no canary; compile it again")
    now = record_canary(artifact)
    problems = []
    if now.token_ids != recorded.token_ids:
        problems.append(f"canary: tokens {list(now.token_ids)}, expected {list(recorded.token_ids)}")
    worst = max(abs(a - b) for a, b in zip(now.logprobs, recorded.logprobs, strict=True))
    if not worst <= recorded.tolerance:
        problems.append(f"canary: a logprob differs by {worst:.3g}, allowed {recorded.tolerance}")
    return problems


def verify_artifact(path: str | os.PathLike[str]) -> list[str]:
    """Re-checks hashes, the host and the canary of an artifact; every mismatch as a sentence, none if it is whole."""
    return replay_canary(Artifact.open(path, verify="hashes"))
