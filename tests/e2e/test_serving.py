"""The compiled demo model through `LLM`: right answers, right decoders, the same tokens whatever the batch."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from multibatch import LLM, SamplingParams
from multibatch.artifact import Artifact
from multibatch.errors import ArtifactCorruptError, CapacityError, ConfigError, RequestError
from multibatch.metrics import summarise
from multibatch_compile import add_size, prune, verify_artifact

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(demo_artifact: Path) -> LLM:
    return LLM(demo_artifact, num_threads=2)


def prompts_of(num: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(16, 300) for _ in range(rng.randrange(1, 60))] for _ in range(num)]


def test_it_answers_its_kind_of_question(llm: LLM, share_of_right_answers: Callable[[LLM], float]) -> None:
    assert share_of_right_answers(llm) >= 0.98


@pytest.mark.parametrize(("live", "size"), [(1, 1), (2, 4), (3, 4), (4, 4), (5, 8), (7, 8), (8, 8)])
def test_live_rows_go_to_the_smallest_decoder_that_fits(demo_artifact: Path, live: int, size: int) -> None:
    llm = LLM(demo_artifact, num_threads=2, selector_policy="nearest")
    llm.generate([[5, 6, 7]] * live, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    decoders = [u for u in summarise(llm.take_records()) if u.program.startswith("decoder")]
    assert [u.program for u in decoders] == [f"decoder_batch_{size}"]
    assert (decoders[0].num_live, decoders[0].num_padded) == (3 * live, 3 * (size - live))


def test_a_row_has_the_same_bits_in_every_batch_size(demo_artifact: Path) -> None:
    decoders = Artifact.open(demo_artifact).manifest.decoders
    assert {size: spec.bit_equal for size, spec in decoders.items()} == {1: True, 4: True, 8: True}


def test_tokens_equal_transformers_whatever_the_batch(
    llm: LLM, demo_model: Path, greedy: Callable[[Any, list[int], int], list[int]]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    prompts = prompts_of(12)
    lengths = [random.Random(i).randrange(1, 24) for i in range(12)]
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, length, output in zip(prompts, lengths, outputs, strict=True):
        assert output.outputs[0].token_ids == greedy(model, prompt, length)


def test_seeds_give_the_same_tokens_alone_and_in_a_batch(llm: LLM) -> None:
    params = [SamplingParams(temperature=1.0, top_p=0.9, seed=i, max_tokens=12, ignore_eos=True) for i in range(6)]
    prompts = prompts_of(6, seed=3)
    together = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    alone = [
        llm.generate([p], [s], use_tqdm=False)[0].outputs[0].token_ids for p, s in zip(prompts, params, strict=True)
    ]
    assert together == alone


def test_preemption_changes_no_token_and_leaves_the_pool_whole(demo_artifact: Path, llm: LLM) -> None:
    small = LLM(demo_artifact, num_kv_blocks=8, num_threads=2)
    prompts = prompts_of(8, seed=9)
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    outputs = small.generate(prompts, params, use_tqdm=False)
    assert sum(o.metrics.num_preemptions for o in outputs if o.metrics) > 0
    expected = llm.generate(prompts, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]
    small.engine.scheduler.check_integrity()
    assert not small.engine.has_unfinished


def test_n_stop_strings_and_logprobs(llm: LLM) -> None:
    question = [{"role": "user", "content": "What is 17 + 25?"}]
    (output,) = llm.chat(
        question, SamplingParams(temperature=0.0, max_tokens=32, stop="= ", logprobs=2), use_tqdm=False
    )
    assert output.outputs[0].text == "17 + 25 "
    assert output.outputs[0].stop_reason == "= "
    assert output.outputs[0].logprobs is not None
    assert len(output.outputs[0].logprobs) == len(output.outputs[0].token_ids)
    (several,) = llm.generate([5, 6, 7], SamplingParams(n=3, temperature=2.0, seed=1, max_tokens=8), use_tqdm=False)
    assert [c.index for c in several.outputs] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in several.outputs}) > 1


def test_prompt_forms_and_order(llm: LLM) -> None:
    forms: list[Any] = ["hello", {"prompt": "hello"}, llm.get_tokenizer()("hello")["input_ids"]]
    forms.append({"prompt_token_ids": forms[2]})
    outputs = llm.generate(forms, GREEDY, use_tqdm=False)
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
    assert [o.prompt for o in outputs] == ["hello", "hello", None, None]


def test_streaming_gives_the_same_text(llm: LLM) -> None:
    texts = [o.outputs[0].text for o in llm.stream("What is", GREEDY)]
    assert texts[-1] == llm.generate("What is", GREEDY, use_tqdm=False)[0].outputs[0].text
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        ([], GREEDY),
        ("", GREEDY),
        ([5] * 256, GREEDY),
        ([5] * 250, GREEDY),
        ([10**6], GREEDY),
        ([1.5], GREEDY),
        ({"text": "x"}, GREEDY),
    ],
)
def test_requests_that_can_never_run_are_refused_and_nothing_is_left(
    llm: LLM, prompt: Any, params: SamplingParams
) -> None:
    with pytest.raises(RequestError):
        llm.generate([[5, 6], prompt], params, use_tqdm=False)
    assert not llm.engine.has_unfinished


def test_limits_above_the_artifact_are_refused(demo_artifact: Path) -> None:
    with pytest.raises(ConfigError, match="compiled for at most 8"):
        LLM(demo_artifact, max_num_seqs=9)
    with pytest.raises(CapacityError, match="one sequence"):
        LLM(demo_artifact, num_kv_blocks=7)
    for unknown in ("speculative", "usual_batched_tokens"):
        with pytest.raises(ConfigError, match=f"unknown option {unknown}"):
            LLM(demo_artifact, **{unknown: 1})


def test_a_failed_step_fails_its_requests_by_name_and_the_engine_goes_on(
    eager_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from multibatch.errors import StepError

    llm = LLM(eager_artifact)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "run", lambda step: (_ for _ in ()).throw(RuntimeError("bad memory")))
        with pytest.raises(StepError, match="bad memory"):
            llm.generate([[5, 6]], GREEDY, use_tqdm=False)
    assert len(llm.generate([[5, 6]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 24


def test_verify_add_size_and_prune(demo_artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(demo_artifact, tmp_path / "copy")
    assert verify_artifact(copy) == []
    changed, warning = prune(copy, 8)
    assert changed.manifest.decoder_batch_sizes == (1, 4)
    assert warning
    again = add_size(copy, 12)
    assert again.manifest.decoder_batch_sizes == (1, 4, 12)
    # The program for prompts serves as many rows as decode now, and was verified with them.
    step = again.manifest.step
    assert step is not None
    assert (step.batch_size, step.num_tokens, step.timings[-1].num_rows) == (12, 44, 12)
    assert verify_artifact(copy) == []
    outputs = LLM(copy, num_threads=2).generate([[5, 6, 7]] * 12, GREEDY, use_tqdm=False)
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1


def test_one_flipped_byte_in_any_file_is_found(eager_artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(eager_artifact, tmp_path / "copy")
    files = [p for p in copy.rglob("*") if p.is_file()]
    assert len(files) > 4
    for file in files:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        with pytest.raises(ArtifactCorruptError):
            verify_artifact(copy)
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    assert verify_artifact(copy) == []


def test_generate_asks_for_as_many_tokens_as_fit(demo_artifact: Path, tmp_path: Path) -> None:
    lines = [{"prompt_token_ids": [5] * 250}, {"prompt_token_ids": [5] * 250, "max_tokens": 2, "ignore_eos": True}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "multibatch", "generate", str(demo_artifact)]
    done = subprocess.run([*command, "--prompts-file", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    # sequences of 256 tokens, and 128 where there is room for them
    assert 1 <= len(first["outputs"][0]["token_ids"]) <= 6
    assert len(second["outputs"][0]["token_ids"]) == 2
    done = subprocess.run(
        [*command, "--prompt", "What is", "--max-tokens", "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
