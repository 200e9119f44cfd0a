"""Finds, by what they compute and never by name, parts of a model that the operators do in one go."""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from multibatch import ops as _ops  # noqa: F401  declares the operators
from multibatch import reference

_ACTIVATIONS = {
    (torch.ops.aten.silu.default, ()): "silu",
    (torch.ops.aten.gelu.default, (("approximate", "tanh"),)): "gelu_tanh",
}

_WITH_RESIDUAL: dict[Any, Any] = {
    torch.ops.multibatch.packed_linear.default: torch.ops.multibatch.residual_linear.default,
    torch.ops.multibatch.gated_linear.default: torch.ops.multibatch.gated_residual_linear.default,
}

_GATED = {torch.ops.multibatch.gated_linear.default, torch.ops.multibatch.gated_residual_linear.default}
_MAKES_GATES = {torch.ops.multibatch.packed_linear.default, torch.ops.multibatch.normed_linear.default}

_MOST_ROTARY = 256
"""Numbers of a head that the operator can rotate (kStretch in csrc/elementwise.h)."""


@dataclass(frozen=True, slots=True)
class NormOptions:
    """The arguments of `reference.rms_norm` besides x and the weight."""

    epsilon: float
    offset: float
    round_first: bool


class PackedNorm(nn.Module):
    """RMS normalisation by the operator."""

    def __init__(self, weight: nn.Parameter, options: NormOptions) -> None:
        super().__init__()
        self.weight = weight
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] -> [..., n]."""
        o = self.options
        y: torch.Tensor = torch.ops.multibatch.rms_norm(x, self.weight, o.epsilon, o.offset, o.round_first)
        return y


def replace_norms(model: nn.Module) -> None:
    """Puts the operator in place of every module that computes an RMS normalisation."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            options = norm_options(child)
            if options is not None:
                setattr(parent, name, PackedNorm(child.weight, options))  # type: ignore[arg-type]


def norm_options(module: nn.Module) -> NormOptions | None:
    """With which options `reference.rms_norm` gives what the module gives; None where it is something else.

    The module runs on random numbers with a random weight, so one without memory for its weights will do.
    """
    weight = module._parameters.get("weight")
    alone = set(module._parameters) == {"weight"} and not module._buffers and not list(module.children())
    if not alone or weight is None or weight.ndim != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn((4, 5, weight.shape[0]), generator=generator) * 3).to(weight.dtype)
    sample = (torch.rand(weight.shape, generator=generator) + 0.5).to(weight.dtype)
    twin = copy.copy(module)
    twin._parameters = {"weight": nn.Parameter(sample, requires_grad=False)}
    try:
        with torch.inference_mode():
            expected: Any = twin(x)
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError):
        return None  # it takes something else than one tensor, so it is no normalisation
    if not isinstance(expected, torch.Tensor) or expected.shape != x.shape or expected.dtype != x.dtype:
        return None
    candidates = [
        NormOptions(epsilon, offset, round_first)
        for epsilon in sorted({v for v in vars(module).values() if isinstance(v, float)})
        for offset in (0.0, 1.0)
        for round_first in (True, False)
    ]
    error = {o: _error(x, sample, expected, o) for o in candidates}
    best = min(candidates, key=error.__getitem__, default=None)
    return best if best is not None and error[best] <= 4 * torch.finfo(x.dtype).eps else None


def _error(x: torch.Tensor, weight: torch.Tensor, expected: torch.Tensor, options: NormOptions) -> float:
    got = reference.rms_norm(x, weight, options.epsilon, options.offset, options.round_first)
    return float(((got.float() - expected.float()).abs() / (expected.float().abs() + 1e-3)).max())


def remove_identities(graph: fx.Graph) -> int:
    """Takes out dropout, which does nothing here, and views that keep the shape: they stand between what belongs together.

    Returns:
        How many were taken out.
    """
    count = 0
    for node in list(graph.nodes):
        is_dropout = _is(node, torch.ops.aten.dropout.default) and node.args[2] is False
        is_view = _is(node, torch.ops.aten.view.default) or _is(node, torch.ops.aten.reshape.default)
        if is_dropout or (is_view and _is_alike(node, node.args[0])):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            count += 1
    return count


def fuse_gates(graph: fx.Graph) -> int:
    """Rewrites linear(activation(gate) * up), with gate and up the halves of one tensor, as one operator.

    Returns:
        How many were rewritten.
    """
    count = 0
    for node in list(graph.nodes):
        if node.target is not torch.ops.multibatch.packed_linear.default:
            continue
        found = _gate_of(node.args[0])
        if found is None or node.kwargs:
            continue
        gate_up, activation = found
        _replace(graph, node, torch.ops.multibatch.gated_linear.default, (gate_up, *node.args[1:], activation))
        count += 1
    graph.eliminate_dead_code()
    return count


def fuse_norms(graph: fx.Graph) -> int:
    """Rewrites linear(rms_norm(x)) as one operator where nothing else needs the normalised x.

    Returns:
        How many were rewritten.
    """
    count = 0
    for node in list(graph.nodes):
        if node.target is not torch.ops.multibatch.packed_linear.default:
            continue
        norm = node.args[0]
        if not _is(norm, torch.ops.multibatch.rms_norm.default) or len(norm.users) > 1 or node.kwargs or norm.kwargs:
            continue
        _replace(graph, node, torch.ops.multibatch.normed_linear.default, (*norm.args, *node.args[1:]))
        graph.erase_node(norm)
        count += 1
    return count


def fuse_residuals(graph: fx.Graph) -> int:
    """Rewrites x + linear(y), x being of the linear layer's shape, as one operator where nothing else needs linear(y).

    Returns:
        How many were rewritten.
    """
    count = 0
    for node in list(graph.nodes):
        if not _is(node, torch.ops.aten.add.Tensor) or node.kwargs or len(node.args) != 2:
            continue
        for linear, residual in (node.args[::-1], node.args):
            if not isinstance(linear, fx.Node) or linear.target not in _WITH_RESIDUAL or linear.kwargs:
                continue
            if linear is not residual and len(linear.users) == 1 and _is_alike(linear, residual):
                _replace(graph, node, _WITH_RESIDUAL[linear.target], (residual, *linear.args))
                graph.erase_node(linear)
                count += 1
                break
    return count


def _is_alike(node: fx.Node, other: Any) -> bool:
    value, others = node.meta["val"], getattr(other, "meta", {}).get("val")
    if not isinstance(others, torch.Tensor) or others.ndim != value.ndim or others.dtype != value.dtype:
        return False
    return all(statically_known_true(a == b) for a, b in zip(value.shape, others.shape, strict=True))


def fuse_mlps(graph: fx.Graph) -> int:
    """Rewrites a gated linear layer and the one that makes gate and up, where nothing else needs these, as one operator.

    After the other fusions: it takes the normalisation and the residual along.

    Returns:
        How many were rewritten.
    """
    count = 0
    for node in list(graph.nodes):
        if node.target not in _GATED or node.kwargs:
            continue
        residual, gate_up, *down, activation = (
            node.args if node.target in _WITH_RESIDUAL.values() else (None, *node.args)
        )
        if gate_up.target not in _MAKES_GATES or len(gate_up.users) > 1 or gate_up.kwargs:
            continue
        plain = _is(gate_up, torch.ops.multibatch.packed_linear.default)
        x, *norm = gate_up.args[:1] + (None, 0.0, 0.0, False) if plain else gate_up.args[:5]
        first, size = gate_up.args[-5:-1], gate_up.args[-1] // 2
        arguments = (x, residual, *norm, *first, *down[:-1], size, down[-1], activation)
        _replace(graph, node, torch.ops.multibatch.gated_mlp.default, arguments)
        graph.erase_node(gate_up)
        count += 1
    return count


def fuse_rotary(graph: fx.Graph) -> int:
    """Rewrites attention over rotated queries and keys (`reference.rotate`) as one operator that rotates as it reads.

    Returns:
        How many were rewritten.
    """
    count = 0
    for node in list(graph.nodes):
        if node.target is not torch.ops.multibatch.paged_attention.default or node.kwargs:
            continue
        query, key = _rotated(node.args[0]), _rotated(node.args[1])
        if query is None or key is None or query[1:] != key[1:]:
            continue
        arguments = (query[0], key[0], node.args[2], *query[1:], *node.args[3:])
        _replace(graph, node, torch.ops.multibatch.rotary_attention.default, arguments)
        count += 1
    graph.eliminate_dead_code()
    return count


def _rotated(y: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """x, cos and sin where y is `reference.rotate` of them."""
    if not _is(y, torch.ops.aten.cat.default):
        return _rotated_all(y)
    if len(y.args[0]) != 2 or y.args[1:] not in ((-1,), (3,)):
        return None
    turned, rest = _rotated_all(y.args[0][0]), _part(y.args[0][1])
    if turned is None or rest is None:
        return None
    dims, part = turned[1].meta["val"].shape[-1], _part(turned[0])
    return (rest[0], *turned[1:]) if part == (rest[0], 0, dims) and rest[1] == dims and _is_end(rest) else None


def _rotated_all(y: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    if not _is(y, torch.ops.aten.add.Tensor) or y.kwargs or len(y.args) != 2:
        return None
    straight, crossed = y.args
    if not (_is(straight, torch.ops.aten.mul.Tensor) and _is(crossed, torch.ops.aten.mul.Tensor)):
        return None
    (x, cos), (halves, sin) = straight.args, crossed.args
    if not all(isinstance(node, fx.Node) for node in (x, cos, sin)) or not _is(halves, torch.ops.aten.cat.default):
        return None
    tables, shape = (cos.meta["val"], sin.meta["val"]), x.meta["val"].shape
    if len(shape) != 4:
        return None
    fits = all(t.shape == (1, 1, shape[2], shape[3]) and t.dtype == x.meta["val"].dtype for t in tables)
    if not fits or len(halves.args[0]) != 2 or halves.args[1:] not in ((-1,), (3,)) or shape[3] > _MOST_ROTARY:
        return None
    negated, first = halves.args[0]
    half, second = shape[3] // 2, _part(negated.args[0]) if _is(negated, torch.ops.aten.neg.default) else None
    halved = _part(first) == (x, 0, half) and second is not None and second[:2] == (x, half) and _is_end(second)
    return (x, cos, sin) if halved else None


def _part(node: Any) -> tuple[fx.Node, int, int] | None:
    """(x, start, end) of a slice of x's last dimension, x being of four, and the bounds known."""
    if not _is(node, torch.ops.aten.slice.Tensor) or len(node.args) != 4 or node.args[1] not in (-1, 3):
        return None
    x, _, start, end = node.args
    return (x, start, end) if isinstance(start, int) and isinstance(end, int) else None


def _is_end(part: tuple[fx.Node, int, int]) -> bool:
    return bool(part[2] >= part[0].meta["val"].shape[-1])


def _replace(graph: fx.Graph, node: fx.Node, target: Any, arguments: tuple[Any, ...]) -> None:
    with graph.inserting_before(node):
        fused = graph.call_function(target, arguments)
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)
    graph.erase_node(node)


def _gate_of(product: Any) -> tuple[fx.Node, str] | None:
    if not _is(product, torch.ops.aten.mul.Tensor):
        return None
    for activated, up in (product.args, product.args[::-1]):
        key = (getattr(activated, "target", None), tuple(getattr(activated, "kwargs", {}).items()))
        if key in _ACTIVATIONS and len(activated.args) == 1:
            source = _halves(activated.args[0], up)
            if source is not None:
                return source, _ACTIVATIONS[key]
    return None


def _halves(gate: Any, up: Any) -> fx.Node | None:
    """The tensor whose last dimension is [gate, up] in equal parts."""
    if not (_is(gate, operator.getitem) and _is(up, operator.getitem)):
        return None
    source, first = gate.args
    other, second = up.args
    if source is not other or (first, second) != (0, 1):
        return None
    split_with_sizes, split = torch.ops.aten.split_with_sizes.default, torch.ops.aten.split.Tensor
    if not (_is(source, split_with_sizes) or _is(source, split)):
        return None
    whole, sizes = source.args[0], [part.shape[-1] for part in source.meta["val"]]
    dim = source.args[2] if len(source.args) > 2 else source.kwargs.get("dim", 0)
    last = dim in (-1, whole.meta["val"].ndim - 1)
    return whole if last and len(sizes) == 2 and sizes[0] == sizes[1] else None


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target
