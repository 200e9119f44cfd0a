"""multibatch and other engines in turn: the same machine, the same model, the same token ids.

Usage: python -m benchmarks.peers ARTIFACT --peer openvino:FOLDER --python openvino=VENV/bin/python …

Prints tokens per second, their share of what the machine's rates allow and our ratio to each peer; the last line is one
JSON. `peer_worker.py` starts each engine in a process of its own, where `peer_engines.py` drives it. What the workloads are:
benchmarks/README.md.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import random
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from benchmarks.peer_worker import OURS, Case, Prompts, Spec, Worker
from multibatch.artifact import Artifact
from multibatch.errors import MultibatchError
from multibatch.hardware import read_cpu_info, usable_cores
from multibatch.manifest import Manifest
from multibatch.roofline import Roofline, best_of
from multibatch.terminal import OUT

KINDS = (OURS, "openvino", "llamacpp", "ort", "vllm")
BEST = "the best of each round"
RAGGED = 0.1


def make_cases(
    works: Sequence[str], batches: Sequence[int], input_len: int, output_len: int, vocab_size: int, most: int
) -> list[Case]:
    """Cases of random ids, the same at every call. At most `most` requests run at once."""
    rng = random.Random(0)

    def ids(count: int, length: int) -> Prompts:
        return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(count)]

    cases: list[Case] = []
    for work in works:
        if work == "w1":
            cases += [Case(f"W1 x {b}", work, ids(b, input_len), [output_len] * b, b) for b in batches]
        elif work == "prefill":
            shapes = [(1, input_len), (1, 8 * input_len), (min(8, most), input_len)]
            cases += [Case(f"prefill {n} x {length}", work, ids(n, length), [1] * n, n) for n, length in shapes]
        else:
            lengths = [rng.randint(max(1, output_len // 4), 2 * output_len) for _ in range(32)]
            prompts = [ids(1, rng.randint(max(1, input_len // 8), 2 * input_len))[0] for _ in range(32)]
            cases.append(Case("W2", work, prompts, lengths, min(8, most)))
    return cases


def make_specs(
    artifact: Path, peers: Sequence[tuple[str, str]], pythons: Mapping[str, str], preloads: Mapping[str, str]
) -> list[Spec]:
    """Ours first; peers are named by their kind, and by their file too where two are of one kind."""
    kinds = [OURS, *(kind for kind, _ in peers)]
    specs = [Spec(OURS, OURS, str(artifact), sys.executable)]
    for kind, path in peers:
        name = kind if kinds.count(kind) == 1 else f"{kind}:{Path(path).name}"
        specs.append(Spec(name, kind, path, pythons.get(kind, sys.executable), preloads.get(kind, "")))
    return specs


@dataclass(slots=True)
class Measured:
    """All rounds: the rate and raggedness of each (case, engine), and what the machine could do meanwhile."""

    rates: dict[tuple[str, str], list[float]]
    ragged: dict[tuple[str, str], list[float]]
    rooflines: dict[str, list[Roofline]] = field(default_factory=dict)
    """After each round of a case of W1."""
    versions: dict[str, str] = field(default_factory=dict)
    starts: dict[str, list[float]] = field(default_factory=dict)
    """Seconds from the start of each engine's process to its first token, one for each kind of work."""

    @property
    def best(self) -> Roofline | None:
        """What the machine could do in its best moments."""
        measured = list(itertools.chain.from_iterable(self.rooflines.values()))
        return best_of(measured) if measured else None


def measure(specs: Sequence[Spec], cases: Sequence[Case], rounds: int, threads: int, timeout: float) -> Measured:
    """Every engine in turn runs a case before the next case comes, every other round in the opposite order: a machine whose
    speed changes from minute to minute changes it for all of them.
    """
    keys = [(case.name, spec.name) for case in cases for spec in specs]
    found = Measured({key: [] for key in keys}, {key: [] for key in keys})
    for _, group in itertools.groupby(cases, key=lambda case: case.work):
        alike = list(group)
        with ExitStack() as stack:
            workers = {spec.name: stack.enter_context(closing(spec.start(alike, threads, timeout))) for spec in specs}
            found.versions |= {name: worker.version for name, worker in workers.items()}
            for name, worker in workers.items():
                answer = worker.run(alike[0], most_tokens=1)
                found.starts.setdefault(name, []).append(worker.start_s + min(answer["first"]))
            in_turn = list(workers.items())
            for number, case in itertools.product(range(rounds), alike):
                for name, worker in in_turn[:: -1 if number % 2 else 1]:
                    measure_once(found, case, name, worker, is_first=number == 0)
                if case.work == "w1":
                    found.rooflines.setdefault(case.name, []).append(Roofline(**workers[OURS].ask({"rates": True})))
    return found


def measure_once(found: Measured, case: Case, name: str, worker: Worker, *, is_first: bool) -> None:
    """One engine, one case; before the first time a few tokens for warming up."""
    if is_first:
        worker.run(case, most_tokens=4)
    answers = [worker.run(case) for _ in range(3 if case.work == "prefill" else 1)]
    found.rates[case.name, name].append(statistics.median(map(case.rate, answers)))
    found.ragged[case.name, name].append(max(map(case.ragged, answers)))


def summarize(
    specs: Sequence[Spec], cases: Sequence[Case], found: Measured, manifest: Manifest
) -> list[dict[str, Any]]:
    """A JSON-ready row per case. The limit is that of our artifact's step, for every engine."""
    rows = []
    best = found.best
    for case in cases:
        limit = None
        if case.work == "w1" and best:
            contexts = [len(p) + n // 2 for p, n in zip(case.prompts, case.lengths, strict=True)]
            limit = best.decode_tokens_per_s(manifest, contexts)
        engines = {}
        ours = found.rates[case.name, specs[0].name]
        for spec in specs:
            rates = found.rates[case.name, spec.name]
            rate = statistics.median(rates)
            engines[spec.name] = {
                "tokens_per_s": round(rate, 2),
                "share_of_limit": round(rate / limit, 4) if limit else None,
                "ragged": round(statistics.median(found.ragged[case.name, spec.name]), 3),
                "rounds": [round(r, 2) for r in rates],
                "ours_over": round(median_ratio(ours, rates), 4),
            }
        row = {"case": case.name, "limit_tokens_per_s": limit and round(limit, 1), "engines": engines}
        row["bandwidth_gbps"] = [round(r.bandwidth_gbps, 1) for r in found.rooflines.get(case.name, [])]
        theirs = [found.rates[case.name, spec.name] for spec in specs[1:]]
        if theirs:
            row["ours_over_best"] = round(median_ratio(ours, [max(rates) for rates in zip(*theirs, strict=True)]), 4)
        rows.append(row)
    return rows


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of the ratios within each round: what drifts from round to round cancels."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def table_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Cells of a line per case and engine."""
    for row in rows:
        for name, engine in row["engines"].items():
            rate = f"{'~' if engine['ragged'] > RAGGED else ''}{engine['tokens_per_s']:.1f}"
            share = "" if engine["share_of_limit"] is None else f"{engine['share_of_limit']:.0%}"
            ratio = "" if name == OURS else f"{engine['ours_over']:.2f} x"
            yield [row["case"] if name == OURS else "", name, rate, share, ratio]
        if len(row["engines"]) > 2:
            yield ["", BEST, "", "", f"{row['ours_over_best']:.2f} x"]


def pairs(separator: str) -> Any:
    """A callback that takes options of the form KIND, separator, PATH apart."""

    def split(_context: click.Context, _option: click.Parameter, values: Sequence[str]) -> list[tuple[str, str]]:
        found = [(kind, path) for kind, _, path in (value.partition(separator) for value in values)]
        if any(kind not in KINDS or not path for kind, path in found):
            raise click.BadParameter(f"want KIND{separator}PATH, where KIND is one of {', '.join(KINDS)}")
        return found

    return split


def numbers(_context: click.Context, _option: click.Parameter, value: str) -> list[int]:
    """A list such as 1,4,8."""
    if not all(part.isdecimal() and int(part) for part in value.split(",")):
        raise click.BadParameter(f"{value!r} is not a list such as 1,4,8")
    return [int(part) for part in value.split(",")]


def works(_context: click.Context, _option: click.Parameter, value: str) -> list[str]:
    """A list of workloads."""
    if unknown := set(value.split(",")) - {"w1", "w2", "prefill"}:
        raise click.BadParameter(f"{', '.join(sorted(unknown))}: there are w1, w2 and prefill")
    return value.split(",")


@click.command()
@click.argument("artifact", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--peer",
    "peers",
    multiple=True,
    callback=pairs(":"),
    help=f"KIND:PATH of another engine's model, or {OURS}:PATH of another artifact; may be given more than once.",
)
@click.option(
    "--python", "pythons", multiple=True, callback=pairs("="), help="KIND=PATH of the Python that has that engine."
)
@click.option(
    "--preload", "preloads", multiple=True, callback=pairs("="), help="KIND=LIBRARIES for that engine's LD_PRELOAD."
)
@click.option("--batches", callback=numbers, default="1,4,8,16", show_default=True, help="Batch sizes of W1.")
@click.option("--work", callback=works, default="w1,w2,prefill", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--input-len", type=click.IntRange(1), default=128, show_default=True, help="W1's; others in proportion.")
@click.option("--output-len", type=click.IntRange(2), default=64, show_default=True, help="W1's; W2's in proportion.")
@click.option("--threads", type=click.IntRange(1), help="Of every engine; default: the cores this process may use.")
@click.option("--timeout", default=900.0, show_default=True, help="Seconds for one start or one measurement.")
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the JSON too.")
def main(
    artifact: Path,
    peers: list[tuple[str, str]],
    pythons: list[tuple[str, str]],
    preloads: list[tuple[str, str]],
    batches: list[int],
    work: list[str],
    rounds: int,
    input_len: int,
    output_len: int,
    threads: int | None,
    timeout: float,
    target: Path | None,
) -> None:
    """Run multibatch and other engines in turn."""
    try:
        manifest = Artifact.open(artifact).manifest
    except MultibatchError as error:
        raise click.ClickException(str(error)) from error
    specs = make_specs(artifact, peers, dict(pythons), dict(preloads))
    if "w2" in work and any(spec.kind == "ort" for spec in specs):
        raise click.UsageError("ort has no continuous batching on a CPU, and W2 needs it: --work w1,prefill")
    if max(batches) > manifest.max_num_seqs and "w1" in work:
        raise click.UsageError(f"the artifact runs {manifest.max_num_seqs} requests at once, not {max(batches)}")
    cases = make_cases(work, batches, input_len, output_len, manifest.model.vocab_size, manifest.max_num_seqs)
    for case in cases:
        if case.longest > manifest.max_seq_len:
            raise click.UsageError(
                f"{case.name} needs {case.longest} positions, the artifact has {manifest.max_seq_len}"
            )
    threads = threads or usable_cores()
    found = measure(specs, cases, rounds, threads, timeout)
    rows = summarize(specs, cases, found, manifest)
    table = Table(title=f"In turn, median of {rounds}")
    for i, column in enumerate(("work", "engine", "tok/s", "of limit", f"{OURS} is")):
        table.add_column(column, justify="left" if i < 2 else "right", overflow="fold")
    for cells in table_lines(rows):
        table.add_row(*cells)
    starts = ", ".join(f"{name} {statistics.median(seconds):.1f}" for name, seconds in found.starts.items())
    table.caption = f"Seconds from start to first token: {starts}"
    OUT.print(table)
    best = found.best
    record = {
        "model": manifest.model.id,
        "dtype": manifest.model.dtype,
        "models": {spec.name: Path(spec.path).name for spec in specs},
        "cases": rows,
        "start_s": {name: [round(s, 2) for s in seconds] for name, seconds in found.starts.items()},
        "rounds": rounds,
        "input_len": input_len,
        "output_len": output_len,
        "bandwidth_gbps": best and round(best.bandwidth_gbps, 1),
        "gproducts": best and best.gproducts and round(best.gproducts, 1),
        "cpu": read_cpu_info().model_name,
        "threads": threads,
        "python": platform.python_version(),
        "versions": found.versions,
        "load_average": round(os.getloadavg()[0], 2),
    }
    if target:
        target.write_text(json.dumps(record, indent=2) + "\n")
    click.echo(json.dumps(record))


if __name__ == "__main__":
    main()
