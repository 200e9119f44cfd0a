"""Replacing a folder as a whole: what lies beside it meanwhile, who may, and the flush and rename that do it.

Owns the names beside a target, its lock and the exchange. Knows nothing of what a folder holds: that is `artifact.py`
and `publish.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from multibatch.errors import ArtifactError

_RENAME_EXCHANGE: Final = 2  # of linux/fs.h
_AT_FDCWD: Final = -100  # of linux/fcntl.h


def sibling(target: Path, kind: Literal["staging", "old"]) -> Path:
    """A new name beside the target, on the same disk and so within reach of a rename."""
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def leftovers(target: Path) -> list[Path]:
    """Folders of `sibling` names that killed processes left beside the target, oldest first."""
    form = re.compile(re.escape(f".{target.name}.") + "(staging|old)-[0-9]+-[0-9a-f]{8}")
    if not target.parent.is_dir():
        return []
    found = [x for x in target.parent.iterdir() if form.fullmatch(x.name)]
    return sorted(found, key=lambda x: x.lstat().st_mtime)


def files_below(folder: Path) -> list[Path]:
    """Everything below a folder that is not a folder itself; links are not followed."""
    found = []
    for parent, folders, names in os.walk(folder):
        links = [x for x in folders if os.path.islink(os.path.join(parent, x))]
        found += [Path(parent, x) for x in names + links]
    return sorted(found)


@contextlib.contextmanager
def lock(target: Path) -> Iterator[None]:
    """Hold `.NAME.lock` beside the target; the kernel lets go of it when the process dies.

    Raises:
        ArtifactError: another process holds it, or this one already does.
    """
    path = target.with_name(f".{target.name}.lock")
    while True:
        with contextlib.ExitStack() as stack:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace") or "unknown"
                message = f"{target}: is being written by process {holder}; wait for it to end"
                raise ArtifactError(message) from error
            # The holder before us removed the file: a lock on what has no name locks nobody out.
            if not _is_file_of(descriptor, path):
                continue
            stack.callback(path.unlink, missing_ok=True)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield
            return


def replace(staging: Path, target: Path, *, overwrite: bool) -> None:
    """Put `staging` at `target`, for good: the names are on the disk then. What was there ends up at `staging`.

    Raises:
        OSError: the system refused, or the target is more than an empty folder and not to be overwritten.
    """
    if not (overwrite and target.is_dir()):
        # Fails where something that is not an empty folder has come there meanwhile.
        staging.rename(target)
    elif not _exchange(staging, target):
        _swap(staging, target)
    _flush(target.parent)


def flush_tree(folder: Path) -> None:
    """Write a folder and everything below it through to the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _flush(Path(parent, name))
        _flush(Path(parent))


def remove_tree(folder: Path) -> None:
    """Remove a folder; what cannot be removed now is removed by the next compile into its target."""
    shutil.rmtree(folder, ignore_errors=True)


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    paths = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second))
    if renameat2(*paths, ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), os.fspath(second))


def _swap(staging: Path, target: Path) -> None:
    """Swap two folders in three renames; if the second fails, the old target comes back."""
    aside = sibling(target, "old")
    try:
        target.rename(aside)
        staging.rename(target)
    except BaseException:
        if not target.exists():
            aside.rename(target)
        raise
    aside.rename(staging)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
