"""A small artifact for tests, with the golden manifest's files and contents of our own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from multibatch.artifact import Artifact, record_file
from multibatch.manifest import FileRecord, Manifest
from multibatch.publish import Staging

GOLDEN = Path(__file__).parent / "data" / "manifest_v4.json"


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
        ops=tuple(replace(library, file=written(library.file)) for library in golden.ops),
        files=tuple(written(x) for x in golden.files),
    )


def build(target: Path, text: str = "one", *, overwrite: bool = False) -> Artifact:
    with Staging(target, overwrite=overwrite) as staging:
        return staging.publish(write_files(staging.path, text))


def content(target: Path) -> str:
    """Which build lies there, every byte of it checked."""
    whole = Artifact.open(target, verify="hashes")
    return whole.file(whole.manifest.weights).read_text(encoding="utf-8").split()[0]
