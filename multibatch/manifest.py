"""What `manifest.json` says: the only thing that the compile step and the runtime share.

Owns the fields and their rules. How JSON is read strictly is in `strict_json.py`. Touches no file: the folder is opened
and checked in `artifact.py` and written in `publish.py`. Its format is specified in `artifacts/README.md`.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from multibatch.errors import ArtifactCorruptError, ArtifactError, IncompatibleError
from multibatch.strict_json import decode, parse

SCHEMA_VERSION: Final = 4
MANIFEST_NAME: Final = "manifest.json"
MANIFEST_HASH_NAME: Final = "manifest.sha256"
COST_TABLE_NAME: Final = "cost_table.csv"
DTYPE_BYTES: Final[Mapping[str, int]] = types.MappingProxyType(
    {"float32": 4, "float16": 2, "bfloat16": 2} | {"int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}
)

Option = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a program."""

    name: str
    # An int is fixed; a str names a dimension that is free at run time, such as "num_blocks".
    shape: tuple[int | str, ...]
    # A key of DTYPE_BYTES.
    dtype: str

    def __post_init__(self) -> None:
        _require(bool(self.name), "a tensor's name", self.name, "a non-empty string")
        _known_dtype(self.dtype, f"dtype of tensor {self.name!r}")
        for size in self.shape:
            good = bool(size) if isinstance(size, str) else size >= 0
            _require(good, f"shape of tensor {self.name!r}", self.shape, "sizes >= 0 or names")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of the artifact and what it must contain."""

    # Relative to the artifact's folder, with forward slashes, and never leaving it.
    path: str
    # Lower-case hex.
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        parts = self.path.split("/")
        inside = not {"", ".", ".."} & set(parts) and not set("\\\0:") & set(self.path)
        _require(inside, "a file's path", self.path, "a relative path inside the artifact")
        reserved = self.path in (MANIFEST_NAME, MANIFEST_HASH_NAME)
        _require(not reserved, "a file's path", self.path, "another name, this one is the manifest")
        _require(_is_sha256(self.sha256), f"sha256 of {self.path}", self.sha256, "64 hex digits")
        _require(self.bytes >= 0, f"bytes of {self.path}", self.bytes, "an int >= 0")


@dataclass(frozen=True, slots=True)
class Timing:
    """What calls of one shape take on the machine that built the program."""

    # R: rows of the call.
    num_rows: int
    # T: tokens of the call.
    num_tokens: int
    # Median wall time.
    ms: float

    def __post_init__(self) -> None:
        _at_least(1, self.num_rows, "timings: num_rows")
        _at_least(self.num_rows, self.num_tokens, "timings: num_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramSpec:
    """One compiled program: T flattened tokens of R rows."""

    # `decoder_name(batch_size)`, `prefill_name(num_tokens)` or STEP.
    name: str
    # step: any numbers of rows and tokens up to the program's, decode rows and chunks of prompts mixed.
    kind: Literal["decode", "prefill", "step"]
    # R: rows (sequences) of one call; the most of a step program.
    batch_size: int
    # T: tokens of one call; equals batch_size for decode; the most of a step program.
    num_tokens: int
    # None for the eager backend, which compiles nothing.
    file: FileRecord | None
    # In the order in which the program takes them.
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    # Wall time of the build, seconds.
    build_seconds: float | None = None
    # Median wall time of one call on the machine that built it.
    measured_ms: float | None = None
    # Largest absolute difference of the logits from the eager reference on the same inputs.
    max_abs_error: float | None = None
    # True where every row equals, bit for bit, what the smallest program gives for it alone.
    bit_equal: bool | None = None
    # Where it does not: the largest absolute difference of the logits.
    max_size_difference: float | None = None
    # Of a step program: smaller calls, ascending by tokens.
    timings: tuple[Timing, ...] = ()

    def __post_init__(self) -> None:
        _at_least(1, self.batch_size, f"batch_size of program {self.name!r}")
        _at_least(1, self.num_tokens, f"num_tokens of program {self.name!r}")
        if self.kind == "decode":
            expected = decoder_name(self.batch_size)
            same = self.num_tokens == self.batch_size
            _require(same, f"num_tokens of {self.name!r}", self.num_tokens, self.batch_size)
        elif self.kind == "prefill":
            expected = prefill_name(self.num_tokens)
        else:
            expected = STEP
            _at_least(self.batch_size + 1, self.num_tokens, f"num_tokens of {self.name!r}")
        _require(self.name == expected, "a program's name", self.name, expected)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The model that was compiled."""

    # Hub id or folder, as the user gave it.
    id: str
    # Commit of the hub repository; None for a local folder.
    revision: str | None
    # Class name in the model's config, such as "Qwen2ForCausalLM".
    architecture: str
    # Hash of the source's config.json.
    config_sha256: str
    # Fingerprint of the source weights, before packing.
    weights_sha256: str
    num_parameters: int
    vocab_size: int
    num_layers: int
    # Of the weights, the activations and the KV pool.
    dtype: Literal["bfloat16", "float16", "float32"]
    # Tokens that end a sequence.
    eos_token_ids: tuple[int, ...]
    # Bytes of weights that one decode step must read.
    weight_bytes: int
    # Products of the linear layers for one token, without the LM head's.
    products_per_token: int
    # Products of the LM head for one row of logits.
    products_per_logits: int

    def __post_init__(self) -> None:
        for name in ("config_sha256", "weights_sha256"):
            value = getattr(self, name)
            _require(_is_sha256(value), f"model.{name}", value, "64 hex digits")
        for name in (
            "num_parameters",
            "vocab_size",
            "num_layers",
            "weight_bytes",
            "products_per_token",
            "products_per_logits",
        ):
            _at_least(1, getattr(self, name), f"model.{name}")
        _token_ids(self.eos_token_ids, self.vocab_size, "model.eos_token_ids")


@dataclass(frozen=True, slots=True)
class KVLayer:
    """What one layer keeps per token."""

    num_kv_heads: int
    # Elements of a key, per head.
    head_dim: int
    # Elements of a value, per head.
    value_dim: int

    def __post_init__(self) -> None:
        for name in ("num_kv_heads", "head_dim", "value_dim"):
            _at_least(1, getattr(self, name), f"kv.layers: {name}")


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of the KV pool, but for the number of blocks, which the runtime chooses."""

    # Tokens per block.
    block_size: int
    # Layers that own keys and values.
    num_layers: int
    layers: tuple[KVLayer, ...]

    def __post_init__(self) -> None:
        _at_least(1, self.block_size, "kv.block_size")
        _require(self.num_layers == len(self.layers), "kv.num_layers", self.num_layers, self.layers)
        _at_least(1, self.num_layers, "kv.num_layers")

    def bytes_per_block(self, dtype: str) -> int:
        """Bytes that one block takes over all layers, keys and values."""
        _known_dtype(dtype, "the KV pool's dtype")
        per_token = sum(x.num_kv_heads * (x.head_dim + x.value_dim) for x in self.layers)
        return self.block_size * per_token * DTYPE_BYTES[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildInfo:
    """What the artifact was built with and for."""

    multibatch_version: str
    backend: Literal["inductor", "eager"]
    device: Literal["cpu", "cuda"]
    torch_version: str
    transformers_version: str
    python_version: str
    cpu_model: str
    # As `platform.machine()` says it, such as "x86_64".
    cpu_architecture: str
    # The CPU features that the programs use; the serving machine needs them all.
    isa: tuple[str, ...]
    # Such as "9.0"; None on a CPU.
    compute_capability: str | None
    # The backend's own options, as they were used.
    options: Mapping[str, Option] = field(hash=False)
    # ISO 8601, UTC.
    created_at: str
    # Read bandwidth of the machine's memory, GB/s, as measured with the programs.
    measured_bandwidth_gbps: float | None
    # Products per second that the linear kernel makes of weights in the cache, in 10^9; None where there is no such kernel.
    measured_gproducts: float | None
    # Cores that the build and its measurements could use.
    host_cores: int

    def __post_init__(self) -> None:
        _at_least(1, self.host_cores, "build.host_cores")
        on_cuda = self.device == "cuda"
        same = on_cuda == (self.compute_capability is not None)
        allowed = 'a string such as "9.0" for cuda, null for cpu'
        _require(same, "build.compute_capability", self.compute_capability, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorLibrary:
    """One build of the operators that the programs call."""

    file: FileRecord
    # The CPU features that it uses. A machine is served by the library that uses most of what it has.
    isa: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A greedy continuation recorded at build time, replayed by `verify`."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    # Of each of token_ids.
    logprobs: tuple[float, ...]
    # Largest absolute difference of a logprob that is still right.
    tolerance: float

    def __post_init__(self) -> None:
        _at_least(1, len(self.prompt_token_ids), "the length of canary.prompt_token_ids")
        _at_least(1, len(self.token_ids), "the length of canary.token_ids")
        same = len(self.logprobs) == len(self.token_ids)
        _require(same, "the length of canary.logprobs", len(self.logprobs), len(self.token_ids))
        _at_least(0, self.tolerance, "canary.tolerance")


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far the quantised model is from the model that it was made from, position by position."""

    # Positions compared.
    num_tokens: int
    # Mean over positions of KL(original || quantised), nats.
    kl_divergence: float
    # Share of positions where both have the same most likely token.
    top1_agreement: float

    def __post_init__(self) -> None:
        _at_least(1, self.num_tokens, "quantization: num_tokens")
        good = 0 <= self.top1_agreement <= 1
        _require(good, "quantization: top1_agreement", self.top1_agreement, "0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Weights of fewer bits, and what that did to the outputs."""

    # int8: signed bytes with one scale per output. int4: four bits with a scale for every 32 inputs of an output, the LM head
    # as in int8. Activations are rounded per token.
    scheme: Literal["int8", "int4"]
    # On uniformly random token ids.
    random_tokens: Agreement | None = None
    # On text that the quantised model sampled itself.
    own_text: Agreement | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything the runtime knows about an artifact before it opens a program.

    Raises:
        ArtifactError: fields that contradict each other.
    """

    # The format's version, not the project's.
    schema_version: int = SCHEMA_VERSION
    model: ModelInfo
    build: BuildInfo
    kv: KVLayout
    # Longest sequence, prompt and output together.
    max_seq_len: int
    # Most sequences that may run at once; the largest decoder holds them.
    max_num_seqs: int
    programs: tuple[ProgramSpec, ...]
    weights: FileRecord
    # Builds of the operators, each for more CPU features than the one before; empty where the programs call none.
    ops: tuple[OperatorLibrary, ...]
    # Everything else: config, tokenizer, chat template, …
    files: tuple[FileRecord, ...]
    # None until the compile step has verified the programs.
    canary: Canary | None
    # None: the weights are in the model's dtype.
    quantization: Quantization | None

    def __post_init__(self) -> None:
        same = self.schema_version == SCHEMA_VERSION
        _require(same, "schema_version", self.schema_version, SCHEMA_VERSION)
        for name in ("max_seq_len", "max_num_seqs"):
            _at_least(1, getattr(self, name), name)
        _unique([program.name for program in self.programs], "programs: names")
        _unique([record.path for record in self.all_files], "files: paths")
        self._check_programs()
        if self.canary is not None:
            tokens = self.canary.prompt_token_ids + self.canary.token_ids
            _token_ids(tokens, self.model.vocab_size, "canary")
            fits = len(tokens) <= self.max_seq_len
            _require(fits, "the canary's length", len(tokens), f"at most {self.max_seq_len}")

    def _check_programs(self) -> None:
        sizes = self.decoder_batch_sizes
        covers = bool(sizes) and sizes[-1] >= self.max_num_seqs
        _require(covers, "decoder batch sizes", sizes, f"a size >= {self.max_num_seqs}")
        _require(bool(self.prefills) or self.step is not None, "prefill or step programs", 0, "at least one")
        compiled = self.build.backend != "eager"
        for program in self.programs:
            allowed = f"{'a file' if compiled else 'null'} for backend {self.build.backend}"
            has_file = program.file is not None
            _require(has_file == compiled, f"file of {program.name!r}", program.file, allowed)

    @property
    def cost_table(self) -> FileRecord | None:
        """What `multibatch calibrate` measured, among `files`; None before that."""
        return next((record for record in self.files if record.path == COST_TABLE_NAME), None)

    @property
    def decoders(self) -> dict[int, ProgramSpec]:
        """Decode programs by batch size, ascending."""
        decode = (program for program in self.programs if program.kind == "decode")
        return {x.batch_size: x for x in sorted(decode, key=lambda x: x.batch_size)}

    @property
    def prefills(self) -> dict[int, ProgramSpec]:
        """Prefill programs by chunk size (tokens of one call), ascending."""
        prefill = (program for program in self.programs if program.kind == "prefill")
        return {x.num_tokens: x for x in sorted(prefill, key=lambda x: x.num_tokens)}

    @property
    def step(self) -> ProgramSpec | None:
        """The program for any numbers of rows and tokens, where there is one."""
        return next((program for program in self.programs if program.kind == "step"), None)

    @property
    def decoder_batch_sizes(self) -> tuple[int, ...]:
        """The ladder, ascending. Without decoders of its own an artifact has one rung per number of rows."""
        if not self.decoders and self.step is not None:
            return tuple(range(1, self.step.batch_size + 1))
        return tuple(self.decoders)

    def decoder_for(self, batch_size: int) -> ProgramSpec:
        """The program that runs a rung of the ladder."""
        found = self.decoders.get(batch_size) or self.step
        if found is None:
            raise KeyError(f"no decoder for {batch_size} rows; there are {self.decoder_batch_sizes}")
        return found

    @property
    def max_prefill_tokens(self) -> int:
        """Most tokens of prompts in one call."""
        return max(self.prefills) if self.step is None else self.step.num_tokens - self.step.batch_size

    @property
    def max_prefill_rows(self) -> int:
        """Most prompts in one call."""
        return min(x.batch_size for x in self.prefills.values()) if self.step is None else self.step.batch_size

    @property
    def prefill_chunk_sizes(self) -> tuple[int, ...]:
        """Tokens of each prefill program, ascending."""
        return tuple(self.prefills)

    @property
    def all_files(self) -> tuple[FileRecord, ...]:
        """Every file of the artifact but the manifest and its checksum."""
        programs = tuple(x.file for x in self.programs if x.file is not None)
        return (*programs, self.weights, *(library.file for library in self.ops), *self.files)

    def program(self, name: str) -> ProgramSpec:
        """The program of that name; `KeyError` naming those there are."""
        for program in self.programs:
            if program.name == name:
                return program
        raise KeyError(f"no program {name!r}; there are {[x.name for x in self.programs]}")

    def to_json(self) -> str:
        """Sorted and indented, so that two manifests can be compared with diff."""
        data = asdict(self)
        return json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str | Path = MANIFEST_NAME) -> Manifest:
        """Read what `to_json` wrote; `source` is named in errors.

        Raises:
            ArtifactCorruptError: not JSON, truncated, a key unknown, missing or twice, a value
                of the wrong type, or fields that contradict each other.
            IncompatibleError: another schema version.
        """
        try:
            data = parse(text)
            _check_schema(data, source)
            manifest: Manifest = decode(cls, data)
        except IncompatibleError:
            raise
        except (ValueError, OverflowError, RecursionError, ArtifactError) as error:
            message = f"{source}: not a readable manifest: {error}; compile the model again"
            raise ArtifactCorruptError(message) from error
        return manifest


STEP: Final = "step"
"""Name of the step program, also its file's stem."""


def decoder_name(batch_size: int) -> str:
    """Name of the decode program of that batch size, also its file's stem."""
    return f"decoder_batch_{batch_size}"


def prefill_name(num_tokens: int) -> str:
    """Name of the prefill program of that chunk size, also its file's stem."""
    return f"prefill_{num_tokens}"


def _require(holds: bool, what: str, got: object, allowed: object) -> None:
    if not holds:
        raise ArtifactError(f"{what}: got {got!r}, expected {allowed}")


def _at_least(least: float, value: float, what: str) -> None:
    _require(value >= least, what, value, f"at least {least}")


def _unique(values: list[str], what: str) -> None:
    twice = sorted({x for x in values if values.count(x) > 1})
    _require(not twice, what, twice, "each once")


def _known_dtype(dtype: str, what: str) -> None:
    _require(dtype in DTYPE_BYTES, what, dtype, f"one of {', '.join(DTYPE_BYTES)}")


def _token_ids(ids: tuple[int, ...], vocab_size: int, what: str) -> None:
    wrong = [x for x in ids if not 0 <= x < vocab_size]
    _require(not wrong, what, wrong, f"token ids from 0 to {vocab_size - 1}")


def _is_sha256(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def _check_schema(data: Any, source: str | Path) -> None:
    _require(isinstance(data, dict), "the manifest", type(data).__name__, "a JSON object")
    found = decode(int, data.get("schema_version"), "schema_version")
    if found != SCHEMA_VERSION:
        newer = found > SCHEMA_VERSION
        age, cure = ("newer", "update multibatch or ") if newer else ("older", "")
        raise IncompatibleError(
            f"{source}: the artifact has the {age} schema version {found}, this multibatch reads "
            f"version {SCHEMA_VERSION}; {cure}compile the model again"
        )
