"""The prefix cache on the compiled demo model: what is reused, and that nothing it gives is different for it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from multibatch import LLM, SamplingParams
from multibatch.errors import RequestError

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(demo_artifact: Path) -> LLM:
    return LLM(demo_artifact, num_threads=2)


@pytest.fixture(scope="module")
def uncached(demo_artifact: Path) -> LLM:
    return LLM(demo_artifact, num_threads=2, enable_prefix_caching=False)


def ids(num: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(16, 300) for _ in range(num)]


def cached_tokens(llm: LLM, prompt: object, params: SamplingParams = GREEDY) -> int | None:
    (output,) = llm.generate([prompt], params, use_tqdm=False)  # type: ignore[list-item]
    return output.num_cached_tokens


def test_full_blocks_of_an_earlier_prompt_are_used_again(llm: LLM, uncached: LLM) -> None:
    llm.reset_prefix_cache()
    block = llm.artifact.manifest.kv.block_size
    shared = ids(3 * block + 5, seed=0)
    prompts = [shared + ids(10, seed=1), shared + ids(10, seed=2), shared[: 2 * block] + ids(30, seed=3)]
    outputs = [llm.generate([prompt], GREEDY, use_tqdm=False)[0] for prompt in prompts]
    assert [output.num_cached_tokens for output in outputs] == [0, 3 * block, 2 * block]
    expected = uncached.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]
    assert [o.num_cached_tokens for o in expected] == [0, 0, 0]
    stats = llm.engine.prefix_cache_stats
    assert stats.hits >= 5 * block
    assert uncached.engine.prefix_cache_stats.queries == 0


def test_what_a_request_generated_is_a_prefix_too(llm: LLM, uncached: LLM) -> None:
    llm.reset_prefix_cache()
    block = llm.artifact.manifest.kv.block_size
    prompt = ids(block - 2, seed=4)
    long = SamplingParams(temperature=0.0, max_tokens=2 * block, ignore_eos=True)
    (first,) = llm.generate([prompt], long, use_tqdm=False)
    again = prompt + first.outputs[0].token_ids
    (output,) = llm.generate([again], GREEDY, use_tqdm=False)
    # the newest token was never computed; nothing else is missing
    assert output.num_cached_tokens == (len(again) - 1) // block * block
    (expected,) = uncached.generate([again], GREEDY, use_tqdm=False)
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids


def test_salts_and_skipping_and_resetting(llm: LLM) -> None:
    llm.reset_prefix_cache()
    block = llm.artifact.manifest.kv.block_size
    prompt = ids(2 * block + 1, seed=5)
    assert cached_tokens(llm, prompt) == 0
    assert cached_tokens(llm, prompt) == 2 * block
    salted = {"prompt_token_ids": prompt, "cache_salt": "mine"}
    assert cached_tokens(llm, salted) == 0
    assert cached_tokens(llm, salted) == 2 * block
    skipping = SamplingParams(temperature=0.0, max_tokens=2, skip_reading_prefix_cache=True)
    assert cached_tokens(llm, prompt, skipping) == 0
    assert llm.reset_prefix_cache()
    assert cached_tokens(llm, prompt) == 0
    with pytest.raises(RequestError, match="cache_salt is ''"):
        cached_tokens(llm, {"prompt_token_ids": prompt, "cache_salt": ""})


def test_a_small_pool_evicts_preempts_and_stays_right(demo_artifact: Path, uncached: LLM) -> None:
    small = LLM(demo_artifact, num_kv_blocks=12, num_threads=2)
    block = small.artifact.manifest.kv.block_size
    rng = random.Random(6)
    heads = [ids(block + 3, seed=10 + i) for i in range(3)]
    prompts = [heads[rng.randrange(3)] + ids(rng.randrange(1, block), seed=100 + i) for i in range(40)]
    params = [SamplingParams(temperature=0.0, max_tokens=rng.randrange(2, 50), ignore_eos=True) for _ in prompts]
    outputs = small.generate(prompts, params, use_tqdm=False)
    expected = uncached.generate(prompts, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]
    assert sum(o.num_cached_tokens or 0 for o in outputs) > 0
    small.engine.scheduler.check_integrity()


def test_priorities_need_their_policy_and_change_the_order(demo_artifact: Path, llm: LLM) -> None:
    with pytest.raises(RequestError, match="priority 3, and the engine serves first come, first served"):
        llm.generate([[5, 6]], GREEDY, use_tqdm=False, priority=[3])
    with pytest.raises(RequestError, match="2 priorities for 1 prompts"):
        llm.generate([[5, 6]], GREEDY, use_tqdm=False, priority=[3, 1])
    urgent = LLM(demo_artifact, num_threads=2, max_num_seqs=1, scheduling_policy="priority")
    prompts = [ids(8, seed=i) for i in range(4)]
    outputs = urgent.generate(prompts, GREEDY, use_tqdm=False, priority=[2, 0, 1, 0])
    ended = [o.metrics.last_token_ts or 0.0 for o in outputs if o.metrics is not None]
    assert sorted(range(4), key=ended.__getitem__) == [1, 3, 2, 0]
    expected = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]


@pytest.mark.parametrize(
    "options",
    [
        {"dynamic_batching": "linear"},
        {"dynamic_batching": "statistical", "dynamic_batching_epsilon": 0.01},
        {"target_inter_token_ms": 0.5},
        {"selector_policy": "cheapest"},
        {"scheduling_policy": "priority"},
    ],
)
def test_no_policy_changes_a_token(demo_artifact: Path, uncached: LLM, options: dict[str, object]) -> None:
    limited = LLM(demo_artifact, num_kv_blocks=16, num_threads=2, **options)
    prompts = [ids(5 + 3 * i, seed=i) for i in range(12)]
    outputs = limited.generate(prompts, GREEDY, use_tqdm=False)
    expected = uncached.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]
