"""What a replay of the canary finds, and what it lets pass: another token only where both are as likely."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from multibatch import LLM, SamplingParams
from multibatch.artifact import Artifact
from multibatch.errors import ConfigError
from multibatch.manifest import Canary
from multibatch_compile.canary import replay_canary


@pytest.fixture(scope="module")
def artifact(demo_artifact: Path) -> Artifact:
    return Artifact.open(demo_artifact)


@pytest.fixture(scope="module")
def recorded(artifact: Artifact) -> Canary:
    assert artifact.manifest.canary is not None
    return artifact.manifest.canary


def replayed(artifact: Artifact, canary: Canary | None) -> list[str]:
    return replay_canary(Artifact(artifact.path, dataclasses.replace(artifact.manifest, canary=canary)))


def test_a_logprob_beyond_the_tolerance_is_named_with_its_place(artifact: Artifact, recorded: Canary) -> None:
    place, token_id = 5, recorded.token_ids[5]
    logprobs = list(recorded.logprobs)
    logprobs[place] -= 2 * recorded.tolerance
    (problem,) = replayed(artifact, dataclasses.replace(recorded, logprobs=tuple(logprobs)))
    assert problem.startswith(f"canary: token {place} is {token_id} with a logprob of {recorded.logprobs[place]:.6g}")


def test_a_token_that_is_not_among_the_likeliest_is_named(artifact: Artifact, recorded: Canary) -> None:
    wrong = next(i for i in range(1, 500) if i not in recorded.token_ids)
    canary = dataclasses.replace(recorded, token_ids=(wrong, *recorded.token_ids[1:]))
    (problem,) = replayed(artifact, canary)
    assert f"token 0 is {wrong} with a logprob of -inf" in problem


def second_choice(demo_artifact: Path, recorded: Canary, place: int) -> tuple[Canary, float]:
    """A canary that takes the second-likeliest token at `place`, and by how much that one is less likely."""
    llm = LLM(demo_artifact, num_threads=2)

    def steps(prompt: tuple[int, ...], num_tokens: int) -> list[tuple[int, dict[int, float]]]:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=2)
        (output,) = llm.generate([list(prompt)], params, use_tqdm=False)
        completion = output.outputs[0]
        assert completion.logprobs is not None
        found = [{t: entry.logprob for t, entry in entries.items()} for entries in completion.logprobs]
        return list(zip(completion.token_ids, found, strict=True))

    kept = recorded.prompt_token_ids + recorded.token_ids[:place]
    likeliest, choices = steps(kept, 1)[0]
    second = next(token_id for token_id in choices if token_id != likeliest)
    left = len(recorded.token_ids) - place - 1
    rest = steps((*kept, second), left) if left else []
    canary = dataclasses.replace(
        recorded,
        token_ids=(*recorded.token_ids[:place], second, *(token_id for token_id, _ in rest)),
        logprobs=(*recorded.logprobs[:place], choices[second], *(found[token_id] for token_id, found in rest)),
    )
    return canary, choices[likeliest] - choices[second]


@pytest.mark.parametrize("place", [0, 4, -1])
def test_of_two_tokens_as_likely_as_each_other_either_may_be_drawn(
    demo_artifact: Path, artifact: Artifact, recorded: Canary, place: int
) -> None:
    place %= len(recorded.token_ids)
    canary, gap = second_choice(demo_artifact, recorded, place)
    assert gap > 0
    assert replayed(artifact, dataclasses.replace(canary, tolerance=math.nextafter(gap, math.inf) + 1e-5)) == []
    (problem,) = replayed(artifact, dataclasses.replace(canary, tolerance=min(1e-4, gap / 2)))
    assert f"token {place} is {recorded.token_ids[place]}, expected {canary.token_ids[place]}" in problem


def test_without_a_canary_there_is_nothing_to_replay(artifact: Artifact) -> None:
    with pytest.raises(ConfigError, match=r"has no canary; compile it again"):
        replayed(artifact, None)
