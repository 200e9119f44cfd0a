"""How much an engine takes on, of what its artifact was compiled for and of the machine's memory."""

from __future__ import annotations

from collections.abc import Sequence

from multibatch.config import EngineConfig
from multibatch.errors import CapacityError, ConfigError, RequestError
from multibatch.hardware import available_memory_bytes
from multibatch.kv.block_table import blocks_for
from multibatch.manifest import Manifest
from multibatch.sampling_params import SamplingParams


def limit_of(name: str, asked: int | None, compiled: int, option: str) -> int:
    """What was asked for; default: all that was compiled.

    Raises:
        ConfigError: it is more than that.
    """
    if asked is None:
        return compiled
    if asked > compiled:
        raise ConfigError(
            f"{name} is {asked}; the artifact was compiled for at most {compiled}: lower it, or compile with {option} {asked}"
        )
    return asked


def prefill_tokens(manifest: Manifest, asked: int | None) -> int:
    """Prompt tokens of a step.

    Raises:
        ConfigError: more than the largest program takes.
    """
    option = "--max-num-batched-tokens" if manifest.step is not None else "--prefill-chunk-sizes"
    return limit_of("max_num_batched_tokens", asked, manifest.max_prefill_tokens, option)


def pool_blocks(manifest: Manifest, config: EngineConfig, max_num_seqs: int, max_seq_len: int) -> int:
    """Blocks of the KV pool besides the scratch block.

    Raises:
        CapacityError: they cannot hold one sequence of `max_seq_len`.
    """
    one = blocks_for(max_seq_len, manifest.kv.block_size)
    per_block = manifest.kv.bytes_per_block(manifest.model.dtype)
    if config.num_kv_blocks is not None:
        num_blocks = config.num_kv_blocks
    elif config.kv_cache_memory_bytes is not None:
        num_blocks = config.kv_cache_memory_bytes // per_block - 1
    else:
        num_blocks = min(one * max_num_seqs, available_memory_bytes() // 2 // per_block - 1)
    if num_blocks < one:
        raise CapacityError(
            f"the KV pool has {max(num_blocks, 0)} blocks; one sequence of max_seq_len {max_seq_len} needs {one}"
            f" ({one * per_block} bytes): give it more memory, or set a smaller max_seq_len"
        )
    return num_blocks


def check_request(
    request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, manifest: Manifest, max_seq_len: int
) -> None:
    """Checks what a request asks for against what was compiled.

    Raises:
        RequestError: a token that the model does not have, more tokens than fit, or prompt_logprobs without a program for them.
    """
    vocabulary = manifest.model.vocab_size
    beyond = [t for t in prompt_token_ids if not 0 <= t < vocabulary]
    if beyond:
        raise RequestError(
            f"request {request_id!r}: token id {beyond[0]} in the prompt; allowed: 0 to {vocabulary - 1}"
        )
    if params.prompt_logprobs is not None and manifest.step is None:
        raise RequestError(
            f"request {request_id!r}: prompt_logprobs is {params.prompt_logprobs}, and the artifact's programs for"
            " prompts give the logits of the last token alone; allowed: None. Leave it out, or compile without"
            " --prefill-chunk-sizes"
        )
    total = len(prompt_token_ids) + (params.max_tokens or 1)
    if len(prompt_token_ids) and total > max_seq_len:
        raise RequestError(
            f"request {request_id!r}: {len(prompt_token_ids)} prompt tokens and max_tokens {params.max_tokens}"
            f" make {total}; allowed: max_seq_len {max_seq_len} in all. Lower max_tokens, shorten the prompt,"
            " give max_tokens=None for as many as fit, or compile with a larger --max-seq-len"
        )
