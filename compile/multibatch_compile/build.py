"""From options to a published artifact: load, pack, build every program, verify, measure, publish."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import multibatch
from multibatch.artifact import Artifact, record_file
from multibatch.backends.load import check_this_host, load_programs
from multibatch.config import EngineConfig
from multibatch.engine import Engine
from multibatch.errors import CompileError, ConfigError
from multibatch.hardware import available_memory_bytes, read_cpu_info, usable_cores
from multibatch.kv.block_table import blocks_for
from multibatch.ladder import DecoderLadder
from multibatch.machine_rates import measure_roofline
from multibatch.manifest import (
    STEP,
    BuildInfo,
    FileRecord,
    KVLayout,
    Manifest,
    ModelInfo,
    OperatorLibrary,
    ProgramSpec,
    Quantization,
    TensorSpec,
    decoder_name,
    prefill_name,
)
from multibatch.publish import Staging, ensure_disk_space, update

from .canary import record_canary
from .config import ANY, CompileConfig, make_config
from .export import ProgramShape, input_specs
from .measure import measure_program, measure_timings
from .model import LoadedModel, load_model, write_weights
from .operators import Target, find_compiler, is_built, operator_library, targets
from .progress import Progress
from .quantization import compare, quantized_reference
from .shims import has_all_shims
from .verify import check_flattening, check_program
from .workers import run_workers

_WEIGHTS = "weights.safetensors"
_BYTES_PER_JOB = 2_500_000_000
"""Memory that one program's build may take: torch, transformers and the compiler."""


def compile_model(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    decoder_batch_sizes: Iterable[object] | str = ANY,
    max_num_seqs: int | None = None,
    max_seq_len: int = 2048,
    block_size: int = 32,
    prefill_chunk_sizes: Iterable[object] | None = None,
    max_num_batched_tokens: int | None = None,
    dtype: str | None = None,
    quantization: str = "none",
    backend: str = "inductor",
    portable: bool = False,
    device: str = "cpu",
    jobs: int | None = None,
    revision: str | None = None,
    force: bool = False,
    progress: bool = False,
) -> Artifact:
    """Compiles a Hugging Face causal LM into an artifact.

    Args:
        model: a local folder in Hugging Face format, or a hub id.
        output: the artifact's folder; it appears whole or not at all.
        decoder_batch_sizes: "any": one program for every batch size up to max_num_seqs, which a CPU runs as fast as
            programs for one size (benchmarks/README.md). Or sizes in any order: a decoder each, to which live rows are
            padded; the maximum is added where it is missing.
        max_num_seqs: sequences that will run at once; default: the largest size, or 8.
        max_seq_len: longest sequence, prompt and output together.
        block_size: tokens per KV block.
        prefill_chunk_sizes: tokens of each prefill program, to which prompts are padded; default: none, one program takes
            prompts of any length, and decode rows with them.
        max_num_batched_tokens: prompt tokens of one call of that program; default 1,024.
        dtype: bfloat16, float16 or float32; default: the checkpoint's.
        quantization: none, int8 (weights of one byte with a scale per output) or int4 (four bits with a scale for every 32
            inputs of an output; the LM head in int8); activations are rounded to int8 per token in both.
        backend: inductor (AOTInductor programs) or eager (transformers' own code, nothing compiled).
        portable: also serve machines without this one's newer CPU features (on x86: those with AVX2), more slowly.
        device: cpu.
        jobs: programs built at once; default: as many as cores and memory allow.
        revision: of a hub id.
        force: replace an artifact that is there.
        progress: show a bar per program on standard error.

    Raises:
        ConfigError: an option outside what is allowed.
        CompileError: the model cannot be loaded or built.
        ArtifactError: the output exists, is being written, or does not fit on the disk.
        VerificationError: a program is wrong; nothing is published.
    """
    config = make_config(
        decoder_batch_sizes=decoder_batch_sizes,
        max_num_seqs=max_num_seqs,
        max_seq_len=max_seq_len,
        block_size=block_size,
        prefill_chunk_sizes=prefill_chunk_sizes,
        max_num_batched_tokens=max_num_batched_tokens,
        dtype=dtype,
        quantization=quantization,
        backend=backend,
        portable=portable,
        device=device,
        jobs=jobs,
    )
    with Progress(progress) as bars, Staging(output, overwrite=force) as staging:
        with bars.stage("load the model"):
            loaded = load_model(str(model), config.dtype, config.block_size, revision, config.quantization)
            check_flattening(loaded, config.max_seq_len)
        manifest = _stage_model(staging, loaded, config, str(model), bars)
        manifest = _build_programs(staging, manifest, [p.name for p in manifest.programs], config.jobs, bars)
        manifest = _prove(staging, manifest, loaded, [p.name for p in manifest.programs], bars)
        with bars.stage("publish"):
            return staging.publish(manifest)


def add_size(artifact: str | os.PathLike[str], size: int, *, jobs: int = 1, progress: bool = False) -> Artifact:
    """Adds one decoder to an artifact; the programs that are there stay as they are.

    Raises:
        ConfigError: the size is there already, or not an int >= 1.
        IncompatibleError: the artifact was built for another machine or torch.
        CompileError: the model that the artifact was compiled from cannot be loaded for verification.
    """
    with Progress(progress) as bars, update(artifact) as (old, staging):
        manifest = old.manifest
        check_this_host(manifest)
        _require_decoders(manifest)
        DecoderLadder(manifest.decoder_batch_sizes).with_size(size)
        with bars.stage("load the model"):
            scheme = "none" if manifest.quantization is None else manifest.quantization.scheme
            loaded = load_model(
                manifest.model.id, manifest.model.dtype, manifest.kv.block_size, manifest.model.revision, scheme
            )
            if loaded.info.weights_sha256 != manifest.model.weights_sha256:
                raise CompileError(
                    f"{manifest.model.id} has other weights than the artifact was compiled from; compile it again"
                )
        shape = _decode_shape(size, blocks_for(manifest.max_seq_len, manifest.kv.block_size))
        spec = _spec(shape, manifest.kv, manifest.model, manifest.build.backend)
        most = max(size, manifest.max_num_seqs)
        there = [_widened(program, most) for program in manifest.programs]
        changed = [new.name for old, new in zip(manifest.programs, there, strict=True) if old is not new]
        programs = sorted([*there, spec], key=lambda p: (p.kind, p.num_tokens))
        manifest = dataclasses.replace(manifest, programs=tuple(programs), max_num_seqs=most, canary=None)
        manifest = _build_programs(staging, manifest, [spec.name], jobs, bars)
        manifest = _prove(staging, manifest, loaded, [spec.name, *changed], bars)
        return staging.publish(manifest)


def prune(artifact: str | os.PathLike[str], size: int) -> tuple[Artifact, str | None]:
    """Removes one decoder; the artifact and, where the largest went, what that means.

    Raises:
        ConfigError: there is no such size, or it is the only one.
    """
    with update(artifact) as (old, staging):
        manifest = old.manifest
        _require_decoders(manifest)
        ladder = DecoderLadder(manifest.decoder_batch_sizes)
        left = ladder.without_size(size)
        gone = manifest.decoders[size]
        if gone.file is not None:
            staging.remove(gone.file.path)
        manifest = dataclasses.replace(
            manifest,
            programs=tuple(p for p in manifest.programs if p.name != gone.name),
            max_num_seqs=min(manifest.max_num_seqs, left.max),
        )
        return staging.publish(manifest), ladder.max_warning(left)


def _widened(program: ProgramSpec, num_rows: int) -> ProgramSpec:
    """A step program for more rows: its dimensions are free, so it is the same one, but what it does there is unproven."""
    if program.kind != "step" or program.batch_size >= num_rows:
        return program
    num_tokens = program.num_tokens - program.batch_size + num_rows
    return dataclasses.replace(program, batch_size=num_rows, num_tokens=num_tokens)


def _require_decoders(manifest: Manifest) -> None:
    if not manifest.decoders:
        raise ConfigError(
            f"one program serves every batch size up to {manifest.max_num_seqs}, so there is no ladder to change;"
            " compile again with --max-num-seqs, or with --decoder-batch-sizes"
        )


def cache_name(model: str, options: Mapping[str, Any]) -> str:
    """Folder name of the artifact that `LLM(model)` compiles into the cache: changes when the model or the options do."""
    digest = hashlib.sha256()
    folder = Path(model)
    if folder.is_dir():
        for file in sorted(folder.iterdir()):
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    text = json.dumps([model, dict(options), multibatch.__version__, torch.__version__], sort_keys=True, default=str)
    digest.update(text.encode())
    return f"{folder.name or 'model'}-{digest.hexdigest()[:16]}"


def _stage_model(staging: Staging, loaded: LoadedModel, config: CompileConfig, source: str, bars: Progress) -> Manifest:
    """Writes everything but the programs; the manifest has them without files yet."""
    compiled = config.backend == "inductor"
    if compiled:
        find_compiler()
    with bars.stage("write weights"):
        model: Any = loaded.decoder.model
        # At least: programs hold no weights and add little.
        is_whole = config.quantization == "none"
        ensure_disk_space(
            staging.target, sum(p.numel() * (p.element_size() if is_whole else 1) for p in model.parameters())
        )
        model.config.save_pretrained(staging.path)
        _save_tokenizer(source, staging.path / "tokenizer")
        packing = loaded.packing if compiled else None
        read = write_weights(model, staging.path, staging.path / _WEIGHTS, loaded.info.dtype, packing)
        info = dataclasses.replace(loaded.info, weight_bytes=read)
    max_blocks = blocks_for(config.max_seq_len, loaded.kv.block_size)
    programs = [_spec(shape, loaded.kv, info, config.backend) for shape in _shapes(config, max_blocks)]
    others = [p.relative_to(staging.path).as_posix() for p in sorted(staging.path.rglob("*")) if p.is_file()]
    return Manifest(
        model=info,
        build=_build_info(config),
        kv=loaded.kv,
        max_seq_len=config.max_seq_len,
        max_num_seqs=config.max_num_seqs,
        programs=tuple(programs),
        weights=record_file(staging.path, _WEIGHTS),
        ops=tuple(_not_built(target) for target in targets(config.portable)) if compiled else (),
        files=tuple(record_file(staging.path, name) for name in others if name != _WEIGHTS),
        canary=None,
        quantization=None if config.quantization == "none" else Quantization(scheme=config.quantization),
    )


def _not_built(target: Target) -> OperatorLibrary:
    """A placeholder; publish refuses it, since the file's size would not match."""
    return OperatorLibrary(file=FileRecord(target.file, "0" * 64, 0), isa=target.isa)


def _save_tokenizer(source: str, folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # A model without a tokenizer serves token ids; asking it for text is refused by name at run time.
        return
    tokenizer.save_pretrained(folder)


def _shapes(config: CompileConfig, max_blocks: int) -> list[ProgramShape]:
    """Every program of a compile."""
    sizes = () if config.ladder is None else config.ladder.sizes
    shapes = [_decode_shape(size, max_blocks) for size in sizes]
    rows = config.prefill_rows
    shapes += [ProgramShape(prefill_name(n), "prefill", rows, n, max_blocks) for n in config.prefill_chunk_sizes]
    if not config.prefill_chunk_sizes:
        rows = config.max_num_seqs
        shapes.append(ProgramShape(STEP, "step", rows, config.max_num_batched_tokens + rows, max_blocks))
    return shapes


def _decode_shape(size: int, max_blocks: int) -> ProgramShape:
    return ProgramShape(decoder_name(size), "decode", size, size, max_blocks)


def _spec(shape: ProgramShape, kv: KVLayout, info: ModelInfo, backend: str) -> ProgramSpec:
    # A placeholder until the program is built; publish refuses it, since the file's size would not match.
    file = FileRecord(f"programs/{shape.name}.pt2", "0" * 64, 0) if backend == "inductor" else None
    return ProgramSpec(
        name=shape.name,
        kind=shape.kind,  # type: ignore[arg-type]
        batch_size=shape.num_rows,
        num_tokens=shape.num_tokens,
        file=file,
        inputs=input_specs(shape, kv, info.dtype),
        outputs=(TensorSpec("logits", (shape.num_logits, info.vocab_size), info.dtype),),
    )


def _build_info(config: CompileConfig) -> BuildInfo:
    import transformers

    cpu = read_cpu_info()
    return BuildInfo(
        multibatch_version=multibatch.__version__,
        backend=config.backend,
        device="cpu",
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
        python_version=platform.python_version(),
        cpu_model=cpu.model_name,
        cpu_architecture=cpu.architecture,
        isa=targets(config.portable)[0].isa if config.backend == "inductor" else (),
        compute_capability=None,
        options={},
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        measured_bandwidth_gbps=None,
        measured_gproducts=None,
        host_cores=usable_cores(),
    )


def _build_programs(staging: Staging, manifest: Manifest, names: Sequence[str], jobs: int, bars: Progress) -> Manifest:
    """Builds the named programs, each in a process of its own, the largest first."""
    if manifest.build.backend == "eager":
        return manifest
    (staging.path / "programs").mkdir(exist_ok=True)
    limit = max(1, min(jobs, available_memory_bytes() // _BYTES_PER_JOB))
    order = sorted((manifest.program(name) for name in names), key=lambda p: -p.num_tokens)
    jobs_of = {spec.name: _program_job(staging.path, manifest, spec) for spec in order}
    wanted = [target for target in targets(portable=True) if _not_built(target) in manifest.ops]
    new = {f"operators {t.name}": {"operators": t.name} for t in wanted if not is_built(t)}
    seconds = run_workers(staging.path, {**new, **jobs_of}, limit, bars)
    if wanted:
        (staging.path / "ops").mkdir()
        for target in wanted:
            shutil.copy2(operator_library(target), staging.path / target.file)
        built = [OperatorLibrary(file=record_file(staging.path, t.file), isa=t.isa) for t in wanted]
        manifest = dataclasses.replace(manifest, ops=tuple(built))
    programs = []
    for spec in manifest.programs:
        if spec.name in seconds:
            record = record_file(staging.path, f"programs/{spec.name}.pt2")
            programs.append(dataclasses.replace(spec, file=record, build_seconds=round(seconds[spec.name], 2)))
        else:
            programs.append(spec)
    return dataclasses.replace(manifest, programs=tuple(programs))


def _program_job(folder: Path, manifest: Manifest, spec: ProgramSpec) -> dict[str, Any]:
    """What `worker.py` reads."""
    # Libraries that are not there yet come from this version's sources; those of an old artifact may be an old version's.
    libraries = [folder / library.file.path for library in manifest.ops]
    shape = ProgramShape(
        spec.name, spec.kind, spec.batch_size, spec.num_tokens, blocks_for(manifest.max_seq_len, manifest.kv.block_size)
    )
    return {
        "folder": str(folder),
        "weights": manifest.weights.path,
        "shape": dataclasses.asdict(shape),
        "block_size": manifest.kv.block_size,
        "layers": [dataclasses.astuple(layer) for layer in manifest.kv.layers],
        "dtype": manifest.model.dtype,
        "portable": len(manifest.ops) > 1,
        "latest_operators": all(has_all_shims(library) for library in libraries if library.is_file()),
        "output": str(folder / "programs" / f"{spec.name}.pt2"),
    }


def _with_rates(manifest: Manifest) -> BuildInfo:
    roofline = measure_roofline(manifest)
    return dataclasses.replace(
        manifest.build,
        measured_bandwidth_gbps=round(roofline.bandwidth_gbps, 2),
        measured_gproducts=None if roofline.gproducts is None else round(roofline.gproducts, 2),
    )


def _prove(staging: Staging, manifest: Manifest, loaded: LoadedModel, names: Sequence[str], bars: Progress) -> Manifest:
    """Verifies and measures the named programs and records the canary."""
    artifact = Artifact(staging.path, manifest)
    programs = load_programs(artifact)
    reference, original = loaded.decoder, None
    if manifest.quantization is not None:
        with bars.stage("quantise the reference"):
            reference, original = quantized_reference(loaded, manifest.quantization.scheme), loaded.decoder
    proven = []
    for spec in manifest.programs:
        if spec.name in names:
            with bars.stage(f"verify {spec.name}"):
                verdict = dataclasses.asdict(check_program(manifest, spec, programs, reference, original))
                milliseconds = round(measure_program(manifest, spec, programs), 4)
                timings = measure_timings(manifest, spec, programs) if spec.kind == "step" else ()
                proven.append(dataclasses.replace(spec, **verdict, measured_ms=milliseconds, timings=timings))
        else:
            proven.append(spec)
    manifest = dataclasses.replace(manifest, programs=tuple(proven), build=_with_rates(manifest))
    if manifest.quantization is not None:
        with bars.stage("compare with the original"):
            engine = Engine(Artifact(staging.path, manifest), EngineConfig(), programs)
            found = compare(loaded, reference, engine, manifest.quantization)
            manifest = dataclasses.replace(manifest, quantization=found)
    with bars.stage("canary"):
        canary = record_canary(Artifact(staging.path, manifest), programs)
    manifest = dataclasses.replace(manifest, canary=canary)
    # A process holds one build of the operators: the others answer in processes of their own.
    others = {
        f"verify {Path(library.file.path).stem}": {"replay": manifest.to_json(), "isa": library.isa}
        | {"folder": str(staging.path)}
        for library in manifest.ops[:-1]
    }
    run_workers(staging.path, others, 1, bars)
    return manifest
