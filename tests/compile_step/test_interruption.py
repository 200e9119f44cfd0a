"""A whole compile, as the command runs it, ended in every way: the output is the old artifact, the new one or nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from multibatch.artifact import Artifact
from multibatch.errors import ArtifactCorruptError, ArtifactError, CompileError
from multibatch_compile import compile_model, verify_artifact
from multibatch_compile.operators import operator_library, targets
from tests.compile_step.held_compile import (
    ARGUMENTS,
    COMMON,
    COMPILER,
    EAGER,
    NEW,
    OLD,
    PATIENCE,
    STAGES,
    Compile,
    Launcher,
    Start,
    environment,
    interrupt,
    interrupt_group,
    kill,
)

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="finds processes through /proc")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """An artifact, to be copied."""
    target = tmp_path_factory.mktemp("old") / "out"
    compile_model(model, target, max_seq_len=OLD, backend="eager", **COMMON)
    return target


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    made = Launcher()
    yield made
    made.close()


@pytest.fixture
def start(tmp_path: Path, model: Path, launcher: Launcher) -> Iterator[Start]:
    """Starts compiles, which may run at the same time; none outlives the test."""
    started: list[Compile] = []

    def run(
        *options: str, output: Path, stop: tuple[str, int] = ("", 0), what: str = "wait", **variables: str
    ) -> Compile:
        folder = tmp_path / f"run{len(started)}"
        folder.mkdir()
        arguments = [str(model), *ARGUMENTS, *options]
        started.append(Compile(launcher, folder, arguments, output, (what, *stop), variables))
        return started[-1]

    yield run
    for one in started:
        one.kill_all()


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    operator_library(targets(portable=False)[0])  # so that no test waits for it
    real = shutil.which(os.environ.get("CXX", "g++"))
    assert real is not None
    script = tmp_path_factory.mktemp("compiler") / "g++"
    script.write_text(COMPILER.replace("REAL", real))
    script.chmod(0o755)
    return str(script)


def place(tmp_path: Path, name: str, old: Path | None) -> Path:
    """An output in a folder of its own, with the old artifact there or nothing."""
    parent = tmp_path / name
    parent.mkdir()
    if old is not None:
        shutil.copytree(old, parent / "out")
    return parent / "out"


def check_old(output: Path, *, exists: bool = True) -> None:
    """Every byte of the old artifact is there, or nothing that opens."""
    if exists:
        assert verify_artifact(output) == []
        assert Artifact.open(output).manifest.max_seq_len == OLD
    else:
        assert not output.exists()
        with pytest.raises(ArtifactCorruptError, match="no such folder"):
            Artifact.open(output)


def check_old_alone(output: Path) -> None:
    check_old(output)
    assert os.listdir(output.parent) == [output.name]


def check_new_alone(output: Path) -> None:
    assert verify_artifact(output) == []
    assert Artifact.open(output).manifest.max_seq_len == NEW
    assert os.listdir(output.parent) == [output.name]


def check_stopped(one: Compile, act: Callable[[Compile], None], model: Path, *, exists: bool) -> None:
    """What a compile that was killed or interrupted leaves, and that the next one clears it away."""
    code, said, output = one.end(), one.said(), one.output
    one.check_no_other_left()
    check_old(output, exists=exists)
    if act is kill:
        assert code == -signal.SIGKILL
        assert len(list(output.parent.glob(".out.staging-*"))) == 1
    else:
        assert code == 1, said
        assert "Aborted" in said
        assert "Traceback" not in said
        assert os.listdir(output.parent) == (["out"] if exists else [])
        return
    compile_model(model, output, max_seq_len=NEW, backend="eager", force=exists, **COMMON)
    check_new_alone(output)


@pytest.mark.parametrize(("act", "exists"), [(kill, True), (kill, False), (interrupt, True), (interrupt_group, False)])
def test_stopped_at_every_stage(
    tmp_path: Path, model: Path, old: Path, start: Start, act: Callable[[Compile], None], exists: bool
) -> None:
    running = []
    for number, stop in enumerate(STAGES.values()):
        output = place(tmp_path, f"case{number}", old if exists else None)
        running.append(start(*EAGER, output=output, stop=stop))
    for one in running:
        one.until_file("reached")
        act(one)
        check_stopped(one, act, model, exists=exists)


def test_builders_and_their_compilers_end_with_the_compile(
    tmp_path: Path, model: Path, old: Path, start: Start, compiler: str
) -> None:
    cases = [
        # how, over an old artifact, in the C++ compiler (else: as soon as there is a builder)
        (kill, True, True),
        (interrupt_group, False, True),
        (kill, False, False),
        (interrupt, True, False),
    ]
    running = []
    for number, (_, exists, _) in enumerate(cases):
        output = place(tmp_path, f"case{number}", old if exists else None)
        running.append(start("--jobs", "1", "--force", output=output, CXX=compiler))
    # Those that stop early first, so that the others have the cores.
    for (act, exists, is_late), one in sorted(zip(cases, running, strict=True), key=lambda x: x[0][2]):
        if is_late:
            one.until_file("compiles")
            # The builder, the C++ compiler; a process has no environment to be known by while it becomes another program.
            one.until(lambda held=one: len(held.others()) >= 2, "compiling")
        else:
            one.until(one.has_builder, "building")
        act(one)
        check_stopped(one, act, model, exists=exists)


def test_what_the_compiler_said_is_shown(tmp_path: Path, old: Path, start: Start, compiler: str) -> None:
    output = place(tmp_path, "case", old)
    failing = start("--jobs", "1", "--force", output=output, CXX=compiler, MULTIBATCH_TEST_FAILING="1")
    assert failing.end() == 1
    said = failing.said()
    assert "error: prefill_16 could not be built (exit code 1):" in said
    assert "[/no] such thing as 'std::unobtainium'" in said
    assert "multibatch_compile/build.py" not in said  # the builder's traceback, and not the command's
    assert "multibatch_compile/workers.py" not in said
    failing.check_no_other_left()
    check_old_alone(output)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('no such compiler'); sys.exit(3)", r"prefill_16 could not be built \(exit code 3\):\nno such compiler"),
        ("os.kill(os.getpid(), 9)", r"prefill_16 could not be built \(killed, perhaps for lack of memory.*--jobs"),
        ("os.abort()", r"prefill_16 could not be built \(signal 6\)"),
    ],
    ids=["exit", "killed", "crash"],
)
def test_a_builder_that_fails_ends_the_others(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    builders: dict[str, subprocess.Popen[bytes]] = {}

    def start(scratch: Path, name: str, job: object) -> tuple[Any, float, Path]:
        log, what = scratch / f"{name}.log", code if name == "prefill_16" else "time.sleep(300)"
        with log.open("wb") as out:
            command = [sys.executable, "-c", f"import os, sys, time; {what}"]
            builders[name] = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        return builders[name], 0.0, log

    monkeypatch.setattr("multibatch_compile.workers._start", start)
    monkeypatch.setattr("multibatch_compile.build.available_memory_bytes", lambda: 10**12)
    with pytest.raises(CompileError, match=message):
        compile_model(model, tmp_path / "out", max_seq_len=NEW, jobs=2, **COMMON)
    assert builders["decoder_batch_1"].returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == []


def test_without_a_compiler_the_error_says_what_to_install(
    tmp_path: Path, model: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = place(tmp_path, "case", old)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompileError, match=r"no C\+\+ compiler g\+\+ found; install one"):
        compile_model(model, output, max_seq_len=NEW, force=True, **COMMON)
    check_old_alone(output)


class TestFullDisk:
    """The old artifact stays, and the error says what to do."""

    def check(self, code: int, said: str, output: Path) -> None:
        assert code == 1, said
        assert f"error: {output}: the disk got full after" in said
        assert "free some, or choose a folder on another disk" in said
        assert "Traceback" not in said

    @pytest.mark.parametrize("name", ["config.json", "manifest.json", "manifest.sha256"])
    def test_at_one_file(self, tmp_path: Path, old: Path, start: Start, name: str) -> None:
        output = place(tmp_path, "case", old)
        full = start(*EAGER, output=output, stop=(name, 1), what="full")
        self.check(full.end(), full.said(), output)
        check_old_alone(output)

    def test_of_a_real_disk(self, tmp_path: Path, model: Path, old: Path) -> None:
        """In memory, one page too small for two artifacts; only the processes below the prefix see it."""
        page = os.sysconf("SC_PAGE_SIZE")
        pages = sum(-(-file.stat().st_size // page) for file in old.rglob("*") if file.is_file())
        disk, copied = tmp_path / "disk", tmp_path / "copied"
        disk.mkdir()
        script = (
            'mount -t tmpfs -o "size=$1" tmpfs disk && cp -r "$2" disk/out || exit 99; shift 2;'
            ' "$@"; code=$?; ls -A disk > names; cp -r disk/out copied; exit $code'
        )
        if shutil.which("unshare") is None:
            pytest.skip("no unshare")
        prefix = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
        prefix += [str((2 * pages - 1) * page), str(old)]
        if subprocess.run([*prefix, "true"], cwd=tmp_path, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted here")
        shutil.rmtree(copied)
        command = [
            sys.executable,
            "-m",
            "multibatch",
            "compile",
            str(model),
            *ARGUMENTS,
            *EAGER,
            "-o",
            str(disk / "out"),
        ]
        done = subprocess.run(
            [*prefix, *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=environment(),
            timeout=PATIENCE,
            check=False,
        )
        self.check(done.returncode, done.stderr, disk / "out")
        assert (tmp_path / "names").read_text().split() == ["out"]
        check_old(copied)

    def test_too_small_for_the_weights_is_told_before_they_are_written(
        self, tmp_path: Path, model: Path, old: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = place(tmp_path, "case", old)
        weights = Artifact.open(old).manifest.model.num_parameters * 4
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=weights - 1))
        with pytest.raises(ArtifactError, match=f"{weights} bytes needed, {weights - 1} free; free some"):
            compile_model(model, output, max_seq_len=NEW, backend="eager", force=True, **COMMON)
        check_old_alone(output)


@pytest.mark.parametrize("exists", [True, False], ids=["replacing", "new"])
def test_a_second_compile_into_one_folder_is_refused(tmp_path: Path, old: Path, start: Start, exists: bool) -> None:
    output = place(tmp_path, "case", old if exists else None)
    first = start(*EAGER, output=output, stop=STAGES["the weights are written"])
    first.until_file("reached")
    staged = sorted(output.parent.glob(".out.staging-*/*"))
    second = start(*EAGER, output=output)
    assert second.end() == 1
    assert f"error: {output}: is being written by process {first.pid}; wait for it to end" in second.said()
    assert "Traceback" not in second.said()
    assert sorted(output.parent.glob(".out.staging-*/*")) == staged
    check_old(output, exists=exists)
    (first.run / "go").touch()
    assert first.end() == 0, first.said()
    check_new_alone(output)


def test_an_output_that_exists_is_kept(tmp_path: Path, model: Path, old: Path, start: Start) -> None:
    artifact, noted = place(tmp_path, "artifact", old), place(tmp_path, "noted", old)
    mine, source, empty, damaged = (tmp_path / x for x in ("mine", "source", "empty", "damaged"))
    mine.mkdir()
    empty.mkdir()
    (mine / "diary.txt").write_text("dear")
    (noted / "notes.txt").write_text("mine")
    shutil.copytree(model, source)
    shutil.copytree(old, damaged)
    (damaged / "manifest.json").write_text("{")
    cases = [
        (artifact, [], "exists; replace it with --force"),
        (damaged, [], "exists; replace it with --force"),
        (mine, ["--force"], "exists and is not an artifact"),
        (source, ["--force"], "exists and is not an artifact"),
        (noted, ["--force"], "also holds notes.txt, which would be lost; move them away"),
    ]
    before = [contents(output) for output, _, _ in cases]
    running = [start("--backend", "eager", *options, output=output) for output, options, _ in cases]
    for (output, _, message), one in zip(cases, running, strict=True):
        assert one.end() == 1
        assert f"error: {output}: {message}" in one.said()
        assert "Traceback" not in one.said()
    assert [contents(output) for output, _, _ in cases] == before
    for one in [start(*EAGER, output=output) for output in (artifact, damaged, empty)]:
        assert one.end() == 0, one.said()
        assert Artifact.open(one.output, verify="hashes").manifest.max_seq_len == NEW


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
