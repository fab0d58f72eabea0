"""Memory limits from fixture trees of /proc and cgroups: versions 1 and 2, nested, in containers."""

from pathlib import Path

import pytest

from mobile_gguf.memory.machine import cgroup_limits, read_memory
from mobile_gguf.memory.threads import cpu_quota, default_threads

MIB = 1 << 20
NO_LIMIT_V1 = "9223372036854771712"

MOUNTS_V1 = """\
23 1 0:21 / / rw - ext4 /dev/sda1 rw
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime shared:5 - cgroup cgroup rw,memory
"""
MOUNTS_V2 = """\
23 1 0:21 / / rw - ext4 /dev/sda1 rw
31 23 0:28 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def machine(tmp_path):
    """Makes a root with 16 GiB of memory, 8 available, and a process in a group."""

    def make(group: str, mounts: str, root: str = "/") -> Path:
        write(tmp_path / "proc/meminfo", "MemTotal: 16777216 kB\nMemFree: 100 kB\nMemAvailable: 8388608 kB\n")
        write(tmp_path / "proc/self/cgroup", group)
        write(tmp_path / "proc/self/mountinfo", mounts.format(root=root))
        return tmp_path

    return make


def group_v1(directory: Path, limit: str, usage: int = 0, stat: str = "") -> None:
    write(directory / "memory.limit_in_bytes", f"{limit}\n")
    write(directory / "memory.usage_in_bytes", f"{usage}\n")
    write(directory / "memory.stat", stat)


def group_v2(directory: Path, limit: str, usage: int = 0, stat: str = "") -> None:
    write(directory / "memory.max", f"{limit}\n")
    write(directory / "memory.current", f"{usage}\n")
    write(directory / "memory.stat", stat)


def test_without_cgroups_it_is_what_the_machine_has_available(machine):
    memory = read_memory(machine("", ""))
    assert (memory.available_bytes, memory.total_bytes, memory.source) == (8 << 30, 16 << 30, "the machine")


def test_v1_counts_page_cache_as_free(machine):
    root = machine("4:memory:/job\n1:cpu:/\n", MOUNTS_V1)
    stat = f"cache 1\ntotal_inactive_file {200 * MIB}\ntotal_active_file {100 * MIB}\ntotal_rss 9\n"
    group_v1(root / "sys/fs/cgroup/memory", NO_LIMIT_V1)
    group_v1(root / "sys/fs/cgroup/memory/job", str(1024 * MIB), 700 * MIB, stat)
    memory = read_memory(root)
    assert memory.available_bytes == (1024 - (700 - 300)) * MIB
    assert memory.total_bytes == 1024 * MIB
    assert memory.source.endswith("cgroup/memory/job")


def test_v1_without_a_limit_says_nothing(machine):
    root = machine("4:memory:/job\n", MOUNTS_V1)
    group_v1(root / "sys/fs/cgroup/memory/job", NO_LIMIT_V1, 5 * MIB)
    assert cgroup_limits(root) == []
    assert read_memory(root).source == "the machine"


def test_v1_the_tightest_of_nested_groups_counts(machine):
    root = machine("4:memory:/outer/inner\n", MOUNTS_V1)
    group_v1(root / "sys/fs/cgroup/memory/outer", str(1000 * MIB), 900 * MIB)
    group_v1(root / "sys/fs/cgroup/memory/outer/inner", str(500 * MIB), 100 * MIB)
    assert [limit.free_bytes for limit in cgroup_limits(root)] == [400 * MIB, 100 * MIB]
    assert read_memory(root).available_bytes == 100 * MIB


def test_v2_counts_page_cache_and_reclaimable_slab_as_free(machine):
    root = machine("0::/user.slice/run.scope\n", MOUNTS_V2)
    stat = f"anon 5\ninactive_file {30 * MIB}\nactive_file {20 * MIB}\nslab_reclaimable {10 * MIB}\n"
    group_v2(root / "sys/fs/cgroup/user.slice", "max", 4000 * MIB)
    group_v2(root / "sys/fs/cgroup/user.slice/run.scope", str(600 * MIB), 160 * MIB, stat)
    assert read_memory(root).available_bytes == 500 * MIB


def test_v2_high_is_a_limit_too(machine):
    root = machine("0::/a\n", MOUNTS_V2)
    group_v2(root / "sys/fs/cgroup/a", "max", 10 * MIB)
    write(root / "sys/fs/cgroup/a/memory.high", f"{110 * MIB}\n")
    assert read_memory(root).available_bytes == 100 * MIB


def test_v2_max_means_no_limit(machine):
    root = machine("0::/a\n", MOUNTS_V2)
    group_v2(root / "sys/fs/cgroup/a", "max", 10 * MIB)
    assert cgroup_limits(root) == []


@pytest.mark.parametrize("group", ["/docker/abc", "/", "/../elsewhere"])
def test_in_a_container_the_mount_is_the_containers_own_group(machine, group):
    root = machine(f"0::{group}\n", MOUNTS_V2, root="/docker/abc" if group == "/docker/abc" else "/")
    group_v2(root / "sys/fs/cgroup", str(256 * MIB), 56 * MIB)
    assert read_memory(root).available_bytes == 200 * MIB


def test_a_group_path_of_the_host_that_is_not_mounted_here(machine):
    root = machine("4:memory:/kubepods/pod1\n", MOUNTS_V1)
    group_v1(root / "sys/fs/cgroup/memory", str(300 * MIB), 100 * MIB)
    assert read_memory(root).available_bytes == 200 * MIB


def test_more_used_than_allowed_leaves_nothing(machine):
    root = machine("0::/a\n", MOUNTS_V2)
    group_v2(root / "sys/fs/cgroup/a", str(10 * MIB), 11 * MIB)
    assert read_memory(root).available_bytes == 0


def test_an_old_kernel_without_memavailable(tmp_path):
    write(tmp_path / "proc/meminfo", "MemTotal: 1000 kB\nMemFree: 100 kB\nCached: 50 kB\n")
    assert read_memory(tmp_path).available_bytes == 150 * 1024


def test_the_real_machine_has_memory():
    memory = read_memory()
    assert 0 < memory.available_bytes <= memory.total_bytes


def test_cpu_quota_v1_and_v2(machine):
    root = machine("2:cpu,cpuacct:/job\n", MOUNTS_V1)
    write(root / "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us", "150000\n")
    write(root / "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us", "100000\n")
    write(root / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    write(root / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    assert cpu_quota(root) == 1.5
    root = machine("0::/a/b\n", MOUNTS_V2)
    write(root / "sys/fs/cgroup/a/cpu.max", "50000 100000\n")
    write(root / "sys/fs/cgroup/a/b/cpu.max", "max 100000\n")
    assert cpu_quota(root) == 0.5
    assert default_threads(root) == (1, 1)


def test_default_threads_are_the_cores_not_the_hardware_threads(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    assert default_threads(tmp_path) == (8, 8)
    write(tmp_path / "sys/devices/system/cpu/smt/active", "1\n")
    assert default_threads(tmp_path) == (4, 8)
