"""The manifest's round trip, its strictness, and the golden file of its schema version."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multibatch.errors import ArtifactCorruptError, ArtifactError, IncompatibleError
from multibatch.manifest import (
    DTYPE_BYTES,
    SCHEMA_VERSION,
    STEP,
    Agreement,
    BuildInfo,
    Canary,
    FileRecord,
    KVLayer,
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

README = Path(__file__).parents[2] / "artifacts" / "README.md"
GOLDEN = Path(__file__).parent / "data" / f"manifest_v{SCHEMA_VERSION}.json"
SHA = "0123456789abcdef" * 4


def program(name: str, rows: int, tokens: int) -> ProgramSpec:
    return ProgramSpec(
        name=name,
        kind="decode" if name.startswith("decoder") else "prefill",
        batch_size=rows,
        num_tokens=tokens,
        file=FileRecord(f"programs/{name}.pt2", SHA, 4096),
        inputs=(
            TensorSpec("token_ids", (1, tokens), "int64"),
            TensorSpec("key_cache_0", ("num_blocks", 2, 8, 16), "bfloat16"),
        ),
        outputs=(TensorSpec("logits", (rows, 512), "float32"),),
        build_seconds=12.5,
        measured_ms=0.75,
        max_abs_error=0.0,
        bit_equal=True,
        max_size_difference=0.0,
    )


def example() -> Manifest:
    return Manifest(
        model=ModelInfo(
            id="someone/some-model",
            revision="main",
            architecture="Qwen2ForCausalLM",
            config_sha256=SHA,
            weights_sha256=SHA,
            num_parameters=1000,
            vocab_size=512,
            num_layers=1,
            dtype="bfloat16",
            eos_token_ids=(2,),
            weight_bytes=2000,
            products_per_token=700,
            products_per_logits=300,
        ),
        build=BuildInfo(
            multibatch_version="0.1.0",
            backend="inductor",
            device="cpu",
            torch_version="2.13.0+cpu",
            transformers_version="5.23.0",
            python_version="3.11.7",
            cpu_model="Some CPU",
            cpu_architecture="x86_64",
            isa=("avx2", "fma"),
            compute_capability=None,
            options={"freezing": False, "jobs": 2, "level": 0.5, "mode": "max", "seed": None},
            created_at="2026-11-21T01:42:00+00:00",
            measured_bandwidth_gbps=20.5,
            measured_gproducts=100.5,
            host_cores=2,
        ),
        kv=KVLayout(16, 1, (KVLayer(2, 8, 8),)),
        max_seq_len=128,
        max_num_seqs=8,
        programs=(
            program("decoder_batch_8", 8, 8),
            program("decoder_batch_1", 1, 1),
            program("prefill_64", 4, 64),
            program("prefill_16", 4, 16),
        ),
        weights=FileRecord("weights.safetensors", SHA, 2000),
        ops=(OperatorLibrary(file=FileRecord("ops/multibatch_ops_native.so", SHA, 300), isa=("avx2", "fma")),),
        files=(FileRecord("config.json", SHA, 30), FileRecord("tokenizer/tokenizer.json", SHA, 40)),
        canary=Canary(prompt_token_ids=(5, 6), token_ids=(7,), logprobs=(-0.25,), tolerance=0.0625),
        quantization=Quantization(
            scheme="int8", random_tokens=Agreement(num_tokens=9, kl_divergence=0.5, top1_agreement=0.25)
        ),
    )


def changed(path: str, value: object) -> str:
    """The example as JSON with the value at a dotted path replaced."""
    data = json.loads(example().to_json())
    place: Any = data
    *above, last = path.split(".")
    for key in above:
        place = place[int(key) if isinstance(place, list) else key]
    place[int(last) if isinstance(place, list) else last] = value
    return json.dumps(data)


def test_the_golden_file_is_what_this_version_writes() -> None:
    """A change here changes what old artifacts mean: raise SCHEMA_VERSION with it."""
    assert SCHEMA_VERSION == 4
    assert example().to_json() == GOLDEN.read_text(encoding="utf-8")
    assert Manifest.from_json(GOLDEN.read_text(encoding="utf-8")) == example()


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ("the manifest", Manifest),
        ("model", ModelInfo),
        ("build", BuildInfo),
        ("kv", KVLayout),
        ("kv.layers", KVLayer),
        ("programs", ProgramSpec),
        ("inputs, outputs", TensorSpec),
        ("a file", FileRecord),
        ("quantization", Quantization),
        ("random_tokens, own_text", Agreement),
        ("canary", Canary),
    ],
)
def test_the_specification_names_every_field(row: str, kind: type[Any]) -> None:
    text = README.read_text(encoding="utf-8")
    (line,) = [x for x in text.splitlines() if x.startswith(f"| {row} |")]
    assert re.findall(r"`(\w+)`", line) == [x.name for x in fields(kind)]


names = st.text(min_size=1, max_size=8)
floats = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(1, 2**40)
hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
maybe_floats = st.none() | floats


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    compiled = draw(st.booleans())
    sizes = draw(st.lists(st.integers(1, 64), min_size=1, unique=True, max_size=5))
    chunks = draw(st.lists(st.integers(1, 512), min_size=1, unique=True, max_size=3))
    rows = draw(st.integers(1, 16))
    dtypes = st.sampled_from(sorted(DTYPE_BYTES))
    shapes = st.lists(st.integers(0, 2**33) | names, max_size=4).map(tuple)
    tensors = st.lists(st.builds(TensorSpec, names, shapes, dtypes), max_size=3).map(tuple)

    def spec(name: str, kind: Any, batch_size: int, num_tokens: int) -> ProgramSpec:
        record = FileRecord(f"programs/{name}.pt2", draw(hashes), draw(counts))
        return ProgramSpec(
            name=name,
            kind=kind,
            batch_size=batch_size,
            num_tokens=num_tokens,
            file=record if compiled else None,
            inputs=draw(tensors),
            outputs=draw(tensors),
            build_seconds=draw(maybe_floats),
            measured_ms=draw(maybe_floats),
            max_abs_error=draw(maybe_floats),
            bit_equal=draw(st.none() | st.booleans()),
            max_size_difference=draw(maybe_floats),
        )

    decoders = [spec(decoder_name(n), "decode", n, n) for n in sizes]
    prefills = [spec(prefill_name(n), "prefill", draw(st.integers(1, rows)), n) for n in chunks]
    if draw(st.booleans()):
        most = max(sizes)
        prefills = [spec(STEP, "step", most, most + draw(st.integers(1, 64)))]
        decoders = draw(st.sampled_from([decoders, []]))
    layers = st.builds(KVLayer, counts, counts, counts)
    kv_layers = tuple(draw(st.lists(layers, min_size=1, max_size=3)))
    base = example()
    scalars = st.none() | st.booleans() | st.integers() | floats | st.text()
    return replace(
        base,
        model=replace(base.model, id=draw(names), revision=draw(st.none() | names)),
        build=replace(
            base.build,
            backend="inductor" if compiled else "eager",
            isa=tuple(draw(st.lists(names))),
            options=draw(st.dictionaries(st.text(), scalars, max_size=4)),
            measured_bandwidth_gbps=draw(maybe_floats),
            measured_gproducts=draw(maybe_floats),
        ),
        kv=KVLayout(draw(counts), len(kv_layers), kv_layers),
        max_num_seqs=draw(st.integers(1, max(sizes))),
        programs=tuple(draw(st.permutations(decoders + prefills))),
        ops=base.ops if draw(st.booleans()) else (),
        canary=base.canary if draw(st.booleans()) else None,
        quantization=base.quantization if draw(st.booleans()) else None,
    )


@given(manifests())
def test_round_trip(manifest: Manifest) -> None:
    text = manifest.to_json()
    again = Manifest.from_json(text)
    assert again == manifest
    assert again.to_json() == text
    for key, value in manifest.build.options.items():
        assert type(again.build.options[key]) is type(value)


@given(manifests())
def test_derived_views_hold_every_program_and_file_once(manifest: Manifest) -> None:
    step = manifest.step
    if manifest.decoders or step is None:
        assert list(manifest.decoder_batch_sizes) == sorted(manifest.decoders)
    else:
        assert manifest.decoder_batch_sizes == tuple(range(1, step.batch_size + 1))
    for size in manifest.decoder_batch_sizes:
        assert manifest.decoder_for(size).batch_size >= size
    assert list(manifest.prefill_chunk_sizes) == sorted(manifest.prefills)
    assert manifest.max_prefill_rows >= 1
    assert manifest.max_prefill_tokens >= 1
    views = [*manifest.decoders.values(), *manifest.prefills.values(), *([] if step is None else [step])]
    assert sorted(x.name for x in views) == sorted(x.name for x in manifest.programs)
    for spec in manifest.programs:
        assert manifest.program(spec.name) is spec
        assert spec.file is None or spec.file in manifest.all_files
    assert {manifest.weights, *manifest.files} <= set(manifest.all_files)


@given(st.data())
def test_a_truncated_manifest_is_never_read(data: st.DataObject) -> None:
    text = example().to_json()
    end = data.draw(st.integers(0, len(text) - 3))
    with pytest.raises(ArtifactCorruptError, match="here: not a readable manifest"):
        Manifest.from_json(text[:end], source="here")


@pytest.mark.parametrize("text", ["", "null", "[]", '"x"', "{}", "[" * 100_000, "9" * 10_000])
def test_other_json_is_no_manifest(text: str) -> None:
    with pytest.raises(ArtifactCorruptError):
        Manifest.from_json(text)


def places(value: Any, path: str = "") -> list[str]:
    """Every dotted path to an object of the manifest, "" for itself."""
    if isinstance(value, list):
        return [x for i, item in enumerate(value) for x in places(item, f"{path}.{i}")]
    if not isinstance(value, dict) or path == ".build.options":
        return []
    return [path, *(x for key, item in value.items() for x in places(item, f"{path}.{key}"))]


@pytest.mark.parametrize("path", places(json.loads(example().to_json())))
def test_an_unknown_key_is_named(path: str) -> None:
    with pytest.raises(ArtifactCorruptError, match=r"unknown key in .*'surprise'"):
        Manifest.from_json(changed(f"{path}.surprise".lstrip("."), 1))


def test_every_missing_key_is_named() -> None:
    whole = json.loads(example().to_json())
    for path in places(whole):
        place = whole
        for key in path.split(".")[1:]:
            place = place[int(key) if isinstance(place, list) else key]
        for key in list(place):
            value = place.pop(key)
            with pytest.raises(ArtifactCorruptError, match=key):
                Manifest.from_json(json.dumps(whole))
            place[key] = value


def test_a_key_that_comes_twice_is_named() -> None:
    text = example().to_json().replace('"max_seq_len"', '"max_num_seqs": 8, "max_seq_len"')
    with pytest.raises(ArtifactCorruptError, match="max_num_seqs"):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("max_seq_len", "128", r"max_seq_len: got '128' \(str\), expected int"),
        ("max_seq_len", 128.0, r"max_seq_len: got 128.0 \(float\), expected int"),
        ("max_seq_len", True, r"max_seq_len: got True \(bool\), expected int"),
        ("max_seq_len", None, r"max_seq_len: got None \(NoneType\), expected int"),
        ("model", [], r"model: got \[\] \(list\), expected ModelInfo"),
        ("model.dtype", "int4", r"model.dtype: got 'int4' \(str\), expected .*'bfloat16'"),
        ("model.eos_token_ids", 2, r"model.eos_token_ids: got 2 \(int\), expected tuple"),
        ("model.eos_token_ids.0", "2", r"model.eos_token_ids\[0\]: got '2' \(str\), expected int"),
        ("programs.0.inputs.0.shape.1", 2.5, r"programs\[0\].inputs\[0\].shape\[1\]: got 2.5"),
        ("programs.0.bit_equal", 1, r"programs\[0\].bit_equal: got 1 \(int\), expected bool"),
        ("programs.0.measured_ms", float("nan"), r"programs\[0\].measured_ms: got nan"),
        ("programs.0.measured_ms", float("inf"), r"programs\[0\].measured_ms: got inf"),
        ("build.options.mode", [], r"build.options.mode: got \[\] \(list\), expected str or"),
        ("build.options.level", float("inf"), r"build.options.level: got inf"),
        ("canary.logprobs.0", "x", r"canary.logprobs\[0\]: got 'x' \(str\), expected float"),
        ("schema_version", "1", r"schema_version: got '1' \(str\), expected int"),
    ],
)
def test_a_wrong_type_names_path_got_and_expected(path: str, value: object, message: str) -> None:
    with pytest.raises(ArtifactCorruptError, match=message):
        Manifest.from_json(changed(path, value), source="here")


def test_an_int_may_stand_for_a_float_but_not_one_too_large() -> None:
    manifest = Manifest.from_json(changed("programs.0.measured_ms", 3))
    assert type(manifest.programs[0].measured_ms) is float
    with pytest.raises(ArtifactCorruptError, match="too large"):
        Manifest.from_json(changed("programs.0.measured_ms", 10**400))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("max_num_seqs", 9, r"decoder batch sizes: got \(1, 8\), expected a size >= 9"),
        ("max_num_seqs", 0, "max_num_seqs"),
        ("programs.0.name", "decoder_batch_4", "decoder_batch_8"),
        ("programs.0.num_tokens", 16, r"num_tokens of 'decoder_batch_8': got 16, expected 8"),
        ("programs.0.file", None, "expected a file for backend inductor"),
        ("programs.1.file.path", "config.json", r"files: paths: got \['config.json'\]"),
        ("programs.0.inputs.0.dtype", "int9", "dtype of tensor 'token_ids': got 'int9'"),
        ("programs.0.inputs.0.shape.0", -1, "shape of tensor 'token_ids'"),
        ("model.config_sha256", "A" * 64, "model.config_sha256"),
        ("model.eos_token_ids.0", 512, "token ids from 0 to 511"),
        ("kv.num_layers", 2, "kv.num_layers: got 2"),
        ("kv.layers.0.head_dim", 0, "head_dim: got 0, expected at least 1"),
        ("build.compute_capability", "9.0", "build.compute_capability"),
        ("build.device", "cuda", "build.compute_capability"),
        ("canary.logprobs", [], "canary.logprobs"),
        ("canary.token_ids.0", 512, "canary"),
        ("canary.tolerance", -1.0, "canary.tolerance"),
        ("weights.bytes", -1, "bytes of weights.safetensors"),
    ],
)
def test_fields_that_contradict_each_other(path: str, value: object, message: str) -> None:
    with pytest.raises(ArtifactCorruptError, match=message):
        Manifest.from_json(changed(path, value))


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a//b",
        "./a",
        "a/",
        "a\\b",
        "C:a",
        "a\0b",
        "manifest.json",
        "manifest.sha256",
    ],
)
def test_a_file_stays_inside_the_artifact(path: str) -> None:
    with pytest.raises(ArtifactError, match="a file's path"):
        FileRecord(path, SHA, 1)


def test_programs_are_unique_and_of_both_kinds() -> None:
    manifest = example()
    first, *others = manifest.programs
    with pytest.raises(ArtifactError, match=r"names: got \['decoder_batch_8'\]"):
        replace(manifest, programs=(first, first, *others))
    with pytest.raises(ArtifactError, match="prefill or step programs"):
        replace(manifest, programs=manifest.programs[:2])
    with pytest.raises(ArtifactError, match=r"decoder batch sizes: got \(\)"):
        replace(manifest, programs=manifest.programs[2:])


@pytest.mark.parametrize(
    ("version", "message"),
    [(5, "newer schema version 5.*reads version 4; update multibatch"), (0, "older.*compile")],
)
def test_another_schema_says_what_to_do(version: int, message: str) -> None:
    # The keys of another schema may differ; its version is still what is reported.
    with pytest.raises(IncompatibleError, match=message):
        Manifest.from_json(json.dumps({"schema_version": version, "novelty": []}))


def test_bytes_per_block_counts_keys_and_values_of_all_layers() -> None:
    kv = KVLayout(16, 2, (KVLayer(2, 64, 64), KVLayer(1, 128, 32)))
    assert kv.bytes_per_block("bfloat16") == 16 * (2 * (64 + 64) + (128 + 32)) * 2
    assert kv.bytes_per_block("float32") == 2 * kv.bytes_per_block("float16")
    with pytest.raises(ArtifactError, match="float5"):
        kv.bytes_per_block("float5")


def test_an_unknown_program_names_those_there_are() -> None:
    with pytest.raises(KeyError, match="decoder_batch_1"):
        example().program("decoder_batch_2")
