"""Checks every program against the eager reference, padding against the pool, and each row against itself alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from multibatch.backends.base import LoadedPrograms
from multibatch.backends.eager import EagerPrograms
from multibatch.backends.flat_model import FlatDecoder
from multibatch.batch import DecodeRow, ProgramInputs, decode_inputs, prefill_inputs
from multibatch.errors import UnsupportedModelError, VerificationError
from multibatch.kv.block_table import blocks_for, slots_of
from multibatch.kv.pool import KVPool
from multibatch.manifest import Manifest, ProgramSpec, decoder_name
from multibatch.request import Request, Sequence
from multibatch.sampling_params import SamplingParams
from multibatch.scheduled_step import PrefillChunk

from .model import LoadedModel, pool_of

TOLERANCE = {"float32": 2e-3, "bfloat16": 8e-2, "float16": 1e-2}
"""Largest difference of a logit from the reference, relative to the reference's largest logit."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What verification found of one program."""

    max_abs_error: float
    bit_equal: bool | None = None
    max_size_difference: float | None = None


def check_flattening(loaded: LoadedModel, max_seq_len: int) -> None:
    """Compares the flattened form with the model's own forward on one prompt.

    Raises:
        UnsupportedModelError: they differ, so the architecture needs something that nobody told us of.
    """
    windows = [o.sliding_window for o in loaded.options if o.sliding_window]
    length = min(max_seq_len, max([24, *(w + 8 for w in windows if w <= 1024)]))
    rng = random.Random(0)
    ids = [rng.randrange(loaded.info.vocab_size) for _ in range(length)]
    blocks = list(range(1, blocks_for(length, loaded.kv.block_size) + 1))
    pool = pool_of(loaded.kv, len(blocks) + 1, loaded.info.dtype)
    inputs = prefill_inputs([chunk_of(ids, blocks)], length, 1, len(blocks), loaded.kv.block_size)
    model: Any = loaded.decoder.model
    flat = EagerPrograms(loaded.decoder).run("", inputs, pool)[0].float()
    attention = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            own = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
    finally:
        model.set_attn_implementation(attention)
    error = float((flat - own).abs().max())
    allowed = TOLERANCE[loaded.info.dtype] * max(1.0, float(own.abs().max()))
    if not error <= allowed:
        raise UnsupportedModelError(
            f"{loaded.info.architecture}: flattened over a paged pool its logits differ from its own by {error:.3g}"
            f" (allowed {allowed:.3g}) at {length} tokens; it needs something of attention that is not handled"
        )


def check_program(
    manifest: Manifest,
    spec: ProgramSpec,
    programs: LoadedPrograms,
    decoder: FlatDecoder,
    original: FlatDecoder | None = None,
) -> Verdict:
    """One program against the reference on the same random pool.

    Args:
        manifest: of the artifact.
        spec: the program.
        programs: loaded.
        decoder: the reference.
        original: where `decoder` is quantised, what it was made from. A sum that rounds otherwise becomes another step of
            the next layer's quantisation, so the program may be as far from the reference as twice what quantisation does.

    Raises:
        VerificationError: its logits are off, or it changed a block that is not its rows'.
    """
    case = _Case(manifest, spec, seed=spec.num_tokens)
    pool = case.pool()
    logits = programs.run(spec.name, case.inputs, pool).float()[: case.num_live]
    reference_pool = case.pool()
    reference = EagerPrograms(decoder).run(spec.name, case.inputs, reference_pool).float()[: case.num_live]
    error = float((logits - reference).abs().max())
    allowed = TOLERANCE[manifest.model.dtype] * max(1.0, float(reference.abs().max()))
    if original is not None:
        exact = EagerPrograms(original).run(spec.name, case.inputs, case.pool()).float()[: case.num_live]
        allowed = max(allowed, 2 * float((exact - reference).abs().max()))
    if not error <= allowed:
        raise VerificationError(
            f"{spec.name}: logits differ from the eager reference by {error:.3g}, allowed {allowed:.3g}"
        )
    case.check_untouched(pool)
    if spec.kind == "prefill":
        return Verdict(error)
    smallest = decoder_name(manifest.decoder_batch_sizes[0])
    alone = torch.cat([programs.run(smallest, one, case.pool()).float()[:1] for one in case.one_by_one()])
    difference = float((alone - logits).abs().max())
    if not difference <= allowed:
        raise VerificationError(f"{spec.name}: rows differ by {difference:.3g} from running one by one")
    return Verdict(error, difference == 0.0, difference)


class _Case:
    """Random rows for one program, some padded, over a random pool."""

    def __init__(self, manifest: Manifest, spec: ProgramSpec, seed: int) -> None:
        self.manifest = manifest
        self._rng = random.Random(seed)
        self._seed = seed
        self._block_size = manifest.kv.block_size
        self._max_blocks = blocks_for(manifest.max_seq_len, self._block_size)
        self._next_block = 1
        self._written: list[int] = []
        if spec.kind == "decode":
            # One padded row where there is room: it has to leave no trace.
            self.num_live = max(1, spec.batch_size - 1)
            self._rows = [self._row() for _ in range(self.num_live)]
            self.inputs = self._decode(self._rows, spec.batch_size)
        else:
            chunks = self._chunks(spec.num_tokens, spec.batch_size)
            self.num_live = len(chunks)
            self.inputs = prefill_inputs(chunks, spec.num_tokens, spec.batch_size, self._max_blocks, self._block_size)

    def pool(self) -> KVPool:
        """The same random pool at every call."""
        pool = pool_of(self.manifest.kv, self._next_block, self.manifest.model.dtype)
        generator = torch.Generator().manual_seed(self._seed)
        for tensor in (*pool.keys, *pool.values):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
        return pool

    def one_by_one(self) -> list[ProgramInputs]:
        """Each live row in the smallest decoder."""
        smallest = self.manifest.decoder_batch_sizes[0]
        return [self._decode([row], smallest) for row in self._rows]

    def check_untouched(self, pool: KVPool) -> None:
        """Every slot but the rows' new ones and the scratch block must be as it was."""
        before = self.pool()
        size = self._block_size
        mask = torch.zeros(self._next_block * size, dtype=torch.bool)
        mask[:size] = True
        mask[self._written] = True
        mask = mask.view(self._next_block, 1, 1, size)
        for old, new in zip(before.keys, pool.keys, strict=True):
            self._same(old, new, mask)
        for old, new in zip(before.values, pool.values, strict=True):
            self._same(old, new, mask.transpose(2, 3))

    def _same(self, old: torch.Tensor, new: torch.Tensor, written: torch.Tensor) -> None:
        if bool(((old != new) & ~written).any()):
            raise VerificationError("a program changed a block that none of its rows own")

    def _row(self) -> DecodeRow:
        position = self._rng.randrange(min(self.manifest.max_seq_len, 5 * self._block_size))
        blocks = self._blocks(position + 1)
        self._written += slots_of(blocks, position, position + 1, self._block_size)
        return DecodeRow(self._rng.randrange(self.manifest.model.vocab_size), position, blocks)

    def _chunks(self, num_tokens: int, num_rows: int) -> list[PrefillChunk]:
        count = min(num_rows, 3, num_tokens)
        # The last tokens of the program are padding, unless it is too small for any.
        lengths = [max(1, num_tokens // count - 1)] * count
        chunks = []
        for length in lengths:
            start = self._rng.randrange(max(1, min(self.manifest.max_seq_len - length, 2 * self._block_size)))
            ids = [self._rng.randrange(self.manifest.model.vocab_size) for _ in range(start + length)]
            blocks = self._blocks(len(ids))
            self._written += slots_of(blocks, start, len(ids), self._block_size)
            chunks.append(chunk_of(ids, blocks, start))
        return chunks

    def _blocks(self, num_tokens: int) -> list[int]:
        count = blocks_for(num_tokens, self._block_size)
        self._next_block += count
        return list(range(self._next_block - count, self._next_block))

    def _decode(self, rows: list[DecodeRow], batch_size: int) -> ProgramInputs:
        return decode_inputs(rows, batch_size, self._max_blocks, self._block_size)


def chunk_of(ids: list[int], blocks: list[int], start: int = 0) -> PrefillChunk:
    """Tokens `start` and on of a prompt, as the scheduler would hand them to a program."""
    request = Request(request_id="check", prompt_token_ids=tuple(ids), params=SamplingParams(), seed=0)
    sequence = Sequence(request, num_computed_tokens=start, block_ids=blocks)
    return PrefillChunk(sequence, start, len(ids) - start)
