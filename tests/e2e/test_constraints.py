"""What requests ask of their tokens, served: the outputs keep to it, and neither batch nor preemption matters."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from multibatch import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from multibatch.artifact import Artifact
from multibatch.config import EngineConfig
from multibatch.engine import Engine
from multibatch.errors import RequestError, StepError
from multibatch.sampling_params import RequestOutputKind

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "word": {"type": "string", "maxLength": 6},
        "number": {"type": "integer", "minimum": 0, "maximum": 9999},
        "days": {"type": "array", "items": {"enum": ["Monday", "Friday"]}, "maxItems": 2},
    },
    "required": ["word", "number", "days"],
    "additionalProperties": False,
}
JSON = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
CHOICES = ["Monday", "Wednesday", "the moon"]
FORMS: list[dict[str, Any]] = [
    {"structured_outputs": JSON},
    {"structured_outputs": StructuredOutputsParams(regex=r"[a-f]{3,9}: \d{2}")},
    {"structured_outputs": StructuredOutputsParams(choice=CHOICES)},
    {"structured_outputs": StructuredOutputsParams(grammar='root ::= "yes" | "no" " way"')},
    {"allowed_token_ids": [20, 30, 40, 50]},
    {"bad_words": ["e", "the", "a"]},
    {"logit_bias": {77: 100.0}},
    {},
]


@pytest.fixture(scope="module")
def llm(demo_artifact: Path) -> LLM:
    return LLM(demo_artifact, num_threads=1)


def prompts_of(num: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(16, 300) for _ in range(rng.randrange(1, 60))] for _ in range(num)]


def params_of(temperature: float) -> list[SamplingParams]:
    return [SamplingParams(temperature=temperature, seed=i, max_tokens=60, **form) for i, form in enumerate(FORMS)]


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_keep_to_what_was_asked(llm: LLM, temperature: float) -> None:
    outputs = llm.generate(prompts_of(len(FORMS)), params_of(temperature), use_tqdm=False)
    found = texts(outputs)
    parsed = json.loads(found[0])
    assert list(parsed) == ["word", "number", "days"]
    assert len(parsed["word"]) <= 6
    assert 0 <= parsed["number"] <= 9999
    assert set(parsed["days"]) <= {"Monday", "Friday"}
    assert re.fullmatch(r"[a-f]{3,9}: \d{2}", found[1])
    assert found[2] in CHOICES
    assert found[3] in ("yes", "no way")
    assert {output.outputs[0].finish_reason for output in outputs[:4]} == {"stop"}
    eos = llm.engine.manifest.model.eos_token_ids
    assert all(output.outputs[0].token_ids[-1] in eos for output in outputs[:4])
    assert set(ids(outputs)[4]) <= {20, 30, 40, 50}
    tokenizer = llm.get_tokenizer()
    bad = [tokenizer.encode(text) for word in ("e", "the", "a") for text in (word, f" {word}")]
    tokens = ids(outputs)[5]
    assert not any(tokens[i : i + len(b)] == b for b in bad for i in range(len(tokens)))
    assert set(ids(outputs)[6]) == {77}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_batch_changes_nothing(llm: LLM, temperature: float) -> None:
    prompts, params = prompts_of(len(FORMS), seed=4), params_of(temperature)
    together = llm.generate(prompts, params, use_tqdm=False)
    alone = [llm.generate([p], [s], use_tqdm=False)[0] for p, s in zip(prompts, params, strict=True)]
    assert ids(together) == ids(alone)
    # A request that asks for nothing gets what it gets beside others that ask for nothing.
    plain = [SamplingParams(temperature=temperature, seed=i, max_tokens=60) for i in range(len(FORMS))]
    assert ids(llm.generate(prompts, plain, use_tqdm=False))[-1] == ids(together)[-1]


def test_preemption_changes_nothing(demo_artifact: Path, llm: LLM) -> None:
    small = LLM(demo_artifact, num_kv_blocks=8, num_threads=1)
    long = StructuredOutputsParams(regex="([a-z]{3,5} ){20}")
    prompts = prompts_of(8, seed=9)
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=100, structured_outputs=long) for i in range(4)]
    params += [replace(p, structured_outputs=None, bad_words=["a", "is"], ignore_eos=True) for p in params]
    outputs = small.generate(prompts, params, use_tqdm=False)
    for half in (outputs[:4], outputs[4:]):
        assert sum(o.metrics.num_preemptions for o in half if o.metrics) > 0
    assert all(re.fullmatch(str(long.regex), text) for text in texts(outputs[:4]))
    assert ids(outputs) == ids(llm.generate(prompts, params, use_tqdm=False))
    small.engine.scheduler.check_integrity()


def test_n_completions_each_keep_to_the_form(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=2.0, seed=1, max_tokens=60, structured_outputs=JSON)
    (output,) = llm.generate([5, 6, 7], params, use_tqdm=False)
    assert len({json.dumps(json.loads(c.text)) for c in output.outputs}) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {768: 1.0}}, "logit_bias has token id 768; allowed: 0 to 767"),
        ({"allowed_token_ids": [5, 900]}, "allowed_token_ids has token id 900"),
        ({"allowed_token_ids": [2], "min_tokens": 2}, "allowed_token_ids are 2"),
        ({"structured_outputs": StructuredOutputsParams(regex="(")}, "regex does not compile"),
    ],
)
def test_what_can_never_be_followed_is_refused_and_nothing_is_left(
    llm: LLM, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=rf"request '\d+': .*{message}"):
        llm.generate([[5, 6], [7]], [SamplingParams(), SamplingParams(**options)], use_tqdm=False)
    assert not llm.engine.has_unfinished


def steps(engine: Engine) -> Iterator[RequestOutput]:
    while engine.has_unfinished:
        yield from engine.step()


def test_a_request_without_a_token_left_ends_alone(demo_artifact: Path, llm: LLM) -> None:
    engine = Engine(Artifact.open(demo_artifact), EngineConfig(num_threads=1))
    contradicting = {"structured_outputs": StructuredOutputsParams(choice=["yes"]), "allowed_token_ids": [30]}
    plain = SamplingParams(
        temperature=0.8, seed=3, max_tokens=20, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )
    engine.add_request("good", [5, 6, 7], plain)
    engine.add_request("bad", [5, 6, 7], SamplingParams(**contradicting))  # type: ignore[arg-type]
    engine.add_request("other", [9], plain)
    done = {output.request_id: output.outputs[0] for output in steps(engine) if output.finished}
    assert {name: output.finish_reason for name, output in done.items()} == {
        "good": "length",
        "bad": "error",
        "other": "length",
    }
    assert isinstance(engine.failure, StepError)
    assert engine.failure.request_ids == ("bad",)
    assert "structured_outputs" in str(engine.failure)
    assert [done["good"].token_ids, done["other"].token_ids] == ids(
        llm.generate([[5, 6, 7], [9]], plain, use_tqdm=False)
    )
    engine.scheduler.check_integrity()


def test_an_artifact_without_an_end_token_stops_where_the_form_is_complete(demo_artifact: Path) -> None:
    artifact = Artifact.open(demo_artifact)
    model = replace(artifact.manifest.model, eos_token_ids=())
    engine = Engine(replace(artifact, manifest=replace(artifact.manifest, model=model)), EngineConfig(num_threads=1))
    engine.add_request("r", [5, 6], SamplingParams(structured_outputs=StructuredOutputsParams(choice=CHOICES)))
    output = engine.run_all()["r"].outputs[0]
    assert output.text in CHOICES
    assert (output.finish_reason, output.stop_reason) == ("stop", None)


def logprobs_of(model: Any, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([prompt])).logits[0]
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize("top", [0, 3, -1])
def test_prompt_logprobs_are_those_of_transformers(llm: LLM, demo_model: Path, top: int) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    prompts = [*prompts_of(6, seed=2), [5], [7] * 33]  # longer than a call takes, and of one token
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, prompt_logprobs=top)
    llm.generate(prompts, replace(params, prompt_logprobs=None), use_tqdm=False)  # their blocks are cached now
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        found = output.prompt_logprobs
        assert found is not None
        assert found[0] is None
        assert len(found) == len(prompt)
        expected = logprobs_of(model, prompt)
        for position, entries in enumerate(found[1:], 1):
            row = expected[position - 1]
            assert entries is not None
            assert len(entries) in ((768,) if top == -1 else (top, top + 1) if top else (1,))
            assert prompt[position] in entries
            for token, entry in entries.items():
                assert entry.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert (
            output.outputs[0].token_ids
            == ids(llm.generate([prompt], replace(params, prompt_logprobs=None), use_tqdm=False))[0]
        )


def test_prompt_logprobs_in_a_batch_with_others_and_in_pieces(demo_artifact: Path, llm: LLM) -> None:
    prompts = prompts_of(8, seed=5)
    wanted = [
        SamplingParams(temperature=0.9, seed=i, max_tokens=100, ignore_eos=True, prompt_logprobs=2 if i % 2 else None)
        for i in range(8)
    ]
    plain = [replace(p, prompt_logprobs=None) for p in wanted]
    small = LLM(demo_artifact, num_kv_blocks=8, num_threads=1)  # preempts
    outputs, others = llm.generate(prompts, wanted, use_tqdm=False), small.generate(prompts, wanted, use_tqdm=False)
    assert sum(o.metrics.num_preemptions for o in others[1::2] if o.metrics) > 0
    assert ids(outputs) == ids(others) == ids(llm.generate(prompts, plain, use_tqdm=False))
    assert [o.prompt_logprobs for o in outputs] == [o.prompt_logprobs for o in others]
    assert [o.prompt_logprobs is None for o in outputs] == [True, False] * 4
    alone = [llm.generate([p], [s], use_tqdm=False)[0] for p, s in zip(prompts, wanted, strict=True)]
    assert [o.prompt_logprobs for o in alone] == [o.prompt_logprobs for o in outputs]


def test_prompt_logprobs_of_several_completions_come_once_and_with_the_first_delta(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=4, ignore_eos=True, prompt_logprobs=1)
    prompt = prompts_of(1, seed=7)[0]
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(prompt)
    deltas = list(llm.stream(prompt, replace(params, output_kind=RequestOutputKind.DELTA)))
    assert deltas[0].prompt_logprobs == output.prompt_logprobs
    assert len(deltas) > 1
    assert all(delta.prompt_logprobs == [] for delta in deltas[1:])


def test_prompt_logprobs_need_a_program_that_gives_them(eager_artifact: Path) -> None:
    with pytest.raises(RequestError, match="prompt_logprobs is 1, and the artifact's programs"):
        LLM(eager_artifact).generate([[5, 6]], SamplingParams(prompt_logprobs=1), use_tqdm=False)
