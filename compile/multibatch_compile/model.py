"""Loads a checkpoint, finds out whether and how it can be compiled, and writes its weights into an artifact."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from multibatch.backends.base import DTYPES
from multibatch.backends.eager import assign_weights, model_skeleton
from multibatch.backends.flat_model import REFERENCE_ATTENTION, FlatDecoder
from multibatch.backends.inductor import TIED
from multibatch.errors import CompileError, UnsupportedModelError
from multibatch.kv.pool import KVPool
from multibatch.manifest import KVLayer, KVLayout, ModelInfo
from multibatch.reference import AttentionOptions

from .packing import Packing, pack_model


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A checkpoint in memory, ready to be the reference and to be packed."""

    decoder: FlatDecoder
    """With the reference attention."""
    info: ModelInfo
    kv: KVLayout
    options: tuple[AttentionOptions, ...]
    """What each layer asks of attention."""
    packing: Packing
    """How its linear layers will be packed."""


def load_model(
    source: str, dtype: str | None, block_size: int, revision: str | None = None, quantization: str = "none"
) -> LoadedModel:
    """Loads as transformers does, from a folder or a hub id.

    Raises:
        CompileError: there is no such model, it is truncated, or its weights are not finite.
        UnsupportedModelError: it needs what multibatch does not handle, by name.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        chosen = dtype or str(config.dtype or torch.float32).removeprefix("torch.")
        if chosen not in DTYPES:
            raise UnsupportedModelError(f"{source} is in {chosen}; allowed: {', '.join(DTYPES)}; choose with --dtype")
        _refuse_config(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[chosen], revision=revision, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if isinstance(error, UnsupportedModelError):
            raise
        raise CompileError(
            f"{source} cannot be loaded as a causal LM: {error}\nGive a Hugging Face folder with config.json and"
            " safetensors, or a hub id that this machine can reach"
        ) from error
    except Exception as error:  # safetensors raises a class of its own that is no OSError
        if type(error).__module__.startswith("safetensors") or "Safetensor" in type(error).__name__:
            raise CompileError(f"{source}: its weights cannot be read: {error}; copy the checkpoint again") from error
        raise
    model, report = loaded
    missing = sorted(report["missing_keys"]) if isinstance(report, dict) else sorted(report.missing_keys)
    if missing:
        raise CompileError(f"{source} has no weights for {', '.join(missing[:3])}; the checkpoint is incomplete")
    model = model.eval().requires_grad_(False)
    loaded_model = _inspect(source, revision, model, config, chosen, block_size)
    packing = Packing(quantization, find_fused(loaded_model.decoder))  # type: ignore[arg-type]
    return dataclasses.replace(loaded_model, packing=packing)


def _inspect(source: str, revision: str | None, model: Any, config: Any, dtype: str, block_size: int) -> LoadedModel:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise CompileError(f"{source}: {name} holds NaN or infinity; nothing can be compiled from it")
    decoder = FlatDecoder(model, REFERENCE_ATTENTION)
    kv, options = probe(decoder, int(config.get_text_config().num_hidden_layers), DTYPES[dtype], block_size)
    _check_windows(config, options)
    head = model.get_output_embeddings()
    vocabulary = int(head.weight.shape[0])
    info = ModelInfo(
        id=source,
        revision=revision,
        architecture=type(model).__name__,
        config_sha256=hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=str).encode()).hexdigest(),
        weights_sha256=_fingerprint(model),
        num_parameters=sum(p.numel() for p in model.parameters()),
        vocab_size=vocabulary,
        num_layers=kv.num_layers,
        dtype=dtype,  # type: ignore[arg-type]
        eos_token_ids=_eos_token_ids(model, vocabulary),
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        products_per_token=sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head),
        products_per_logits=head.weight.numel(),
    )
    return LoadedModel(decoder, info, kv, options, Packing())


def probe(
    decoder: FlatDecoder, num_layers: int, dtype: torch.dtype, block_size: int
) -> tuple[KVLayout, tuple[AttentionOptions, ...]]:
    """Runs two tokens and notes what each layer hands to attention.

    Raises:
        UnsupportedModelError: a layer does not call transformers' attention interface exactly once.
    """
    seen: dict[int, tuple[KVLayer, AttentionOptions]] = {}

    def note(module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if layer in seen:
            raise UnsupportedModelError(f"layer {layer} calls attention twice in one step; handled: once")
        if q.shape[1] % k.shape[1]:
            raise UnsupportedModelError(f"layer {layer} has {q.shape[1]} query heads over {k.shape[1]} KV heads")
        seen[layer] = (KVLayer(k.shape[1], k.shape[3], v.shape[3]), options)

    decoder.context.on_call = note
    try:
        with torch.inference_mode():
            decoder(*_two_tokens(), [], [])
    except UnsupportedModelError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        name = type(decoder.model).__name__
        raise UnsupportedModelError(f"{name} does not run on flattened tokens: {error}") from error
    finally:
        decoder.context.on_call = None
    if sorted(seen) != list(range(num_layers)):
        name = type(decoder.model).__name__
        raise UnsupportedModelError(
            f"{name}: {len(seen)} of {num_layers} layers call transformers' attention interface; all have to"
            " (linear attention, state spaces and shared KV layers are not handled)"
        )
    layers = tuple(seen[i][0] for i in range(num_layers))
    return KVLayout(block_size, num_layers, layers), tuple(seen[i][1] for i in range(num_layers))


def find_fused(decoder: FlatDecoder) -> tuple[tuple[str, ...], ...]:
    """Linear layers side by side in one module that get the very same tensor: query, key and value; gate and up.

    Seen by running two tokens, so no name of a module matters. Tied layers, and those that run twice, are left out.
    """
    model = decoder.model
    names: dict[nn.Module, str] = {m: name for name, m in model.named_modules() if type(m) is nn.Linear}
    owners = collections.Counter(id(module.weight) for module in model.modules() if hasattr(module, "weight"))
    calls: list[tuple[nn.Module, torch.Tensor]] = []
    hooks = [m.register_forward_pre_hook(lambda module, inputs: calls.append((module, inputs[0]))) for m in names]
    decoder.context.on_call = lambda *_: None
    try:
        with torch.inference_mode():
            decoder(*_two_tokens(), [], [])
    finally:
        decoder.context.on_call = None
        for hook in hooks:
            hook.remove()
    times = collections.Counter(module for module, _ in calls)
    groups: dict[tuple[str, int], list[str]] = {}
    for module, x in calls:
        if times[module] == 1 and owners[id(module.weight)] == 1:
            groups.setdefault((names[module].rpartition(".")[0], id(x)), []).append(names[module])
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def write_weights(model: nn.Module, config_dir: Path, path: Path, dtype: str, packing: Packing | None) -> int:
    """Writes every parameter and buffer once, tied ones by reference in the file's metadata.

    Args:
        model: with its weights.
        config_dir: holds config.json.
        path: the file to write.
        dtype: the model's.
        packing: how to pack linear layers; None: not at all.

    Returns:
        Bytes that one decode step must read: all but an embedding that is no output layer too.
    """
    unique: dict[tuple[int, tuple[int, ...]], str] = {}
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {"format": "pt"}
    if packing is not None:
        skeleton = model_skeleton(config_dir, DTYPES[dtype])
        assign_weights(skeleton, dict(named_tensors(model)))
        pack_model(skeleton, packing)
        model = skeleton
        metadata |= packing.to_metadata()
    for name, tensor in named_tensors(model):
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and key in unique:
            metadata[TIED + name] = unique[key]
            continue
        unique[key] = name
        tensors[name] = tensor.detach().contiguous()
    _save_aligned(tensors, path, metadata)
    read = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if embedding.weight.data_ptr() != head.weight.data_ptr():
        read -= embedding.weight.numel() * embedding.weight.element_size()
    return int(read)


def _save_aligned(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Saves so that the data begins at a multiple of 64 bytes, a cache line: vector loads across two cost twice."""
    path.touch()
    mode = path.stat().st_mode  # what every file here gets; safetensors lets only the owner read what it writes
    save_file(tensors, path, metadata={**metadata, "padding": ""})
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    if start % 64:
        save_file(tensors, path, metadata={**metadata, "padding": " " * (-start % 64)})
    path.chmod(mode)


def named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Every parameter and buffer by name, tied ones once for each of their names."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    return [*parameters, *model.named_buffers(remove_duplicate=False)]


def _two_tokens() -> list[torch.Tensor]:
    ints = torch.tensor([0, 2], dtype=torch.int32)
    return [
        torch.zeros((1, 2), dtype=torch.int64),
        torch.tensor([[0, 1]]),
        torch.tensor([0, 1]),
        ints,
        torch.zeros((1, 1), dtype=torch.int32),
        torch.tensor([2], dtype=torch.int32),
        torch.tensor([1]),
    ]


def _refuse_config(config: Any) -> None:
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UnsupportedModelError(f"{config.model_type}: layers of type {', '.join(sorted(kinds))} are not handled")
    rope = getattr(text, "rope_parameters", None) or {}
    sets = rope.values() if rope and all(isinstance(v, dict) for v in rope.values()) else [rope]
    for one in sets:
        if one.get("rope_type") in ("dynamic", "longrope"):
            raise UnsupportedModelError(
                f"{config.model_type}: rope type {one['rope_type']} depends on the length of the longest row; not handled"
            )


def _check_windows(config: Any, options: tuple[AttentionOptions, ...]) -> None:
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    for layer, kind in enumerate(kinds):
        window = int(getattr(text, "sliding_window", None) or 0) if kind == "sliding_attention" else 0
        if options[layer].sliding_window != window:
            raise UnsupportedModelError(
                f"{config.model_type}: layer {layer} is {kind} with window {window} by its config, but asks attention"
                f" for {options[layer].sliding_window}"
            )


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _eos_token_ids(model: Any, vocabulary: int) -> tuple[int, ...]:
    given = model.generation_config.eos_token_id
    if given is None:
        given = model.config.get_text_config().eos_token_id
    ids = [] if given is None else [given] if isinstance(given, int) else list(given)
    return tuple(i for i in ids if 0 <= i < vocabulary)


def pool_of(kv: KVLayout, num_blocks: int, dtype: str) -> KVPool:
    """An empty pool for checks."""
    return KVPool.allocate(kv, num_blocks, DTYPES[dtype])
