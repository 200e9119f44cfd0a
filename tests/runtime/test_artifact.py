"""An artifact is opened whole or refused by name."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from multibatch.artifact import Artifact, check_host, recompile_command, sha256_file
from multibatch.errors import ArtifactCorruptError, ArtifactError, ConfigError, IncompatibleError
from multibatch.manifest import SCHEMA_VERSION, Manifest, OperatorLibrary
from tests.runtime.small_artifact import GOLDEN, build

RECORDED = [x.path for x in Manifest.from_json(GOLDEN.read_text(encoding="utf-8")).all_files]
EVERY_FILE = [*RECORDED, "manifest.json", "manifest.sha256"]


def flip_byte(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def test_what_was_published_opens(target: Path) -> None:
    published = build(target)
    assert Artifact.open(target, verify="hashes") == published
    assert published.file(published.manifest.weights).is_file()
    assert os.listdir(target.parent) == [target.name]
    line = (target / "manifest.sha256").read_text(encoding="utf-8")
    assert line == f"{sha256_file(target / 'manifest.json')}  manifest.json\n"


@pytest.mark.parametrize("position", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("name", EVERY_FILE)
def test_one_flipped_byte_is_found_and_its_file_named(built: Path, name: str, position: int) -> None:
    flip_byte(built / name, position)
    with pytest.raises(ArtifactCorruptError, match=name) as caught:
        Artifact.open(built, verify="hashes")
    assert "expected" in str(caught.value)
    assert "compile again" in str(caught.value)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_a_changed_manifest_is_found_at_every_open(built: Path, name: str) -> None:
    flip_byte(built / name, 40)
    with pytest.raises(ArtifactCorruptError, match=name):
        Artifact.open(built, verify="none")


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_truncated_file_is_named_without_reading_it(built: Path, name: str) -> None:
    file = built / name
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(ArtifactCorruptError, match=name) as caught:
        Artifact.open(built)
    if name in RECORDED:
        assert f"expected {size} bytes, found {size - 1} bytes" in str(caught.value)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_missing_file_is_named(built: Path, name: str) -> None:
    (built / name).unlink()
    with pytest.raises(ArtifactCorruptError, match=f"{name}.*(no such|No such)"):
        Artifact.open(built)


@pytest.mark.parametrize("name", RECORDED)
def test_a_file_for_other_eyes_is_named(built: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (built / name).chmod(0o600)
    # What another user sees; nothing is hidden from root, as which tests may run.
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != built / name)
    with pytest.raises(ArtifactError, match=rf"{name}: .*mode 600.*chmod a\+r"):
        Artifact.open(built)


def test_a_missing_folder_and_one_without_a_manifest_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactCorruptError, match=r"absent: .*no such folder.*compile"):
        Artifact.open(tmp_path / "absent")
    with pytest.raises(ArtifactCorruptError, match=r"manifest\.json"):
        Artifact.open(tmp_path)


def test_files_that_the_manifest_does_not_name_are_listed(built: Path) -> None:
    (built / "programs" / "stray.pt2").write_text("x", encoding="utf-8")
    (built / "linked").symlink_to(built / "programs")
    Artifact.open(built)
    with pytest.raises(ArtifactCorruptError, match=r"linked, programs/stray\.pt2; remove"):
        Artifact.open(built, verify="hashes")


def test_an_unknown_way_to_verify_is_refused(built: Path) -> None:
    with pytest.raises(ConfigError, match="fully"):
        Artifact.open(built, verify="fully")  # type: ignore[arg-type]


def test_a_newer_schema_is_refused_with_advice(built: Path) -> None:
    file = built / "manifest.json"
    text = file.read_text(encoding="utf-8").replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 99')
    file.write_text(text, encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    (built / "manifest.sha256").write_text(f"{digest}  manifest.json\n", encoding="utf-8")
    with pytest.raises(IncompatibleError, match=r"model: .*newer schema version 99.*update"):
        Artifact.open(built)


class TestCheckHost:
    """The golden artifact: inductor, torch 2.13.0+cpu, x86_64 with avx2 and fma."""

    manifest = Manifest.from_json(GOLDEN.read_text(encoding="utf-8"))

    def check(
        self,
        manifest: Manifest | None = None,
        *,
        torch_version: str = "2.13.0",
        isa: tuple[str, ...] = ("avx2", "fma", "avx512f"),
        architecture: str = "x86_64",
        device: str = "cpu",
        compute_capability: str | None = None,
    ) -> None:
        check_host(
            manifest or self.manifest,
            torch_version=torch_version,
            isa=isa,
            architecture=architecture,
            device=device,
            compute_capability=compute_capability,
        )

    @pytest.mark.parametrize("version", ["2.13.0", "2.13.0+cpu", "2.13.0+cu126"])
    def test_the_same_public_version_of_torch_fits(self, version: str) -> None:
        self.check(torch_version=version)

    @pytest.mark.parametrize("version", ["2.13.1", "2.12.0+cpu", "2.13.0rc1"])
    def test_another_torch_is_refused(self, version: str) -> None:
        found = version.partition("+")[0]
        with pytest.raises(IncompatibleError, match=rf"torch 2\.13\.0, found {found}.*install"):
            self.check(torch_version=version)

    def test_eager_runs_with_any_torch_unless_it_has_an_operator_library(self) -> None:
        programs = tuple(replace(x, file=None) for x in self.manifest.programs)
        build = replace(self.manifest.build, backend="eager")
        eager = replace(self.manifest, build=build, programs=programs, ops=())
        self.check(eager, torch_version="2.9.0")
        with pytest.raises(IncompatibleError, match="torch"):
            self.check(replace(eager, ops=self.manifest.ops), torch_version="2.9.0")

    def test_missing_features_are_named(self) -> None:
        with pytest.raises(IncompatibleError, match=r"avx2, fma, found one without fma; .*--force"):
            self.check(isa=("avx2",))

    def test_another_architecture_is_refused(self) -> None:
        with pytest.raises(IncompatibleError, match="x86_64, found aarch64"):
            self.check(architecture="aarch64", isa=("asimd",))

    def test_another_device_is_refused(self) -> None:
        with pytest.raises(IncompatibleError, match="device cpu, found cuda"):
            self.check(device="cuda", compute_capability="9.0")

    @pytest.mark.parametrize("found", ["8.6", None])
    def test_another_compute_capability_is_refused(self, found: str | None) -> None:
        build = replace(self.manifest.build, device="cuda", compute_capability="8.0", isa=())
        cuda = replace(self.manifest, build=build)
        self.check(cuda, device="cuda", compute_capability="8.0")
        with pytest.raises(IncompatibleError, match=r"compute capability 8\.0, found"):
            self.check(cuda, device="cuda", compute_capability=found)

    def test_the_command_builds_the_same_again(self) -> None:
        assert recompile_command(self.manifest, "my models/x") == (
            "multibatch compile someone/some-model -o 'my models/x' --decoder-batch-sizes 8,1"
            " --max-num-seqs 8 --max-seq-len 128 --prefill-chunk-sizes 16,64 --block-size 16"
            " --dtype bfloat16 --quantization int8 --backend inductor --device cpu --force"
        )

    def library(self, name: str) -> OperatorLibrary:
        (golden,) = self.manifest.ops
        return replace(golden, file=replace(golden.file, path=f"ops/{name}.so"))

    def test_the_command_for_programs_of_any_size(self) -> None:
        spec = replace(self.manifest.programs[0], name="step", kind="step", batch_size=8, num_tokens=72)
        manifest = replace(self.manifest, programs=(spec,), ops=(self.library("portable"), self.library("native")))
        manifest = replace(manifest, quantization=None)
        command = recompile_command(manifest)
        assert "--decoder-batch-sizes any --max-num-seqs 8" in command
        assert "--max-num-batched-tokens 64" in command
        assert "--portable" in command
        assert "--quantization" not in command
