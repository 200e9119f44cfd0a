"""`multibatch bench`: every variant runs the same work, and the last line is one JSON that adds up."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from multibatch.artifact import Artifact
from multibatch.bench import seeds
from multibatch.cost_table import CostRow, CostTable, Slowdown
from multibatch.publish import store_cost_table
from multibatch.trace import RequestTimes, TraceRequest

VARIANTS = {"ladder", "nearest", "pad_to_max", "batch_1", "eager", "transformers_generate"}


def run(*arguments: object) -> dict[str, Any]:
    """The last line that a command prints."""
    command = [sys.executable, "-m", "multibatch", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert {"cpu", "cores", "torch"} <= set(record)
    return record


def test_bench_compares_every_variant_in_one_run(demo_artifact: Path) -> None:
    options = ["--batch", "3", "--input-len", "9", "--output-len", "5", "--repeats", "2"]
    record = run("bench", demo_artifact, *options)
    assert set(record["variants"]) == VARIANTS
    assert set(record["ladder_over"]) == VARIANTS - {"ladder"}
    ladder = record["variants"]["ladder"]
    for name, ratio in record["ladder_over"].items():
        other = record["variants"][name]["decode_tokens_per_s"]
        assert abs(ratio * other / ladder["decode_tokens_per_s"] - 1) < 0.01
    limit = record["limit_decode_tokens_per_s"]
    assert abs(ladder["share_of_limit"] * limit / ladder["decode_tokens_per_s"] - 1) < 0.05
    decoders = {use["program"]: use for use in record["programs"] if use["program"].startswith("decoder")}
    # 3 prompts of 9 tokens fit one prefill of 32; the other 4 of 5 tokens are decoded 3 at a time in the size-4 decoder.
    assert set(decoders) == {"decoder_batch_4"}
    assert decoders["decoder_batch_4"]["num_live"] == 2 * 4 * 3
    assert decoders["decoder_batch_4"]["num_padded"] == 2 * 4
    assert record["batch"] == 3
    assert {"cpu", "cores", "torch", "multibatch", "bandwidth_gbps", "peak_rss_mb"} <= set(record)


@pytest.fixture(scope="module")
def calibrated(demo_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "demo"
    shutil.copytree(demo_artifact, folder)
    grid = ["--ctx-lens", "32,128", "--d-nums", "1,4,8", "--chunk-sizes", "0,8,32", "--repeats", "3"]
    command = [sys.executable, "-m", "multibatch", "calibrate", folder, *grid, "--export", folder.parent / "table.csv"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # 2 contexts x 3 numbers of rows x 3 chunks, and the 2 prompts alone
    assert "20 steps timed" in done.stdout
    return folder


def test_calibrate_stores_and_exports_what_a_step_costs(calibrated: Path) -> None:
    table = Artifact.open(calibrated, verify="hashes").cost_table()
    assert table is not None
    assert (table.ctx_lens, table.d_nums) == ((32, 128), (1, 4, 8))
    assert CostTable.from_csv((calibrated.parent / "table.csv").read_text()).rows == table.rows


def test_calibrate_takes_a_table_from_elsewhere(calibrated: Path, tmp_path: Path) -> None:
    folder, source = tmp_path / "artifact", tmp_path / "foreign.csv"
    shutil.copytree(calibrated, folder)
    source.write_text("ctx_len,d_num,chunk_size,cost\n128,8,32,1.5\n")
    command = [sys.executable, "-m", "multibatch", "calibrate", folder]
    done = subprocess.run([*command, "--from", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = Artifact.open(folder).cost_table()
    assert table is not None
    assert table.rows == (CostRow(128, 8, 32, 1.5),)
    wrong = subprocess.run([*command, "--d-nums", "1,9"], capture_output=True, text=True, check=False)
    assert wrong.returncode != 0
    assert "d_nums has 9; the artifact allows at most 8" in wrong.stderr


def test_latency_and_throughput_have_vllms_fields(demo_artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "latency.json"
    size = ["--input-len", 8, "--output-len", 4]
    record = run(
        "bench",
        "latency",
        demo_artifact,
        *size,
        "--batch-size",
        3,
        "--num-iters-warmup",
        1,
        "--num-iters",
        4,
        "--output-json",
        file,
    )
    assert {"model_id", "avg_latency", "latencies", "percentiles"} <= set(record)
    assert len(record["latencies"]) == 4
    assert set(record["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    assert json.loads(file.read_text()) == record
    record = run("bench", "throughput", demo_artifact, *size, "--num-prompts", 10, "--num-warmups", 1)
    assert (record["num_requests"], record["total_num_tokens"]) == (10, 10 * 12)
    assert record["tokens_per_second"] * record["elapsed_time"] == pytest.approx(120)


def test_a_terminal_shows_no_json_and_each_run_is_announced(demo_artifact: Path, tmp_path: Path) -> None:
    command = ["bench", "seeds", demo_artifact, "--num-requests", "2", "--batch-sizes", "1,2", "--repeats", "1"]
    typed = [sys.executable, "-m", "multibatch", *map(str, command), "--output-json", str(tmp_path / "seeds.json")]
    code = f"import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn({typed})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "continuous, 2 at once, run 1 of 1" in done.stdout
    assert "continuous at 2 over one at a time" in done.stdout
    assert '"rows"' not in done.stdout
    assert len(json.loads((tmp_path / "seeds.json").read_text())["rows"]) == 3


def test_a_prediction_follows_a_machine_that_has_changed_its_speed(calibrated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slow"
    shutil.copytree(calibrated, folder)
    table = Artifact.open(calibrated).cost_table()
    assert table is not None
    store_cost_table(folder, table.scaled(Slowdown(1000.0, 1000.0)))
    record = run("bench", "serve", folder, "--num-prompts", 12, "--input-len", 12, "--output-len", 6, "--predict")
    assert max(record["slowdown"].values()) < 0.05
    for name in ("mean_ttft_ms", "mean_tpot_ms"):
        assert record["predicted_as_calibrated_over_measured"][name] > 50
        assert record["predicted_over_measured"][name] < 20


def test_serve_sends_a_load_and_predicts_it(calibrated: Path, tmp_path: Path) -> None:
    load = ["--num-prompts", 20, "--request-rate", 200, "--input-len", 12, "--output-len", 6, "--lengths", "uniform"]
    goodput = ["--goodput", "ttft:60000", "--goodput", "tpot:60000"]
    record = run("bench", "serve", calibrated, *load, *goodput, "--predict")
    assert (record["completed"], record["failed"]) == (20, 0)
    assert record["request_goodput"] == pytest.approx(record["request_throughput"])
    assert record["predicted"]["total_output_tokens"] == record["total_output_tokens"]
    assert set(record["predicted_over_measured"]) == {"output_throughput", "mean_ttft_ms", "mean_tpot_ms"}
    assert set(record["slowdown"]) == {"decode", "prompts"}
    for metric in ("ttft", "tpot", "itl", "e2el"):
        assert 0 < record[f"median_{metric}_ms"] <= record[f"p99_{metric}_ms"]
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 5, "output_length": 3}\n' * 4)
    record = run("bench", "serve", calibrated, "--trace", trace, "--slo-limits-for-dynamic-batch", 1000)
    assert (record["total_input_tokens"], record["total_output_tokens"]) == (20, 12)


def test_fixed_groups_begin_when_they_are_complete_and_the_machine_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = [TraceRequest(timestamp=at, input_length=8, output_length=2) for at in (0.0, 0.5, 7.0, 7.5)]

    def three_seconds_each(engine: object, group: list[TraceRequest]) -> list[RequestTimes]:
        assert [request.timestamp for request in group] == [0.0] * len(group)
        return [RequestTimes(0.0, [1.0, 3.0], 0.25) for _ in group]

    monkeypatch.setattr(seeds, "run_load", three_seconds_each)
    alone = seeds._run_groups(None, trace, 1)  # type: ignore[arg-type]
    assert [times.tokens[-1] for times in alone] == [3.0, 6.0, 10.0, 13.0]
    pairs = seeds._run_groups(None, trace, 2)  # type: ignore[arg-type]
    assert [times.tokens[-1] for times in pairs] == [3.5, 3.5, 10.5, 10.5]
    row = seeds._row("static", 2, pairs)
    assert row["latency_ms"] == pytest.approx(1000 * (3.5 + 3.0 + 3.5 + 3.0) / 4)
    assert row["ttft_ms"] == pytest.approx(row["latency_ms"] - 2000)
    assert row["prefill_ms"] == pytest.approx(750)


def test_seeds_compare_schedulers_and_draw_them(demo_artifact: Path, tmp_path: Path) -> None:
    files = ["--csv", tmp_path / "seeds.csv", "--picture", tmp_path / "seeds.png"]
    load = ["--num-requests", 9, "--input-len", 8, "--output-len", 6, "--repeats", 1, "--batch-sizes", "1,4,8"]
    record = run("bench", "seeds", demo_artifact, *load, *files)
    cases = [(row["scheduler"], row["batch_size"]) for row in record["rows"]]
    assert cases == [("static", 1), ("static", 4), ("static", 8), ("continuous", 4), ("continuous", 8)]
    for row in record["rows"]:
        assert 0 < row["prefill_ms"] <= row["ttft_ms"] <= row["latency_ms"]
        assert row["latency_p50_ms"] <= row["latency_p95_ms"]
        assert row["tokens_per_s"] < row["limit_tokens_per_s"]
    assert len((tmp_path / "seeds.csv").read_text().splitlines()) == 6
    assert (tmp_path / "seeds.png").read_bytes().startswith(b"\x89PNG")


def test_policies_are_compared_on_the_engine_and_in_the_simulator(calibrated: Path, tmp_path: Path) -> None:
    load = ["--num-requests", 12, "--input-len", 8, "--output-len", 8, "--longest-output", 60, "--num-kv-blocks", 10]
    record = run("bench", "policies", calibrated, *load, "--picture", tmp_path / "policies.png")
    cases = {(case["load"], case["policy"]) for case in record["cases"]}
    loads, policies = {"steady", "bursty", "heavy-tailed"}, {"static", "greedy", "linear", "statistical", "dynamic"}
    assert cases == {(load, policy) for load in loads for policy in policies}
    for case in record["cases"]:
        assert case["measured"]["completed"] == 12
        assert case["measured"]["total_output_tokens"] == case["predicted"]["total_output_tokens"]
        if case["policy"] == "static":
            assert case["measured"]["num_preemptions"] == 0
    assert {(c["load"], c["policy"]) for c in record["capacity"]} == {
        (x, y) for x in loads for y in ("static", "dynamic")
    }
    assert (tmp_path / "policies.png").read_bytes().startswith(b"\x89PNG")
    record = run("bench", "chunk-budget", calibrated, "--target-ms", 1000, "--request-rate", 100, *load[:6])
    assert [row["policy"] for row in record["rows"]] == ["fixed budget", "refined budget"]
