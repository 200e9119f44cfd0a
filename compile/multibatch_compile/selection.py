"""Drops tokens whose logits nobody asked for as early as their numbers stop mattering to other tokens.

A causal LM picks the wanted tokens just before its LM head. What is between the last attention and there computes each
token by itself, so it can as well be computed for the wanted ones alone: of a prompt of a thousand tokens, for one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

_OPERATORS = torch.ops.multibatch
_BY_TOKEN = {
    _OPERATORS.packed_linear.default,
    _OPERATORS.gated_linear.default,
    _OPERATORS.normed_linear.default,
    _OPERATORS.rms_norm.default,
    torch.ops.aten.layer_norm.default,
    torch.ops.aten.to.dtype,
}
"""What computes a token's numbers from those of the same token in its first argument, besides element by element."""


def select_early(graph: fx.Graph) -> int:
    """Moves `x[:, wanted]`, x being [1, T, N], ahead of everything that computes x token by token and for x alone.

    Returns:
        How many nodes compute fewer tokens now.
    """
    selections = [node for node in graph.nodes if _is_selection(node)]
    if len(selections) != 1:
        return 0
    (selection,) = selections
    tokens = _shape(selection.args[0])[1]
    if statically_known_true(_shape(selection)[1] == tokens):
        return 0  # a decoder: one token of each row, and all of them wanted
    moved = _computed_for(graph, selection, tokens)
    if not moved:
        return 0
    wanted: dict[fx.Node, fx.Node] = {}

    def of_wanted(argument: fx.Node) -> fx.Node:
        if argument not in wanted and _is_by_token(argument, tokens):
            wanted[argument] = graph.call_function(selection.target, (argument, *selection.args[1:]))
            _set_value(wanted[argument])
        return wanted.get(argument, argument)

    with graph.inserting_before(selection):
        for node in moved:
            wanted[node] = graph.node_copy(node, of_wanted)
            _set_value(wanted[node])
    selection.replace_all_uses_with(wanted[selection.args[0]])
    graph.eliminate_dead_code()
    return len(moved)


def _computed_for(graph: fx.Graph, selection: fx.Node, tokens: Any) -> list[fx.Node]:
    """What is computed token by token and for nothing but the selection, in the order of the graph."""
    found = {selection}
    for node in reversed(graph.nodes):
        if node.users and found.issuperset(node.users) and _can_move(node, tokens):
            found.add(node)
    return [node for node in graph.nodes if node in found and node is not selection]


def _can_move(node: fx.Node, tokens: Any) -> bool:
    if node.op != "call_function" or not _is_by_token(node, tokens):
        return False
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        # A number for all tokens, and one for each of the last dimension, mean the same for fewer of them.
        return all(_is_by_token(x, tokens) or len(_shape(x)) <= 1 for x in node.all_input_nodes)
    if node.target not in _BY_TOKEN:
        return False
    if node.target is torch.ops.aten.layer_norm.default and len(node.args[1]) != 1:  # type: ignore[arg-type]
        return False  # over more than a token's numbers
    first, *others = node.all_input_nodes
    return _is_by_token(first, tokens) and not any(_is_by_token(x, tokens) for x in others)


def _is_selection(node: fx.Node) -> bool:
    if node.target is not torch.ops.aten.index.Tensor or len(_shape(node.args[0])) != 3:
        return False
    indices: Any = node.args[1]
    return len(indices) == 2 and indices[0] is None and len(_shape(indices[1])) == 1


def _is_by_token(node: Any, tokens: Any) -> bool:
    shape = _shape(node)
    return len(shape) == 3 and statically_known_true(shape[0] == 1) and statically_known_true(shape[1] == tokens)


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(getattr(node.meta.get("val"), "shape", ()))


def _set_value(node: fx.Node) -> None:
    arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    node.meta["val"] = node.target(*arguments, **keywords)  # type: ignore[operator]
