"""Requests, their state, their outputs in vLLM's form, and their random streams."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multibatch.errors import RequestError
from multibatch.request import (
    CompletionOutput,
    FinishReason,
    Logprob,
    Request,
    RequestMetrics,
    RequestOutput,
    Sequence,
    SequenceStatus,
    philox,
    random_bits,
    resolve_seed,
)
from multibatch.sampling_params import SamplingParams

# Known answers of the Random123 library (kat_vectors, philox4x32 with 10 rounds): counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def make_request(**options: Any) -> Request:
    values: dict[str, Any] = {"request_id": "a", "prompt_token_ids": (5, 6, 7), "params": SamplingParams(), "seed": 0}
    return Request(**(values | options))


def names(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def test_a_request_is_frozen_and_given_by_name() -> None:
    request = make_request()
    assert (request.prompt, request.arrival_time, request.eos_token_ids) == (None, 0.0, ())
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        Request("a", (1,), SamplingParams())  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"request_id": ""}, "request_id is empty"),
        ({"prompt_token_ids": ()}, "request a: the prompt has 0 tokens"),
        ({"prompt_token_ids": (1, -2)}, "request a: prompt_token_ids has -2"),
        ({"seed": -1}, "request a: seed is -1"),
        ({"seed": 2**64}, "request a: seed is 18446744073709551616"),
    ],
)
def test_a_request_that_cannot_run_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        make_request(**options)
    assert isinstance(caught.value, ValueError)
    assert "allowed: " in str(caught.value)


def test_a_sequence_starts_as_its_prompt_and_leaves_it_alone() -> None:
    sequence = Sequence(make_request())
    assert (sequence.request_id, sequence.token_ids, sequence.output_token_ids) == ("a", [5, 6, 7], [])
    assert (sequence.status, sequence.is_finished, sequence.finish_reason) == (SequenceStatus.WAITING, False, None)
    sequence.token_ids += [8, 9]
    assert (sequence.num_prompt_tokens, sequence.num_output_tokens, sequence.num_tokens) == (3, 2, 5)
    assert sequence.output_token_ids == [8, 9]
    assert sequence.request.prompt_token_ids == (5, 6, 7)
    sequence.output_token_ids.append(1)
    assert sequence.num_tokens == 5


def test_a_sequence_is_finished_by_its_status() -> None:
    sequence = Sequence(make_request(), status=SequenceStatus.FINISHED, finish_reason=FinishReason.LENGTH)
    assert sequence.is_finished


def test_sequences_are_told_apart_by_identity_and_share_no_lists() -> None:
    request = make_request()
    first, second = Sequence(request), Sequence(request)
    assert first != second
    assert len({first, second}) == 2
    first.block_ids.append(1)
    first.token_ids.append(1)
    assert (second.block_ids, second.num_output_tokens) == ([], 0)
    with pytest.raises(AttributeError):
        first.num_block_ids = 1  # type: ignore[attr-defined]


def test_a_finish_reason_is_its_word() -> None:
    assert [str(reason) for reason in FinishReason] == ["stop", "length", "abort", "error"]
    assert json.dumps(FinishReason.STOP) == '"stop"'
    assert isinstance(FinishReason.STOP, str)
    assert FinishReason("length") is FinishReason.LENGTH


def test_outputs_have_the_fields_of_vllm_in_its_order() -> None:
    assert names(Logprob) == ["logprob", "rank", "decoded_token"]
    assert names(CompletionOutput) == [
        "index",
        "text",
        "token_ids",
        "cumulative_logprob",
        "logprobs",
        "routed_experts",
        "finish_reason",
        "stop_reason",
        "lora_request",
        "sampling_mask",
        "spec_decode_metrics",
        "weight_versions",
    ]
    assert names(RequestOutput) == [
        "request_id",
        "prompt",
        "prompt_token_ids",
        "prompt_logprobs",
        "outputs",
        "finished",
        "metrics",
        "lora_request",
        "encoder_prompt",
        "encoder_prompt_token_ids",
        "num_cached_tokens",
        "num_cache_creation_tokens",
        "prompt_token_id_logprobs",
        "kv_transfer_params",
        "ec_transfer_params",
    ]
    assert names(RequestMetrics) == [
        "num_generation_tokens",
        "num_preemptions",
        "arrival_time",
        "queued_ts",
        "scheduled_ts",
        "first_token_ts",
        "last_token_ts",
        "first_token_latency",
        "num_cached_tokens",  # ours
    ]


def test_outputs_are_made_by_position_and_the_rest_is_none() -> None:
    running = CompletionOutput(0, "hi", [1, 2], -0.5, [{1: Logprob(-0.1, 1, "h")}, {2: Logprob(-0.4)}])
    assert not running.finished()
    assert (running.routed_experts, running.stop_reason, running.lora_request) == (None, None, None)
    done = dataclasses.replace(running, finish_reason=FinishReason.STOP, stop_reason="i")
    assert done.finished()
    output = RequestOutput("a", "p", [1], None, [done], True)
    assert (output.metrics, output.num_cached_tokens, output.kv_transfer_params) == (None, None, None)
    with pytest.raises(TypeError):
        RequestOutput("a", "p", [1], None, [done], True, *[None] * 7)


def test_metrics_are_differences_of_one_clock() -> None:
    metrics = RequestMetrics(
        num_generation_tokens=5, queued_ts=0.0, scheduled_ts=1.0, first_token_ts=3.0, last_token_ts=11.0
    )
    assert (metrics.queue_s, metrics.ttft_s, metrics.time_per_output_token_s, metrics.e2e_s) == (1.0, 3.0, 2.0, 11.0)
    assert (metrics.prefill_ms, metrics.decode_ms, metrics.latency_ms) == (2000.0, 8000.0, 11000.0)


def test_what_has_not_happened_has_no_time() -> None:
    metrics = RequestMetrics(queued_ts=1.0)
    assert (metrics.queue_s, metrics.ttft_s, metrics.time_per_output_token_s, metrics.e2e_s) == (None,) * 4
    assert (metrics.prefill_ms, metrics.decode_ms, metrics.latency_ms) == (None,) * 3
    one_token = RequestMetrics(num_generation_tokens=1, first_token_ts=2.0, last_token_ts=2.0)
    assert one_token.time_per_output_token_s is None


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: tuple[int, int, int, int], key: int, result: tuple[int, ...]) -> None:
    assert philox(counter, key) == result


def test_random_bits_are_pinned() -> None:
    assert random_bits(0, 0) == (0x6627E8D5 << 32 | 0xE169C58D) >> 11
    assert random_bits(0, 0) != random_bits(0, 2**32) != random_bits(2**32, 0)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_random_bits_are_53_and_differ_by_seed_and_position(seed: int, position: int) -> None:
    bits = random_bits(seed, position)
    assert 0 <= bits < 2**53
    assert bits == random_bits(seed, position)
    assert len({bits, random_bits(seed ^ 1, position), random_bits(seed, position + 1)}) == 3


def test_random_bits_are_spread_evenly() -> None:
    counts = [0] * 16
    for seed in range(40):
        for position in range(100):
            counts[random_bits(seed, position) >> 49] += 1
    chi_square = sum((count - 250) ** 2 / 250 for count in counts)
    assert chi_square < 37.7  # 0.1 % of fair streams exceed it, with 15 degrees of freedom


def test_a_given_seed_is_used_as_it_is() -> None:
    assert resolve_seed(7, 0, 1) == resolve_seed(7, 99, 2) == 7
    assert [resolve_seed(7, 0, 0, child_index=i) for i in range(3)] == [7, 8, 9]
    assert resolve_seed(-2, 0, 0) == 2**64 - 2


def test_without_a_seed_streams_differ_and_can_be_repeated() -> None:
    seeds = [
        resolve_seed(None, index, engine, child_index=child)
        for index in range(20)
        for engine in range(5)
        for child in range(4)
    ]
    assert len(set(seeds)) == len(seeds)
    assert seeds[0] == resolve_seed(None, 0, 0)
    assert all(0 <= seed < 2**64 for seed in seeds)


@given(st.integers(-(2**63), 2**64 - 1) | st.none(), st.integers(0, 2**40), st.integers(0, 2**64), st.integers(0, 64))
def test_every_resolved_seed_is_one_that_a_request_takes(
    given_seed: int | None, i: int, engine: int, child: int
) -> None:
    seed = resolve_seed(given_seed, i, engine, child_index=child)
    assert make_request(seed=seed).seed == seed
