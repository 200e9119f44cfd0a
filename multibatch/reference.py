"""What the operators compute, in plain PyTorch: slow, obvious, and what `verify` and the tests compare with."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs of one program call besides token ids and positions. All tensors live on the pool's device.

    One form serves decode (T = R) and prefill (T = chunk, several prompts): T flattened tokens of R rows.
    """

    slot_mapping: torch.Tensor
    """int64[T]: where each token's key and value go: block * block_size + offset. No row of several may read where a row of one
    token writes, its own last position: kernels write it as they read the row."""
    cu_seqlens: torch.Tensor
    """int32[R + 1]: row r's tokens are [cu_seqlens[r], cu_seqlens[r + 1])."""
    block_tables: torch.Tensor
    """int32[R, M]: the blocks of each row in the order of its positions; unused entries are 0."""
    seq_lens: torch.Tensor
    """int32[R]: positions of each row after this call, its new tokens included."""
    key_pools: list[torch.Tensor]
    """Per layer [num_blocks, H_kv, D, block_size]."""
    value_pools: list[torch.Tensor]
    """Per layer [num_blocks, H_kv, block_size, D_v]."""


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What a layer asks of attention beyond causality."""

    scale: float
    sliding_window: int = 0
    """A query sees itself and the sliding_window - 1 positions before it; 0: all positions before it."""
    softcap: float = 0.0
    """Scores become softcap * tanh(score / softcap); 0: unchanged."""


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    step: StepInputs,
    layer: int,
    options: AttentionOptions,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Writes the new keys and values into the pool, then attends row by row in float32.

    Args:
        query: [1, H, T, D].
        key: [1, H_kv, T, D].
        value: [1, H_kv, T, D_v].
        step: the call's inputs; its pools are changed in place.
        layer: index into the pools.
        options: the layer's scale, window and softcap.
        sinks: float[H] or None: a score per head that takes part in the softmax and has no value (gpt-oss).

    Returns:
        [1, T, H, D_v], zero for tokens that belong to no row.
    """
    key_pool, value_pool = step.key_pools[layer], step.value_pools[layer]
    block_size = key_pool.shape[3]
    block, offset = step.slot_mapping // block_size, step.slot_mapping % block_size
    key_pool[block, :, :, offset] = key[0].transpose(0, 1)
    value_pool[block, :, offset, :] = value[0].transpose(0, 1)
    out = query.new_zeros((1, query.shape[2], query.shape[1], value.shape[3]))
    starts = step.cu_seqlens.tolist()
    for row, length in enumerate(step.seq_lens.tolist()):
        start, stop = starts[row], starts[row + 1]
        if start == stop:
            continue
        blocks = step.block_tables[row, : -(-length // block_size)].long()
        keys = key_pool[blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, :length]
        values = value_pool[blocks].permute(1, 0, 2, 3).flatten(1, 2)[:, :length]
        rows = _attend(query[0, :, start:stop], keys, values, options, sinks)
        out[0, start:stop] = rows.transpose(0, 1).to(out.dtype)
    return out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions in the form of two halves (Su et al. 2021, as transformers' Llama has them), computed in float32.

    Args:
        x: [1, H, T, D].
        cos: [1, 1, T, d], d even and at most D; what is beyond d stays.
        sin: like cos.

    Returns:
        Like x.
    """
    dims = cos.shape[-1]
    turned, rest = x[..., :dims].float(), x[..., dims:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos.float() + torch.cat([-second, first], -1) * sin.float()
    return torch.cat([turned.to(x.dtype), rest], -1)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    options: AttentionOptions,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One row: query [H, t, D] at the last t of `length` positions, keys [H_kv, length, D] -> float32[H, t, D_v]."""
    group = query.shape[0] // keys.shape[0]
    t, length = query.shape[1], keys.shape[1]
    scores = query.float() @ keys.float().repeat_interleave(group, 0).transpose(1, 2)
    scores = scores * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    position = torch.arange(length - t, length, device=query.device)[:, None]
    other = torch.arange(length, device=query.device)[None, :]
    hidden = other > position
    if options.sliding_window:
        hidden = hidden | (other <= position - options.sliding_window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(-1, t, 1)
        scores = torch.cat([scores, column], dim=2)
    weights = torch.softmax(scores, dim=2)[:, :, :length]
    return weights @ values.float().repeat_interleave(group, 0)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float, round_first: bool) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon) * (weight + offset) over the last dimension, in float32.

    Args:
        x: [..., n].
        weight: [n].
        epsilon: keeps the root from zero.
        offset: 1 where the weight is stored as a difference from 1, as in Gemma; else 0.
        round_first: whether the normalised value is rounded to x's dtype before it meets the weight, as in Llama.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    if round_first:
        wide = wide.to(x.dtype).float()
    return (wide * (weight.float() + offset)).to(x.dtype)


def gate(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """[..., 2 K], gate before up -> activation(gate) * up, [..., K]. activation: silu or gelu_tanh."""
    left, right = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return torch.nn.functional.silu(left) * right
    return torch.nn.functional.gelu(left, approximate="tanh") * right


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] -> int8[N, K] and float32[N] scales: symmetric, the largest magnitude of an output becomes 127.

    One scale per output channel and one per token of the activations, as SmoothQuant's W8A8 has them (Xiao et al. 2022),
    without its smoothing.
    """
    wide = weight.detach().float()
    scales = wide.abs().amax(dim=1) / 127
    steps = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (wide / steps[:, None]).round().to(torch.int8), scales


GROUP = 32
"""Inputs that have one scale in a weight of four bits."""


def quantize_weight_by_group(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] -> int8[N, K] of -8 to 7 and bfloat16[N, ceil(K / 32)] scales, one for each group of inputs.

    Symmetric, as GGML's Q4_0: the number of largest magnitude becomes -8, whatever its sign. Of that scale and some that are
    near it each group takes the one with the least squared error.
    """
    n, k = weight.shape
    wide = torch.nn.functional.pad(weight.detach().float(), (0, -k % GROUP)).view(n, -1, GROUP)
    extreme = wide.gather(2, wide.abs().argmax(dim=2, keepdim=True))
    divisor = torch.where(extreme == 0, torch.ones_like(extreme), extreme)
    best = torch.full_like(extreme, torch.inf)
    scales, rounded = torch.zeros_like(extreme), torch.zeros_like(wide)
    for largest in (-8.0, -7.5, -7.0, -8.5, -9.0):
        scale = (extreme / largest).bfloat16().float()
        steps = (wide / torch.where(scale == 0, torch.ones_like(scale), scale)).round().clamp(-8, 7)
        error = ((steps * scale - wide) / divisor).square().sum(dim=2, keepdim=True)
        scales, rounded = torch.where(error < best, scale, scales), torch.where(error < best, steps, rounded)
        best = torch.minimum(error, best)
    return rounded.view(n, -1)[:, :k].to(torch.int8), scales.squeeze(2).bfloat16()


def weight_of_groups(rounded: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What `quantize_weight_by_group` made: float32[N, K]."""
    return rounded.float() * scales.float().repeat_interleave(GROUP, dim=1)[:, : rounded.shape[1]]


def int8_linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """[..., K] -> [..., N] in x's dtype, as the int8 operator computes it.

    Args:
        x: [..., K] in any float dtype; each row is rounded to 255 steps of its own scale.
        weight: int8[N, K].
        scales: float32[N].
        bias: [N] or None.
    """
    rounded, steps = quantize_rows(x)
    y = rounded @ weight.float().T * (steps * scales)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def int4_linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As `int8_linear`, with what `quantize_weight_by_group` gives."""
    rounded, steps = quantize_rows(x)
    y = rounded @ weight_of_groups(weight, scales).T * steps
    return (y if bias is None else y + bias.float()).to(x.dtype)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., K] -> float32[..., K] of whole numbers up to 127, and float32[..., 1]: what they are multiples of."""
    wide = x.float()
    steps = wide.abs().amax(dim=-1, keepdim=True) / 127
    return (wide / torch.where(steps > 0, steps, torch.ones_like(steps))).round(), steps
