"""Downloads that break: gone on with where they stopped, checked, and refused where they are wrong."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_stub import LARGE, HubStub, blob, partial

from mobile_gguf.errors import MobileError
from mobile_gguf.hub import HubError, find_pulled, parse_reference, pull
from mobile_gguf.hub.download import DamagedError
from mobile_gguf.hub.meter import Meter
from mobile_gguf.wording import format_duration

pytestmark = pytest.mark.slow

pytest.importorskip("huggingface_hub")
Command = Callable[..., tuple[int, str, str]]

pytest.importorskip("huggingface_hub")


# cut, killed, damaged


@pytest.mark.parametrize("after", [0, 100_000, len(LARGE) - 1])
def test_a_cut_is_gone_on_with_at_once(hub: HubStub, hub_pauses: list[float], after: int) -> None:
    hub.breaks_off, hub.break_after, hub.breaks = "large-Q8_0.gguf", after, 2
    pulled = pull(parse_reference("hf:org/large"))
    assert pulled.path.read_bytes() == LARGE
    assert len(hub_pauses) == (2 if after < 200_000 else 1)
    assert pulled.received_bytes == len(LARGE)


def test_a_stopped_download_is_gone_on_with_by_the_next(hub: HubStub, hub_pauses: list[float]) -> None:
    hub.breaks_off, hub.break_after, hub.breaks = "large-Q8_0.gguf", 3_000_000, 1
    hub.refusals = []

    def stop(text: str, _done: float) -> None:
        if "connection broke" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(parse_reference("hf:org/large"), stop)
    assert not blob(LARGE).exists()
    assert find_pulled(parse_reference("hf:org/large")) is None
    kept = partial(LARGE).read_bytes()
    assert 0 < len(kept) <= 3_000_000
    assert kept == LARGE[: len(kept)]
    pulled = pull(parse_reference("hf:org/large"))
    assert pulled.path.read_bytes() == LARGE
    assert pulled.received_bytes == len(LARGE) - len(kept)
    assert hub.ranges[-1] == f"large-Q8_0.gguf:{len(kept)}"
    assert not partial(LARGE).exists()


def test_ctrl_c_and_kill_leave_what_came(hub: HubStub) -> None:
    """The real command, which gets SIGINT and then SIGKILL in the middle of the bytes."""
    size = 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        hub.holds_at = hub.sent_bytes + 2_000_000
        with subprocess.Popen(
            [sys.executable, "-m", "mobile_gguf", "pull", "hf:org/large"],
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            while not partial(LARGE).exists() or partial(LARGE).stat().st_size <= size:
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.02)
            process.send_signal(number)
            _, err = process.communicate()
        assert process.returncode == code
        assert "Traceback" not in err
        if number == signal.SIGINT:
            assert "stopped: `mobile-gguf pull hf:org/large` goes on from here" in err
        size = partial(LARGE).stat().st_size
        hub.holds_at = None
        assert partial(LARGE).read_bytes() == LARGE[:size]
    assert pull(parse_reference("hf:org/large")).received_bytes == len(LARGE) - size


def test_a_wrong_hash_is_refused_and_removed(hub: HubStub) -> None:
    hub.damaged["large-Q8_0.gguf"] = LARGE[:-1] + b"?"
    with pytest.raises(DamagedError, match="is not what the Hub has"):
        pull(parse_reference("hf:org/large"))
    assert not blob(LARGE).exists()
    assert not partial(LARGE).exists()
    assert find_pulled(parse_reference("hf:org/large")) is None


def test_a_damaged_start_is_fetched_again(hub: HubStub) -> None:
    partial(LARGE).parent.mkdir(parents=True)
    partial(LARGE).write_bytes(b"?" * 1000)
    told = []
    assert pull(parse_reference("hf:org/large"), lambda text, _: told.append(text)).path.read_bytes() == LARGE
    assert hub.ranges == ["large-Q8_0.gguf:1000", "large-Q8_0.gguf:0"]
    assert any("is damaged: fetching it again" in text for text in told)


@pytest.mark.parametrize("content", [LARGE, LARGE + b"more"])
def test_a_partial_that_is_whole_or_too_long(hub: HubStub, content: bytes) -> None:
    partial(LARGE).parent.mkdir(parents=True)
    partial(LARGE).write_bytes(content)
    assert pull(parse_reference("hf:org/large")).path.read_bytes() == LARGE


@pytest.mark.parametrize("served", [LARGE[:-5], LARGE + b"more"])
def test_a_file_of_another_length_is_refused(hub: HubStub, hub_pauses: list[float], served: bytes) -> None:
    hub.damaged["large-Q8_0.gguf"] = served
    hub.ranges_ignored = True
    with pytest.raises(HubError):
        pull(parse_reference("hf:org/large"))
    assert find_pulled(parse_reference("hf:org/large")) is None


def test_a_hub_that_ignores_ranges(hub: HubStub) -> None:
    partial(LARGE).parent.mkdir(parents=True)
    partial(LARGE).write_bytes(LARGE[:1000])
    hub.ranges_ignored = True
    assert pull(parse_reference("hf:org/large")).path.read_bytes() == LARGE


def test_a_partial_that_is_a_link_is_not_written_through(hub: HubStub, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"precious")
    partial(LARGE).parent.mkdir(parents=True)
    partial(LARGE).symlink_to(tmp_path / "mine")
    with pytest.raises(MobileError, match="cannot write"):
        pull(parse_reference("hf:org/large"))
    assert (tmp_path / "mine").read_bytes() == b"precious"


# disks


def test_too_little_space_is_said_before_a_byte_is_asked_for(
    hub: HubStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("mobile_gguf.hub.download.shutil.disk_usage", lambda _path: usage)
    with pytest.raises(MobileError, match=r"not enough space for 4\.9 MiB more .* set HF_HOME"):
        pull(parse_reference("hf:org/large"))
    assert not any("resolve" in request for request in hub.requests)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB; skips where one may not be mounted."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True)
    if done.returncode:
        pytest.skip("no file system may be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_fills_up_on_the_way(
    hub: HubStub, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setenv("HF_HUB_CACHE", str(small_disk))
    roomy = shutil.disk_usage("/")._replace(free=1 << 40)
    monkeypatch.setattr("mobile_gguf.hub.download.shutil.disk_usage", lambda _path: roomy)
    with pytest.raises(MobileError, match=r"the disk is full.*HF_HOME"):
        pull(parse_reference("hf:org/large"))
    assert find_pulled(parse_reference("hf:org/large")) is None
    kept = partial(LARGE).read_bytes()
    assert kept
    assert kept == LARGE[: len(kept)]


# what is said of a transfer


def test_meter_and_durations() -> None:
    told: list[tuple[str, float]] = []
    meter = Meter("x", 2048, lambda text, done: told.append((text, done)))
    meter.add(2048)
    assert told[-1][0].startswith("x: 2.0 KiB of 2.0 KiB")
    assert told[-1][1] == 1
    assert [format_duration(s) for s in (0.4, 59, 61, 7650)] == ["0 s", "59 s", "1:01", "2:07:30"]
