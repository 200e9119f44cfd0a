"""An artifact's folder: opened and checked, matched to this machine, and published as a whole.

Owns files, hashes, locks and renames; what the manifest says is `manifest.py`. Loads no program.
Publishing writes beside the target and renames (after safetensors, whose in-place writes zeroed
a live mmap), so at every moment the target is the old artifact, the new one, or not there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from multibatch.errors import ArtifactCorruptError, ArtifactError, ConfigError, IncompatibleError
from multibatch.hardware import missing_isa
from multibatch.manifest import MANIFEST_HASH_NAME, MANIFEST_NAME, FileRecord, Manifest

Verify = Literal["sizes", "hashes", "none"]

_RENAME_EXCHANGE: Final = 2  # of linux/fs.h
_AT_FDCWD: Final = -100  # of linux/fcntl.h
_NO_LINKS: Final = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP)
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A folder whose manifest is whole and whose files are those that were built."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: Verify = "sizes") -> Artifact:
        """Open a folder; the manifest's own checksum is checked whatever `verify` says.

        Args:
            path: the artifact's folder.
            verify: "sizes" looks for missing and truncated files; "hashes" reads every byte and
                also refuses files that the manifest does not name; "none" looks at no file.

        Raises:
            ArtifactCorruptError: something is missing, truncated, changed or too many.
            IncompatibleError: the manifest has another schema version.
        """
        if verify not in ("sizes", "hashes", "none"):
            raise ConfigError(f'verify: got {verify!r}, expected "sizes", "hashes" or "none"')
        folder = Path(path)
        artifact = cls(folder, Manifest.from_json(_manifest_text(folder), source=folder))
        if verify != "none":
            artifact.check_files(hashes=verify == "hashes")
        return artifact

    def file(self, record: FileRecord) -> Path:
        """Where a file of the manifest lies."""
        return self.path / record.path

    def check_files(self, *, hashes: bool) -> None:
        """Compare the files with the manifest; see `open`."""
        for record in self.manifest.all_files:
            file = self.file(record)
            if not file.is_file():
                raise _corrupt(file, f"{record.bytes} bytes", "no such file")
            size = file.stat().st_size
            if size != record.bytes:
                raise _corrupt(file, f"{record.bytes} bytes", f"{size} bytes")
            if hashes and (found := sha256_file(file)) != record.sha256:
                raise _corrupt(file, f"sha256 {record.sha256}", f"sha256 {found}")
        if hashes and (extra := _unknown_files(self.path, self.manifest)):
            allowed = "only the files that the manifest names"
            raise _corrupt(self.path, allowed, f"also {', '.join(extra)}", "remove them")


def check_host(
    manifest: Manifest,
    *,
    torch_version: str,
    isa: Iterable[str],
    architecture: str,
    device: str = "cpu",
    compute_capability: str | None = None,
) -> None:
    """Refuse a machine that the artifact's programs were not built for.

    Args:
        manifest: of the artifact.
        torch_version: the installed one; what follows a "+" is not compared.
        isa: features of this processor, of `hardware.read_cpu_info`.
        architecture: of this processor, as `platform.machine()` says it.
        device: what the programs shall run on, "cpu" or "cuda".
        compute_capability: of that GPU, such as "9.0".

    Raises:
        IncompatibleError: the first thing that does not match, and the command to build again.
    """
    build = manifest.build
    # AOTInductor packages and the operator library are bound to one version of torch's C++ side.
    if build.backend == "inductor" or manifest.ops is not None:
        built, found = (x.partition("+")[0] for x in (build.torch_version, torch_version))
        if built != found:
            cure = f"install torch {built}, or build again with torch {found}"
            raise _incompatible(manifest, "torch", built, found, cure)
    if build.device != device:
        raise _incompatible(manifest, "the device", build.device, device)
    if build.cpu_architecture != architecture:
        raise _incompatible(manifest, "a processor", build.cpu_architecture, architecture)
    if missing := missing_isa(build.isa, isa):
        found = f"one without {', '.join(missing)}"
        raise _incompatible(manifest, "a processor with", ", ".join(build.isa), found)
    # Kernels are tuned to the shared memory of one capability: 8.0's may not fit 8.6.
    if build.compute_capability != compute_capability and device == "cuda":
        wanted, found = build.compute_capability, compute_capability or "unknown"
        raise _incompatible(manifest, "compute capability", str(wanted), found)


def recompile_command(manifest: Manifest, output: str | os.PathLike[str] = "ARTIFACT") -> str:
    """The command that builds the same artifact again, on the machine that shall serve it."""
    sizes = ",".join(str(size) for size in reversed(manifest.decoder_batch_sizes))
    chunks = ",".join(str(size) for size in manifest.prefill_chunk_sizes)
    return (
        f"multibatch compile {shlex.quote(manifest.model.id)} -o {shlex.quote(os.fspath(output))}"
        f" --decoder-batch-sizes {sizes} --max-num-seqs {manifest.max_num_seqs}"
        f" --max-seq-len {manifest.max_seq_len} --prefill-chunk-sizes {chunks}"
        f" --block-size {manifest.kv.block_size} --dtype {manifest.model.dtype}"
        f" --backend {manifest.build.backend} --device {manifest.build.device} --force"
    )


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_file(root: str | os.PathLike[str], relative: str) -> FileRecord:
    """What the manifest says of the file `relative` below `root`."""
    file = Path(root, relative)
    return FileRecord(relative, sha256_file(file), file.stat().st_size)


def ensure_disk_space(path: str | os.PathLike[str], needed_bytes: int) -> None:
    """Raise ArtifactError where the disk of `path`, which need not exist yet, has less free."""
    free = _free_bytes(Path(path))
    if free < needed_bytes:
        raise ArtifactError(
            f"no space for {path}: {needed_bytes} bytes needed, {free} free; "
            "free some, or choose a folder on another disk"
        )


class Staging:
    """A folder beside `target` that becomes it when published, and else leaves nothing.

    Use as a context manager: write files below `path`, then call `publish`. The lock is held from
    entry to exit; do not fork without exec in between, a forked child would go on holding it.

    Raises:
        ArtifactError: at entry, if the target exists (and not `overwrite`), is not an artifact,
            is being written by another process, or its disk has less than `needed_bytes` free;
            at exit, if the disk got full.
    """

    def __init__(
        self, target: str | os.PathLike[str], *, overwrite: bool = False, needed_bytes: int = 0
    ) -> None:
        # A link stays a link: what it points to is replaced.
        self.target = Path(os.path.realpath(target))
        self.overwrite = overwrite
        self.needed_bytes = needed_bytes
        self.path = _sibling(self.target, "staging")
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Self:
        _refuse_target(self.target, self.overwrite)
        try:
            with contextlib.ExitStack() as stack:
                self.target.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_lock(self.target))
                _clear_stale(self.target)
                # Once more: another process may have published before the lock was ours.
                _refuse_target(self.target, self.overwrite)
                ensure_disk_space(self.target, self.needed_bytes)
                stack.callback(_remove_tree, self.path)
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
        checksum = _checksum_line(text.encode())
        (self.path / MANIFEST_HASH_NAME).write_text(checksum, encoding="utf-8")
        Artifact(self.path, manifest).check_files(hashes=False)
        if extra := _unknown_files(self.path, manifest):
            raise ArtifactError(f"staged, but not in the manifest: {', '.join(extra)}")
        _flush_tree(self.path)
        try:
            _replace(self.path, self.target, overwrite=self.overwrite)
            _flush(self.target.parent)
        except OSError as error:
            raise ArtifactError(f"{self.target}: cannot be replaced: {error}") from error
        # In its place now lies the old artifact, if there was one.
        _remove_tree(self.path)
        return Artifact(self.target, manifest)


@contextlib.contextmanager
def update(
    path: str | os.PathLike[str], *, needed_bytes: int = 0
) -> Iterator[tuple[Artifact, Staging]]:
    """Change an artifact: yields it and a staging that already links every file of it.

    Write new files into `staging.path`, `staging.remove` those that go, then `staging.publish`
    the changed manifest. The artifact is read under the lock, so no other change is lost.

    Raises:
        ArtifactError: as `Artifact.open` and `Staging`, or the folder holds files of others.
    """
    Artifact.open(path, verify="none")
    with Staging(path, overwrite=True, needed_bytes=needed_bytes) as staging:
        artifact = Artifact.open(staging.target)
        if extra := _unknown_files(artifact.path, artifact.manifest):
            found = ", ".join(extra)
            raise ArtifactError(f"{path}: also holds {found}, which would be lost; move them away")
        for record in artifact.manifest.all_files:
            staging.link(artifact.file(record), record.path)
        yield artifact, staging


def _manifest_text(folder: Path) -> str:
    if not folder.is_dir():
        raise _corrupt(folder, "an artifact's folder", "no such folder", _recovery(folder))
    data = {}
    for name in (MANIFEST_NAME, MANIFEST_HASH_NAME):
        try:
            data[name] = (folder / name).read_bytes()
        except OSError as error:
            raise _corrupt(folder / name, "a file", str(error.strerror)) from error
    expected = _checksum_line(data[MANIFEST_NAME]).encode()
    if data[MANIFEST_HASH_NAME] != expected:
        said = f"what {MANIFEST_HASH_NAME} says, {data[MANIFEST_HASH_NAME][:80]!r}"
        raise _corrupt(folder / MANIFEST_NAME, said, f"{expected!r}; one of the two was changed")
    return data[MANIFEST_NAME].decode(errors="replace")


def _recovery(folder: Path) -> str:
    aside = [x for x in _stale(Path(os.path.realpath(folder))) if ".old-" in x.name]
    if aside:
        return f"a compile was killed while it replaced the folder: rename {aside[-1]} to {folder}"
    return "check the path, or compile the model first"


def _checksum_line(data: bytes) -> str:
    # The form that `sha256sum --check` reads.
    return f"{hashlib.sha256(data).hexdigest()}  {MANIFEST_NAME}\n"


def _unknown_files(folder: Path, manifest: Manifest) -> list[str]:
    known = {MANIFEST_NAME, MANIFEST_HASH_NAME, *(x.path for x in manifest.all_files)}
    found = (file.relative_to(folder).as_posix() for file in _files(folder))
    return [path for path in found if path not in known]


def _files(folder: Path) -> list[Path]:
    """Everything below a folder that is not a folder itself; links are not followed."""
    found = []
    for parent, folders, names in os.walk(folder):
        links = [x for x in folders if os.path.islink(os.path.join(parent, x))]
        found += [Path(parent, x) for x in names + links]
    return sorted(found)


def _corrupt(
    path: Path, expected: str, found: str, cure: str = "copy the artifact again or compile again"
) -> ArtifactCorruptError:
    return ArtifactCorruptError(f"{path}: expected {expected}, found {found}; {cure}")


def _incompatible(
    manifest: Manifest, what: str, built: str, found: str, cure: str = "build it again here"
) -> IncompatibleError:
    return IncompatibleError(
        f"the artifact of {manifest.model.id} was built for {what} {built}, found {found}; "
        f"{cure}: {recompile_command(manifest)}"
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


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def _stale(target: Path) -> list[Path]:
    """Folders that killed processes left beside the target, oldest first."""
    form = re.compile(re.escape(f".{target.name}.") + "(staging|old)-[0-9]+-[0-9a-f]{8}")
    if not target.parent.is_dir():
        return []
    found = [x for x in target.parent.iterdir() if form.fullmatch(x.name)]
    return sorted(found, key=lambda x: x.lstat().st_mtime)


def _clear_stale(target: Path) -> None:
    # Who holds the lock knows that nobody else writes here: whatever the pid in the name says
    # (in containers pids come again), the writer is dead.
    for folder in reversed(_stale(target)):
        is_old = ".old-" in folder.name and (folder / MANIFEST_NAME).is_file()
        if is_old and not os.path.lexists(target):
            folder.rename(target)
        else:
            _remove_tree(folder)


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Hold `.NAME.lock` beside the target; the kernel lets go of it when the process dies."""
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


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _replace(staging: Path, target: Path, *, overwrite: bool) -> None:
    """Put `staging` at `target`; what was there ends up at `staging`."""
    if not (overwrite and target.is_dir()):
        # Fails where something that is not an empty folder has come there meanwhile.
        staging.rename(target)
        return
    if _exchange(staging, target):
        return
    aside = _sibling(target, "old")
    try:
        target.rename(aside)
        staging.rename(target)
    except BaseException:
        if not target.exists():
            aside.rename(target)
        raise
    aside.rename(staging)


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


def _flush_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _flush(Path(parent, name))
        _flush(Path(parent))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_tree(folder: Path) -> None:
    # What cannot be removed now is removed by the next compile into this target.
    shutil.rmtree(folder, ignore_errors=True)


def _tree_bytes(folder: Path) -> int:
    return sum(x.lstat().st_size for x in _files(folder))


def _free_bytes(path: Path) -> int:
    absolute = path.absolute()
    return shutil.disk_usage(next(x for x in (absolute, *absolute.parents) if x.exists())).free


def _says_no_space(error: BaseException) -> bool:
    # Other libraries wrap the system's error in their own, and keep its text.
    number = error.errno if isinstance(error, OSError) else None
    return number in _NO_SPACE or os.strerror(errno.ENOSPC) in str(error)
