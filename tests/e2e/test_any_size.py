"""One program for any numbers of rows and tokens: no padding, prompts and decode rows in one call, the same tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from multibatch import LLM, SamplingParams
from multibatch.artifact import Artifact
from multibatch.cli import main
from multibatch.errors import ConfigError
from multibatch.open_engine import open_engine
from multibatch_compile import add_size, compile_model, prune, verify_artifact

MOST = 5


@pytest.fixture(scope="module")
def any_size(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    target = tmp_path_factory.mktemp("artifacts") / "any"
    compile_model(demo_model, target, max_num_seqs=MOST, max_seq_len=256, max_num_batched_tokens=40, dtype="float32")
    return target


def test_tokens_equal_those_of_decoders_of_fixed_sizes(any_size: Path, demo_artifact: Path) -> None:
    rng = random.Random(3)
    prompts = [[rng.randrange(16, 300) for _ in range(rng.randrange(1, 90))] for _ in range(12)]
    params = [
        SamplingParams(temperature=t, seed=i, max_tokens=rng.randrange(1, 30), ignore_eos=True)
        for i, t in enumerate([0.0, 0.9] * 6)
    ]
    llm = LLM(any_size, num_threads=2)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    fixed = LLM(demo_artifact, num_threads=2).generate(prompts, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in fixed]
    records = llm.take_records()
    assert sum(record.num_padded for record in records) == 0
    assert {f"decoder_batch_{n}" for n in range(1, MOST + 1)} <= {record.program for record in records}
    # More calls than prompts would need alone: the budget cuts them, and decode rows ride along.
    assert sum(record.num_live for record in records if record.program == "step") > sum(map(len, prompts))


def test_fewer_prompt_tokens_a_step(any_size: Path) -> None:
    prompts, params = [list(range(20, 110)), [30, 31]], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)

    def generated(most: int | None) -> tuple[list[list[int]], int]:
        llm = LLM(any_size, num_threads=2, max_num_batched_tokens=most)
        tokens = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
        return tokens, max(record.num_live for record in llm.take_records())

    whole, some = generated(None), generated(16)
    assert whole[0] == some[0]
    assert (whole[1], some[1]) == (40, 16)
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens is 41.*--max-num-batched-tokens 41"):
        LLM(any_size, max_num_batched_tokens=41)


@pytest.mark.parametrize(
    ("usual", "asked", "expected"), [(None, None, 40), (16, None, 16), (512, None, 40), (16, 24, 24)]
)
def test_the_usual_prompt_tokens_a_step_hold_where_nobody_asks(
    any_size: Path, usual: int | None, asked: int | None, expected: int
) -> None:
    _, engine = open_engine(any_size, {"max_num_batched_tokens": asked}, usual_batched_tokens=usual)
    assert engine.limits.max_prefill_tokens == expected


def test_what_was_proven_of_it(any_size: Path) -> None:
    manifest = Artifact.open(any_size).manifest
    assert [program.name for program in manifest.programs] == ["step"]
    assert manifest.decoder_batch_sizes == tuple(range(1, MOST + 1))
    (step,) = manifest.programs
    assert step.bit_equal is True
    assert step.max_abs_error is not None
    assert step.max_abs_error < 1e-3
    assert [(t.num_rows, t.num_tokens) for t in step.timings] == [(1, 1), (2, 2), (4, 4), (5, 5), (1, 32)]
    assert verify_artifact(any_size) == []


def test_there_is_no_ladder_to_change(any_size: Path) -> None:
    with pytest.raises(ConfigError, match="every batch size up to 5"):
        add_size(any_size, 8)
    with pytest.raises(ConfigError, match="every batch size up to 5"):
        prune(any_size, 4)


def test_inspect_shows_what_each_size_costs(any_size: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(any_size)], standalone_mode=False)
    shown = capsys.readouterr().out
    for line in ("step: 1 row ", "step: 5 rows", "step: 32 tokens"):
        assert line in shown


def test_bench_measures_it(any_size: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    load = ["--batch", "3", "--input-len", "9", "--output-len", "5", "--repeats", "1", "--no-reference"]
    main(["bench", str(any_size), *load, "--output-json", str(figures)], standalone_mode=False)
    record = json.loads(figures.read_text())
    uses = {use["program"]: use for use in record["programs"]}
    assert set(uses) == {"step", "decoder_batch_3"}
    assert (uses["decoder_batch_3"]["num_live"], uses["decoder_batch_3"]["num_padded"]) == (4 * 3, 0)
    assert uses["decoder_batch_3"]["share_of_limit"] > 0
    assert record["ladder_over"].keys() == {"nearest", "pad_to_max", "batch_1"}


def test_fixed_prefill_sizes_exclude_it(demo_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        compile_model(demo_model, tmp_path / "x", decoder_batch_sizes="any", prefill_chunk_sizes=[16])
    with pytest.raises(ConfigError, match="exclude each other"):
        compile_model(
            demo_model, tmp_path / "x", decoder_batch_sizes=[1], prefill_chunk_sizes=[16], max_num_batched_tokens=8
        )
