"""The pictures of the measurements, drawn with matplotlib, which the extra `bench` brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multibatch.errors import ConfigError


def draw_seeds(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Throughput and 95th percentile of latency over the batch size, a line for each scheduler.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for scheduler, marker in (("static", "o--"), ("continuous", "s-")):
        mine = [row for row in rows if row["scheduler"] == scheduler]
        sizes = [row["batch_size"] for row in mine]
        left.plot(sizes, [row["tokens_per_s"] for row in mine], marker, label=scheduler)
        right.plot(sizes, [row["latency_p95_ms"] / 1000 for row in mine], marker, label=scheduler)
    limits = sorted({(row["batch_size"], row["limit_tokens_per_s"]) for row in rows})
    left.plot([size for size, _ in limits], [limit for _, limit in limits], "k:", label="limit")
    left.set_ylabel("output tokens/s")
    right.set_ylabel("95th percentile of latency, s")
    every = sorted({row["batch_size"] for row in rows})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(every, [str(size) for size in every])
        axes.set_xlabel("batch size")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_policies(cases: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Measured and predicted throughput of each policy, a group of bars for each kind of load.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    plt = _pyplot()
    loads = list(dict.fromkeys(case["load"] for case in cases))
    policies = list(dict.fromkeys(case["policy"] for case in cases))
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    width = 0.8 / len(policies)
    for i, policy in enumerate(policies):
        mine = {case["load"]: case for case in cases if case["policy"] == policy}
        places = [place + i * width for place, load in enumerate(loads) if load in mine]
        found = [mine[load] for load in loads if load in mine]
        axes.bar(places, [case["measured"]["output_throughput"] for case in found], width, label=policy)
        predicted = [case["predicted"]["output_throughput"] for case in found]
        axes.plot(places, predicted, "k_", markersize=14, label="simulator" if i == 0 else None)
    axes.set_xticks([place + width * (len(policies) - 1) / 2 for place in range(len(loads))], loads)
    axes.set_ylabel("output tokens/s")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "a picture needs matplotlib, which is not installed; pip install 'multibatch[bench]', or leave out --picture"
        ) from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt
