"""What may be asked of one generation: vLLM's names, order and defaults; everything else refused by name."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multibatch.errors import ConfigError
from multibatch.sampling_params import RequestOutputKind, SamplingParams
from multibatch.structured_outputs import StructuredOutputsParams

# vLLM 0.33's fields in its order, internal ones left out, with the values a default object has after its __post_init__.
VLLM_DEFAULTS: dict[str, object] = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "watermarking": None,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": [],
    "stop_token_ids": [],
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "prompt_logprob_token_ids": None,
    "prompt_logprob_start": None,
    "logprob_token_ids": None,
    "flat_logprobs": False,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "output_kind": RequestOutputKind.CUMULATIVE,
    "stream_interval": None,
    "skip_clone": False,
    "structured_outputs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "extra_args": None,
    "bad_words": None,
    "skip_reading_prefix_cache": None,
    "thinking_token_budget": None,
    "repetition_detection": None,
    "routed_experts_prompt_start": 0,
    "trace_decode_token_ids": None,
}

YES_OR_NO = StructuredOutputsParams(choice=["yes", "no"])

NOT_BUILT: dict[str, list[object]] = {
    "watermarking": [{}, object()],
    "prompt_logprob_token_ids": [[], [1]],
    "prompt_logprob_start": [0, 3],
    "logprob_token_ids": [[], [1, 2]],
    "flat_logprobs": [True, 1, None],
    "spaces_between_special_tokens": [False, None],
    "stream_interval": [1, 8],
    "extra_args": [{"a": 1}],
    "thinking_token_budget": [0, 64],
    "repetition_detection": [object()],
    "routed_experts_prompt_start": [1, False],
    "trace_decode_token_ids": [[1]],
}


def test_fields_have_the_names_order_and_defaults_of_vllm() -> None:
    params = SamplingParams()
    assert {f.name: getattr(params, f.name) for f in dataclasses.fields(params)} == VLLM_DEFAULTS
    assert [f.name for f in dataclasses.fields(params)] == list(VLLM_DEFAULTS)


def test_positions_mean_what_they_mean_in_vllm() -> None:
    params = SamplingParams(2, 0.5, -0.5, 1.5, 0.7, None, 0.9, 40, 0.1, 7, "end", [3], True, 99, 4, 5)
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (2, 0.7, 0.9, 40, 0.1)
    assert (params.seed, params.stop, params.stop_token_ids) == (7, ["end"], [3])
    assert (params.ignore_eos, params.max_tokens, params.min_tokens, params.logprobs) == (True, 99, 4, 5)


def test_a_position_where_vllm_has_internal_fields_is_refused() -> None:
    values = list(VLLM_DEFAULTS.values())
    up_to_skip_clone = list(VLLM_DEFAULTS).index("skip_clone") + 1
    assert SamplingParams(*values[:up_to_skip_clone]) == SamplingParams()  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        SamplingParams(*values[: up_to_skip_clone + 1])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["best_of", "guided_decoding", "logits_processors", "temprature"])
def test_an_unknown_name_is_refused(name: str) -> None:
    options: dict[str, Any] = {name: 1}
    with pytest.raises(TypeError, match=name):
        SamplingParams(**options)
    with pytest.raises(TypeError, match=name):
        SamplingParams.from_optional(**options)


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, vs in NOT_BUILT.items() for v in vs])
def test_what_is_not_built_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is .*not built yet; allowed: .*\. .+"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NOT_BUILT)
def test_the_default_of_what_is_not_built_is_accepted(name: str) -> None:
    assert SamplingParams(**{name: VLLM_DEFAULTS[name]}) == SamplingParams()  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "empty"), [("logit_bias", {}), ("bad_words", []), ("extra_args", {})])
def test_an_empty_collection_asks_for_nothing(name: str, empty: object) -> None:
    assert SamplingParams(**{name: empty}) == SamplingParams()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("n", v) for v in (0, -1, 16385, True, 1.0, "1", None)],
        *[("top_k", v) for v in (-2, 1.5, True, "5", None)],
        *[("max_tokens", v) for v in (0, -1, 2.0, True)],
        *[("min_tokens", v) for v in (-1, 1.0, True, None, 17)],
        *[("logprobs", v) for v in (-2, 1.0, False, "1")],
        *[("prompt_logprobs", v) for v in (-2, 1.0, False, "1")],
        *[("structured_outputs", v) for v in ({"json": {}}, "[a-z]+", True)],
        *[("logit_bias", v) for v in ([1], {-1: 1.0}, {"x": 1.0}, {1.0: 1.0}, {1: "2"}, {1: True}, {1: math.nan}, 5)],
        *[("allowed_token_ids", v) for v in ([], 5, [-1], ["1"], [1.0], [True], {1})],
        *[("bad_words", v) for v in ("x", ["x", ""], [" "], ["\n"], [1], 5, {"a"}, [None])],
        *[("seed", v) for v in (1.0, True, "1", 2**64, -(2**63) - 1)],
        *[("presence_penalty", v) for v in (-2.01, 2.01, math.nan, "0", None, True)],
        *[("frequency_penalty", v) for v in (-2.01, 2.01, math.nan, "0", None, True)],
        *[("repetition_penalty", v) for v in (0, -1.0, math.inf, math.nan, "1", None, True)],
        *[("temperature", v) for v in (-0.1, 2.1, math.nan, math.inf, "x", None, True)],
        *[("top_p", v) for v in (0, -0.1, 1.1, math.nan, "x", None, True)],
        *[("min_p", v) for v in (-0.1, 1.1, math.nan, "x", None, True)],
        *[("stop", v) for v in ("", ["a", ""], [1], 5, {"a"}, [None])],
        *[("stop_token_ids", v) for v in (5, [-1], ["1"], [1.0], [True], "12")],
        *[("ignore_eos", v) for v in (1, None, "yes")],
        *[("detokenize", v) for v in (1, None)],
        *[("skip_special_tokens", v) for v in (0, None)],
        *[("include_stop_str_in_output", v) for v in (0, None)],
        *[("skip_clone", v) for v in (0, None)],
        *[("output_kind", v) for v in (0, None, "DELTA")],
    ],
)
def test_a_value_out_of_range_or_of_another_type_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is .*; allowed: "):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_an_error_is_also_a_value_error_and_shows_what_came() -> None:
    with pytest.raises(ValueError, match=r"^top_p is 1\.5; allowed: a number in \(0, 1\]\.$"):
        SamplingParams(top_p=1.5)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"temperature": 0, "n": 2}, "n"),
        ({"stop": "x", "detokenize": False}, "stop"),
        ({"prompt_logprobs": 1, "skip_reading_prefix_cache": False}, "skip_reading_prefix_cache"),
        ({"structured_outputs": YES_OR_NO, "ignore_eos": True}, "ignore_eos"),
        ({"structured_outputs": YES_OR_NO, "min_tokens": 3}, "min_tokens"),
    ],
)
def test_values_that_contradict_each_other_are_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is "):
        SamplingParams(**options)
    for field_name in options:
        SamplingParams(**{k: v for k, v in options.items() if k != field_name})


def test_values_at_the_limits_are_accepted() -> None:
    SamplingParams(n=16384, presence_penalty=-2, frequency_penalty=2, temperature=2, top_p=1, min_p=1, min_tokens=16)
    SamplingParams(max_tokens=None, min_tokens=10**6, seed=2**64 - 1, logprobs=-1, detokenize=False)


def test_greedy_resets_what_shapes_a_draw() -> None:
    params = SamplingParams(temperature=0, top_p=0.5, top_k=5, min_p=0.1, repetition_penalty=1.2)
    assert params.is_greedy
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.0, 1.0, 0, 0.0)
    assert params.repetition_penalty == 1.2
    with pytest.raises(ConfigError, match="top_p"):
        SamplingParams(temperature=0, top_p=5)


@pytest.mark.parametrize("temperature", [1e-9, 1e-5, 0.0099])
def test_a_temperature_close_to_zero_is_raised_with_a_warning(temperature: float) -> None:
    with pytest.warns(UserWarning, match="raised to 0.01") as caught:
        params = SamplingParams(temperature=temperature, top_k=3)
    assert params.temperature == 0.01
    assert not params.is_greedy
    assert params.top_k == 3
    assert caught[0].filename == __file__


def test_normalised_as_vllm_does() -> None:
    assert SamplingParams(stop="a").stop == ["a"]
    assert SamplingParams(stop=None).stop == []  # type: ignore[arg-type]
    assert SamplingParams(stop=("a", "b")).stop == ["a", "b"]
    assert SamplingParams(stop_token_ids=[3, 1, 3]).stop_token_ids == [3, 1]
    assert SamplingParams(stop_token_ids=None).stop_token_ids == []  # type: ignore[arg-type]
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(seed=-2).seed == -2
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(logprobs=True).logprobs == 1
    assert SamplingParams(logprobs=0).logprobs == 0
    assert SamplingParams(prompt_logprobs=True).prompt_logprobs == 1
    assert SamplingParams(prompt_logprobs=0).skip_reading_prefix_cache is True
    assert SamplingParams(logit_bias={3: 500, 4: -math.inf, "5": 1}).logit_bias == {3: 100.0, 4: -100.0, 5: 1.0}  # type: ignore[dict-item]
    assert SamplingParams(allowed_token_ids=(3, 1, 3)).allowed_token_ids == [3, 1]
    assert SamplingParams(bad_words=("a", "b")).bad_words == ["a", "b"]
    assert SamplingParams(structured_outputs=YES_OR_NO).structured_outputs == YES_OR_NO


def test_numbers_of_other_libraries_become_plain_ones() -> None:
    class Three:
        def __index__(self) -> int:
            return 3

    params = SamplingParams(top_k=Three(), temperature=1, top_p=Fraction(1, 2))  # type: ignore[arg-type]
    assert [type(v) for v in (params.top_k, params.temperature, params.top_p)] == [int, float, float]
    assert (params.top_k, params.top_p) == (3, 0.5)


def test_the_callers_lists_are_not_kept() -> None:
    stop, ids = ["a"], [1]
    params = SamplingParams(stop=stop, stop_token_ids=ids)
    stop.append("b")
    ids.append(2)
    assert (params.stop, params.stop_token_ids) == (["a"], [1])


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 0.5  # type: ignore[misc]
    assert dataclasses.replace(SamplingParams(), temperature=0.5).temperature == 0.5


def test_a_clone_is_equal_and_shares_no_list() -> None:
    params = SamplingParams(stop="a", stop_token_ids=[1], seed=3)
    clone = params.clone()
    assert clone == params
    assert clone is not params
    assert clone.stop is not params.stop
    assert clone.stop_token_ids is not params.stop_token_ids
    reused = SamplingParams(skip_clone=True)
    assert reused.clone() is reused


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_every_output_kind_is_accepted_and_copies_survive(kind: RequestOutputKind) -> None:
    params = SamplingParams(
        output_kind=kind, stop=["x"], logprobs=2, logit_bias={1: 2.0}, bad_words=["b"], structured_outputs=YES_OR_NO
    )
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params


def test_from_optional_takes_none_for_the_default_except_for_max_tokens() -> None:
    options = dict.fromkeys(VLLM_DEFAULTS)
    assert SamplingParams.from_optional(**options) == SamplingParams(max_tokens=None)
    assert SamplingParams.from_optional() == SamplingParams()
    assert SamplingParams.from_optional(temperature=None, top_k=4) == SamplingParams(top_k=4)


def test_history_is_needed_only_by_a_penalty() -> None:
    assert not SamplingParams(top_k=3, top_p=0.5, min_p=0.1).needs_history
    assert SamplingParams(presence_penalty=0.1).needs_history
    assert SamplingParams(frequency_penalty=-0.1).needs_history
    assert SamplingParams(repetition_penalty=0.9).needs_history


@given(st.floats(-3, 3), st.floats(0.01, 3), st.floats(-0.5, 1.5), st.integers(-3, 10), st.integers(-1, 4))
def test_what_is_accepted_is_in_range_and_means_itself(
    penalty: float, temperature: float, share: float, top_k: int, min_tokens: int
) -> None:
    options: dict[str, Any] = {"presence_penalty": penalty, "temperature": temperature, "top_p": share}
    options |= {"top_k": top_k, "min_tokens": min_tokens, "max_tokens": 3}
    if not (abs(penalty) <= 2 and temperature <= 2 and 0 < share <= 1 and top_k >= -1 and 0 <= min_tokens <= 3):
        with pytest.raises(ConfigError):
            SamplingParams(**options)
        return
    params = SamplingParams(**options)
    assert SamplingParams(**{f.name: getattr(params, f.name) for f in dataclasses.fields(params)}) == params
