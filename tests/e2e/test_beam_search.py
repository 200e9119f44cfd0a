"""Beam search finds what the plainest reading of vLLM's algorithm finds with transformers' logits."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from multibatch import LLM, BeamSearchParams
from multibatch.errors import ConfigError, RequestError
from multibatch.sampling_params import SamplingParams

EOS = 2
Beam = tuple[list[int], float]


@pytest.fixture(scope="module")
def llm(eager_artifact: Path) -> LLM:
    return LLM(eager_artifact)


@pytest.fixture(scope="module")
def model(demo_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()


def next_logprobs(model: Any, tokens: list[int]) -> list[float]:
    with torch.inference_mode():
        row: list[float] = model(torch.tensor([tokens])).logits[0, -1].float().log_softmax(-1).tolist()
    return row


def searched(model: Any, prompt: list[int], width: int, rounds: int, *, ignore_eos: bool, penalty: float) -> list[Beam]:
    beams: list[Beam] = [(prompt, 0.0)]
    ended: list[Beam] = []
    for _ in range(rounds):
        longer: list[Beam] = []
        for tokens, total in beams:
            row = next_logprobs(model, tokens)
            likeliest = sorted(range(len(row)), key=lambda t: -row[t])[: 2 * width]
            for token in likeliest:
                is_end = token == EOS and not ignore_eos
                (ended if is_end else longer).append(([*tokens, token], total + row[token]))
        beams = sorted(longer, key=lambda beam: -beam[1])[:width]

    def score(beam: Beam) -> float:
        tokens, total = beam
        return total / (len(tokens) - (tokens[-1] == EOS and not ignore_eos)) ** penalty

    return sorted(ended + beams, key=score, reverse=True)[:width]


def prompt_of(llm: LLM, question: str) -> list[int]:
    return llm.engine.tokenizer.render_chat([{"role": "user", "content": question}], None, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("width", "options"),
    [
        (1, {}),
        (3, {}),
        (4, {"length_penalty": 0.0}),
        (4, {"length_penalty": 2.5}),
        (3, {"ignore_eos": True}),
        (2, {"include_stop_str_in_output": True, "skip_special_tokens": False}),
    ],
)
def test_it_finds_what_the_plain_algorithm_finds(llm: LLM, model: Any, width: int, options: dict[str, Any]) -> None:
    prompts = [prompt_of(llm, "What is 17 + 25?"), prompt_of(llm, "Which day comes after Monday?"), [40, 41, 42]]
    outputs = llm.beam_search(prompts, BeamSearchParams(width, 12, **options))
    num_ended = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = searched(
            model,
            prompt,
            width,
            12,
            ignore_eos=options.get("ignore_eos", False),
            penalty=options.get("length_penalty", 1.0),
        )
        assert len(output.sequences) == len(expected)
        for beam, (tokens, total) in zip(output.sequences, expected, strict=True):
            is_ended = tokens[-1] == EOS and not options.get("ignore_eos", False)
            num_ended += is_ended
            assert beam.tokens == (tokens[:-1] if is_ended and "include_stop_str_in_output" not in options else tokens)
            assert beam.cum_logprob == pytest.approx(total, abs=1e-3)
            assert (beam.finish_reason, beam.stop_reason) == (("stop", EOS) if is_ended else ("length", None))
            assert len(beam.logprobs) == len(tokens) - len(prompt)
            drawn = [entry[token].logprob for entry, token in zip(beam.logprobs, tokens[len(prompt) :], strict=True)]
            assert beam.cum_logprob == pytest.approx(sum(drawn))
            special = options.get("skip_special_tokens", True)
            assert beam.text == llm.get_tokenizer().decode(beam.tokens, skip_special_tokens=special)
    assert (num_ended > 0) is not options.get("ignore_eos", False)


def test_with_enough_beams_it_finds_the_best_of_all_continuations(llm: LLM, model: Any) -> None:
    prompt, width = [40, 41, 42], 24
    (output,) = llm.beam_search(prompt, BeamSearchParams(width, 2, ignore_eos=True))
    first = next_logprobs(model, prompt)
    likely = sorted(range(len(first)), key=lambda t: -first[t])
    seconds = {t: next_logprobs(model, [*prompt, t]) for t in likely[:width]}
    best = max((first[t] + seconds[t][u], t, u) for t, u in itertools.product(seconds, range(len(first))))
    assert best[0] > first[likely[width]]  # so no continuation that begins otherwise is as likely
    assert output.sequences[0].tokens == [*prompt, best[1], best[2]]
    assert output.sequences[0].cum_logprob == pytest.approx(best[0], abs=1e-3)


def test_one_beam_is_greedy_and_a_prompt_alone_is_as_among_others(llm: LLM) -> None:
    prompts = ["What is", "hello", "Which word"]
    params = BeamSearchParams(1, 10, ignore_eos=True)
    together = [output.sequences[0] for output in llm.beam_search(prompts, params)]
    alone = [llm.beam_search(prompt, params)[0].sequences[0] for prompt in prompts]
    assert [b.tokens for b in together] == [b.tokens for b in alone]
    greedy = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True), use_tqdm=False)
    assert [b.tokens for b in together] == [[*(o.prompt_token_ids or []), *o.outputs[0].token_ids] for o in greedy]


def test_a_temperature_repeats_itself(llm: LLM) -> None:
    params = BeamSearchParams(2, 6, temperature=1.5)
    found = llm.beam_search(["What is", "hello"], params)
    assert llm.beam_search(["What is", "hello"], params) == found


def test_every_beam_may_end(llm: LLM) -> None:
    prompt = prompt_of(llm, "What is 17 + 25?")
    (output,) = llm.beam_search([prompt], BeamSearchParams(1, 60))
    assert output.sequences[0].finish_reason == "stop"
    assert not llm.engine.has_unfinished


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("beam_width", v) for v in (0, -1, 1.5, True, "2", None)],
        *[("max_tokens", v) for v in (0, 2.0, True, None)],
        *[("temperature", v) for v in (-0.1, 2.1, "x", None, True)],
        *[("length_penalty", v) for v in (float("nan"), float("inf"), 51, "x", None, True)],
        *[("ignore_eos", v) for v in (1, None)],
        *[("include_stop_str_in_output", v) for v in (0, None)],
        *[("skip_special_tokens", v) for v in ("yes", None)],
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    options: dict[str, Any] = {"beam_width": 2, "max_tokens": 4} | {name: value}
    with pytest.raises(ConfigError, match=rf"^{name} is .*; allowed: "):
        BeamSearchParams(**options)


@pytest.mark.parametrize("prompt", [[5] * 120, [], [10**6]])
def test_a_prompt_that_can_never_run_is_refused_and_nothing_is_left(llm: LLM, prompt: list[int]) -> None:
    with pytest.raises(RequestError):
        llm.beam_search([[5, 6], prompt], BeamSearchParams(2, 10))
    assert not llm.engine.has_unfinished
