"""Other processes: killed while they publish, or publishing at the same time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from multibatch.artifact import Artifact
from multibatch.errors import ArtifactCorruptError, ArtifactError
from multibatch.publish import Staging
from tests.runtime.small_artifact import build, content

REPOSITORY = Path(__file__).parents[2]
HELPERS = Path(__file__).with_name("small_artifact.py")


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process, with `small_artifact.py` as `helpers`."""
    prelude = f"""
        import importlib.util, os, pathlib, signal, sys, time
        sys.path.insert(0, {str(REPOSITORY)!r})
        spec = importlib.util.spec_from_file_location("helpers", {str(HELPERS)!r})
        helpers = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(helpers)
        from multibatch import atomic_folder, publish
        from multibatch.errors import ArtifactError
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
    with publish.Staging(target, overwrite=True) as staging:
        manifest = helpers.write_files(staging.path, "two")
        for name in ("weights.safetensors", "config.json"):
            with open(staging.path / name, "w") as file:
                for _ in range(5):
                    file.write("torn"); file.flush()
                    print(name, flush=True)
                    time.sleep(0.02)
        time.sleep(60)
"""
# Dies by SIGKILL on the given call of a function, named with the module that calls it.
KILLED_INSIDE = """
    (place, name), call = sys.argv[2].split("."), int(sys.argv[3])
    module = {"atomic_folder": atomic_folder, "publish": publish}[place]
    wrapped, calls = getattr(module, name), []
    def dying(*arguments, **keywords):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return wrapped(*arguments, **keywords)
    setattr(module, name, dying)
    if len(sys.argv) > 4:
        atomic_folder._exchange = lambda *_: False
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
            ("publish.checksum_line", 1, "one"),
            ("atomic_folder._flush", 3, "one"),
            ("publish.replace", 1, "one"),
            ("atomic_folder._exchange", 1, "one"),
            # 10 files and 4 folders are flushed before the exchange, the parent folder after it.
            ("atomic_folder._flush", 15, "two"),
            ("publish.remove_tree", 1, "two"),
        ],
    )
    def test_while_publishing(self, built: Path, function: str, call: int, survivor: str) -> None:
        process = start(KILLED_INSIDE, built, function, call)
        assert end(process) == -signal.SIGKILL
        self.check_after(built, survivor)

    def test_between_the_two_renames_the_old_one_comes_back(self, built: Path) -> None:
        process = start(KILLED_INSIDE, built, "publish._free_bytes", 99, "no exchange", "at rename")
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
                except ArtifactError as error:
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
