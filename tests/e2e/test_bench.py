"""`multibatch bench`: every variant runs the same work, and the last line is one JSON that adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

VARIANTS = {"ladder", "pad_to_max", "batch_1", "eager", "transformers_generate"}


def test_bench_compares_every_variant_in_one_run(demo_artifact: Path) -> None:
    command = [sys.executable, "-m", "multibatch", "bench", str(demo_artifact)]
    options = ["--batch", "3", "--input-len", "9", "--output-len", "5", "--repeats", "2"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
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
