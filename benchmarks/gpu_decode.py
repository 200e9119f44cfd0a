"""Whole models on a device: transformers' code over our attention, its decoders captured, and what a step takes.

The operator must have its code there already (`triton_attention.register`).
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.gpu_machine import Machine
from multibatch.backends.cudagraph import CapturedPrograms
from multibatch.backends.eager import EagerPrograms
from multibatch.backends.flat_model import COMPILED_ATTENTION, FlatDecoder
from multibatch.batch import DecodeRow, ProgramInputs, decode_inputs, prefill_inputs
from multibatch.kv.block_table import blocks_for
from multibatch.kv.pool import KVPool
from multibatch.kv.sizing import DeviceMemory, blocks_in_memory
from multibatch.manifest import KVLayer, KVLayout, decoder_name
from multibatch.request import Request
from multibatch.request import Sequence as RunningSequence
from multibatch.sampling_params import SamplingParams
from multibatch.scheduled_step import PrefillChunk

BLOCK_SIZE = 32
TOLERANCE = 0.02
"""Largest difference of a logit between a captured and an uncaptured step, relative to the largest logit."""
TINY: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 16},
}
"""Sliding windows and a soft-cap are Gemma 2's."""
HALF_BILLION: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
"""The shape of Qwen2.5-0.5B."""


def random_model(name: str, options: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """A random model of an architecture."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    with torch.device(device):
        model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval().requires_grad_(False)
    if options.get("hidden_size") == TINY["hidden_size"]:
        # The default deviation of 0.02 makes every logit alike; near ties would test rounding and not the path.
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def layout_of(config: Any, block_size: int = BLOCK_SIZE) -> KVLayout:
    """The KV pool's layout for a model of this configuration."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer = KVLayer(config.num_key_value_heads, head_dim, head_dim)
    return KVLayout(block_size, config.num_hidden_layers, (layer,) * config.num_hidden_layers)


def check_architectures(
    device: torch.device,
    names: Sequence[str] = tuple(ARCHITECTURES),
    lengths: Sequence[int] = (40, 7, 300),
    num: int = 24,
) -> dict[str, Any]:
    """Greedy tokens of tiny models over the operator against transformers' own generate, in float32, several rows."""
    wrong = []
    for name in names:
        rng = random.Random(0)
        prompts = [[rng.randrange(3, TINY["vocab_size"]) for _ in range(length)] for length in lengths]
        model = random_model(name, TINY | ARCHITECTURES[name], torch.float32, device)
        model.set_attn_implementation("eager")
        expected = [generated(model, prompt, num, device) for prompt in prompts]
        found = continued(FlatDecoder(model, COMPILED_ATTENTION), layout_of(model.config), prompts, num, device)
        pairs = enumerate(zip(found, expected, strict=True))
        wrong += [f"{name}, prompt {i}: {ours} instead of {theirs}" for i, (ours, theirs) in pairs if ours != theirs]
    return {"ok": not wrong, "architectures": list(names), "num_tokens": num, "wrong": wrong}


def generated(model: Any, prompt: list[int], num_tokens: int, device: torch.device) -> list[int]:
    """transformers' own greedy continuation, end-of-sequence ignored."""
    ids = torch.tensor([prompt], device=device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, min_new_tokens=num_tokens,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def continued(
    decoder: FlatDecoder, kv: KVLayout, prompts: Sequence[list[int]], num_tokens: int, device: torch.device
) -> list[list[int]]:
    """Ours: all prompts in one padded call, then decode steps with one row of padding."""
    programs, size = EagerPrograms(decoder), kv.block_size
    most = blocks_for(max(map(len, prompts)) + num_tokens, size)
    tables = [list(range(1 + i * most, 1 + (i + 1) * most)) for i in range(len(prompts))]
    pool = KVPool.allocate(kv, 1 + most * len(prompts), torch.float32, str(device))
    chunks = [whole(prompt, table) for prompt, table in zip(prompts, tables, strict=True)]
    inputs = prefill_inputs(chunks, sum(map(len, prompts)) + 3, len(prompts) + 1, most, size)
    outputs: list[list[int]] = [[] for _ in prompts]
    for step in range(num_tokens):
        logits = programs.run("", on_device(inputs, device), pool)
        for output, token in zip(outputs, logits.argmax(1).tolist(), strict=False):
            output.append(token)
        rows = [
            DecodeRow(output[-1], len(prompt) + step, table)
            for prompt, output, table in zip(prompts, outputs, tables, strict=True)
        ]
        inputs = decode_inputs(rows, len(rows) + 1, most, size)
    return outputs


def whole(prompt: list[int], table: list[int]) -> PrefillChunk:
    """All of a prompt in one chunk."""
    request = Request(request_id="check", prompt_token_ids=tuple(prompt), params=SamplingParams(), seed=0)
    return PrefillChunk(RunningSequence(request, num_computed_tokens=0, block_ids=table), 0, len(prompt))


def on_device(inputs: ProgramInputs, device: torch.device) -> ProgramInputs:
    """The same inputs where the model is."""
    return ProgramInputs(*(tensor.to(device) for tensor in inputs.tensors()))


def measure_decode(
    machine: Machine,
    bandwidth_gbps: float,
    options: Mapping[str, Any] = HALF_BILLION,
    sizes: Sequence[int] = (32, 8, 1),
    context: int = 1024,
    max_seq_len: int = 2048,
    followed_steps: int = 32,
) -> dict[str, Any]:
    """Decode steps of a random bfloat16 model, captured and not, beside the time that reading their bytes takes.

    The programs are transformers' own code over our attention, not compiled ones. A step here is inputs on the host to
    logits on the device; "followed" ones are begun one ahead, each with the greedy tokens of the one before, and the host gets those.
    """
    model = random_model("Qwen2", options, torch.bfloat16, machine.device)
    kv, max_blocks = layout_of(model.config), blocks_for(max_seq_len, BLOCK_SIZE)
    programs = EagerPrograms(FlatDecoder(model, COMPILED_ATTENTION))
    captured = CapturedPrograms(programs, machine.graphs, sizes, max_blocks=max_blocks, block_size=BLOCK_SIZE)
    each = blocks_for(context, BLOCK_SIZE)
    pool, memory = bound_pool(machine, captured, kv, 1 + max(sizes) * each, max_blocks)
    weight_bytes = sum(x.numel() * x.element_size() for x in model.parameters())
    per_position = kv.bytes_per_block("bfloat16") // BLOCK_SIZE
    steps: dict[str, Any] = {}
    is_right = True
    for size in sizes:
        rows = [DecodeRow(3 + r, context - 1, range(1 + r * each, 1 + (r + 1) * each)) for r in range(size)]
        inputs, name = decode_inputs(rows, size, max_blocks, BLOCK_SIZE), decoder_name(size)
        expected = programs.run(name, on_device(inputs, machine.device), pool)
        difference = float((captured.run(name, inputs, pool).float() - expected.float()).abs().max())
        is_right = is_right and difference <= TOLERANCE * float(expected.float().abs().max())
        limit_ms = (weight_bytes + size * context * per_position) / bandwidth_gbps / 1e6
        ms = 1000 * machine.seconds(lambda: captured.run(name, inputs, pool))  # noqa: B023  called at once
        uncaptured_ms = 1000 * machine.seconds(
            lambda: programs.run(name, on_device(inputs, machine.device), pool)  # noqa: B023
        )
        in_turn = tokens_in_turn(captured, name, inputs, pool, followed_steps)
        start = time.perf_counter()
        is_right = is_right and followed_tokens(captured, name, inputs, pool, followed_steps) == in_turn
        followed_ms = 1000 * (time.perf_counter() - start) / followed_steps
        steps[str(size)] = {
            "captured_ms": ms,
            "followed_ms": followed_ms,
            "uncaptured_ms": uncaptured_ms,
            "limit_ms": limit_ms,
            "share_of_limit": limit_ms / ms,
            "tokens_per_s": size * 1000 / ms,
            "largest_difference": difference,
        }
    records = [dataclasses.asdict(record) for record in captured.sizes]
    is_captured = all(record["state"] == "captured" and record["num_replays"] for record in records)
    return {"ok": is_right and is_captured, "steps": steps, "sizes": records, "memory": memory}


def followed_tokens(
    captured: CapturedPrograms, name: str, inputs: ProgramInputs, pool: KVPool, num_steps: int
) -> list[list[int]]:
    """Of steps at one position, each queued before the tokens of the one before are known."""
    call, found = captured.start(name, inputs, pool), []
    for step in range(num_steps):
        if step + 1 < num_steps:
            call.follow(inputs, inputs.token_ids.shape[1], ())
        result = call.finish()
        found.append(result.tokens.tolist())
        call = result.followed or call
    return found


def tokens_in_turn(
    captured: CapturedPrograms, name: str, inputs: ProgramInputs, pool: KVPool, num_steps: int
) -> list[list[int]]:
    """The same, each step begun when the one before was read."""
    found: list[list[int]] = []
    for _ in range(num_steps):
        found.append(captured.start(name, inputs, pool).finish().tokens.tolist())
        inputs = dataclasses.replace(inputs, token_ids=torch.tensor([found[-1]]))
    return found


def bound_pool(
    machine: Machine, captured: CapturedPrograms, kv: KVLayout, num_blocks: int, blocks_per_sequence: int
) -> tuple[KVPool, dict[str, int]]:
    """Captures twice: over two blocks to see what graphs leave free, then over a random pool of `num_blocks`."""
    captured.bind(KVPool.allocate(kv, 2, torch.bfloat16, str(machine.device)))
    free = machine.graphs.free_memory()
    fitting = blocks_in_memory(
        DeviceMemory(total=machine.total_memory, free_at_start=machine.free_at_start, free_now=free),
        gpu_memory_utilization=min(0.9, machine.free_at_start / machine.total_memory),
        bytes_per_block=kv.bytes_per_block("bfloat16"),
        blocks_per_sequence=blocks_per_sequence,
    )
    memory = {"total": machine.total_memory, "free_at_start": machine.free_at_start, "free_with_graphs": free}
    memory |= {"graphs": captured.num_bytes, "pool_blocks_that_fit": fitting}
    pool = KVPool.allocate(kv, num_blocks, torch.bfloat16, str(machine.device))
    for tensor in (*pool.keys, *pool.values):
        tensor.normal_()
    captured.bind(pool)
    return pool, memory
