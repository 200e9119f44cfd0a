"""An artifact is opened whole or refused by name, and published whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from multibatch import artifact as module
from multibatch.artifact import (
    Artifact,
    Staging,
    check_host,
    ensure_disk_space,
    recompile_command,
    record_file,
    sha256_file,
    update,
)
from multibatch.errors import ArtifactCorruptError, ArtifactError, ConfigError, IncompatibleError
from multibatch.manifest import FileRecord, Manifest, ProgramSpec

GOLDEN = Path(__file__).parent / "data" / "manifest_v1.json"
REPOSITORY = Path(__file__).parents[2]
RECORDED = [x.path for x in Manifest.from_json(GOLDEN.read_text(encoding="utf-8")).all_files]
EVERY_FILE = [*RECORDED, "manifest.json", "manifest.sha256"]


def write_files(folder: Path, text: str = "one") -> Manifest:
    """Write the golden manifest's files with contents of our own; the manifest that fits them."""

    def written(record: FileRecord) -> FileRecord:
        file = folder / record.path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text} {record.path}" * 10, encoding="utf-8")
        return record_file(folder, record.path)

    golden = Manifest.from_json(GOLDEN.read_text(encoding="utf-8"))
    programs = [replace(x, file=written(x.file)) for x in golden.programs if x.file is not None]
    return replace(
        golden,
        programs=tuple(programs),
        weights=written(golden.weights),
        ops=None if golden.ops is None else written(golden.ops),
        files=tuple(written(x) for x in golden.files),
    )


def build(target: Path, text: str = "one", *, overwrite: bool = False) -> Artifact:
    with Staging(target, overwrite=overwrite) as staging:
        return staging.publish(write_files(staging.path, text))


def content(target: Path) -> str:
    """Which build lies there, every byte of it checked."""
    whole = Artifact.open(target, verify="hashes")
    return whole.file(whole.manifest.weights).read_text(encoding="utf-8").split()[0]


def stage(target: Path, meanwhile: Callable[[Staging], object], *, overwrite: bool = False) -> None:
    """Build "two", with something happening between the files and the publishing."""
    with Staging(target, overwrite=overwrite) as staging:
        manifest = write_files(staging.path, "two")
        meanwhile(staging)
        staging.publish(manifest)


def raising(error: BaseException) -> Callable[[object], object]:
    def act(_: object) -> object:
        raise error

    return act


def flip_byte(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.fixture
def built(target: Path) -> Path:
    build(target)
    return target


def test_what_was_published_opens(target: Path) -> None:
    published = build(target)
    assert Artifact.open(target, verify="hashes") == published
    assert published.file(published.manifest.weights).is_file()
    assert os.listdir(target.parent) == [target.name]
    line = (target / "manifest.sha256").read_text(encoding="utf-8")
    assert line == f"{sha256_file(target / 'manifest.json')}  manifest.json\n"


@pytest.mark.parametrize("position", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("name", EVERY_FILE)
def test_one_flipped_byte_is_found_and_its_file_named(
    built: Path, name: str, position: int
) -> None:
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
    text = file.read_text(encoding="utf-8").replace('"schema_version": 1', '"schema_version": 2')
    file.write_text(text, encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    (built / "manifest.sha256").write_text(f"{digest}  manifest.json\n", encoding="utf-8")
    with pytest.raises(IncompatibleError, match=r"model: .*newer schema version 2.*update"):
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
        eager = replace(self.manifest, build=build, programs=programs, ops=None)
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
            " --dtype bfloat16 --backend inductor --device cpu --force"
        )


class TestPublish:
    """What lies at the target, and beside it, after every way to end."""

    def test_an_existing_artifact_is_kept_unless_overwritten(self, built: Path) -> None:
        with pytest.raises(ArtifactError, match="--force"), Staging(built):
            pytest.fail("entered")
        assert content(built) == "one"
        build(built, "two", overwrite=True)
        assert content(built) == "two"
        assert os.listdir(built.parent) == [built.name]

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("names", [["notes.txt"], ["notes.txt", "manifest.json"]])
    def test_a_folder_of_the_user_is_never_replaced(
        self, target: Path, overwrite: bool, names: list[str]
    ) -> None:
        target.mkdir()
        for name in names:
            (target / name).write_text("mine", encoding="utf-8")
        with (
            pytest.raises(ArtifactError, match="is not an artifact"),
            Staging(target, overwrite=overwrite),
        ):
            pytest.fail("entered")
        assert [(target / name).read_text(encoding="utf-8") for name in names] == ["mine"] * len(
            names
        )

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_an_empty_folder_is_taken_and_a_file_is_not(
        self, target: Path, overwrite: bool
    ) -> None:
        target.mkdir()
        build(target, overwrite=overwrite)
        assert content(target) == "one"
        file = target.with_name("file")
        file.touch()
        with pytest.raises(ArtifactError, match="is a file"), Staging(file, overwrite=overwrite):
            pytest.fail("entered")

    def test_a_link_to_the_target_stays_a_link(self, built: Path) -> None:
        link = built.with_name("link")
        link.symlink_to(built)
        build(link, "two", overwrite=True)
        assert link.is_symlink()
        assert content(built) == content(link) == "two"

    @pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
    def test_a_failure_leaves_nothing_new(self, built: Path, error: BaseException) -> None:
        with pytest.raises(type(error)):
            stage(built, raising(error), overwrite=True)
        assert os.listdir(built.parent) == [built.name]
        assert content(built) == "one"

    def test_what_is_not_published_is_dropped(self, target: Path) -> None:
        with Staging(target) as staging:
            write_files(staging.path)
        assert os.listdir(target.parent) == []

    def test_the_staged_files_must_be_those_of_the_manifest(self, target: Path) -> None:
        with pytest.raises(ArtifactError, match=r"not in the manifest: stray"):
            stage(target, lambda staging: (staging.path / "stray").touch())
        with pytest.raises(ArtifactCorruptError, match=r"config\.json"):
            stage(target, lambda staging: staging.remove("config.json"))
        assert os.listdir(target.parent) == []

    def test_a_target_that_comes_meanwhile_is_not_overwritten(self, target: Path) -> None:
        def appear(_: Staging) -> None:
            target.mkdir()
            (target / "mine").touch()

        with pytest.raises(ArtifactError, match="cannot be replaced"):
            stage(target, appear)
        assert os.listdir(target) == ["mine"]

    def test_two_renames_do_where_the_system_cannot_exchange(
        self, built: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_exchange", lambda *_: False)
        build(built, "two", overwrite=True)
        assert content(built) == "two"
        assert os.listdir(built.parent) == [built.name]

    def test_a_failed_second_rename_puts_the_old_one_back(
        self, built: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_exchange", lambda *_: False)
        rename = Path.rename

        def failing(self: Path, to: Path) -> Path:
            if ".staging-" in self.name:
                raise OSError(errno.EIO, "broken disk")
            return rename(self, to)

        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(ArtifactError, match="broken disk"):
            build(built, "two", overwrite=True)
        assert content(built) == "one"
        assert os.listdir(built.parent) == [built.name]

    def test_only_leftovers_of_this_target_are_cleared(self, target: Path) -> None:
        mine = target.with_name(f".{target.name}.staging-1-0123abcd")
        others = [f".{target.name}.staging-x", f".{target.name}.x.staging-1-0123abcd", "other"]
        for name in (mine.name, *others):
            (target.parent / name / "sub").mkdir(parents=True)
        build(target)
        assert sorted(os.listdir(target.parent)) == sorted([*others, target.name])

    def test_an_unwritable_place_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        inside = tmp_path / "file" / "model"
        with pytest.raises(ArtifactError, match="cannot be written"), Staging(inside):
            pytest.fail("entered")


class TestDiskSpace:
    """A full disk is told before the work where it can be, and leaves nothing."""

    def test_too_little_space_is_refused_before_any_work(self, target: Path) -> None:
        needed = 2**60
        with (
            pytest.raises(ArtifactError, match=rf"{needed} bytes needed, \d+ free"),
            Staging(target, needed_bytes=needed),
        ):
            pytest.fail("entered")
        assert os.listdir(target.parent) == []

    def test_space_is_measured_where_the_path_will_be(self, tmp_path: Path) -> None:
        ensure_disk_space(tmp_path / "not" / "there" / "yet", 1)

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, "No space left on device"),
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            RuntimeError("Error while serializing: No space left on device (os error 28)"),
        ],
        ids=["enospc", "quota", "wrapped"],
    )
    def test_a_disk_that_gets_full_is_told_with_figures(
        self, built: Path, error: Exception
    ) -> None:
        with pytest.raises(ArtifactError, match=r"more than \d+ needed, \d+ free") as caught:
            stage(built, raising(error), overwrite=True)
        staged = sum(x.bytes for x in Artifact.open(built).manifest.all_files)
        assert f"full after {staged} bytes: more than {staged} needed" in str(caught.value)
        assert caught.value.__cause__ is error
        assert os.listdir(built.parent) == [built.name]
        assert content(built) == "one"

    def test_the_disk_may_get_full_while_publishing(
        self, target: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ArtifactError, match="the disk got full"):
            build(target)
        assert os.listdir(target.parent) == []


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process that can import this file as `helpers`."""
    prelude = f"""
        import importlib.util, os, pathlib, signal, sys, time
        sys.path.insert(0, {str(REPOSITORY)!r})
        spec = importlib.util.spec_from_file_location("helpers", {__file__!r})
        helpers = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(helpers)
        target = pathlib.Path(sys.argv[1])
    """
    script = textwrap.dedent(prelude) + textwrap.dedent(code)
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    process.stdout.close()
    return process.wait(timeout=60)


SLOW = """
    with helpers.Staging(target, overwrite=True) as staging:
        manifest = helpers.write_files(staging.path, "two")
        for name in ("weights.safetensors", "config.json"):
            with open(staging.path / name, "w") as file:
                for _ in range(5):
                    file.write("torn"); file.flush()
                    print(name, flush=True)
                    time.sleep(0.02)
        time.sleep(60)
"""
# Dies by SIGKILL on the given call of a function of the artifact module.
KILLED_INSIDE = """
    name, call = sys.argv[2], int(sys.argv[3])
    wrapped, calls = getattr(helpers.module, name), []
    def dying(*arguments, **keywords):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return wrapped(*arguments, **keywords)
    setattr(helpers.module, name, dying)
    if len(sys.argv) > 4:
        helpers.module._exchange = lambda *_: False
    if len(sys.argv) > 5:
        rename = pathlib.Path.rename
        def dying_rename(path, to):
            if ".staging-" in path.name:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(path, to)
        pathlib.Path.rename = dying_rename
    helpers.build(target, "two", overwrite=True)
"""


class TestKilled:
    """kill -9 at several moments: the old artifact or the new one opens, never half of one."""

    @pytest.mark.parametrize("exists", [True, False], ids=["replacing", "new"])
    @pytest.mark.parametrize("lines", [1, 4, 8])
    def test_while_files_are_written(self, target: Path, exists: bool, lines: int) -> None:
        if exists:
            build(target)
        process = start(SLOW, target)
        for _ in range(lines):
            assert read_line(process)
        process.kill()
        assert end(process) == -signal.SIGKILL
        self.check_after(target, "one" if exists else None)

    @pytest.mark.parametrize(
        ("function", "call", "survivor"),
        [
            ("_checksum_line", 1, "one"),
            ("_flush", 3, "one"),
            ("_replace", 1, "one"),
            ("_exchange", 1, "one"),
            # 10 files and 4 folders are flushed before the exchange, the parent folder after it.
            ("_flush", 15, "two"),
            ("_remove_tree", 1, "two"),
        ],
    )
    def test_while_publishing(self, built: Path, function: str, call: int, survivor: str) -> None:
        process = start(KILLED_INSIDE, built, function, call)
        assert end(process) == -signal.SIGKILL
        self.check_after(built, survivor)

    def test_between_the_two_renames_the_old_one_comes_back(self, built: Path) -> None:
        process = start(KILLED_INSIDE, built, "_free_bytes", 99, "no exchange", "at rename")
        assert end(process) == -signal.SIGKILL
        with pytest.raises(ArtifactCorruptError, match=r"killed while .* rename .*\.old-"):
            Artifact.open(built)
        with pytest.raises(ArtifactError, match="--force"), Staging(built):
            pytest.fail("entered")
        self.check_after(built, "one")

    def check_after(self, target: Path, survivor: str | None) -> None:
        if survivor is None:
            with pytest.raises(ArtifactCorruptError):
                Artifact.open(target)
        else:
            assert content(target) == survivor
        # Nothing is locked, and the next compile clears what the dead one left.
        build(target, "three", overwrite=True)
        assert content(target) == "three"
        assert os.listdir(target.parent) == [target.name]


class TestLock:
    """Two processes never write one artifact at the same time."""

    def test_the_second_process_names_the_first(self, target: Path) -> None:
        process = start(SLOW, target)
        assert read_line(process)
        with (
            pytest.raises(ArtifactError, match=f"written by process {process.pid}"),
            Staging(target),
        ):
            pytest.fail("entered")
        process.kill()
        end(process)
        build(target)
        assert content(target) == "one"

    def test_one_process_is_no_exception(self, target: Path) -> None:
        with (
            Staging(target),
            pytest.raises(ArtifactError, match=f"process {os.getpid()}"),
            Staging(target),
        ):
            pytest.fail("entered")

    def test_a_lock_file_without_its_holder_locks_nobody_out(self, target: Path) -> None:
        target.with_name(f".{target.name}.lock").write_text("1", encoding="utf-8")
        build(target)
        assert os.listdir(target.parent) == [target.name]

    def test_many_processes_at_once_leave_one_whole_artifact(self, target: Path) -> None:
        code = """
            for _ in range(10):
                try:
                    helpers.build(target, "two", overwrite=True)
                except helpers.ArtifactError as error:
                    assert "being written by" in str(error), error
        """
        processes = [start(code, target) for _ in range(3)]
        deadline = time.monotonic() + 60
        opened = 0
        while any(x.poll() is None for x in processes) and time.monotonic() < deadline:
            opened += target.exists() and bool(Artifact.open(target, verify="none"))
        assert [end(x) for x in processes] == [0, 0, 0]
        assert opened > 0
        assert content(target) == "two"
        assert os.listdir(target.parent) == [target.name]


def without(manifest: Manifest, name: str) -> Manifest:
    kept: tuple[ProgramSpec, ...] = tuple(x for x in manifest.programs if x.name != name)
    return replace(manifest, programs=kept)


class TestUpdate:
    """Sizes come and go without the rest being written again."""

    def test_a_dropped_program_goes_and_the_rest_is_linked(self, built: Path) -> None:
        before = (built / "weights.safetensors").stat().st_ino
        with update(built) as (artifact, staging):
            staging.remove("programs/decoder_batch_1.pt2")
            staging.publish(without(artifact.manifest, "decoder_batch_1"))
        after = Artifact.open(built, verify="hashes")
        assert after.manifest.decoder_batch_sizes == (8,)
        assert not (built / "programs/decoder_batch_1.pt2").exists()
        weights = (built / "weights.safetensors").stat()
        assert (weights.st_ino, weights.st_nlink) == (before, 1)

    def test_a_program_is_added(self, built: Path) -> None:
        with update(built) as (artifact, staging):
            name = "programs/decoder_batch_2.pt2"
            (staging.path / name).write_text("new", encoding="utf-8")
            record = record_file(staging.path, name)
            one = artifact.manifest.program("decoder_batch_1")
            two = replace(one, name="decoder_batch_2", batch_size=2, num_tokens=2, file=record)
            programs = (*artifact.manifest.programs, two)
            staging.publish(replace(artifact.manifest, programs=programs))
        opened = Artifact.open(built, verify="hashes")
        assert opened.manifest.decoder_batch_sizes == (1, 2, 8)

    def test_without_links_files_are_copied(
        self, built: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_links(*_: object) -> None:
            raise OSError(errno.EPERM, "no links on this disk")

        monkeypatch.setattr(os, "link", no_links)
        before = (built / "weights.safetensors").stat().st_ino
        with update(built) as (artifact, staging):
            staging.publish(replace(artifact.manifest, canary=None))
        assert content(built) == "one"
        assert (built / "weights.safetensors").stat().st_ino != before

    def test_a_failure_changes_nothing(self, built: Path) -> None:
        def fail_midway() -> None:
            with update(built) as (_, staging):
                staging.remove("config.json")
                raise RuntimeError("midway")

        with pytest.raises(RuntimeError, match="midway"):
            fail_midway()
        assert content(built) == "one"
        assert os.listdir(built.parent) == [built.name]

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda folder: os.truncate(folder / "weights.safetensors", 1),
            lambda folder: (folder / "notes.txt").touch(),
            lambda folder: (folder / "manifest.json").unlink(),
        ],
        ids=["truncated", "files of others", "no manifest"],
    )
    def test_what_is_not_a_whole_artifact_is_not_changed(
        self, built: Path, spoil: Callable[[Path], None]
    ) -> None:
        spoil(built)
        before = sorted(os.listdir(built))
        with pytest.raises(ArtifactError), update(built):
            pytest.fail("entered")
        assert sorted(os.listdir(built)) == before
        assert os.listdir(built.parent) == [built.name]

    def test_a_folder_that_is_not_there_is_not_made(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactCorruptError, match="no such folder"), update(tmp_path / "a/b"):
            pytest.fail("entered")
        assert os.listdir(tmp_path) == []
