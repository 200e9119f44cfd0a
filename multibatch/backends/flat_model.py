"""Runs a transformers causal LM over flattened tokens and a paged KV pool, with transformers' own modelling code.

transformers looks attention up by name (`AttentionInterface`); the functions registered here find the call's inputs on
the attention module itself, so an architecture needs no file of ours and none of its forward signatures matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from multibatch import ops as _ops  # noqa: F401  declares the operators that the compiled attention calls
from multibatch import reference
from multibatch.errors import UnsupportedModelError
from multibatch.reference import AttentionOptions, StepInputs

COMPILED_ATTENTION = "multibatch"
REFERENCE_ATTENTION = "multibatch_reference"

_IGNORED_KEYWORDS = frozenset(
    {
        "position_ids", "cache_position", "is_causal", "use_cache", "output_attentions",
        "output_hidden_states", "return_dict", "output_router_logits", "past_key_values",
        "position_embeddings", "logits_to_keep", "labels", "inputs_embeds",
    }
)  # fmt: skip
"""What models hand to attention that changes nothing here: positions are applied before attention is called."""


class AttentionContext:
    """Where the attention functions of one `FlatDecoder` find the inputs of the call that runs."""

    def __init__(self) -> None:
        self.step: StepInputs | None = None
        self.on_call: Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, Any], None] | None = None


class FlatDecoder(nn.Module):
    """A causal LM as the one form that every program has: T flattened tokens of R rows -> logits of R rows.

    Args:
        model: a transformers `...ForCausalLM`; its attention implementation is set to `attention`.
        attention: `COMPILED_ATTENTION` (one custom operator) or `REFERENCE_ATTENTION` (plain PyTorch).
    """

    def __init__(self, model: nn.Module, attention: str) -> None:
        super().__init__()
        register_attention()
        model.set_attn_implementation(attention)  # type: ignore[operator]
        self.model = model
        self.context = AttentionContext()
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.multibatch_context = self.context  # type: ignore[assignment]

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        cu_seqlens: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        logits_to_keep: torch.Tensor,
        key_pools: list[torch.Tensor],
        value_pools: list[torch.Tensor],
    ) -> torch.Tensor:
        """Runs one step. The pools are changed in place.

        Args:
            token_ids: int64[1, T].
            positions: int64[1, T], restarting with each row.
            slot_mapping: int64[T].
            cu_seqlens: int32[R + 1].
            block_tables: int32[R, M].
            seq_lens: int32[R].
            logits_to_keep: int64[R]: the token of each row whose logits are wanted.
            key_pools: per layer [num_blocks, H_kv, D, block_size].
            value_pools: per layer [num_blocks, H_kv, block_size, D_v].

        Returns:
            Logits [R, V] in the model's dtype.
        """
        self.context.step = StepInputs(slot_mapping, cu_seqlens, block_tables, seq_lens, key_pools, value_pools)
        try:
            output = self.model(
                input_ids=token_ids,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=logits_to_keep,
            )
        finally:
            self.context.step = None
        logits: torch.Tensor = output.logits
        return logits[0]


def attention_options(module: nn.Module, query: torch.Tensor, keywords: dict[str, Any]) -> AttentionOptions:
    """What this layer asks for, from the keywords that transformers passes to an attention function.

    Raises:
        UnsupportedModelError: a keyword that would change the result and is not handled, by name.
    """
    known = dict(keywords)
    scale = known.pop("scaling", None)
    window = known.pop("sliding_window", None)
    softcap = known.pop("softcap", None)
    known.pop("dropout", None)  # inference
    known.pop("s_aux", None)
    left = sorted(k for k, v in known.items() if v is not None and k not in _IGNORED_KEYWORDS)
    if left or getattr(module, "is_causal", True) is False or keywords.get("is_causal") is False:
        what = ", ".join(left) or "attention that is not causal"
        raise UnsupportedModelError(
            f"{type(module).__name__} asks attention for {what}; handled: causal, sliding_window, softcap, sinks"
        )
    return AttentionOptions(
        scale=float(scale) if scale is not None else query.shape[-1] ** -0.5,
        sliding_window=int(window or 0),
        softcap=float(softcap or 0.0),
    )


def _context(module: nn.Module, attention_mask: torch.Tensor | None) -> AttentionContext:
    context = getattr(module, "multibatch_context", None)
    if context is None or context.step is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no layer_idx, so its place in the KV pool is unknown")
    if attention_mask is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes a mask of its own; handled: causal, sliding_window, softcap, sinks"
        )
    assert isinstance(context, AttentionContext)
    return context


def compiled_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function over the custom operator. Shapes as `reference.paged_attention`."""
    context = _context(module, attention_mask)
    options, step = attention_options(module, query, keywords), context.step
    assert step is not None
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    out = torch.ops.multibatch.paged_attention(
        query,
        key,
        value,
        step.key_pools[layer],
        step.value_pools[layer],
        step.slot_mapping,
        step.cu_seqlens,
        step.block_tables,
        step.seq_lens,
        keywords.get("s_aux"),
        options.scale,
        options.sliding_window,
        options.softcap,
    )
    return out, None


def reference_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function over `reference.paged_attention`; tells `on_call` what it was given."""
    context = _context(module, attention_mask)
    options, step = attention_options(module, query, keywords), context.step
    assert step is not None
    if context.on_call is not None:
        context.on_call(module, query, key, value, options)
        shape = (1, query.shape[2], query.shape[1], value.shape[3])
        return query.new_zeros(shape), None
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    sinks = keywords.get("s_aux")
    return reference.paged_attention(query, key, value, step, layer, options, sinks), None


def register_attention() -> None:
    """Makes both functions known to transformers by name; calling it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(COMPILED_ATTENTION, compiled_attention)
    AttentionInterface.register(REFERENCE_ATTENTION, reference_attention)
