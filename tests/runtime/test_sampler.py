"""The draw: right distributions, right supports, and nothing that depends on the rows beside it."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multibatch.errors import StepError
from multibatch.logits_masks import TokenRules
from multibatch.request import Request, Sequence, random_bits
from multibatch.sampler import Sampler
from multibatch.sampling_params import SamplingParams
from multibatch.sampling_row import SamplingRow

TOKENS = st.lists(st.integers(0, 19), max_size=12)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_row(seed: int = 0, position: int = 0, **options: Any) -> SamplingRow:
    names = ("prompt_token_ids", "output_token_ids", "forbidden_token_ids", "grammar_mask", "request_id")
    known = {name: options.pop(name) for name in names if name in options}
    params = SamplingParams(**options)
    rules = TokenRules.of(params, 100, lambda text: [ord(c) for c in text.strip()])
    return SamplingRow(params=params, seed=seed, position=position, rules=rules, **known)


def draw(logits: torch.Tensor, *rows: SamplingRow) -> list[int]:
    return Sampler().sample(logits, rows).token_ids


def many(logits: list[float] | torch.Tensor, count: int, **options: Any) -> Counter[int]:
    """How often each id is drawn in `count` draws from the same logits, by as many streams."""
    one = torch.as_tensor(logits)
    rows = [make_row(seed=i % 50, position=i // 50, **options) for i in range(count)]
    return Counter(draw(one.expand(count, -1), *rows))


def random_logits(n: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def kept_ids(logits: torch.Tensor, params: SamplingParams) -> set[int]:
    """The support by the plainest reading: min_p, then top_k, then top_p, in float64 with a full sort."""
    probabilities = (logits.double() / params.temperature).softmax(0).tolist()
    order = sorted(range(len(probabilities)), key=lambda t: (-probabilities[t], t))
    order = [t for t in order if probabilities[t] >= params.min_p * probabilities[order[0]]]
    if 0 < params.top_k < len(order):
        order = [t for t in order if probabilities[t] >= probabilities[order[params.top_k - 1]]]
    total, before, kept = math.fsum(probabilities[t] for t in order), 0.0, set()
    for t in order:
        if before >= params.top_p * total:
            break
        kept.add(t)
        before += probabilities[t]
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 5, 127, 128, 129, 1000, 4096])
def test_greedy_is_the_argmax_and_takes_the_lowest_of_equals(vocabulary: int, dtype: torch.dtype) -> None:
    logits = (random_logits(6, vocabulary) * 2).round().div(2).to(dtype)  # many ties
    before = logits.clone()
    expected = [max(range(vocabulary), key=lambda t: (row[t], -t)) for row in logits.tolist()]
    assert draw(logits, *[make_row(temperature=0)] * 6) == expected
    assert torch.equal(logits, before)


def test_greedy_of_rows_that_are_not_contiguous() -> None:
    logits = random_logits(300, 4).T
    assert draw(logits, *[make_row(temperature=0)] * 4) == logits.argmax(-1).tolist()
    rows = [make_row(seed=i, top_p=0.9, logprobs=2) for i in range(4)]
    assert Sampler().sample(logits, rows) == Sampler().sample(logits.contiguous(), rows)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 6}, {"top_p": 0.999999}])
def test_draws_follow_the_softmax(options: dict[str, Any]) -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, 1.5])
    count = 4000
    expected = (logits.double() / options.get("temperature", 1.0)).softmax(0) * count
    found = many(logits, count, **options)
    chi_square = sum((found[i] - float(e)) ** 2 / float(e) for i, e in enumerate(expected))
    assert chi_square < 20.5  # 0.1 % of right samplers exceed it, with 5 degrees of freedom


def test_the_draw_is_the_inverse_of_the_running_sum() -> None:
    logits = random_logits(1, 50)[0]
    running = logits.double().softmax(0).cumsum(0)
    for position in range(100):
        uniform = random_bits(3, position) / 2**53
        assert draw(logits[None], make_row(3, position)) == [int(torch.searchsorted(running, uniform, right=True))]


@pytest.mark.parametrize(("bits", "expected"), [(0, 1), (2**52, 2**18), (2**53 - 1, 2**19 - 2)])
def test_the_ends_of_the_random_numbers(bits: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multibatch.draws.random_bits", lambda seed, position: bits)
    logits = torch.zeros(1, 2**19)  # as many equal weights as come closest to the largest int64
    assert draw(logits, make_row(forbidden_token_ids=(0, 2**19 - 1))) == [expected]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([1.0, 0.95, 0.6, 0.2]), st.sampled_from([0, 0.03, 0.4])
)
def test_supports_are_those_of_a_full_sort(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": 0.8}
    logits = random_logits(1, 12, seed, scale=1.0)[0]
    expected = kept_ids(logits, SamplingParams(**options))
    found = set(many(logits, 400, **options))
    assert found <= expected
    assert found >= {t for t in expected if logits.div(0.8).softmax(0)[t] > 0.05}  # missed once in 10^9


@pytest.mark.parametrize("vocabulary", [500, 5000, 20011])
@pytest.mark.parametrize("scale", [0.5, 3.0, 30.0])
@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.5}, {"top_p": 0.99}, {"top_k": 40}, {"min_p": 0.2}, {"top_k": 4500, "top_p": 0.9}, {"top_k": 400}],
)
def test_supports_in_large_vocabularies(vocabulary: int, scale: float, options: dict[str, Any]) -> None:
    """Drawn at the two ends of the random numbers and between, ids lie where a full sort in float64 has them."""
    logits = random_logits(1, vocabulary, scale=scale)[0]
    kept = sorted(kept_ids(logits, SamplingParams(**options)))
    weights = logits.double()[kept].softmax(0).cumsum(0)
    for position in range(25):
        (drawn,) = draw(logits[None], make_row(1, position, **options))
        uniform = random_bits(1, position) / 2**53
        ends = torch.searchsorted(weights, torch.tensor([uniform - 3e-5, uniform + 3e-5]).double().clamp(0, 1 - 1e-9))
        assert drawn in kept[int(ends[0]) : int(ends[1]) + 1]


@pytest.mark.parametrize("vocabulary", [10, 129, 6000])
def test_equal_logits_are_cut_by_one_rule(vocabulary: int) -> None:
    """top_k keeps all that equal the last kept, as vLLM does; top_p keeps the lowest ids of equals."""
    logits = torch.zeros(vocabulary)
    assert max(many(logits, 300, top_k=2)) > vocabulary // 2
    assert max(many(logits, 300, min_p=1.0)) > vocabulary // 2
    assert set(many(logits, 300, top_p=2.5 / vocabulary)) == {0, 1, 2}


def test_top_k_1_and_a_tiny_top_p_are_greedy() -> None:
    logits = random_logits(8, 1000)
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert draw(logits, *[make_row(i, **options) for i in range(8)]) == logits.argmax(-1).tolist()


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 2},
    {},
    {"temperature": 0.7, "top_k": 20},
    {"top_p": 0.8, "logprobs": 0},
    {"min_p": 0.05, "presence_penalty": 0.5},
    {"temperature": 1.3, "top_k": 500, "top_p": 0.9, "frequency_penalty": 0.4, "logprobs": 3},
    {"top_k": 3, "forbidden_token_ids": (1, 2)},
    {"temperature": 0, "logit_bias": {1: 4.0, 0: -3.0}},
    {"allowed_token_ids": [0, 1], "logprobs": 1},
    {"temperature": 0, "grammar_mask": torch.arange(3) == 1},
    {"top_p": 0.9, "bad_words": ["\x00"], "frequency_penalty": 0.4},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [129, 9001])
def test_a_row_is_the_same_in_every_batch(vocabulary: int, dtype: torch.dtype) -> None:
    logits = random_logits(len(OPTIONS), vocabulary, scale=1.5).to(dtype)
    history: dict[str, Any] = {"prompt_token_ids": (1, 2, 3), "output_token_ids": [5, 5, 9]}
    rows = [make_row(i + 10, i, **history, **options) for i, options in enumerate(OPTIONS)]
    whole = Sampler().sample(logits, rows)
    for i, row in enumerate(rows):
        alone = Sampler().sample(logits[i : i + 1], [row])
        assert (alone.token_ids[0], alone.logprobs[0]) == (whole.token_ids[i], whole.logprobs[i])
    for seed in range(8):
        order = random.Random(seed).sample(range(len(rows)), len(rows))
        mixed = Sampler().sample(logits[order], [rows[i] for i in order])
        assert mixed.token_ids == [whole.token_ids[i] for i in order]
        assert mixed.logprobs == [whole.logprobs[i] for i in order]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_batch_gives_what_each_row_gives_alone(data: st.DataObject) -> None:
    picks = data.draw(st.lists(st.sampled_from(OPTIONS), min_size=1, max_size=9))
    logits = random_logits(len(picks), data.draw(st.integers(2, 400)), data.draw(st.integers(0, 10**6)), scale=2.0)
    rows = [make_row(data.draw(st.integers(0, 2**64 - 1)), i, **options) for i, options in enumerate(picks)]
    alone = [draw(logits[i : i + 1], row)[0] for i, row in enumerate(rows)]
    assert draw(logits, *rows) == alone


def test_a_seed_repeats_and_another_seed_or_position_does_not() -> None:
    logits = torch.zeros(200, 100_000)
    rows = [make_row(7, position) for position in range(200)]
    first = draw(logits, *rows)
    assert draw(logits, *rows) == first
    assert len(set(first)) > 190
    assert sum(a == b for a, b in zip(first, draw(logits, *[replace(r, seed=8) for r in rows]), strict=True)) < 5


def test_draws_are_pinned() -> None:
    """A change of the generator or of the search would silently break every seed that users have written down."""
    rows = [make_row(i, 3 * i, top_k=(0, 50)[i % 2], top_p=(1.0, 0.9)[i // 4]) for i in range(8)]
    logits = (torch.arange(8)[:, None] * 7919 + torch.arange(1000) * 104729) % 1009 / 200
    assert draw(logits, *rows) == [386, 755, 10, 461, 426, 323, 298, 185]


def naive_penalties(logits: list[float], row: SamplingRow) -> list[float]:
    params, counts = row.params, Counter(row.output_token_ids)
    scores = list(logits)
    for t in {*row.prompt_token_ids, *counts}:
        scores[t] = scores[t] / params.repetition_penalty if scores[t] > 0 else scores[t] * params.repetition_penalty
    for t, times in counts.items():
        scores[t] -= params.frequency_penalty * times + params.presence_penalty
    return scores


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), TOKENS, TOKENS, *[st.floats(-2, 2)] * 2, st.floats(0.5, 2))
def test_penalties_are_those_of_the_plain_formula(
    seed: int, prompt: list[int], output: list[int], presence: float, frequency: float, repetition: float
) -> None:
    penalties: dict[str, Any] = {"presence_penalty": presence, "frequency_penalty": frequency}
    penalties["repetition_penalty"] = repetition
    row = make_row(seed, **penalties, prompt_token_ids=tuple(prompt), output_token_ids=output, temperature=0)
    logits = random_logits(1, 20, seed)
    scores = naive_penalties(logits[0].tolist(), row)
    (greedy,) = draw(logits, row)
    assert scores[greedy] == pytest.approx(max(scores), abs=1e-4)
    (drawn,) = draw(logits, replace(row, params=SamplingParams(**penalties, top_k=5)))
    assert scores[drawn] >= sorted(scores)[-5] - 1e-4


def test_frequency_counts_and_ids_that_have_no_logit_are_ignored() -> None:
    logits = torch.arange(128.0)[None] / 128
    seen: dict[str, Any] = {"temperature": 0, "prompt_token_ids": (999, -1), "output_token_ids": [127] * 3 + [500]}
    assert draw(logits, make_row(**seen, presence_penalty=0.007)) == [127]
    assert draw(logits, make_row(**seen, frequency_penalty=0.007)) == [126]
    assert draw(logits, make_row(**seen | {"output_token_ids": []}, repetition_penalty=2.0)) == [127]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 2}, {}, {"top_p": 0.9}])
def test_forbidden_and_impossible_tokens_are_never_drawn(options: dict[str, Any]) -> None:
    logits = [0.0, 9.0, 1.0, 9.0, 0.5]
    found = many(logits, 200, forbidden_token_ids=(1, 3, 3, 77), **options)
    assert found.total() == 200
    assert not {1, 3} & set(found)
    assert 1 not in many([0.0, -math.inf, 1.0], 200, **options)


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.9, "presence_penalty": 1.0}])
def test_only_what_rules_and_form_allow_is_drawn(options: dict[str, Any]) -> None:
    logits = [9.0, 0.0, 9.0, 1.0, 9.0]
    assert set(many(logits, 100, allowed_token_ids=[1, 3], **options)) <= {1, 3}
    form = torch.tensor([False, True, True, True, False])
    assert set(many(logits, 100, grammar_mask=form, bad_words=["\x02"], **options)) <= {1, 3}
    assert set(many(logits, 100, grammar_mask=form, **options | {"temperature": 0})) == {2}
    assert set(many(logits, 100, logit_bias={1: 100.0}, **options)) == {1}


def test_biases_come_before_penalties_and_change_no_logprob() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    row = make_row(temperature=0, logit_bias={1: 3.0}, repetition_penalty=2.0, prompt_token_ids=(1,), logprobs=0)
    result = Sampler().sample(logits, [row])  # (2 + 3) / 2 is below 3, and 2 / 2 + 3 would be above it
    assert result.token_ids == [2]
    assert result.logprobs[0] is not None
    assert result.logprobs[0].logprobs == pytest.approx([float(logits.log_softmax(-1)[0, 2])])


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 2}])
@pytest.mark.parametrize("bad", [[math.nan, 1.0], [1.0, math.inf], [-math.inf, -math.inf]])
def test_logits_without_a_finite_maximum_are_refused_and_their_rows_named(
    options: dict[str, Any], bad: list[float]
) -> None:
    logits = torch.tensor([[0.0, 1.0], bad, [2.0, 1.0], bad])
    rows = [make_row(request_id=name, **options) for name in ("a", "b", "c", "")]
    with pytest.raises(StepError, match=r"logits of row 1 \(b\), 3 have a NaN") as caught:
        Sampler().sample(logits, rows)
    assert caught.value.request_ids == ("b", "")


def test_a_row_with_everything_forbidden_is_refused() -> None:
    with pytest.raises(StepError, match=r"row 0 \(x\).*no token left"):
        draw(torch.zeros(2, 2), make_row(forbidden_token_ids=(0, 1), request_id="x"), make_row())


@pytest.mark.parametrize("shape", [(2, 5), (1, 0), (5,), (1, 1, 5)])
def test_logits_that_do_not_fit_the_rows_are_refused(shape: tuple[int, ...]) -> None:
    assert draw(torch.zeros(0, 8)) == []
    with pytest.raises(StepError, match=r"allowed: \[1, vocabulary\]"):
        draw(torch.zeros(shape), make_row())


@pytest.mark.parametrize("top", [0, 1, 4, 300, -1])
def test_logprobs_are_of_the_raw_logits(top: int) -> None:
    logits = random_logits(3, 200).round()  # ties
    penalty: dict[str, Any] = {"repetition_penalty": 2.0, "prompt_token_ids": tuple(range(100)), "logprobs": top}
    rows = [make_row(0, **penalty, temperature=0), make_row(1, 9, **penalty, temperature=0.5, top_p=0.9), make_row()]
    result = Sampler().sample(logits, rows)
    assert result.logprobs[2] is None
    for i in range(2):
        found, expected = result.logprobs[i], logits[i].log_softmax(0).tolist()
        order = sorted(range(200), key=lambda t: (-expected[t], t))
        assert found is not None
        others = [t for t in order[: top if top >= 0 else None] if t != result.token_ids[i]]
        assert found.token_ids == [result.token_ids[i], *others]
        assert found.logprobs == pytest.approx([expected[t] for t in found.token_ids], abs=1e-5)
        assert found.ranks == [order.index(t) + 1 for t in found.token_ids]


def test_a_row_is_made_from_a_sequence() -> None:
    def row_of(num_output: int, **options: Any) -> SamplingRow:
        params = SamplingParams(stop_token_ids=[3], min_tokens=2, **options)
        request = Request(request_id="a", prompt_token_ids=(5, 6), params=params, seed=4, eos_token_ids=(0, 1))
        return SamplingRow.from_sequence(Sequence(request, token_ids=[5, 6, *[8] * num_output]))

    early, later = row_of(1), row_of(2, presence_penalty=1.0)
    assert (early.seed, early.position, early.request_id) == (4, 3, "a")
    assert early.forbidden_token_ids == (0, 1, 3)
    assert (early.prompt_token_ids, early.output_token_ids) == ((), ())
    assert (later.position, later.forbidden_token_ids) == (4, ())
    assert (later.prompt_token_ids, later.output_token_ids) == ((5, 6), [8, 8])


def test_a_row_copies_its_output_for_bad_words_alone() -> None:
    def row_of(**options: Any) -> SamplingRow:
        params = SamplingParams(**options)
        request = Request(request_id="a", prompt_token_ids=(5, 6), params=params, seed=4)
        rules = TokenRules.of(params, 100, lambda text: [ord(c) for c in text])
        return SamplingRow.from_sequence(
            Sequence(request, token_ids=[5, 6, 8]), rules, torch.ones(100, dtype=torch.bool)
        )

    assert row_of(bad_words=["A"]).output_token_ids == [8]
    assert row_of(allowed_token_ids=[1]).output_token_ids == ()
    assert row_of(logit_bias={1: 1.0}).grammar_mask is not None
