"""An artifact's folder written: staged beside its target, published as a whole or not at all, changed the same way.

Writing beside the target and renaming is after safetensors, whose in-place writes zeroed a live mmap: at every moment
the target is the old artifact, the new one, or not there. The renames are in `atomic_folder.py`, what is opened
afterwards in `artifact.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from multibatch.artifact import Artifact, checksum_line, record_file
from multibatch.atomic_folder import files_below, flush_tree, leftovers, lock, remove_tree, replace, sibling
from multibatch.cost_table import CostTable
from multibatch.errors import ArtifactError
from multibatch.manifest import COST_TABLE_NAME, MANIFEST_HASH_NAME, MANIFEST_NAME, Manifest

_NO_LINKS: Final = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP)
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)


class Staging:
    """A folder beside `target` that becomes it when published, and else leaves nothing.

    Use as a context manager: write files below `path`, then call `publish`. The lock is held from
    entry to exit; do not fork without exec in between, a forked child would go on holding it.

    Raises:
        ArtifactError: at entry, if the target exists (and not `overwrite`), is not an artifact or also holds
            files of others, is being written by another process, or its disk has less than `needed_bytes` free;
            at exit, if the disk got full.
    """

    def __init__(self, target: str | os.PathLike[str], *, overwrite: bool = False, needed_bytes: int = 0) -> None:
        # A link stays a link: what it points to is replaced.
        self.target = Path(os.path.realpath(target))
        self.overwrite = overwrite
        self.needed_bytes = needed_bytes
        self.path = sibling(self.target, "staging")
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Self:
        _refuse_target(self.target, self.overwrite)
        try:
            with contextlib.ExitStack() as stack:
                self.target.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock(self.target))
                _clear_stale(self.target)
                # Once more: another process may have published before the lock was ours.
                _refuse_target(self.target, self.overwrite)
                ensure_disk_space(self.target, self.needed_bytes)
                stack.callback(remove_tree, self.path)
                self.path.mkdir()
                self._cleanup = stack.pop_all()
        except OSError as error:
            raise ArtifactError(f"{self.target}: cannot be written: {error}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        is_full = error is not None and _says_no_space(error)
        staged = _tree_bytes(self.path) if is_full else 0
        self._cleanup.close()
        if is_full:
            raise ArtifactError(
                f"{self.target}: the disk got full after {staged} bytes: more than "
                f"{max(staged, self.needed_bytes)} needed, {_free_bytes(self.target)} free without "
                "them; free some, or choose a folder on another disk"
            ) from error

    def link(self, source: Path, relative: str) -> None:
        """Take a file over by a hard link, or a copy where the disk has no links.

        The link shares its bytes with `source`: call `remove` before writing that file anew.
        """
        file = self.path / relative
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = os.path.realpath(source)
        try:
            os.link(whole, file)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            shutil.copy2(whole, file)

    def remove(self, relative: str) -> None:
        """Drop a staged file; what it was linked to stays."""
        (self.path / relative).unlink()

    def publish(self, manifest: Manifest) -> Artifact:
        """Write the manifest, flush everything to the disk and rename the folder to the target.

        Raises:
            ArtifactError: the staged files are not those of the manifest, or the rename failed.
        """
        text = manifest.to_json()
        if Manifest.from_json(text) != manifest:
            raise ArtifactError("the manifest does not survive its JSON form; this is a bug")
        (self.path / MANIFEST_NAME).write_text(text, encoding="utf-8")
        checksum = checksum_line(text.encode())
        (self.path / MANIFEST_HASH_NAME).write_text(checksum, encoding="utf-8")
        staged = Artifact(self.path, manifest)
        staged.check_files(hashes=False)
        if extra := staged.unknown_files():
            raise ArtifactError(f"staged, but not in the manifest: {', '.join(extra)}")
        flush_tree(self.path)
        try:
            replace(self.path, self.target, overwrite=self.overwrite)
        except OSError as error:
            raise ArtifactError(f"{self.target}: cannot be replaced: {error}") from error
        # In its place now lies the old artifact, if there was one.
        remove_tree(self.path)
        return Artifact(self.target, manifest)


@contextlib.contextmanager
def update(path: str | os.PathLike[str], *, needed_bytes: int = 0) -> Iterator[tuple[Artifact, Staging]]:
    """Change an artifact: yields it and a staging that already links every file of it.

    Write new files into `staging.path`, `staging.remove` those that go, then `staging.publish`
    the changed manifest. The artifact is read under the lock, so no other change is lost.

    Raises:
        ArtifactError: as `Artifact.open` and `Staging`, or the folder holds files of others.
    """
    Artifact.open(path, verify="none")
    with Staging(path, overwrite=True, needed_bytes=needed_bytes) as staging:
        artifact = Artifact.open(staging.target)
        for record in artifact.manifest.all_files:
            staging.link(artifact.file(record), record.path)
        yield artifact, staging


def store_cost_table(path: str | os.PathLike[str], table: CostTable) -> Artifact:
    """Puts a cost table into an artifact, in the place of the one that is there.

    Raises:
        ArtifactError: as `update`.
    """
    with update(path) as (old, staging):
        if old.manifest.cost_table is not None:
            staging.remove(COST_TABLE_NAME)
        (staging.path / COST_TABLE_NAME).write_text(table.to_csv(), encoding="utf-8")
        others = tuple(record for record in old.manifest.files if record.path != COST_TABLE_NAME)
        record = record_file(staging.path, COST_TABLE_NAME)
        return staging.publish(dataclasses.replace(old.manifest, files=(*others, record)))


def ensure_disk_space(path: str | os.PathLike[str], needed_bytes: int) -> None:
    """Raise ArtifactError where the disk of `path`, which need not exist yet, has less free."""
    free = _free_bytes(Path(path))
    if free < needed_bytes:
        raise ArtifactError(
            f"no space for {path}: {needed_bytes} bytes needed, {free} free; "
            "free some, or choose a folder on another disk"
        )


def _refuse_target(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise ArtifactError(f"{target}: is a file; choose another output folder")
    names = {x.name for x in os.scandir(target)}
    if not names:
        return
    # Both names, as many a folder that is not ours holds a manifest.json.
    if not {MANIFEST_NAME, MANIFEST_HASH_NAME} <= names:
        raise ArtifactError(
            f"{target}: exists and is not an artifact (no {MANIFEST_NAME} with its checksum), so "
            "it is never replaced, not even with --force; choose another folder or remove it"
        )
    if not overwrite:
        raise ArtifactError(f"{target}: exists; replace it with --force or choose another folder")
    try:
        extra = Artifact.open(target, verify="none").unknown_files()
    except ArtifactError:
        # Damaged, or of another schema version: to replace it is the cure.
        return
    if extra:
        raise ArtifactError(f"{target}: also holds {', '.join(extra)}, which would be lost; move them away")


def _clear_stale(target: Path) -> None:
    # Who holds the lock knows that nobody else writes here: whatever the pid in the name says
    # (in containers pids come again), the writer is dead.
    for folder in reversed(leftovers(target)):
        is_old = ".old-" in folder.name and (folder / MANIFEST_NAME).is_file()
        if is_old and not os.path.lexists(target):
            folder.rename(target)
        else:
            remove_tree(folder)


def _tree_bytes(folder: Path) -> int:
    return sum(x.lstat().st_size for x in files_below(folder))


def _free_bytes(path: Path) -> int:
    absolute = path.absolute()
    return shutil.disk_usage(next(x for x in (absolute, *absolute.parents) if x.exists())).free


def _says_no_space(error: BaseException) -> bool:
    # Other libraries wrap the system's error in their own, and keep its text.
    number = error.errno if isinstance(error, OSError) else None
    return number in _NO_SPACE or os.strerror(errno.ENOSPC) in str(error)
