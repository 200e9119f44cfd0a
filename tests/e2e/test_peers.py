"""benchmarks/peers.py: the figures it makes of times, and a run of two artifacts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import peer_engines, peer_worker, peers
from multibatch.artifact import Artifact
from multibatch.roofline import Roofline


def test_rates_and_raggedness() -> None:
    w1 = peer_worker.Case("W1 x 2", "w1", [[1] * 4, [2] * 4], [5, 5], 2)
    answer = {"first": [1.0, 2.0], "last": [5.0, 6.0]}
    assert w1.rate(answer) == 2 * 4 / (6.0 - 2.0)
    assert w1.ragged(answer) == (6.0 - 5.0) / (6.0 - 2.0)
    assert peer_worker.Case("W2", "w2", [[1], [2]], [5, 7], 2).rate(answer) == 12 / 6.0
    assert peer_worker.Case("prefill", "prefill", [[1] * 9], [1], 1).rate({"first": [3.0], "last": [3.0]}) == 3.0


def test_cases_are_the_same_at_every_call_and_fit_the_most_that_may_run() -> None:
    arguments = (["w1", "w2", "prefill"], [1, 3], 128, 64, 1000, 4)
    cases = peers.make_cases(*arguments)
    assert cases == peers.make_cases(*arguments)
    assert [c.name for c in cases] == [
        "W1 x 1",
        "W1 x 3",
        "W2",
        "prefill 1 x 128",
        "prefill 1 x 1024",
        "prefill 4 x 128",
    ]
    w2 = cases[2]
    assert len(w2.prompts) == 32 and w2.running == 4
    assert all(16 <= len(p) <= 256 for p in w2.prompts) and all(16 <= n <= 128 for n in w2.lengths)
    assert all(0 <= token < 1000 for case in cases for prompt in case.prompts for token in prompt)


def test_ratio_is_taken_within_a_round() -> None:
    # the machine halves its speed from round to round, for both alike
    assert peers.median_ratio([8.0, 4.0, 2.0], [4.0, 2.0, 1.0]) == 2.0


def test_table_shows_share_ratio_and_raggedness(eager_artifact: Path) -> None:
    specs = peers.make_specs(eager_artifact, [("llamacpp", "a.gguf"), ("llamacpp", "b.gguf")], {}, {})
    assert [s.name for s in specs] == ["multibatch", "llamacpp:a.gguf", "llamacpp:b.gguf"]
    case = peer_worker.Case("W1 x 1", "w1", [[1] * 4], [4], 1)
    rates = {("W1 x 1", s.name): [rate] for s, rate in zip(specs, (6.0, 3.0, 12.0), strict=True)}
    ragged = {key: [0.5 if key[1].endswith("b.gguf") else 0.0] for key in rates}
    manifest = Artifact.open(eager_artifact).manifest
    slow = Roofline(bandwidth_gbps=1e-3, gproducts=None)
    rows = peers.summarize(specs, [case], peers.Measured(rates, ragged, {"W1 x 1": [slow]}), manifest)
    limit = 1000 / slow.step_ms(manifest, [6])
    assert rows[0]["bandwidth_gbps"] == [0.0]
    assert rows[0]["limit_tokens_per_s"] == pytest.approx(limit, abs=0.1)
    assert list(peers.table_lines(rows)) == [
        ["W1 x 1", "multibatch", "6.0", f"{6 / limit:.0%}", ""],
        ["", "llamacpp:a.gguf", "3.0", f"{3 / limit:.0%}", "2.00 x"],
        ["", "llamacpp:b.gguf", "~12.0", f"{12 / limit:.0%}", "0.50 x"],
        ["", "the best of each round", "", "", "0.50 x"],
    ]


def test_the_best_is_that_of_each_round(eager_artifact: Path) -> None:
    specs = peers.make_specs(eager_artifact, [("llamacpp", "a"), ("openvino", "b")], {}, {"openvino": "x.so:y.so"})
    assert [s.preload for s in specs] == ["", "", "x.so:y.so"]
    case = peer_worker.Case("W2", "w2", [[1] * 4], [4], 1)
    rates = {
        ("W2", s.name): list(r)
        for s, r in zip(specs, ((6.0, 6.0, 6.0), (3.0, 4.0, 12.0), (2.0, 5.0, 1.0)), strict=True)
    }
    found = peers.Measured(rates, {key: [0.0] for key in rates})
    (row,) = peers.summarize(specs, [case], found, Artifact.open(eager_artifact).manifest)
    assert row["ours_over_best"] == pytest.approx(6 / 5)
    assert row["bandwidth_gbps"] == []


@dataclass
class _Engine:
    """A spec that is its own worker, and notes what is asked of it."""

    name: str
    log: list[tuple[str, str, int | None]]
    version: str = "1"
    start_s: float = 0.5

    def start(self, cases: list[peer_worker.Case], threads: int, timeout: float) -> _Engine:
        self.log.append((self.name, "start", len(cases)))
        return self

    def run(self, case: peer_worker.Case, most_tokens: int | None = None) -> dict[str, list[float]]:
        self.log.append((self.name, case.name, most_tokens))
        return {"first": [1.0], "last": [2.0]}

    def ask(self, job: dict[str, bool]) -> dict[str, float | None]:
        return {"bandwidth_gbps": 1.0, "gproducts": None}

    def close(self) -> None:
        self.log.append((self.name, "close", None))


def test_engines_start_once_for_a_work_and_run_in_turn() -> None:
    log: list[tuple[str, str, int | None]] = []
    engines: list[Any] = [_Engine(name, log) for name in ("multibatch", "b")]
    cases = [
        peer_worker.Case(name, work, [[1]], [2], 1) for name, work in (("W1 x 1", "w1"), ("W1 x 2", "w1"), ("W2", "w2"))
    ]
    found = peers.measure(engines, cases, 2, 1, 1.0)
    w1 = ["W1 x 1", "W1 x 2"]
    first = [(engine, case, most) for case in w1 for engine in ("multibatch", "b") for most in (4, None)]
    second = [(engine, case, None) for case in w1 for engine in ("b", "multibatch")]
    until = log.index(("b", "close", None))
    starts = [("multibatch", "start", 2), ("b", "start", 2), ("multibatch", "W1 x 1", 1), ("b", "W1 x 1", 1)]
    assert log[:until] == [*starts, *first, *second]
    # 0.5 s until it takes requests, and 1 s to the first token.
    assert found.starts == {"multibatch": [1.5] * 2, "b": [1.5] * 2}
    assert [name for name, what, _ in log[until + 2 :] if what == "start"] == ["multibatch", "b"]
    assert [len(rates) for rates in found.rates.values()] == [2] * 6
    assert {name: len(measured) for name, measured in found.rooflines.items()} == {"W1 x 1": 2, "W1 x 2": 2}


def test_an_engine_stands_still_while_nothing_is_asked_of_it() -> None:
    script = """
import json, os, sys
child = os.fork()
if not child:
    while True: pass
print(json.dumps({"version": str(child)}), flush=True)
for line in sys.stdin: print(line, end="", flush=True)
os.kill(child, 9)
"""
    worker = peer_worker.Worker("spinner", [sys.executable, "-c", script], os.environ, 60.0)
    with closing(worker):
        stands_still(int(worker.version))
        assert worker.ask({"a": 1}) == {"a": 1}
        stands_still(int(worker.version))


def stands_still(pid: int) -> None:
    """Waits until a process is stopped."""
    deadline = time.monotonic() + 60.0
    while (state := Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]) != "T":
        assert time.monotonic() < deadline, f"the engine's child goes on, in state {state}"
        time.sleep(0.01)


class _Scripted:
    """One token per running request and step; ends a request after `stops` tokens."""

    version = "scripted"

    def __init__(self, keeps_limit: bool, stops: int = 99) -> None:
        self.keeps_limit, self.stops = keeps_limit, stops
        self.left: dict[int, int] = {}
        self.most = 0

    def add(self, request: int, prompt: list[int], num_tokens: int) -> None:
        self.left[request] = min(num_tokens, self.stops)

    def step(self) -> list[tuple[int, int]]:
        self.most = max(self.most, len(self.left))
        made = [(request, 1) for request in self.left]
        self.left = {request: left - 1 for request, left in self.left.items() if left > 1}
        return made


@pytest.mark.parametrize(("keeps_limit", "most"), [(True, 5), (False, 2)])
def test_an_engine_that_keeps_no_limit_is_fed(keeps_limit: bool, most: int) -> None:
    engine = _Scripted(keeps_limit)
    answer = peer_engines.generate(engine, 2, [[1]] * 5, [3, 1, 2, 4, 2])
    assert answer["num_tokens"] == [3, 1, 2, 4, 2]
    assert engine.most == most


def test_a_request_that_ends_early_is_counted_as_it_came() -> None:
    answer = peer_engines.generate(_Scripted(True, stops=2), 2, [[1]] * 2, [2, 3])
    assert answer["num_tokens"] == [2, 2]


def test_a_run_of_two_artifacts(eager_artifact: Path, tmp_path: Path) -> None:
    target, other = tmp_path / "peers.json", tmp_path / "other"
    shutil.copytree(eager_artifact, other)
    options = ["--batches", "2", "--rounds", "1", "--input-len", "6", "--output-len", "3", "--threads", "1"]
    options += ["--peer", f"multibatch:{other}", "--work", "w1", "--json", str(target)]
    command = [sys.executable, "-m", "benchmarks.peers", eager_artifact, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(peers.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record == json.loads(target.read_text())
    assert {"cpu", "threads", "versions", "bandwidth_gbps", "model"} <= set(record)
    starts = record["start_s"]
    assert set(starts) == {"multibatch", "multibatch:other"} and all(s > 0 for [s] in starts.values())
    (case,) = record["cases"]
    ours = case["engines"]["multibatch"]
    assert ours["tokens_per_s"] > 0 and ours["ours_over"] == 1.0
    theirs = case["engines"]["multibatch:other"]
    assert theirs["ours_over"] == pytest.approx(ours["tokens_per_s"] / theirs["tokens_per_s"], rel=0.01)
    assert ours["share_of_limit"] == pytest.approx(ours["tokens_per_s"] / case["limit_tokens_per_s"], abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batches", "5"], "4 requests at once, not 5"),
        (["--work", "prefill", "--batches", "1", "--input-len", "16"], "prefill 1 x 128 needs 129 positions"),
        (["--peer", "other:x"], "multibatch, openvino, llamacpp, ort, vllm"),
        (["--peer", "vllm:"], "KIND:PATH"),
        (["--peer", "ort:x"], "ort has no continuous batching"),
        (["--work", "w3"], "there are w1, w2 and prefill"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(eager_artifact: Path, options: list[str], message: str) -> None:
    done = CliRunner().invoke(peers.main, [str(eager_artifact), *options])
    assert done.exit_code == 2 and message in done.output
