"""What this process may use: the least of what machine, control groups and `ulimit` leave it, on trees of files made here."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from eigenzoo.passes import machine
from eigenzoo.passes.machine import machine_memory, num_cores, peak_memory
from eigenzoo.passes.resources import SHARE_OF_RAM, resources_for

GIB = 2**30
NO_LIMIT = "9223372036854771712"
"""What version 1 shows without a limit."""


@pytest.fixture(autouse=True)
def machine_of_64_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * GIB // 4096}
    monkeypatch.setattr("os.sysconf", sizes.__getitem__)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(32)), raising=False)
    monkeypatch.setattr("resource.getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def tree(monkeypatch: pytest.MonkeyPatch, root: Path, groups: str, files: Mapping[str, str]) -> None:
    """A system whose control groups have these files."""
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(machine, "ROOT", root)


VERSION_2 = "0::/system.slice/job.scope\n"
VERSION_1 = "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n0::/\n"
JOB = "sys/fs/cgroup/system.slice/job.scope"
DOCKER = "sys/fs/cgroup/memory/docker/abc"

MEMORY: dict[str, tuple[str, dict[str, str], int]] = {
    "none": (VERSION_2, {f"{JOB}/memory.max": "max\n", f"{JOB}/memory.high": "max\n"}, 64 * GIB),
    "own": (VERSION_2, {f"{JOB}/memory.max": f"{8 * GIB}\n"}, 8 * GIB),
    "high": (VERSION_2, {f"{JOB}/memory.max": "max\n", f"{JOB}/memory.high": f"{6 * GIB}\n"}, 6 * GIB),
    "outer": (
        VERSION_2,
        {f"{JOB}/memory.max": f"{8 * GIB}\n", "sys/fs/cgroup/system.slice/memory.max": f"{4 * GIB}\n"},
        4 * GIB,
    ),
    "container": ("0::/\n", {"sys/fs/cgroup/memory.max": f"{2 * GIB}\n"}, 2 * GIB),
    "seen from outside": (VERSION_2, {"sys/fs/cgroup/memory.max": f"{2 * GIB}\n"}, 2 * GIB),
    "larger than the machine": (VERSION_2, {f"{JOB}/memory.max": f"{900 * GIB}\n"}, 64 * GIB),
    "version 1": (VERSION_1, {f"{DOCKER}/memory.limit_in_bytes": f"{8 * GIB}\n"}, 8 * GIB),
    "version 1, none": (VERSION_1, {f"{DOCKER}/memory.limit_in_bytes": f"{NO_LIMIT}\n"}, 64 * GIB),
    "version 1, container": (VERSION_1, {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GIB}\n"}, 3 * GIB),
    "odd": ("nonsense\n\n::::\n", {"sys/fs/cgroup/memory.max": "many\n"}, 64 * GIB),
    "a group of another": (VERSION_2, {"sys/fs/cgroup/user.slice/memory.max": f"{GIB}\n"}, 64 * GIB),
    "thousands of digits": (VERSION_2, {f"{JOB}/memory.max": "9" * 5000}, 64 * GIB),
}


@pytest.mark.parametrize("case", MEMORY)
def test_memory_is_the_least_of_all_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    groups, files, expected = MEMORY[case]
    tree(monkeypatch, tmp_path, groups, files)
    assert machine_memory() == expected


def test_a_system_without_control_groups_has_the_machines_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert (machine_memory(), num_cores()) == (64 * GIB, 32)


def test_the_limit_of_the_address_space_holds_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(monkeypatch, tmp_path, VERSION_2, {f"{JOB}/memory.max": f"{8 * GIB}\n"})
    limits = {resource.RLIMIT_AS: (5 * GIB, resource.RLIM_INFINITY)}
    monkeypatch.setattr("resource.getrlimit", limits.__getitem__)
    assert machine_memory() == 5 * GIB


def test_blocks_take_their_share_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(monkeypatch, tmp_path, VERSION_2, {f"{JOB}/memory.max": f"{GIB // 2}\n"})
    found = resources_for(4)
    assert found.block_bytes == found.layer_bytes == GIB // 2 // SHARE_OF_RAM // 2 // 4


CORES: dict[str, tuple[str, dict[str, str], int]] = {
    "none": (VERSION_2, {f"{JOB}/cpu.max": "max 100000\n"}, 32),
    "two": (VERSION_2, {f"{JOB}/cpu.max": "200000 100000\n"}, 2),
    "one and a half": (VERSION_2, {f"{JOB}/cpu.max": "150000 100000\n"}, 2),
    "a tenth": (VERSION_2, {f"{JOB}/cpu.max": "10000 100000\n"}, 1),
    "outer": (
        VERSION_2,
        {f"{JOB}/cpu.max": "max 100000\n", "sys/fs/cgroup/system.slice/cpu.max": "400000 100000\n"},
        4,
    ),
    "version 1": (
        VERSION_1,
        {
            "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000\n",
        },
        3,
    ),
    "version 1, none": (
        VERSION_1,
        {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
        32,
    ),
    "odd": (VERSION_2, {f"{JOB}/cpu.max": "100000 0\n"}, 32),
    "hundreds of digits": (VERSION_2, {f"{JOB}/cpu.max": f"{'9' * 400} 1\n"}, 32),
}


@pytest.mark.parametrize("case", CORES)
def test_cores_are_the_least_of_affinity_and_quotas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    groups, files, expected = CORES[case]
    tree(monkeypatch, tmp_path, groups, files)
    assert num_cores() == expected
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3}, raising=False)
    assert num_cores() == 1


def test_a_system_without_affinity_has_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 10)
    assert num_cores() == 10
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert num_cores() == 1


@pytest.mark.parametrize(("system", "expected"), [("linux", 5000 * 1024), ("darwin", 5000)])
def test_peak_memory_is_in_bytes(monkeypatch: pytest.MonkeyPatch, system: str, expected: int) -> None:
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("resource.getrusage", lambda whose: SimpleNamespace(ru_maxrss=5000))
    assert peak_memory() == expected


def test_this_machine_has_memory_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 2**26 < machine_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 1 <= num_cores() <= (os.cpu_count() or 1)
    assert 10_000_000 < peak_memory() < 2**45


def test_a_group_without_end_is_no_folder_to_look_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(monkeypatch, tmp_path, f"0::/{'a/' * 50_000}\n", {})
    began = time.process_time()
    assert (machine_memory(), num_cores()) == (64 * GIB, 32)
    assert time.process_time() - began < 5
