"""The figures of an engine: Prometheus' own parser reads them, and they are those of what was run."""

from __future__ import annotations

import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from multibatch import LLM, SamplingParams
from multibatch.cost_table import CostRow, CostTable
from multibatch.publish import store_cost_table
from multibatch.runner import MAX_RECORDS
from tests.e2e.pretended_programs import pretended_engine

HISTOGRAMS = {
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "iteration_tokens_total",
}
COUNTERS = {
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "prompt_tokens",
    "prompt_tokens_cached",
    "generation_tokens",
    "request_success",
    "step_seconds",
    "step_predicted_seconds",
    "program_steps",
    "program_live_rows",
    "program_padded_rows",
    "program_seconds",
}
GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "program_wasted_row_share"}


class Scrape:
    """Every sample of a text, by name and labels without the model's."""

    def __init__(self, text: str) -> None:
        self.families = {f.name.removeprefix("multibatch:"): f for f in text_string_to_metric_families(text)}
        self.samples = {
            (
                s.name.removeprefix("multibatch:"),
                *(v for k, v in sorted(s.labels.items()) if k != "model_name"),
            ): s.value
            for family in self.families.values()
            for s in family.samples
        }
        self.models = {s.labels["model_name"] for f in self.families.values() for s in f.samples}

    def __getitem__(self, key: str | tuple[str, ...]) -> float:
        return self.samples[(key,) if isinstance(key, str) else key]

    def bounds(self, name: str) -> list[str]:
        return [str(key[1]) for key in self.samples if key[0] == f"{name}_bucket"]


def params(num_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True, detokenize=False, **options)


def test_names_labels_and_buckets_are_those_of_vllm(eager_artifact: Path) -> None:
    engine, _ = pretended_engine(eager_artifact)
    engine.add_request("a", [5, 6], params(3))
    engine.run_all()
    scrape = Scrape(engine.metrics_text())
    kinds = {name: family.type for name, family in scrape.families.items()}
    assert {name for name, kind in kinds.items() if kind == "histogram"} == HISTOGRAMS
    assert {name for name, kind in kinds.items() if kind == "counter"} == COUNTERS
    assert {name for name, kind in kinds.items() if kind == "gauge"} == GAUGES
    assert scrape.models == {engine.manifest.model.id}
    assert scrape.bounds("request_prompt_tokens") == ["1.0", "2.0", "5.0", "10.0", "20.0", "50.0", "100.0", "+Inf"]
    assert scrape.bounds("request_params_n") == ["1.0", "2.0", "5.0", "10.0", "20.0", "+Inf"]
    assert scrape.bounds("iteration_tokens_total")[:3] == ["1.0", "8.0", "16.0"]
    assert scrape.bounds("iteration_tokens_total")[-2:] == ["16384.0", "+Inf"]
    assert scrape.bounds("time_to_first_token_seconds")[:3] == ["0.001", "0.005", "0.01"]
    assert scrape.bounds("inter_token_latency_seconds")[:3] == ["0.01", "0.025", "0.05"]
    assert scrape.bounds("e2e_request_latency_seconds")[:3] == ["0.3", "0.5", "0.8"]


def test_figures_are_those_of_what_was_run(eager_artifact: Path) -> None:
    rng = random.Random(4)
    engine, _ = pretended_engine(eager_artifact, num_kv_blocks=5)
    lengths = [(rng.randrange(1, 60), rng.randrange(1, 50)) for _ in range(40)]
    for i, (num_prompt, num_tokens) in enumerate(lengths):
        engine.add_request(str(i), [rng.randrange(16, 300) for _ in range(num_prompt)], params(num_tokens))
    waiting = Scrape(engine.metrics_text())
    assert (waiting["num_requests_running"], waiting["num_requests_waiting"]) == (0, 40)
    engine.step()
    assert Scrape(engine.metrics_text())["kv_cache_usage_perc"] > 0
    outputs = engine.run_all()
    scrape = Scrape(engine.metrics_text())
    metrics = [output.metrics for output in outputs.values() if output.metrics is not None]
    num_prompt, num_generated = (sum(column) for column in zip(*lengths, strict=True))
    assert len(metrics) == 40
    assert scrape["prompt_tokens_total"] == scrape["prefix_cache_queries_total"] == num_prompt
    assert scrape["generation_tokens_total"] == num_generated == sum(m.num_generation_tokens for m in metrics)
    assert scrape["num_preemptions_total"] == sum(m.num_preemptions for m in metrics) > 0
    assert [scrape["request_success_total", r] for r in ("stop", "length", "abort", "error")] == [0, 40, 0, 0]
    assert scrape["time_to_first_token_seconds_count"] == 40
    assert scrape["inter_token_latency_seconds_count"] == num_generated - 40
    assert scrape["request_time_per_output_token_seconds_count"] == sum(num > 1 for _, num in lengths)
    for name in ("request_prompt_tokens", "request_generation_tokens", "request_params_n", "request_params_max_tokens"):
        assert scrape[f"{name}_count"] == 40
    assert scrape["request_prompt_tokens_sum"] == num_prompt
    assert scrape["request_generation_tokens_bucket", "20.0"] == sum(num <= 20 for _, num in lengths)
    sums = {
        "time_to_first_token_seconds": [m.ttft_s for m in metrics],
        "request_queue_time_seconds": [m.queue_s for m in metrics],
        "request_prefill_time_seconds": [(m.prefill_ms or 0) / 1000 for m in metrics],
        "request_decode_time_seconds": [(m.decode_ms or 0) / 1000 for m in metrics],
        "inter_token_latency_seconds": [(m.decode_ms or 0) / 1000 for m in metrics],
        "request_time_per_output_token_seconds": [m.time_per_output_token_s or 0 for m in metrics],
    }
    for name, values in sums.items():
        assert scrape[f"{name}_sum"] == pytest.approx(sum(v for v in values if v is not None)), name
    latency = sum((m.latency_ms or 0) / 1000 for m in metrics)
    assert latency <= scrape["e2e_request_latency_seconds_sum"] < latency + 1
    # A preempted sequence computes its tokens again.
    assert scrape["iteration_tokens_total_sum"] > num_prompt + num_generated - 40
    idle = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    assert [scrape[name] for name in idle] == [0, 0, 0]


def test_figures_by_program_are_those_of_the_records(eager_artifact: Path) -> None:
    engine, _ = pretended_engine(eager_artifact)
    for i in range(3):
        engine.add_request(str(i), [5, 6, 7], params(4))
    engine.run_all()
    scrape = Scrape(engine.metrics_text())
    records = [r for r in engine.runner.records if r.program == "decoder_batch_4"]
    assert records
    name = "decoder_batch_4"
    assert scrape["program_steps_total", name] == len(records)
    live, padded = sum(r.num_live for r in records), sum(r.num_padded for r in records)
    assert scrape["program_live_rows_total", name] == live
    assert scrape["program_padded_rows_total", name] == padded > 0
    assert scrape["program_seconds_total", name] == pytest.approx(sum(r.ms for r in records) / 1000)
    assert scrape["program_wasted_row_share", name] == pytest.approx(padded / (live + padded))
    assert scrape["program_steps_total", "prefill_16"] >= 1


def test_predicted_and_measured_step_times_stand_beside_each_other(tmp_path: Path, eager_artifact: Path) -> None:
    """By the times of the decoders, then by a cost table; prompts only by the latter."""
    engine, _ = pretended_engine(eager_artifact)
    decoders = engine.manifest.decoders
    engine.add_request("a", [5, 6, 7], params(4))
    engine.run_all()
    scrape = Scrape(engine.metrics_text())
    one = decoders[1].measured_ms
    assert one is not None
    assert scrape["step_predicted_seconds_total"] == pytest.approx(3 * one / 1000)
    assert scrape["step_seconds_total"] > 0
    calibrated = tmp_path / "calibrated"
    shutil.copytree(eager_artifact, calibrated)
    rows = [CostRow(64, 0, 16, 5.0), CostRow(64, 1, 0, 2.0), CostRow(64, 1, 16, 9.0)]
    store_cost_table(calibrated, CostTable(rows))
    engine, _ = pretended_engine(calibrated)
    engine.add_request("a", [5, 6, 7], params(4))
    engine.run_all()
    assert Scrape(engine.metrics_text())["step_predicted_seconds_total"] == pytest.approx((5 + 3 * 2) / 1000)
    store_cost_table(calibrated, CostTable(rows[1:]))  # as tables from elsewhere are: no prompts alone
    engine, _ = pretended_engine(calibrated)
    engine.add_request("a", [5, 6, 7], params(4))
    engine.run_all()
    assert Scrape(engine.metrics_text())["step_predicted_seconds_total"] == pytest.approx(3 * 2 / 1000)


def test_cached_aborted_and_failed_requests_are_counted(eager_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = pretended_engine(eager_artifact)
    prompt = list(range(20, 90))
    for name in "ab":
        engine.add_request(name, prompt, params(2))
        engine.run_all()
    assert Scrape(engine.metrics_text())["prompt_tokens_cached_total"] == 64
    assert Scrape(engine.metrics_text())["prefix_cache_hits_total"] == 64
    engine.add_request("c", [5], params(2, n=2))
    engine.abort("c")
    scrape = Scrape(engine.metrics_text())
    assert scrape["request_success_total", "abort"] == 2
    assert scrape["request_params_n_sum"] == 4
    assert scrape["request_queue_time_seconds_count"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", lambda _: (_ for _ in ()).throw(RuntimeError("bad memory")))
        engine.add_request("d", [5], params(2))
        engine.step()
    assert Scrape(engine.metrics_text())["request_success_total", "error"] == 1


def test_engines_do_not_share_figures(eager_artifact: Path) -> None:
    first, second = pretended_engine(eager_artifact)[0], pretended_engine(eager_artifact)[0]
    first.add_request("a", [5], params(3))
    first.run_all()
    assert Scrape(first.metrics_text())["generation_tokens_total"] == 3
    assert Scrape(second.metrics_text())["generation_tokens_total"] == 0


def test_they_are_read_while_another_thread_serves(eager_artifact: Path) -> None:
    engine, _ = pretended_engine(eager_artifact)
    for i in range(60):
        engine.add_request(str(i), [5 + i], params(30))
    thread = threading.Thread(target=engine.run_all)
    thread.start()
    texts = []
    while thread.is_alive():
        texts.append(engine.metrics_text())
        thread.join(
            0.01
        )  # without a pause, every call of torch by the other thread waits 5 ms for the interpreter's lock
    seen = [Scrape(text)["generation_tokens_total"] for text in texts]
    assert seen == sorted(seen)
    assert len(seen) > 1
    assert Scrape(engine.metrics_text())["generation_tokens_total"] == 60 * 30


def test_records_are_bounded_and_figures_are_not(eager_artifact: Path) -> None:
    llm = LLM(eager_artifact)
    assert llm.engine.runner.records.maxlen == MAX_RECORDS
    llm.generate([5, 6], params(3, temperature=0.0), use_tqdm=False)
    assert len(llm.take_records()) == 3
    assert llm.take_records() == []
    assert Scrape(llm.get_metrics())["program_steps_total", "decoder_batch_1"] == 2
