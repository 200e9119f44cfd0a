"""Hardware is read from files; these tests write the files."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from multibatch.hardware import (
    available_memory_bytes,
    isa_levels,
    missing_isa,
    read_cpu_info,
    total_memory_bytes,
    usable_cores,
)

GIB = 2**30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def test_x86_features_are_read_in_the_order_of_the_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    processor = "model name\t: Some CPU\nflags\t\t: fpu fma avx512f avx2 sse4_2\n\n"
    info = read_cpu_info(root=write(tmp_path, {"proc/cpuinfo": processor * 2}))
    assert info.model_name == "Some CPU"
    assert info.architecture == "x86_64"
    assert info.isa == ("avx2", "fma", "avx512f")


def test_arm_features_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(platform, "processor", lambda: "")
    processor = "BogoMIPS : 50\nFeatures : fp asimd i8mm bf16\n"
    info = read_cpu_info(root=write(tmp_path, {"proc/cpuinfo": processor}))
    assert info.isa == ("asimd", "bf16", "i8mm")
    assert info.model_name == "unknown"


def test_without_cpuinfo_there_is_a_name_and_no_feature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "mystery")
    info = read_cpu_info(root=tmp_path)
    assert (info.model_name, info.isa) == ("mystery", ())


def test_an_unknown_architecture_has_no_levels() -> None:
    assert isa_levels("riscv64") == ()
    assert isa_levels("arm64") == isa_levels("aarch64") != ()


def test_missing_isa_keeps_the_order_asked_for() -> None:
    assert missing_isa(("avx512f", "avx2", "fma"), ("avx2",)) == ("avx512f", "fma")
    assert missing_isa((), ()) == ()


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/../x\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        (
            {
                "proc/self/cgroup": "2:cpuacct,cpu:/job\n0::/\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
    ],
    ids=["none", "v2-max", "v2", "v2-half-a-core", "v2-parent", "v2-outside", "v1"],
)
def test_cores_are_capped_by_the_quota(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    assert usable_cores(root=write(tmp_path, files)) == cores


MEMINFO = {"proc/meminfo": f"MemTotal: {8 * 2**20} kB\nMemAvailable: {6 * 2**20} kB\n"}


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, 8 * GIB, 6 * GIB),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
                "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            },
            4 * GIB,
            2 * GIB,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/job\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{2 * GIB}\n",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
            },
            2 * GIB,
            0,
        ),
        (
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"},
            8 * GIB,
            6 * GIB,
        ),
    ],
    ids=["none", "v2", "v1-overdrawn", "v2-max"],
)
def test_memory_is_capped_by_the_limit(tmp_path: Path, files: dict[str, str], total: int, available: int) -> None:
    root = write(tmp_path, MEMINFO | files)
    assert total_memory_bytes(root=root) == total
    assert available_memory_bytes(root=root) == available


def test_this_machine_can_be_read() -> None:
    assert read_cpu_info().architecture == platform.machine()
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert 0 < available_memory_bytes() <= total_memory_bytes()


def test_without_meminfo_the_system_is_asked(tmp_path: Path) -> None:
    assert total_memory_bytes(root=tmp_path) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert available_memory_bytes(root=tmp_path) > 0
