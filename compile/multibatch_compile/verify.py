"""Checks every program against the eager reference, padding against the pool, and each row against itself alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch

from multibatch.backends.base import LoadedPrograms
from multibatch.backends.eager import EagerPrograms
from multibatch.backends.flat_model import FlatDecoder
from multibatch.batch import DecodeRow, ProgramInputs, decode_inputs, prefill_inputs, step_inputs
from multibatch.errors import UnsupportedModelError, VerificationError
from multibatch.kv.block_table import blocks_for, slots_of
from multibatch.kv.pool import KVPool
from multibatch.manifest import Manifest, ProgramSpec
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
    """One program against the reference on the same random pool; a step program at several mixes of rows and tokens.

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
    verdicts = []
    for mix in _mixes(spec):
        case = _Case(manifest, spec, mix)
        pool = case.pool()
        logits = programs.run(spec.name, case.inputs, pool).float()[: case.num_live]
        reference = EagerPrograms(decoder).run(spec.name, case.inputs, case.pool()).float()[: case.num_live]
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
        if spec.kind == "step":
            _check_without_logits(case, programs, pool)
        verdicts.append(_against_alone(case, programs, logits, Verdict(error), allowed))
    return _worst(verdicts)


def _check_without_logits(case: _Case, programs: LoadedPrograms, pool: KVPool) -> None:
    """A chunk that ends no prompt wants none: the same call must give none, and leave the pool as `pool` is."""
    inputs, own = replace(case.inputs, logits_to_keep=case.inputs.logits_to_keep[:0]), case.pool()
    num_logits = programs.run(case.name, inputs, own).shape[0]
    if num_logits:
        raise VerificationError(f"{case.name}: {num_logits} rows of logits where none were asked for")
    pairs = zip((*pool.keys, *pool.values), (*own.keys, *own.values), strict=True)
    if not all(torch.equal(a[1:], b[1:]) for a, b in pairs):  # any row may write to the scratch block
        raise VerificationError(f"{case.name}: writes another pool where no logits are asked for")


def _against_alone(
    case: _Case, programs: LoadedPrograms, logits: torch.Tensor, verdict: Verdict, allowed: float
) -> Verdict:
    """Adds how far each decode row is from the same row run alone."""
    if not case.rows:
        return verdict
    program = case.manifest.decoder_for(case.manifest.decoder_batch_sizes[0]).name
    alone = torch.cat([programs.run(program, one, case.pool()).float()[:1] for one in case.one_by_one()])
    difference = float((alone - logits[len(logits) - len(alone) :]).abs().max())
    if not difference <= allowed:
        raise VerificationError(f"{case.name}: rows differ by {difference:.3g} from running one by one")
    return Verdict(verdict.max_abs_error, difference == 0.0, difference)


def _worst(verdicts: list[Verdict]) -> Verdict:
    differences = [v.max_size_difference for v in verdicts if v.max_size_difference is not None]
    return Verdict(
        max(v.max_abs_error for v in verdicts),
        max(differences) == 0.0 if differences else None,
        max(differences) if differences else None,
    )


@dataclass(frozen=True, slots=True)
class _Mix:
    """What one call computes."""

    num_decode: int
    num_chunks: int = 0
    chunk_tokens: int = 0
    """Of all chunks together."""


def _mixes(spec: ProgramSpec) -> list[_Mix]:
    if spec.kind == "decode":
        # One padded row where there is room: it has to leave no trace.
        return [_Mix(max(1, spec.batch_size - 1))]
    if spec.kind == "prefill":
        count = min(spec.batch_size, 3, spec.num_tokens)
        return [_Mix(0, count, max(count, spec.num_tokens - count))]  # the last tokens are padding, where there is room
    most, budget = spec.batch_size, spec.num_tokens - spec.batch_size
    mixes = [_Mix(1), _Mix(most), _Mix(0, 1, 1), _Mix(0, 1, budget)]
    if most >= 3 and budget >= 8:
        mixes.append(_Mix(most - 2, 2, 8))
    return mixes


class _Case:
    """Random rows for one call of a program, some padded, over a random pool."""

    def __init__(self, manifest: Manifest, spec: ProgramSpec, mix: _Mix) -> None:
        seed = spec.num_tokens + mix.num_decode
        self.name = spec.name
        self.manifest = manifest
        self._rng = random.Random(seed)
        self._seed = seed
        self._block_size = manifest.kv.block_size
        self._max_blocks = blocks_for(manifest.max_seq_len, self._block_size)
        self._next_block = 1
        self._written: list[int] = []
        chunks = self._chunks(mix.chunk_tokens, mix.num_chunks)
        self.rows = [self._row() for _ in range(mix.num_decode)]
        self.num_live = len(chunks) + len(self.rows)
        if spec.kind == "decode":
            self.inputs = self._decode(self.rows, spec.batch_size)
        elif spec.kind == "prefill":
            self.inputs = prefill_inputs(chunks, spec.num_tokens, spec.batch_size, self._max_blocks, self._block_size)
        else:
            self.inputs = step_inputs(chunks, self.rows, self._max_blocks, self._block_size)

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
        return [self._decode([row], smallest) for row in self.rows]

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

    def _chunks(self, num_tokens: int, count: int) -> list[PrefillChunk]:
        chunks = []
        for _ in range(count):
            length = min(num_tokens // count, self.manifest.max_seq_len)
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
