"""`multibatch bench`: the measurements as commands; each prints a table, and one line of JSON where nobody looks on."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.table import Table

from multibatch.artifact import Artifact
from multibatch.errors import ConfigError
from multibatch.hardware import read_cpu_info, usable_cores
from multibatch.manifest import Manifest
from multibatch.terminal import ERR, OUT, quiet

_ARTIFACT = click.argument("artifact", type=click.Path(path_type=Path))
_OUTPUT_JSON = click.option("--output-json", type=click.Path(path_type=Path), help="Write all figures to this file.")


class _DefaultGroup(click.Group):
    """`bench ARTIFACT` is `bench ladder ARTIFACT`."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["ladder", *args]
        return super().resolve_command(ctx, args)


@click.group(cls=_DefaultGroup)
def bench() -> None:
    """Measure an artifact; without a command: ladder.

    latency, throughput and serve have the options and JSON fields of vLLM's.
    """


@bench.command("ladder")
@_ARTIFACT
@click.option("--batch", default=8, show_default=True, help="Requests at once.")
@click.option("--input-len", default=128, show_default=True, help="Random prompt tokens of each.")
@click.option("--output-len", default=64, show_default=True, help="New tokens of each.")
@click.option("--repeats", default=5, show_default=True, help="Median of so many; the variants take turns.")
@click.option("--prompts-file", type=click.File("r"), help='JSON lines: {"prompt": …} or {"prompt_token_ids": […]}.')
@click.option(
    "--reference/--no-reference", default=True, help="Also time the eager reference and transformers' generate."
)
@_OUTPUT_JSON
def ladder_command(
    artifact: Path, prompts_file: Any, reference: bool, output_json: Path | None, **options: Any
) -> None:
    """Compare the ladder with pad-to-max, batch 1, the eager reference and transformers' generate."""
    from multibatch.bench.variants import BenchOptions, run_bench

    opened = Artifact.open(artifact)
    prompts: tuple[tuple[int, ...], ...] = ()
    if prompts_file is not None:
        from multibatch.tokenizer import Tokenizer

        records = [json.loads(line) for line in prompts_file if line.strip()]
        tokenizer = Tokenizer(artifact / "tokenizer")
        prompts = tuple(tuple(r.get("prompt_token_ids") or tokenizer.encode(r["prompt"])) for r in records)
    model = _reference_model(opened.manifest) if reference else None
    result = run_bench(opened, BenchOptions(prompts=prompts, **options), model, _progress)
    table = Table(
        title=f"{result['batch']} requests, {options['output_len']} new tokens each, median of {options['repeats']}"
    )
    for name in ("variant", "decode tok/s", "of limit", "output tok/s", "TTFT s", "ladder is"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    names = {
        "pad_to_max": "pad to max",
        "batch_1": "batch 1",
        "transformers_generate": "HF generate",
    }
    for name, v in result["variants"].items():
        ratio = result["ladder_over"].get(name)
        figures = (
            f"{v['decode_tokens_per_s']:.1f}",
            f"{v['share_of_limit']:.0%}",
            f"{v['output_tokens_per_s']:.1f}",
            f"{v['ttft_mean_s']:.3f}",
        )
        table.add_row(names.get(name, name), *figures, "" if ratio is None else f"{ratio:.2f} x")
    OUT.print(table)
    OUT.print(
        f"limit: {result['limit_decode_tokens_per_s']} decode tokens/s, by {_rates(result)} measured in this run: the bytes"
        " of a step (weights and KV) or its products, whichever take longer",
        highlight=False,
    )
    _finish(result, output_json)


def _rates(result: Mapping[str, Any]) -> str:
    rates = f"{result['bandwidth_gbps']['best']} GB/s read"
    return f"{rates} and {result['gproducts']['best']} G products/s" if result["gproducts"] else rates


def _reference_model(manifest: Manifest) -> Any:
    from transformers import AutoModelForCausalLM

    from multibatch.backends.base import DTYPES

    quiet()
    return AutoModelForCausalLM.from_pretrained(manifest.model.id, dtype=DTYPES[manifest.model.dtype]).eval()


@bench.command("latency")
@_ARTIFACT
@click.option("--input-len", default=32, show_default=True)
@click.option("--output-len", default=128, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--num-iters-warmup", default=10, show_default=True)
@click.option("--num-iters", default=30, show_default=True)
@_OUTPUT_JSON
def latency_command(artifact: Path, output_json: Path | None, **options: Any) -> None:
    """Time whole batches of equal requests."""
    from multibatch.bench.offline import run_latency

    result = run_latency(Artifact.open(artifact), **options)
    OUT.print(f"Avg latency: {result['avg_latency']:.4f} seconds", highlight=False)
    for percent, value in result["percentiles"].items():
        OUT.print(f"{percent}% percentile latency: {value:.4f} seconds", highlight=False)
    _finish(result, output_json)


@bench.command("throughput")
@_ARTIFACT
@click.option("--input-len", default=128, show_default=True)
@click.option("--output-len", default=64, show_default=True)
@click.option("--num-prompts", default=100, show_default=True)
@click.option("--num-warmups", default=8, show_default=True)
@_OUTPUT_JSON
def throughput_command(artifact: Path, output_json: Path | None, **options: Any) -> None:
    """Time a queue of equal requests that are all there from the start."""
    from multibatch.bench.offline import run_throughput

    result = run_throughput(Artifact.open(artifact), **options)
    OUT.print(
        f"Throughput: {result['requests_per_second']:.2f} requests/s, {result['tokens_per_second']:.2f} total tokens/s,"
        f" {result['output_tokens_per_second']:.2f} output tokens/s",
        highlight=False,
    )
    _finish(result, output_json)


def _goodput(_: click.Context, __: click.Parameter, values: Sequence[str]) -> dict[str, float]:
    found = {}
    for value in values:
        name, _sep, most = value.partition(":")
        if name not in ("ttft", "tpot", "e2el") or not most.replace(".", "", 1).isdecimal():
            raise ConfigError(f"--goodput {value!r}; allowed: ttft:MS, tpot:MS or e2el:MS")
        found[name] = float(most)
    return found


@bench.command("serve")
@_ARTIFACT
@click.option("--num-prompts", default=100, show_default=True)
@click.option("--request-rate", default=float("inf"), show_default=True, help="Requests per second.")
@click.option("--burstiness", default=1.0, show_default=True, help="1: Poisson; below: bursts; above: steadier.")
@click.option("--max-concurrency", type=int, help="Requests in the engine at once.")
@click.option("--input-len", default=128, show_default=True, help="Mean prompt tokens.")
@click.option("--output-len", default=64, show_default=True, help="Mean new tokens.")
@click.option("--lengths", type=click.Choice(["fixed", "uniform", "heavy"]), default="fixed", show_default=True)
@click.option(
    "--trace",
    "trace_file",
    type=click.File("r"),
    help="A timed_trace instead: JSON lines of timestamp (ms), input_length, output_length.",
)
@click.option(
    "--goodput", multiple=True, callback=_goodput, help="ttft:MS, tpot:MS or e2el:MS; may be given more than once."
)
@click.option("--max-num-seqs", type=int)
@click.option("--max-num-batched-tokens", type=int, help="Prompt tokens of a step; default: all that were compiled.")
@click.option("--num-kv-blocks", type=int)
@click.option("--dynamic-batching", default="off", show_default=True, help="off, linear or statistical.")
@click.option("--target-inter-token-ms", type=float)
@click.option("--slo-limits-for-dynamic-batch", type=float, default=-1, show_default=True)
@click.option("--scheduling-policy", default="fcfs", show_default=True)
@click.option("--predict", is_flag=True, help="Also simulate the load with the artifact's cost table.")
@click.option("--seed", default=0, show_default=True)
@click.option("--output-json", "--save-result", type=click.Path(path_type=Path), help="Write all figures to this file.")
def serve_command(
    artifact: Path,
    num_prompts: int,
    trace_file: Any,
    max_concurrency: int | None,
    goodput: dict[str, float],
    predict: bool,
    seed: int,
    output_json: Path | None,
    **options: Any,
) -> None:
    """Send a load to the engine in this process."""
    from multibatch.bench.serve import run_serve
    from multibatch.config import EngineConfig
    from multibatch.trace import make_trace, read_trace

    load = {name: options.pop(name) for name in ("request_rate", "burstiness", "input_len", "output_len", "lengths")}
    trace = read_trace(trace_file) if trace_file is not None else make_trace(num_prompts, seed=seed, **load)
    result = run_serve(
        Artifact.open(artifact),
        trace,
        EngineConfig(enable_prefix_caching=False, **options),
        max_concurrency=max_concurrency,
        goodput=goodput,
        predict=predict,
        seed=seed,
    )
    result |= {"request_rate": "inf" if load["request_rate"] == float("inf") else load["request_rate"]}
    result |= {"burstiness": load["burstiness"]}
    _print_serve(result)
    _finish(result, output_json)


def _print_serve(result: dict[str, Any]) -> None:
    table = Table(title="Serving Benchmark Result", box=box.SIMPLE, padding=(0, 1, 0, 0))
    columns = [("measured", result)]
    if "predicted" in result:
        columns += [("predicted", result["predicted"]), ("as calibrated", result["predicted_as_calibrated"])]
    table.add_column("")
    for name, _ in columns:
        table.add_column(name, justify="right")
    for name in ("completed", "failed", "num_preemptions", "duration", "request_throughput", "request_goodput"):
        if result[name] is not None:
            table.add_row(name, *(_number(figures[name]) for _, figures in columns))
    table.add_row("output_throughput", *(_number(figures["output_throughput"]) for _, figures in columns))
    for metric in ("ttft", "tpot", "itl", "e2el"):
        for kind in ("mean", "median", "p95", "p99"):
            name = f"{kind}_{metric}_ms"
            table.add_row(name, *(_number(figures[name]) for _, figures in columns))
    OUT.print(table)
    if "slowdown" in result:
        slow = result["slowdown"]
        OUT.print(
            f"steps took {slow['decode']:.2f} times as long as calibrated, those with prompts {slow['prompts']:.2f}: predicted"
            " is with, as calibrated without that",
            highlight=False,
            soft_wrap=True,
        )


_SEEDS_COLUMNS = {
    "scheduler": "scheduler",
    "batch_size": "batch",
    "tokens_per_s": "tok/s",
    "ttft_s": "TTFT",
    "prefill_s": "prefill",
    "decode_s": "decode",
    "latency_s": "latency",
    "latency_p50_s": "P50",
    "latency_p95_s": "P95",
    "limit_tokens_per_s": "limit",
}


@bench.command("seeds")
@_ARTIFACT
@click.option("--batch-sizes", default="1,2,4,8,16", show_default=True)
@click.option("--num-requests", default=32, show_default=True)
@click.option("--input-len", default=128, show_default=True, help="Mean prompt tokens.")
@click.option("--output-len", default=64, show_default=True, help="Mean new tokens.")
@click.option("--request-rate", default=float("inf"), show_default=True, help="Requests per second; inf: all at once.")
@click.option("--repeats", default=3, show_default=True, help="The median run counts; the cases take turns.")
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Also write the table to this file.")
@click.option("--picture", type=click.Path(path_type=Path), help="Also draw throughput and P95 to this file.")
@_OUTPUT_JSON
def seeds_command(
    artifact: Path,
    batch_sizes: str,
    csv_file: Path | None,
    picture: Path | None,
    output_json: Path | None,
    **options: Any,
) -> None:
    """Compare one at a time, fixed groups and continuous batching on the same requests."""
    from multibatch.bench.pictures import draw_seeds
    from multibatch.bench.seeds import run_seeds, write_csv
    from multibatch.ladder import parse_batch_sizes

    opened = Artifact.open(artifact)
    rows = run_seeds(opened, batch_sizes=sorted(parse_batch_sizes(batch_sizes)), progress=_progress, **options)
    rate = options["request_rate"]
    load = f"{options['num_requests']} requests " + ("at once" if rate == float("inf") else f"at {rate:g}/s")
    seconds = [{name.replace("_ms", "_s"): v / 1000 for name, v in row.items() if name.endswith("_ms")} for row in rows]
    shown = [row | times for row, times in zip(rows, seconds, strict=True)]
    _print_rows(f"{load}; times in s; limit: tok/s", shown, _SEEDS_COLUMNS)
    _print_gain(rows)
    if csv_file is not None:
        write_csv(rows, csv_file)
    if picture is not None:
        draw_seeds(rows, _caption(opened), picture)
    _finish({"model_id": opened.manifest.model.id, "request_rate": str(rate), "rows": rows}, output_json)


def _print_gain(rows: list[dict[str, Any]]) -> None:
    """The widest continuous batching over one at a time, and what the limit allows."""
    baseline = next((row for row in rows if row["batch_size"] == 1), None)
    if baseline is None or rows[-1]["batch_size"] == 1:
        return
    widest = rows[-1]
    OUT.print(
        f"continuous at {widest['batch_size']} over one at a time: {widest['tokens_per_s'] / baseline['tokens_per_s']:.2f} x"
        f" the tokens/s (limit over limit: {widest['limit_tokens_per_s'] / baseline['limit_tokens_per_s']:.2f} x), mean"
        f" latency {widest['latency_ms'] / baseline['latency_ms'] - 1:+.0%}",
        highlight=False,
        soft_wrap=True,
    )


@bench.command("policies")
@_ARTIFACT
@click.option("--num-requests", default=64, show_default=True)
@click.option("--input-len", default=64, show_default=True, help="Mean prompt tokens.")
@click.option("--output-len", default=64, show_default=True, help="Mean new tokens.")
@click.option("--longest-output", default=512, show_default=True, help="What every request declares as max_tokens.")
@click.option("--num-kv-blocks", default=96, show_default=True, help="Of the pool.")
@click.option("--capacity-requests", default=512, show_default=True, help="Of the simulated loads that find capacity.")
@click.option("--target-ttft-ms", default=2_000.0, show_default=True, help="95th percentile, for capacity.")
@click.option(
    "--target-tpot-ms", default=100.0, show_default=True, help="95th percentile, for capacity and the deadline policy."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--picture", type=click.Path(path_type=Path), help="Also draw throughput to this file.")
@_OUTPUT_JSON
def policies_command(artifact: Path, picture: Path | None, output_json: Path | None, **options: Any) -> None:
    """Compare static batching with the dynamic policies, measured and simulated, and search each one's capacity."""
    from multibatch.bench.pictures import draw_policies
    from multibatch.bench.policies import PoliciesOptions, gains, run_policies

    opened = Artifact.open(artifact)
    result = run_policies(opened, PoliciesOptions(**options), _progress)
    rows = [
        {
            "load": case["load"],
            "policy": case["policy"],
            "tok/s": case["measured"]["output_throughput"],
            "simulated": case["predicted"]["output_throughput"],
            "p99 itl": case["measured"]["p99_itl_ms"],
            "preempted": case["measured"]["num_preemptions"],
            "over static": gain["throughput_over_static"],
        }
        for case, gain in zip(result["cases"], gains(result), strict=True)
    ]
    _print_rows(f"static: at most {result['static_max_num_seqs']} running", rows, {name: name for name in rows[0]})
    columns = {"load": "load", "policy": "policy", "requests_per_s": "requests/s"}
    _print_rows("capacity: the highest rate that keeps the targets", result["capacity"], columns)
    if picture is not None:
        draw_policies(result["cases"], _caption(opened), picture)
    _finish(result, output_json)


@bench.command("chunk-budget")
@_ARTIFACT
@click.option("--target-ms", type=float, required=True, help="What a step with decode rows may take.")
@click.option("--request-rate", type=float, required=True, help="Requests per second.")
@click.option("--num-requests", default=64, show_default=True)
@click.option("--input-len", default=256, show_default=True, help="Mean prompt tokens.")
@click.option("--output-len", default=64, show_default=True, help="Mean new tokens.")
@click.option("--seed", default=0, show_default=True)
@_OUTPUT_JSON
def chunk_budget_command(
    artifact: Path, target_ms: float, request_rate: float, output_json: Path | None, **options: Any
) -> None:
    """Compare inter-token times with a fixed and a refined prefill budget."""
    from multibatch.bench.policies import PoliciesOptions, run_chunk_budget

    rows = run_chunk_budget(Artifact.open(artifact), PoliciesOptions(**options), target_ms, request_rate, _progress)
    columns = {"policy": "policy", "output_throughput": "tok/s", "p99_itl_ms": "p99 itl", "mean_itl_ms": "mean itl"}
    _print_rows(f"target {target_ms} ms; times in ms", rows, columns | {"p95_ttft_ms": "p95 TTFT"})
    _finish({"target_ms": target_ms, "rows": rows}, output_json)


def _print_rows(title: str, rows: Iterable[dict[str, Any]], columns: Mapping[str, str]) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in columns.values():
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(_number(row[name]) for name in columns))
    OUT.print(table)


def _caption(artifact: Artifact) -> str:
    model, build = artifact.manifest.model, artifact.manifest.build
    bits = f", {artifact.manifest.quantization.scheme}" if artifact.manifest.quantization else f", {model.dtype}"
    return f"{Path(model.id).name}{bits}, {usable_cores()} cores of {build.cpu_model}"


def _progress(what: str) -> None:
    ERR.print(f"[dim]{what}[/dim]", highlight=False)


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.2f}" if abs(value) < 100 else f"{value:.1f}"


def _finish(result: dict[str, Any], file: Path | None) -> None:
    """The figures with the machine they are of: to the file, and as the last line of what no terminal shows."""
    record = {**result, "cpu": read_cpu_info().model_name, "cores": usable_cores()}
    record |= {"torch": version("torch"), "transformers": version("transformers"), "python": platform.python_version()}
    text = json.dumps(record)
    if file is not None:
        file.write_text(text + "\n", encoding="utf-8")
    if not sys.stdout.isatty():
        click.echo(text)
    elif file is None:
        OUT.print("[dim]all figures: --output-json FILE, or into a pipe[/dim]", highlight=False)
