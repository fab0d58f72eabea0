"""Memory cgroups on fixture trees of both versions, and on the real kernel where it lets us."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mobile_gguf.memory import cap as memory_cap
from mobile_gguf.memory.cap import CgroupError, MemoryCgroup, create_memory_cgroup

UNLIMITED_V1 = "9223372036854771712"
FILES = {
    1: {
        "memory.limit_in_bytes": UNLIMITED_V1, "memory.memsw.limit_in_bytes": UNLIMITED_V1,
        "memory.max_usage_in_bytes": "8192",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n", "cgroup.procs": "",
    },
    2: {
        "memory.max": "max", "memory.swap.max": "max", "memory.peak": "8192",
        "memory.events": "low 0\nhigh 0\nmax 3\noom 1\noom_kill 1\n", "cgroup.procs": "",
        "cgroup.controllers": "memory", "cgroup.subtree_control": "",
    },
}  # fmt: skip

Tree = Callable[..., Path]


class FakeOs:
    """``os`` for memory_cap, on an ordinary directory: a new group gets the kernel's files, and loses them
    with its directory. ``refusing`` directories take no groups, ``busy`` groups cannot be removed."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.refusing: set[Path] = set()
        self.busy: set[Path] = set()
        self.missing: set[str] = set()  # files this kernel does not have

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def mkdir(self, path: Path) -> None:
        if path.parent in self.refusing:
            raise PermissionError(errno.EACCES, "Permission denied")
        os.mkdir(path)
        for name, text in FILES[self.version].items():
            if name not in self.missing:
                (path / name).write_text(text)

    def rmdir(self, path: Path) -> None:
        if path in self.busy:
            raise OSError(errno.EBUSY, "Device or resource busy")
        for child in path.iterdir():
            child.unlink()
        os.rmdir(path)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], FakeOs]:
    def install(version: int) -> FakeOs:
        fake = FakeOs(version)
        monkeypatch.setattr(memory_cap, "os", fake)
        monkeypatch.setattr(memory_cap, "_REMOVE_PAUSE_S", 0)
        return fake

    return install


def v1_tree(root: Path, group: str = "/user/job", limited: str = "") -> Path:
    """A machine of version 1 whose process is in ``group``; the group ``limited`` has a limit."""
    proc, top = root / "proc/self", root / "sys/fs/cgroup/memory"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(f"4:memory:{group}\n1:cpu:/\n0::/\n")
    (proc / "mountinfo").write_text(
        "30 1 0:20 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "31 1 0:21 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    )
    (root / "sys/fs/cgroup/unified").mkdir(parents=True)
    place = top
    for name in ["", *group.strip("/").split("/")]:
        place = place / name if name else place
        place.mkdir(parents=True, exist_ok=True)
        inside = "/" + str(place.relative_to(top))
        limit = str(1 << 30) if inside == limited else UNLIMITED_V1
        for file, text in FILES[1].items():
            (place / file).write_text(limit if file == "memory.limit_in_bytes" else text)
    return top


def v2_tree(root: Path, group: str, limited: str = "") -> Path:
    """A machine of version 2; every group above ``group`` hands the memory controller down."""
    proc, top = root / "proc/self", root / "sys/fs/cgroup"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(f"0::{group}\n")
    (proc / "mountinfo").write_text("30 1 0:20 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    names = group.strip("/").split("/")
    place = top
    for depth, name in enumerate(["", *names]):
        place = place / name if name else place
        place.mkdir(parents=True, exist_ok=True)
        for file, text in FILES[2].items():
            (place / file).write_text(text)
        if depth < len(names):
            (place / "cgroup.subtree_control").write_text("cpu memory pids")
        if "/" + str(place.relative_to(top)) == limited:
            (place / "memory.max").write_text(str(1 << 30))
    return top


@pytest.mark.parametrize("version", [1, 2])
def test_group_is_made_limited_read_and_removed(
    tmp_path: Path, kernel: Callable[[int], FakeOs], version: int
) -> None:
    kernel(version)
    top = v1_tree(tmp_path) if version == 1 else v2_tree(tmp_path, "/user.slice/app.scope")
    with create_memory_cgroup(300 << 20, "test", root=tmp_path) as group:
        assert (group.directory.parent, group.version, group.limit_bytes) == (top, version, 300 << 20)
        limits = {
            1: {"memory.limit_in_bytes": "314572800", "memory.memsw.limit_in_bytes": "314572800"},
            2: {"memory.max": "314572800", "memory.swap.max": "0"},
        }
        for name, text in limits[version].items():
            # the kernel replaces, an ordinary file keeps the longer text's end
            assert (group.directory / name).read_text().startswith(text)
        group.attach(4321)
        assert (group.directory / "cgroup.procs").read_text() == "4321"
        assert group.peak_bytes() == 8192
        assert group.oom_kills() == 1
    assert not group.directory.exists()


def test_two_groups_do_not_meet(tmp_path: Path, kernel: Callable[[int], FakeOs]) -> None:
    kernel(1)
    v1_tree(tmp_path)
    with (
        create_memory_cgroup(1 << 20, root=tmp_path) as one,
        create_memory_cgroup(1 << 20, root=tmp_path) as two,
    ):
        assert one.directory != two.directory


@pytest.mark.parametrize("version", [1, 2])
def test_a_cap_stays_inside_the_limit_in_force(
    tmp_path: Path, kernel: Callable[[int], FakeOs], version: int
) -> None:
    kernel(version)
    if version == 1:
        top = v1_tree(tmp_path, "/docker/abc/job", limited="/docker/abc")
    else:
        top = v2_tree(tmp_path, "/docker/abc/job", limited="/docker/abc")
    with create_memory_cgroup(1 << 20, root=tmp_path) as group:
        assert group.directory.parent == top / "docker/abc"


def test_places_that_refuse_are_passed_over(tmp_path: Path, kernel: Callable[[int], FakeOs]) -> None:
    """A user on version 2: only the delegated part of the tree is theirs."""
    fake = kernel(2)
    top = v2_tree(tmp_path, "/user.slice/user-1000.slice/app.slice/run.scope")
    fake.refusing = {top, top / "user.slice", top / "user.slice/user-1000.slice"}
    with create_memory_cgroup(1 << 20, root=tmp_path) as group:
        assert group.directory.parent == top / "user.slice/user-1000.slice/app.slice"


def test_controller_is_handed_down_where_it_can_be(tmp_path: Path, kernel: Callable[[int], FakeOs]) -> None:
    kernel(2)
    top = v2_tree(tmp_path, "/job")
    (top / "cgroup.subtree_control").write_text("")
    with create_memory_cgroup(1 << 20, root=tmp_path):
        assert (top / "cgroup.subtree_control").read_text() == "+memory"


def test_where_nothing_may_be_made_the_reason_is_said(
    tmp_path: Path, kernel: Callable[[int], FakeOs]
) -> None:
    fake = kernel(2)
    top = v2_tree(tmp_path, "/job")
    fake.refusing = {top}
    (top / "job/cgroup.controllers").write_text("cpu")
    with pytest.raises(CgroupError) as caught:
        create_memory_cgroup(1 << 20, root=tmp_path)
    text = str(caught.value)
    assert text.startswith("memory cannot be capped here (run as root, or inside `systemd-run --user")
    assert f"{top} takes no new group (Permission denied)" in text
    assert f"{top / 'job'} has no memory controller" in text
    assert "\n" not in text


def test_without_cgroups(tmp_path: Path) -> None:
    with pytest.raises(CgroupError, match="no memory cgroup hierarchy is mounted"):
        create_memory_cgroup(1 << 20, root=tmp_path)
    with pytest.raises(CgroupError, match="more than 0 bytes, not -1"):
        create_memory_cgroup(-1, root=tmp_path)


def test_group_without_a_limit_file_is_not_left_behind(
    tmp_path: Path, kernel: Callable[[int], FakeOs]
) -> None:
    fake = kernel(1)
    fake.missing = {"memory.limit_in_bytes"}
    top = v1_tree(tmp_path)
    before = set(top.rglob("*"))
    with pytest.raises(CgroupError, match=r"memory\.limit_in_bytes does not take '1048576'"):
        create_memory_cgroup(1 << 20, root=tmp_path)
    assert set(top.rglob("*")) == before


def test_kernels_without_swap_accounting_will_do(tmp_path: Path, kernel: Callable[[int], FakeOs]) -> None:
    kernel(1).missing = {"memory.memsw.limit_in_bytes"}
    v1_tree(tmp_path)
    with create_memory_cgroup(1 << 20, root=tmp_path) as group:
        assert (group.directory / "memory.limit_in_bytes").read_text().startswith("1048576")


def test_busy_groups_and_lost_ones(tmp_path: Path, kernel: Callable[[int], FakeOs]) -> None:
    fake = kernel(1)
    v1_tree(tmp_path)
    group = create_memory_cgroup(1 << 20, root=tmp_path)
    fake.busy = {group.directory}
    with pytest.raises(CgroupError, match=r"cannot remove the cgroup .* busy"):
        group.remove()
    fake.busy = set()
    group.remove()
    group.remove()  # gone already: nothing to say
    with pytest.raises(CgroupError, match="does not take '1'"):
        group.attach(1)


HUNGRY = "import sys; sys.stdin.read(1); x = bytearray(200 << 20); print(len(x))"


@pytest.fixture
def real_group() -> MemoryCgroup:
    try:
        return create_memory_cgroup(64 << 20, "mobile-gguf-test")
    except CgroupError as error:
        pytest.skip(str(error))


def test_the_kernel_enforces_the_cap(real_group: MemoryCgroup) -> None:
    with real_group as group:
        process = subprocess.Popen(
            [sys.executable, "-c", HUNGRY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            group.attach(process.pid)
        except CgroupError as error:
            process.kill()
            process.wait()
            pytest.skip(str(error))
        output, _ = process.communicate("x")
        assert process.returncode == -9
        assert output == ""
        assert group.oom_kills() == 1
        peak = group.peak_bytes()
        assert peak is None or 32 << 20 < peak <= 64 << 20
    assert not group.directory.exists()
