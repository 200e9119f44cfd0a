"""The GPU checks' own code, over Triton's interpreter and a pretended device: run by `test_gpu_check.py`."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import gpu_attention, gpu_decode
from benchmarks.gpu_machine import Machine, copy_bandwidth
from multibatch import triton_attention
from tests.cuda.pretended_device import PretendedDevice

CPU = torch.device("cpu")
SMALL = replace(gpu_attention.ODD, kv_heads=1, group=2)


@pytest.fixture(autouse=True, scope="module")
def _operator() -> None:
    triton_attention.register("CPU")


@pytest.fixture
def machine() -> Machine:
    ticks = itertools.count()
    return Machine(
        PretendedDevice(),
        lambda: None,
        total_memory=2 * 10**9,
        free_at_start=10**9,
        clock=lambda: float(next(ticks)),
        repeats=1,
        least_seconds=1.0,
    )


def test_bandwidth_counts_what_is_read_and_written(machine: Machine) -> None:
    # Every clock reading is a second after the one before.
    assert copy_bandwidth(machine, num_bytes=1000) == pytest.approx(2 * 1000 / 1e9)


def test_attention_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"mixed": ((1, 4), (3, 5)), "decode": ((1, 4), (1, 20))}
    result = gpu_attention.check_attention(CPU, [SMALL, replace(SMALL, window=3)], **rows)
    assert result["ok"], result
    assert result["num_cases"] == 4
    assert 0 < result["largest_error"]["float32"] < 1e-5
    attend = triton_attention.paged_attention

    def by_the_number_of_rows(*arguments: Any) -> torch.Tensor:
        return attend(*arguments) * (1 + 1e-3 * arguments[8].shape[0])

    monkeypatch.setattr(triton_attention, "paged_attention", by_the_number_of_rows)
    result = gpu_attention.check_attention(CPU, [SMALL], **rows)
    assert not result["ok"]
    assert "off by" in result["wrong"][0]
    assert "row 0 has other bits alone" in result["wrong"][-2]


def test_attention_rates_count_the_bytes(machine: Machine) -> None:
    case = gpu_attention.ReadCase(shape=SMALL, num_layers=2, context=20, max_seq_len=40)
    rate = gpu_attention.attention_rates(machine, 1.0, (2,), case)["2"]
    assert rate["us_per_layer"] == 0.5e6
    # 2 layers, 2 rows, 20 positions, 24 + 40 numbers of four bytes, in one second.
    assert rate["gbps"] == rate["share_of_copy_bandwidth"] == pytest.approx(2 * 2 * 20 * 64 * 4 / 1e9)


def test_architectures_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    result = gpu_decode.check_architectures(CPU, lengths=(14, 3), num=3)
    assert result == {"ok": True, "architectures": ["Llama", "Qwen3", "Gemma2"], "num_tokens": 3, "wrong": []}
    monkeypatch.setattr(gpu_decode, "continued", lambda *arguments: [[1], [2]])
    result = gpu_decode.check_architectures(CPU, names=("Llama",), lengths=(14, 3), num=1)
    assert not result["ok"] and "Llama, prompt 0: [1] instead of" in result["wrong"][0]


def test_decode_is_captured_and_measured(machine: Machine) -> None:
    options = gpu_decode.TINY | {"tie_word_embeddings": True}
    result = gpu_decode.measure_decode(
        machine, 1.0, options, sizes=(2, 1), context=20, max_seq_len=64, followed_steps=2
    )
    assert result["ok"], result
    assert [(r["batch_size"], r["state"]) for r in result["sizes"]] == [(2, "captured"), (1, "captured")]
    two = result["steps"]["2"]
    assert two["captured_ms"] == two["uncaptured_ms"] == 1000.0
    assert two["followed_ms"] > 0
    kv_bytes = 2 * 20 * 2 * 2 * 2 * 16 * 2  # rows, positions, layers, keys and values, heads, dimensions, bytes
    weights = 160 * 64 + 2 * (64 * (64 + 2 * 32) + 64 + 2 * 32 + 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64
    assert two["limit_ms"] == pytest.approx((2 * weights + kv_bytes) / 1e6)
    memory = result["memory"]
    assert memory["graphs"] == 300
    # Half of the device was free at the start, so half is what it plans with.
    assert memory["pool_blocks_that_fit"] == (10**9 - 300) // (32 * 2 * 2 * 2 * 16 * 2) - 1


def test_a_size_without_memory_fails_the_check(machine: Machine) -> None:
    short = replace(machine, graphs=PretendedDevice(bytes_of=lambda rows: 100 if rows == 1 else 2 * 10**9))
    options = gpu_decode.TINY | {"num_hidden_layers": 1}
    with pytest.warns(UserWarning, match="batch size 2 is not captured"):
        result = gpu_decode.measure_decode(
            short, 1.0, options, sizes=(2, 1), context=5, max_seq_len=32, followed_steps=2
        )
    assert not result["ok"]
    assert [(r["state"], r["num_replays"]) for r in result["sizes"]] == [("out_of_memory", 0), ("captured", 9)]
