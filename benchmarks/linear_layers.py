"""What the linear layers of a prompt take, beside the products that the same kernel makes with operands in the first cache.

usage: python -m benchmarks.linear_layers ARTIFACT [--tokens 128,1024] [--repeats 9] [--threads 1]

Shapes are those of the artifact's model, a Llama-like one of one width; weights are random. Rates drift within a second here,
so the peak is measured before and after each layer's turn. "prepare" is what comes before the products: the normalisation,
quantisation, and the layout that the kernel reads; timed as the same layer with one panel of outputs. The gate is no part of it:
it is taken as the outputs of gate and up are stored.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from multibatch import ops
from multibatch.artifact import Artifact
from multibatch.backends.base import DTYPES
from multibatch.backends.load import load_programs
from multibatch_compile.packing import PackedLinear

_COPIES = 6
"""Weights of each shape, taken in turn, so that none lies in a cache when its turn comes."""

Weight = tuple[torch.Tensor, None, torch.Tensor | None, torch.Tensor | None, int]


@dataclass(frozen=True, slots=True)
class Layer:
    """One of the linear layers of a block, or those of its gate in one."""

    name: str
    features: tuple[int, ...]
    """Of its input, of what is between two layers, of its output."""
    call: Callable[[list[Weight]], torch.Tensor]

    def weights(self, features: tuple[int, ...], dtype: torch.dtype, quantization: str) -> list[list[Weight]]:
        """Random ones for layers of these features, packed."""
        made: list[list[Weight]] = []
        for _ in range(_COPIES):
            weights: list[Weight] = []
            for in_features, out_features in shapes_of(features):
                weight = torch.randn(out_features, in_features, dtype=dtype)
                linear = PackedLinear(weight, None, quantization)
                weights.append((linear.weight, None, linear.scales, linear.sums, linear.out_features))
            made.append(weights)
        return made


def shapes_of(features: tuple[int, ...]) -> list[tuple[int, int]]:
    """(in, out) of the layers; gate and up are one of twice the outputs."""
    if len(features) == 2:
        return [(features[0], features[1])]
    before, between, behind = features
    return [(before, 2 * between), (between, behind)]


def layers_of(config: dict[str, int], tokens: int, dtype: torch.dtype) -> list[Layer]:
    """The layers of a block in the order of their calls, each with inputs of so many tokens."""
    hidden, heads, between = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // heads
    norm = torch.ones(hidden, dtype=dtype)
    x, attended = (torch.randn(1, tokens, n, dtype=dtype) for n in (hidden, heads * head_dim))
    residuals = {n: x[..., :n].contiguous() for n in (hidden, ops.PANEL)}
    operators = torch.ops.multibatch

    def normed(weights: list[Weight]) -> torch.Tensor:
        y: torch.Tensor = operators.normed_linear(x, norm, 1e-6, 0.0, True, *weights[0])
        return y

    def added(weights: list[Weight]) -> torch.Tensor:
        y: torch.Tensor = operators.residual_linear(residuals[weights[0][-1]], attended, *weights[0])
        return y

    def gated(weights: list[Weight]) -> torch.Tensor:
        (*gate_up, twice), (*down, out_features) = weights
        y: torch.Tensor = operators.gated_mlp(
            x, residuals[out_features], norm, 1e-6, 0.0, True, *gate_up, *down, twice // 2, out_features, "silu"
        )
        return y

    kv = config["num_key_value_heads"] * head_dim
    return [
        Layer("query, key, value", (hidden, heads * head_dim + 2 * kv), normed),
        Layer("attention output", (heads * head_dim, hidden), added),
        Layer("gate, up, down", (hidden, between, hidden), gated),
    ]


def seconds_of(layer: Layer, weights: list[list[Weight]]) -> float:
    """Median of a call."""
    times = []
    for weight in weights:
        start = time.perf_counter()
        layer.call(weight)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def products_of(features: tuple[int, ...]) -> int:
    """For one token."""
    return sum(in_features * out_features for in_features, out_features in shapes_of(features))


def measure(
    layer: Layer, tokens: int, dtype: torch.dtype, quantization: str, repeats: int
) -> tuple[float, float, float]:
    """Seconds of a call, of preparing it, and of its products at the peak; medians."""
    few = (layer.features[0], *(ops.PANEL for _ in layer.features[1:]))
    whole, one = layer.weights(layer.features, dtype, quantization), layer.weights(few, dtype, quantization)
    kind = ops.QUANTIZED.get(quantization, dtype)
    found: list[tuple[float, float, float]] = []
    for _ in range(repeats + 1):
        before = ops.peak_rate(kind, 0.02)
        taken, prepared = seconds_of(layer, whole), seconds_of(layer, one)
        peak = (before + ops.peak_rate(kind, 0.02)) / 2
        prepared -= tokens * products_of(few) / peak
        found.append((taken, prepared, tokens * products_of(layer.features) / peak))
    taken, prepared, ideal = (statistics.median(column) for column in zip(*found[1:], strict=True))
    return taken, prepared, ideal


def main() -> None:
    """Prints a line for each layer, and for a block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--tokens", default="128,1024")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, help="default: the cores this process may use")
    arguments = parser.parse_args()
    artifact = Artifact.open(arguments.artifact)
    programs, manifest = load_programs(artifact, arguments.threads), artifact.manifest
    config = json.loads((artifact.path / "config.json").read_text(encoding="utf-8"))
    dtype = DTYPES[manifest.model.dtype]
    quantization = manifest.quantization.scheme if manifest.quantization else "none"
    with programs.own_threads():
        for tokens in map(int, arguments.tokens.split(",")):
            dtype_name = manifest.model.dtype if quantization == "none" else quantization
            print(f"{tokens} tokens, {dtype_name}: ms, of it prepare; share of the peak, of products alone")
            total = [0.0, 0.0, 0.0]
            for layer in layers_of(config, tokens, dtype):
                times = measure(layer, tokens, dtype, quantization, arguments.repeats)
                total = [a + b for a, b in zip(total, times, strict=True)]
                print(line(layer.name, *times), flush=True)
            print(line("a block", *total), flush=True)


def line(name: str, taken: float, prepared: float, ideal: float) -> str:
    """Of a layer or a block, for people."""
    return f"{name:>18}: {taken * 1e3:7.2f} {prepared * 1e3:6.2f}  {ideal / taken:.2f} {ideal / (taken - prepared):.2f}"


if __name__ == "__main__":
    main()
