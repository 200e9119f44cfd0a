"""An artifact is published whole or not at all, and changed the same way."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from multibatch import atomic_folder
from multibatch.artifact import Artifact, record_file
from multibatch.errors import ArtifactCorruptError, ArtifactError
from multibatch.manifest import Manifest, ProgramSpec
from multibatch.publish import Staging, ensure_disk_space, update
from tests.runtime.small_artifact import build, content, write_files


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
    def test_a_folder_of_the_user_is_never_replaced(self, target: Path, overwrite: bool, names: list[str]) -> None:
        target.mkdir()
        for name in names:
            (target / name).write_text("mine", encoding="utf-8")
        with (
            pytest.raises(ArtifactError, match="is not an artifact"),
            Staging(target, overwrite=overwrite),
        ):
            pytest.fail("entered")
        assert [(target / name).read_text(encoding="utf-8") for name in names] == ["mine"] * len(names)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_an_empty_folder_is_taken_and_a_file_is_not(self, target: Path, overwrite: bool) -> None:
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
        monkeypatch.setattr(atomic_folder, "_exchange", lambda *_: False)
        build(built, "two", overwrite=True)
        assert content(built) == "two"
        assert os.listdir(built.parent) == [built.name]

    def test_a_failed_second_rename_puts_the_old_one_back(self, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(atomic_folder, "_exchange", lambda *_: False)
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
    def test_a_disk_that_gets_full_is_told_with_figures(self, built: Path, error: Exception) -> None:
        with pytest.raises(ArtifactError, match=r"more than \d+ needed, \d+ free") as caught:
            stage(built, raising(error), overwrite=True)
        staged = sum(x.bytes for x in Artifact.open(built).manifest.all_files)
        assert f"full after {staged} bytes: more than {staged} needed" in str(caught.value)
        assert caught.value.__cause__ is error
        assert os.listdir(built.parent) == [built.name]
        assert content(built) == "one"

    def test_the_disk_may_get_full_while_publishing(self, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ArtifactError, match="the disk got full"):
            build(target)
        assert os.listdir(target.parent) == []


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

    def test_without_links_files_are_copied(self, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    def test_what_is_not_a_whole_artifact_is_not_changed(self, built: Path, spoil: Callable[[Path], None]) -> None:
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
