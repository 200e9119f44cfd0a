"""The quantised model in plain PyTorch, and how far it is from the original."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from multibatch import reference
from multibatch.backends.eager import EagerPrograms, assign_weights
from multibatch.backends.flat_model import REFERENCE_ATTENTION, FlatDecoder
from multibatch.batch import prefill_inputs
from multibatch.engine import Engine
from multibatch.kv.block_table import blocks_for
from multibatch.manifest import Agreement, Quantization
from multibatch.sampling_params import SamplingParams

from .model import LoadedModel, named_tensors, pool_of
from .packing import head_of, linear_weight, scheme_of
from .verify import chunk_of

_PROMPTS = 6
_LENGTH = 48


class RoundedLinear(nn.Module):
    """A linear layer as the operators compute it from a weight of eight or four bits."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, scheme: str, same: RoundedLinear | None = None
    ) -> None:
        """Rounds `weight`, [N, K], unless `same` has that weight already."""
        super().__init__()
        self.weight: torch.Tensor
        self.scales: torch.Tensor
        rounded = reference.quantize_weight if scheme == "int8" else reference.quantize_weight_by_group
        self.weight, self.scales = (same.weight, same.scales) if same else rounded(weight)
        self.bias = bias
        self._product = reference.int8_linear if scheme == "int8" else reference.int4_linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        return self._product(x, self.weight, self.scales, self.bias)


def quantized_reference(loaded: LoadedModel, scheme: str) -> FlatDecoder:
    """The model with every linear layer, and an embedding tied to the head, rounded as `--quantization scheme` does."""
    from transformers import AutoModelForCausalLM

    original: Any = loaded.decoder.model
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(original.config, dtype=original.dtype)
    model = model.eval().requires_grad_(False)
    assign_weights(model, dict(named_tensors(original)))
    head = head_of(model)
    rounded: dict[torch.Tensor, RoundedLinear] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            weight = linear_weight(child)
            if weight is not None:
                own = scheme_of(scheme, is_head=child is head)
                setattr(parent, name, RoundedLinear(weight, child.bias, own, rounded.get(child.weight)))
                rounded.setdefault(child.weight, getattr(parent, name))
    for module in model.modules():
        if type(module) is nn.Embedding and module.weight in rounded:
            tied = rounded[module.weight]
            weight = (tied.weight.float() * tied.scales[:, None]).to(module.weight.dtype)
            module.weight = nn.Parameter(weight, requires_grad=False)
    return FlatDecoder(model, REFERENCE_ATTENTION)


def compare(loaded: LoadedModel, quantized: FlatDecoder, engine: Engine, recorded: Quantization) -> Quantization:
    """What was recorded, and original against quantised on random token ids and on text that `engine`, which serves the latter, samples."""
    rng = random.Random(0)
    length = min(_LENGTH, engine.max_seq_len)
    vocabulary = loaded.info.vocab_size
    noise = [[rng.randrange(vocabulary) for _ in range(length)] for _ in range(_PROMPTS)]
    starts = [prompt[: max(1, length // 12)] for prompt in noise]
    own = [start + sampled for start, sampled in zip(starts, _sample(engine, starts, length), strict=True)]
    return dataclasses.replace(
        recorded,
        random_tokens=agreement(loaded, quantized, noise),
        own_text=agreement(loaded, quantized, own),
    )


def agreement(loaded: LoadedModel, quantized: FlatDecoder, texts: Sequence[Sequence[int]]) -> Agreement:
    """Compares the next-token distributions of both models after every token of `texts`."""
    divergence, same, count = 0.0, 0, 0
    for text in texts:
        p = _log_probabilities(loaded, loaded.decoder, text)
        q = _log_probabilities(loaded, quantized, text)
        divergence += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(text)
    return Agreement(
        num_tokens=count, kl_divergence=round(max(0.0, divergence / count), 6), top1_agreement=round(same / count, 4)
    )


def _log_probabilities(loaded: LoadedModel, decoder: FlatDecoder, text: Sequence[int]) -> torch.Tensor:
    """[T, V] float32: after each token of the text."""
    size = loaded.kv.block_size
    blocks = list(range(1, blocks_for(len(text), size) + 1))
    inputs = prefill_inputs([chunk_of(list(text), blocks)], len(text), 1, len(blocks), size)
    inputs = dataclasses.replace(inputs, logits_to_keep=torch.arange(len(text)))
    pool = pool_of(loaded.kv, len(blocks) + 1, loaded.info.dtype)
    return EagerPrograms(decoder).run("", inputs, pool).float().log_softmax(-1)


def _sample(engine: Engine, starts: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    for i, start in enumerate(starts):
        tokens = max(1, length - len(start))
        params = SamplingParams(temperature=1.0, seed=i, max_tokens=tokens, ignore_eos=True, detokenize=False)
        engine.add_request(str(i), start, params)
    outputs = engine.run_all()
    return [list(outputs[str(i)].outputs[0].token_ids) for i in range(len(starts))]
