"""The `multibatch` command. The only file that knows both the compile step and the runtime."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.markup import escape
from rich.table import Table

import multibatch
from multibatch.artifact import Artifact
from multibatch.cli_bench import bench
from multibatch.errors import ConfigError, MultibatchError, RequestError
from multibatch.ladder import parse_batch_sizes
from multibatch.manifest import BuildInfo, Manifest
from multibatch.roofline import Roofline
from multibatch.terminal import ERR, OUT, quiet


class _Group(click.Group):
    """Turns our errors into one line and an exit code; `--debug` shows where they come from."""

    def invoke(self, ctx: click.Context) -> Any:
        warnings.showwarning = lambda message, *_, **__: ERR.print(f"warning: {message}", markup=False, highlight=False)
        try:
            return super().invoke(ctx)
        except MultibatchError as error:
            if ctx.params.get("debug"):
                raise
            ERR.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
            ctx.exit(error.exit_code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(multibatch.__version__, prog_name="multibatch")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """LLM decoding with programs compiled ahead, one per batch size."""
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING)


def _sizes(_: click.Context, __: click.Parameter, value: str | None) -> list[int] | None:
    return None if value is None else parse_batch_sizes(value)


def _sizes_or_any(context: click.Context, option: click.Parameter, value: str) -> list[int] | str | None:
    return value if value == "any" else _sizes(context, option, value)


def _numbers(_: click.Context, option: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise ConfigError(f"--{option.name} is {value!r}; allowed: whole numbers with commas between them") from error


_MAX_TOKENS = 128
"""Of `generate`, where nothing else is asked for."""

main.add_command(bench)


@main.command("compile")
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The artifact's folder.")
@click.option(
    "--decoder-batch-sizes",
    default="any",
    show_default=True,
    callback=_sizes_or_any,
    help="any: one program for all sizes; or such as 8,4,1: a decoder each.",
)
@click.option("--max-seq-len", default=2048, show_default=True, help="Longest sequence, prompt and output together.")
@click.option("--max-num-seqs", type=int, help="Sequences that run at once; default: the largest size, or 8.")
@click.option("--block-size", default=32, show_default=True, help="Tokens per KV block; a multiple of 16.")
@click.option(
    "--prefill-chunk-sizes", callback=_sizes, help="A padded prefill program each; default: none, any length."
)
@click.option("--max-num-batched-tokens", type=int, help="Prompt tokens of one call of any length; default 1024.")
@click.option("--dtype", help="bfloat16, float16 or float32; default: the checkpoint's.")
@click.option(
    "--quantization", default="none", show_default=True, help="none, int8 (a byte per weight) or int4 (4.5 bits)."
)
@click.option("--backend", default="inductor", show_default=True, help="inductor, or eager (nothing compiled).")
@click.option("--portable", is_flag=True, help="Serve older processors too (on x86: AVX2), more slowly.")
@click.option("--device", default="cpu", show_default=True, help="cpu.")
@click.option("--revision", help="Of a hub id.")
@click.option("--jobs", type=int, help="Programs built at once; default: what cores and memory allow.")
@click.option("--force", is_flag=True, help="Replace an artifact that is there.")
def compile_command(model: str, output: Path, **options: Any) -> None:
    """Compile MODEL, a Hugging Face folder or hub id, into an artifact."""
    import multibatch_compile

    quiet()
    artifact = multibatch_compile.compile_model(model, output, progress=True, **options)
    _print_table(artifact)


@main.command("add-size")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("size", type=int)
def add_size_command(artifact: Path, size: int) -> None:
    """Add a decoder of batch size SIZE to ARTIFACT; the other programs stay."""
    import multibatch_compile

    quiet()
    _print_table(multibatch_compile.add_size(artifact, size, progress=True))


@main.command("prune")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("size", type=int)
def prune_command(artifact: Path, size: int) -> None:
    """Remove the decoder of batch size SIZE from ARTIFACT."""
    import multibatch_compile

    changed, warning = multibatch_compile.prune(artifact, size)
    if warning:
        ERR.print(f"warning: {warning}", markup=False, highlight=False)
    _print_table(changed)


@main.command("inspect")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="The manifest and the derived figures as JSON.")
def inspect_command(artifact: Path, as_json: bool) -> None:
    """Show what ARTIFACT holds, what each decoder costs, and what it was built for."""
    opened = Artifact.open(artifact)
    if as_json:
        record = json.loads(opened.manifest.to_json())
        record["figures"] = [x for p in opened.manifest.programs for x in _figures(opened.manifest, p.name)]
        click.echo(json.dumps(record, indent=2))
        return
    _print_table(opened)


@main.command("verify")
@click.argument("artifact", type=click.Path(path_type=Path))
def verify_command(artifact: Path) -> None:
    """Re-check the hashes and the canary of ARTIFACT; exit 1 on any mismatch."""
    import multibatch_compile

    problems = multibatch_compile.verify_artifact(artifact)
    for problem in problems:
        ERR.print(f"[red]mismatch:[/red] {escape(problem)}", highlight=False, soft_wrap=True)
    if problems:
        sys.exit(1)
    OUT.print(f"{artifact}: every file is the one that was built, and the canary gives the same tokens", soft_wrap=True)


@main.command("generate")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt", help="Text to continue; streamed as it comes.")
@click.option("--chat", is_flag=True, help="Take the prompt as a user's message in the model's chat template.")
@click.option(
    "--prompts-file",
    type=click.File("r"),
    help='JSON lines in and out: {"prompt": …} or {"prompt_token_ids": […]} or {"messages": […]}, and any sampling parameter.',
)
@click.option("--max-tokens", type=int, help="New tokens at most; default: 128, or as many as fit behind the prompt.")
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--top-k", default=0, show_default=True)
@click.option("--seed", type=int)
def generate_command(artifact: Path, prompt: str | None, chat: bool, prompts_file: Any, **sampling: Any) -> None:
    """Generate from ARTIFACT."""
    from multibatch.llm import LLM
    from multibatch.sampling_params import SamplingParams

    if (prompt is None) == (prompts_file is None):
        raise ConfigError("give either --prompt or --prompts-file")
    llm = LLM(artifact)
    if prompts_file is not None:
        _generate_file(llm, prompts_file, sampling)
        return
    given: Any = prompt
    if chat:
        given = llm.engine.tokenizer.render_chat(
            [{"role": "user", "content": prompt or ""}], None, add_generation_prompt=True
        )
    shown = 0
    for output in llm.stream(given, SamplingParams(**_with_length(llm, given, sampling))):
        text = output.outputs[0].text
        click.echo(text[shown:], nl=False)
        shown = len(text)
    click.echo()


def _with_length(llm: Any, prompt: Any, sampling: dict[str, Any]) -> dict[str, Any]:
    """The sampling options with the default of max_tokens, where none was given."""
    if sampling["max_tokens"] is not None:
        return sampling
    if isinstance(prompt, dict):
        prompt = prompt.get("prompt_token_ids", prompt.get("prompt", ""))
    ids = llm.engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    return sampling | {"max_tokens": max(1, min(_MAX_TOKENS, llm.engine.max_seq_len - len(ids)))}


def _generate_file(llm: Any, file: Any, sampling: dict[str, Any]) -> None:
    from multibatch.sampling_params import SamplingParams

    prompts: list[Any] = []
    params: list[SamplingParams] = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            messages = record.pop("messages", None)
            prompt = {k: record.pop(k) for k in ("prompt", "prompt_token_ids") if k in record}
            if messages is not None:
                ids = llm.engine.tokenizer.render_chat(messages, None, add_generation_prompt=True)
                prompt = {"prompt_token_ids": ids}
            params.append(SamplingParams(**{**_with_length(llm, prompt, sampling), **record}))
        except (json.JSONDecodeError, AttributeError, TypeError) as error:
            raise RequestError(f"line {number} of the prompts file: {error}; one JSON object per line") from error
        prompts.append(prompt)
    for output in llm.generate(prompts, params):
        first = output.outputs[0]
        outputs = [{"text": o.text, "token_ids": o.token_ids, "finish_reason": o.finish_reason} for o in output.outputs]
        click.echo(json.dumps({"request_id": output.request_id, "text": first.text, "outputs": outputs}))


@main.command("calibrate")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--ctx-lens", callback=_numbers, help="Tokens each decode row attends to; default: 128, 512, … the longest."
)
@click.option("--d-nums", callback=_numbers, help="Decode rows; default: the ladder, or powers of two.")
@click.option(
    "--chunk-sizes",
    callback=_numbers,
    help="Prompt tokens, 0 for none; default: the prefill programs, or powers of two.",
)
@click.option("--repeats", default=5, show_default=True, help="Median of so many rounds.")
@click.option(
    "--from", "source", type=click.File("r"), help="Take this CSV (ctx_len,d_num,chunk_size,cost) instead of measuring."
)
@click.option(
    "--export", type=click.Path(path_type=Path), help="Also write the table to this CSV; with --no-store, only that."
)
@click.option("--store/--no-store", default=True, help="Put the table into ARTIFACT.")
def calibrate_command(artifact: Path, source: Any, export: Path | None, store: bool, **grid: Any) -> None:
    """Measure what steps of ARTIFACT cost on this machine, for --slo-limits-for-dynamic-batch and the simulator."""
    from multibatch.calibration import Grid, calibrate
    from multibatch.cost_table import CostTable
    from multibatch.publish import store_cost_table

    opened = Artifact.open(artifact)
    if source is not None:
        table = CostTable.from_csv(source.read(), source.name)
    else:
        from rich.progress import Progress

        with Progress(console=ERR, transient=True) as bar:
            task = bar.add_task("timing steps", total=None)
            table = calibrate(opened, Grid(**grid), lambda done, total: bar.update(task, completed=done, total=total))
    if export is not None:
        export.write_text(table.to_csv(), encoding="utf-8")
    if store:
        store_cost_table(artifact, table)
    OUT.print(_cost_summary(table), highlight=False, soft_wrap=True)


def _cost_summary(table: Any) -> str:
    costs = [row.cost for row in table.rows]
    return (
        f"{len(table.rows)} steps timed, {min(costs):.2f} to {max(costs):.2f} ms; up to {max(table.d_nums, default=0)}"
        f" decode rows and a context of {max(table.ctx_lens, default=0)}"
    )


@main.command("demo")
@click.option("-o", "--output", default=Path("artifacts/demo"), show_default=True, type=click.Path(path_type=Path))
def demo_command(output: Path) -> None:
    """Compile the small model that ships with multibatch at sizes 8, 4, 1 and talk to it in waves."""
    import multibatch_compile
    from multibatch.demo.waves import run_waves
    from multibatch.llm import LLM

    quiet()
    start = time.perf_counter()
    model = Path(multibatch.__file__).parent / "demo" / "model"
    if output.is_dir():
        OUT.print(f"{output} is there already: nothing to compile", soft_wrap=True)
    else:
        OUT.print(
            f"Compiling the demo model into {output}: decoders 8, 4, 1, and one program for prompts of any length",
            soft_wrap=True,
        )
        multibatch_compile.compile_model(model, output, decoder_batch_sizes=[8, 4, 1], max_seq_len=512, progress=True)
    _print_table(Artifact.open(output))
    run_waves(LLM(output), OUT)
    OUT.print(f"{time.perf_counter() - start:.1f} s in all. Next:", highlight=False)
    # One line whatever the terminal's width, so that it can be copied.
    OUT.print(f"multibatch generate {output} --chat --prompt 'What is 17 + 25?'", highlight=False, soft_wrap=True)


def _figures(manifest: Manifest, name: str) -> list[dict[str, Any]]:
    """What follows from the measurements of one program: of a full call, then of smaller ones."""
    spec = manifest.program(name)
    tokens = spec.num_tokens if spec.kind != "step" else manifest.max_prefill_tokens
    calls = [(name, tokens, spec.measured_ms, spec.kind == "decode")]
    for t in spec.timings:
        is_decode = t.num_rows == t.num_tokens
        what = f"{name}: {t.num_rows} rows" if is_decode else f"{name}: {t.num_tokens} tokens"
        calls.append((what.replace(" 1 rows", " 1 row"), t.num_tokens, t.ms, is_decode))
    build, figures = manifest.build, []
    roofline = None
    if build.measured_bandwidth_gbps is not None:
        roofline = Roofline(bandwidth_gbps=build.measured_bandwidth_gbps, gproducts=build.measured_gproducts)
    for what, count, ms, is_decode in calls:
        share = None
        if ms and roofline:
            limit = roofline.step_ms(manifest, [0] * count) if is_decode else roofline.step_ms(manifest, [], count)
            share = limit / ms
        rate = count / ms * 1000 if ms else None
        figures.append({"program": what, "ms": ms, "tokens_per_second_at_full": rate, "share_of_limit": share})
    return figures


def _call(figures: dict[str, Any]) -> tuple[str, str, str]:
    rate, share = figures["tokens_per_second_at_full"], figures["share_of_limit"]
    return _show(figures["ms"], ".2f"), _show(rate, ".1f"), _show(share, ".0%")


def _show(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _print_table(artifact: Artifact) -> None:
    manifest = artifact.manifest
    table = Table(title=f"{artifact.path}", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("program", "ms", "tok/s full", "of limit", "build s", "MB", "error", "alone"):
        table.add_column(name, justify="left" if name == "program" else "right", no_wrap=True)
    for spec in manifest.programs:
        whole, *smaller = _figures(manifest, spec.name)
        bits = {None: "-", True: "equal", False: _show(spec.max_size_difference, ".2g")}[spec.bit_equal]
        table.add_row(
            spec.name,
            *_call(whole),
            _show(spec.build_seconds, ".1f"),
            _show(spec.file.bytes / 1e6 if spec.file else None, ".1f"),
            _show(spec.max_abs_error, ".2g"),
            bits,
        )
        for figures in smaller:
            table.add_row(figures["program"], *_call(figures))
    OUT.print(table)
    build, model = manifest.build, manifest.model
    lines = [
        "ms: median step; of limit: the time to read the weights or to make their products, at the measured rates, over it;",
        "error: largest difference of a logit from the eager reference; alone: of a row from the same row run alone,",
        "equal: same bits",
        "",
        f"model      {model.architecture}, {model.num_parameters:,} parameters, {model.dtype}, from {model.id}",
        f"limits     max_seq_len {manifest.max_seq_len}, max_num_seqs {manifest.max_num_seqs}, block size {manifest.kv.block_size}",
        f"weights    {manifest.weights.bytes:,} bytes, shared by all programs",
        *_quantization_lines(manifest),
        f"built for  {build.device}, {build.cpu_model}, {' '.join(build.isa) or 'any'}",
        f"built with torch {build.torch_version}, transformers {build.transformers_version}, Python {build.python_version},"
        f" {build.host_cores} cores {_rates(build)}, {build.created_at}",
    ]
    OUT.print("\n".join(lines), highlight=False, soft_wrap=True)


def _rates(build: BuildInfo) -> str:
    read = f"reading {build.measured_bandwidth_gbps} GB/s"
    return read if build.measured_gproducts is None else f"{read}, making {build.measured_gproducts:.0f} G products/s"


def _quantization_lines(manifest: Manifest) -> list[str]:
    if manifest.quantization is None:
        return []
    found = {"random tokens": manifest.quantization.random_tokens, "its own text": manifest.quantization.own_text}
    parts = [
        f"on {name} KL {a.kl_divergence:.2g} nats, same top token {a.top1_agreement:.1%} of {a.num_tokens}"
        for name, a in found.items()
        if a is not None
    ]
    return [f"quantised  {manifest.quantization.scheme}, against {manifest.model.dtype}: " + "; ".join(parts)]


__all__ = ["main"]
