"""What this machine has: processor features, cores and memory, as far as its limits allow.

Reads /proc and the cgroup files only. `root` is where they are mounted; tests give their own.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class CpuInfo:
    """The processor, as far as a compiled program depends on it."""

    # Such as "Intel(R) Xeon(R) Processor @ 2.50GHz"; "unknown" where the system does not say.
    model_name: str
    # As `platform.machine()` says it, such as "x86_64".
    architecture: str
    # Those of `isa_levels(architecture)` that the processor has, in that order.
    isa: tuple[str, ...]


def isa_levels(architecture: str) -> tuple[str, ...]:
    """The features a program may be compiled for, oldest first, named as in /proc/cpuinfo."""
    match architecture.lower():
        case "x86_64" | "amd64":
            base = ("avx2", "fma", "f16c")
            avx512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16")
            return (*base, *avx512, "amx_bf16", "amx_int8")
        case "aarch64" | "arm64":
            return ("asimd", "sve", "bf16", "i8mm")
        case _:
            return ()


def portable_isa(architecture: str) -> tuple[str, ...]:
    """The features that every machine of the last decade has; portable programs use no others."""
    match architecture.lower():
        case "x86_64" | "amd64":
            return ("avx2", "fma", "f16c")
        case "aarch64" | "arm64":
            return ("asimd",)
        case _:
            return ()


def missing_isa(required: Iterable[str], present: Iterable[str]) -> tuple[str, ...]:
    """The required features that are not present, in the order they were asked for."""
    there = frozenset(present)
    return tuple(feature for feature in required if feature not in there)


def read_cpu_info(*, root: Path = _ROOT) -> CpuInfo:
    """The processor from /proc/cpuinfo; without that file, a name and no features."""
    architecture = platform.machine()
    entries = _key_values(_text(root / "proc/cpuinfo") or "", ":")
    model = entries.get("model name") or entries.get("Model") or platform.processor()
    present = entries.get("flags", entries.get("Features", "")).split()
    isa = tuple(x for x in isa_levels(architecture) if x in present)
    return CpuInfo(model or "unknown", architecture, isa)


def usable_cores(*, root: Path = _ROOT) -> int:
    """Whole cores this process may keep busy: its affinity, capped by its cgroups' CPU quota."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    # A quota of 1.5 cores counts as 1: two spinning threads would be throttled half the time.
    return max(1, math.floor(min([cores, *_cpu_quotas(root)])))


def total_memory_bytes(*, root: Path = _ROOT) -> int:
    """Memory of the machine, capped by the cgroups' limit."""
    return min([_meminfo(root, "MemTotal"), *(limit for limit, _ in _memory_limits(root))])


def available_memory_bytes(*, root: Path = _ROOT) -> int:
    """Memory that can be taken without swapping or being killed, never below 0."""
    left = [limit - used for limit, used in _memory_limits(root)]
    return max(0, min([_meminfo(root, "MemAvailable"), *left]))


def _cpu_quotas(root: Path) -> Iterator[float]:
    for folder in _cgroup_folders(root, "cpu"):
        v2 = (_text(folder / "cpu.max") or "").split()
        quota, period = v2 if len(v2) == 2 else ("max", "")
        if not v2:
            quota = (_text(folder / "cpu.cfs_quota_us") or "").strip()
            period = (_text(folder / "cpu.cfs_period_us") or "").strip()
        # "max" and -1 both mean that there is no quota.
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            yield int(quota) / int(period)


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes used that cannot be dropped) of each cgroup above this process."""
    for folder in _cgroup_folders(root, "memory"):
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes") or ""
        used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes") or ""
        if limit.strip().isdecimal() and used.strip().isdecimal():
            # Pages of read files count as used, but the kernel drops them when asked for memory.
            stat = _key_values(_text(folder / "memory.stat") or "", " ")
            droppable = stat.get("total_inactive_file", stat.get("inactive_file", "0"))
            yield int(limit), max(0, int(used) - int(droppable))


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """This process's folder in each hierarchy that has the controller, and all above it."""
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            base = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        # Inside a container the path may be the host's; then only the mount point exists here.
        folder = base / path.strip("/")
        while folder != base:
            yield folder
            folder = folder.parent
        yield base


def _meminfo(root: Path, key: str) -> int:
    value = _key_values(_text(root / "proc/meminfo") or "", ":").get(key, "")
    if value:
        return int(value.split()[0]) * 1024
    pages = "SC_PHYS_PAGES" if key == "MemTotal" else "SC_AVPHYS_PAGES"
    known = pages in os.sysconf_names
    # Where the system says nothing of free memory, all of it is the best guess there is.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages if known else "SC_PHYS_PAGES")


def _key_values(text: str, separator: str) -> dict[str, str]:
    """The first value of each key: processors after the first repeat theirs."""
    values: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(separator)
        values.setdefault(key.strip(), value.strip())
    return values


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
