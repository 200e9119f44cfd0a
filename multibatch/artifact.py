"""An artifact's folder: opened, checked, and matched to this machine.

Owns hashes and what a folder must hold. What the manifest says is in `manifest.py`, how a folder comes about in
`publish.py`. Loads no program.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from multibatch.atomic_folder import files_below, leftovers
from multibatch.cost_table import CostTable
from multibatch.errors import ArtifactCorruptError, ArtifactError, ConfigError, IncompatibleError
from multibatch.hardware import missing_isa
from multibatch.manifest import MANIFEST_HASH_NAME, MANIFEST_NAME, FileRecord, Manifest

Verify = Literal["sizes", "hashes", "none"]


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
            ArtifactError: a file is there, but not for this user to read.
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

    def cost_table(self) -> CostTable | None:
        """What steps cost, as `multibatch calibrate` measured it here; None where it did not.

        Raises:
            ArtifactCorruptError: the file is not as it was written.
        """
        record = self.manifest.cost_table
        if record is None:
            return None
        text = self.file(record).read_bytes()
        if hashlib.sha256(text).hexdigest() != record.sha256:
            raise _corrupt(self.file(record), f"sha256 {record.sha256}", "another", "calibrate again")
        return CostTable.from_csv(text.decode(), str(self.file(record)))

    def check_files(self, *, hashes: bool) -> None:
        """Compare the files with the manifest; see `open`."""
        for record in self.manifest.all_files:
            file = self.file(record)
            if not file.is_file():
                raise _corrupt(file, f"{record.bytes} bytes", "no such file")
            status = file.stat()
            if status.st_size != record.bytes:
                raise _corrupt(file, f"{record.bytes} bytes", f"{status.st_size} bytes")
            if not os.access(file, os.R_OK):
                found = f"one of mode {status.st_mode & 0o777:o} that this user may not read"
                raise ArtifactError(f"{file}: expected a file to read, found {found}; as its owner: chmod a+r {file}")
            if hashes and (found := sha256_file(file)) != record.sha256:
                raise _corrupt(file, f"sha256 {record.sha256}", f"sha256 {found}")
        if hashes and (extra := self.unknown_files()):
            allowed = "only the files that the manifest names"
            raise _corrupt(self.path, allowed, f"also {', '.join(extra)}", "remove them")

    def unknown_files(self) -> list[str]:
        """What lies in the folder without being of the artifact, relative to it and sorted."""
        known = {MANIFEST_NAME, MANIFEST_HASH_NAME, *(x.path for x in self.manifest.all_files)}
        found = (file.relative_to(self.path).as_posix() for file in files_below(self.path))
        return [path for path in found if path not in known]


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
    if build.backend == "inductor" or manifest.ops:
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
    sizes = ",".join(str(size) for size in reversed(manifest.decoders)) or "any"
    chunks = ",".join(str(size) for size in manifest.prefill_chunk_sizes)
    prefill = f"--prefill-chunk-sizes {chunks}" if chunks else f"--max-num-batched-tokens {manifest.max_prefill_tokens}"
    return (
        f"multibatch compile {shlex.quote(manifest.model.id)} -o {shlex.quote(os.fspath(output))}"
        f" --decoder-batch-sizes {sizes} --max-num-seqs {manifest.max_num_seqs}"
        f" --max-seq-len {manifest.max_seq_len} {prefill}"
        f" --block-size {manifest.kv.block_size} --dtype {manifest.model.dtype}"
        + (f" --quantization {manifest.quantization.scheme}" if manifest.quantization else "")
        + (" --portable" if len(manifest.ops) > 1 else "")
        + f" --backend {manifest.build.backend} --device {manifest.build.device} --force"
    )


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_file(root: str | os.PathLike[str], relative: str) -> FileRecord:
    """What the manifest says of the file `relative` below `root`."""
    file = Path(root, relative)
    return FileRecord(relative, sha256_file(file), file.stat().st_size)


def checksum_line(data: bytes) -> str:
    """What MANIFEST_HASH_NAME holds for a manifest of these bytes, in the form that `sha256sum --check` reads."""
    return f"{hashlib.sha256(data).hexdigest()}  {MANIFEST_NAME}\n"


def _manifest_text(folder: Path) -> str:
    if not folder.is_dir():
        raise _corrupt(folder, "an artifact's folder", "no such folder", _recovery(folder))
    data = {}
    for name in (MANIFEST_NAME, MANIFEST_HASH_NAME):
        try:
            data[name] = (folder / name).read_bytes()
        except OSError as error:
            raise _corrupt(folder / name, "a file", str(error.strerror)) from error
    expected = checksum_line(data[MANIFEST_NAME]).encode()
    if data[MANIFEST_HASH_NAME] != expected:
        said = f"what {MANIFEST_HASH_NAME} says, {data[MANIFEST_HASH_NAME][:80]!r}"
        raise _corrupt(folder / MANIFEST_NAME, said, f"{expected!r}; one of the two was changed")
    return data[MANIFEST_NAME].decode(errors="replace")


def _recovery(folder: Path) -> str:
    aside = [x for x in leftovers(Path(os.path.realpath(folder))) if ".old-" in x.name]
    if aside:
        return f"a compile was killed while it replaced the folder: rename {aside[-1]} to {folder}"
    return "check the path, or compile the model first"


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
