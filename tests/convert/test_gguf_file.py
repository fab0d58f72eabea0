"""Raw GGUF editing: nothing is lost, the output is whole or absent, hostile files are refused."""

import errno
import itertools
import os
import re
import resource
import signal
import struct
import threading
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from gguf_samples import contents, in_child, tensors, write_sample

from mobile_gguf.convert import meter
from mobile_gguf.convert.gguf.data import Kv, TensorPlan
from mobile_gguf.convert.gguf.file import GgufSource, update_gguf, write_gguf
from mobile_gguf.errors import MobileError, ModelFormatError, ModelNotFoundError, UsageError
from mobile_gguf.files import atomic
from mobile_gguf.wording import format_duration


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("gguf") / "sample.gguf")


def copy(source, out, **how):
    with GgufSource.open(source) as opened:
        return write_gguf(out, opened.kv, opened.tensors, opened.alignment, **how)


# reading and writing


@pytest.mark.parametrize("alignment", [0, 64, 4096])
def test_a_copy_is_the_file(tmp_path, alignment):
    source = write_sample(tmp_path / "a.gguf", alignment=alignment)
    n_bytes = copy(source, tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == source.read_bytes()
    assert n_bytes == source.stat().st_size
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "b.gguf"]


def test_parts_are_joined(tmp_path, sample):
    first = write_sample(tmp_path / "s.gguf", split_max_tensors=4)
    assert len(list(tmp_path.glob("*.gguf"))) == 3
    copy(first, tmp_path / "joined.gguf")
    assert contents(tmp_path / "joined.gguf") == contents(sample)
    joined, expected = tensors(tmp_path / "joined.gguf"), tensors(sample)
    assert list(joined) == list(expected)
    assert all(np.array_equal(joined[name].data, expected[name].data) for name in expected)


def test_parts_that_do_not_fit_together(tmp_path):
    first = write_sample(tmp_path / "s.gguf", split_max_tensors=4)
    second = tmp_path / "s-00002-of-00003.gguf"
    raw = second.read_bytes()
    second.write_bytes(raw.replace(b"blk.1.ffn_gate_exps.weight", b"blk.0.ffn_gate_exps.weight"))
    with pytest.raises(ModelFormatError, match=r"blk\.0\.ffn_gate_exps\.weight stands in two parts"):
        GgufSource.open(first)
    second.write_bytes(raw)
    whole = first.read_bytes()
    value = whole.index(b"split.tensors.count") + len("split.tensors.count") + 4
    first.write_bytes(whole[:value] + struct.pack("<I", 12) + whole[value + 4 :])
    with pytest.raises(ModelFormatError, match="its parts hold 11 tensors, they should hold 12"):
        GgufSource.open(first)
    second.unlink()
    with pytest.raises(ModelNotFoundError, match="part 2 of 3"):
        GgufSource.open(first)


@pytest.mark.parametrize(
    ("value", "types", "read"),
    [
        (True, [7], True),
        (3, [4], 3),
        (-3, [5], -3),
        (1 << 40, [10], 1 << 40),
        (-(1 << 40), [11], -(1 << 40)),
        (0.5, [6], 0.5),
        ("grün", [8], "grün"),
        ([1, 2], [9, 4], [1, 2]),
        ([True, False], [9, 7], [True, False]),
        (["a", ""], [9, 8], ["a", ""]),
        (np.arange(3, dtype=np.uint16), [9, 2], [0, 1, 2]),
        (np.float64(0.1), [12], 0.1),
    ],
)
def test_metadata_values(tmp_path, sample, value, types, read):
    out = update_gguf(sample, set={"mobile.value": value}, out=tmp_path / "o.gguf")
    field = gguf.GGUFReader(out).fields["mobile.value"]
    assert [int(kind) for kind in field.types] == types
    assert field.contents() == read
    with GgufSource.open(out) as opened:
        assert opened.metadata["mobile.value"] == read


@pytest.mark.parametrize("value", [None, {}, [], [1, "a"], [[1]], object(), b"raw"])
def test_metadata_that_cannot_be_stored(value):
    with pytest.raises(UsageError, match=r"mobile\.x"):
        Kv.of("mobile.x", value)


@pytest.mark.parametrize("array", [np.zeros(()), np.zeros((0, 3)), np.zeros((1,) * 5), np.array(["a"])])
def test_tensors_that_cannot_be_stored(array):
    with pytest.raises(UsageError, match=r"mobile\.x"):
        TensorPlan.of("mobile.x", array)


def test_update(tmp_path, sample):
    path = tmp_path / "m.gguf"
    path.write_bytes(sample.read_bytes())
    path.chmod(0o640)
    hotness, order = np.random.default_rng(1).random((2, 3)), np.arange(6).reshape(2, 3)
    update_gguf(path, set={"mobile.a": 1, "general.name": "New"}, add_tensors={"mobile.hotness": hotness})
    update_gguf(path, set={"mobile.b.x": 2, "mobile.c": "kept"}, add_tensors={"mobile.order": order})
    update_gguf(path, drop=["mobile.b.", "mobile.hot"], set={"mobile.a": 5})
    assert path.stat().st_mode & 0o777 == 0o640
    read, before = contents(path, ours=True), contents(sample)
    assert {key: read[key][1] for key in read if key.startswith("mobile.")} == {
        "mobile.a": 5, "mobile.c": "kept", "mobile.version": 1,
    }  # fmt: skip
    assert read["general.name"][1] == "New"
    assert {k: read[k] for k in before if k != "general.name"} == {
        k: v for k, v in before.items() if k != "general.name"
    }
    after, original = tensors(path), tensors(sample)
    assert list(after) == [*original, "mobile.order"]
    assert np.array_equal(after["mobile.order"].data, order)
    assert all(np.array_equal(after[name].data, original[name].data) for name in original)
    with GgufSource.open(path) as opened:
        assert np.array_equal(opened.array("mobile.order"), order)
        with pytest.raises(ModelFormatError, match=r"no tensor mobile\.hotness"):
            opened.array("mobile.hotness")


def test_an_update_that_fails_leaves_the_file(tmp_path, sample):
    path = tmp_path / "m.gguf"
    path.write_bytes(sample.read_bytes())

    def interrupt(_phase, _done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update_gguf(path, set={"mobile.a": 1}, progress=interrupt)
    assert path.read_bytes() == sample.read_bytes()
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_updating_a_split_file_needs_an_output(tmp_path):
    first = write_sample(tmp_path / "s.gguf", split_max_tensors=4)
    with pytest.raises(UsageError, match="split into 3"):
        update_gguf(first, set={"mobile.a": 1})
    update_gguf(first, set={"mobile.a": 1}, out=tmp_path / "one.gguf")
    assert contents(tmp_path / "one.gguf", ours=True)["mobile.a"][1] == 1


@pytest.mark.parametrize("link", [False, True])
def test_the_output_may_not_be_the_input(tmp_path, sample, link):
    out = sample
    if link:
        out = tmp_path / "link.gguf"
        out.symlink_to(sample)
    with pytest.raises(UsageError, match="is the file that is read"):
        update_gguf(sample, set={"mobile.a": 1}, out=out)


@pytest.mark.parametrize(
    ("version", "words"), [(2, "update mobile-gguf"), (0, "mobile.version"), ("1", "'1'")]
)
def test_versions_of_the_format(tmp_path, sample, version, words):
    out = update_gguf(sample, set={"mobile.version": version}, out=tmp_path / "o.gguf")
    with pytest.raises(ModelFormatError, match=words):
        GgufSource.open(out)


# files that are hostile


def raw_file(tmp_path, entries=(), rows=(), n_entries=None, n_rows=None, data=256, alignment=None):
    """A GGUF with these raw metadata entries and rows of the tensor table."""
    if alignment is not None:
        entries = [*entries, text("general.alignment") + alignment]
    header = b"GGUF" + struct.pack("<IQQ", 3, n_rows or len(rows), n_entries or len(entries))
    body = header + b"".join(entries) + b"".join(rows)
    path = tmp_path / "hostile.gguf"
    path.write_bytes(body + bytes(-len(body) % 32) + bytes(data))
    return path


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def row(name: str | bytes = "a", shape=(8,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


U32 = struct.pack("<II", 4, 1)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"entries": [text("k") + U32, text("k") + U32]}, "metadata k is there twice"),
        ({"rows": [row("a"), row("a", offset=32)]}, "tensor a is there twice"),
        ({"rows": [row("a", (16,)), row("b", offset=32)]}, "overlap"),
        ({"rows": [row("a"), row("b")]}, "overlap"),
        ({"rows": [row("a", offset=1 << 40)]}, "truncated"),
        ({"rows": [row("a", offset=(1 << 64) - 32)]}, "truncated"),
        ({"rows": [row("a", (1 << 61,))]}, "truncated"),
        ({"rows": [row("a", (1 << 40, 1 << 40))]}, "impossible shape"),
        ({"rows": [row("a", (0,))]}, "impossible shape"),
        ({"rows": [row("a", ())]}, "0 dimensions"),
        ({"rows": [row("a", (1,) * 5)]}, "5 dimensions"),
        ({"rows": [row("a", offset=4)]}, "not aligned"),
        ({"rows": [row("a", kind=8)]}, "not a multiple of 32"),
        ({"rows": [row("n" * 64)]}, "a tensor's name claims 64 bytes"),
        ({"rows": [row(b"\xff\xfe")]}, "no UTF-8"),
        ({"rows": [row("a\nb")]}, "control characters"),
        ({"entries": [text("\x1b[2J") + U32]}, "control characters"),
        ({"entries": [text("") + U32]}, "claims 0 bytes"),
        ({"entries": [text("k") + struct.pack("<I", 99)]}, "unknown type 99"),
        ({"entries": [text("k") + struct.pack("<IIQ", 9, 9, 1)]}, "array of the unsupported type 9"),
        ({"entries": [text("k") + struct.pack("<IIQ", 9, 8, 1 << 60)]}, "claims 1152921504606846976 strings"),
        ({"entries": [text("k") + struct.pack("<IIQ", 9, 4, 1 << 60)]}, "truncated"),
        ({"n_entries": 1 << 60}, "claims 1152921504606846976 metadata"),
        ({"n_rows": 1 << 40}, "1099511627776 tensors"),
        ({"alignment": struct.pack("<II", 4, 48)}, "not a power of two"),
        ({"alignment": struct.pack("<II", 4, 0)}, "not a power of two"),
        ({"alignment": struct.pack("<IQ", 10, 64)}, "as a 32-bit number"),
        ({"alignment": struct.pack("<I?", 7, True)}, "as a 32-bit number"),
    ],
)
def test_hostile_headers(tmp_path, what, words):
    path = raw_file(tmp_path, **what)
    with pytest.raises(ModelFormatError, match=words) as caught:
        GgufSource.open(path)
    assert "hostile.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sparse_file_of_nothing_ends_soon_and_in_little_memory(tmp_path):
    path = tmp_path / "sparse.gguf"
    strings = struct.pack("<IIQ", 9, 8, 1 << 21)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 20, 1 << 15) + text("k") + strings)
    os.truncate(path, 1 << 40)
    done = in_child(
        "import resource, sys; from pathlib import Path;"
        "from mobile_gguf.convert.gguf.file import GgufSource;"
        "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30)); GgufSource.open(Path(sys.argv[1]))",
        path,
    )
    assert "ModelFormatError" in done.stderr
    assert "claims 0 bytes" in done.stderr


@pytest.mark.parametrize("change", ["cut", "write"])
def test_a_file_that_changes_while_it_is_read(tmp_path, sample, change):
    path = tmp_path / "m.gguf"
    path.write_bytes(sample.read_bytes())
    with GgufSource.open(path) as opened:
        if change == "cut":
            os.truncate(path, path.stat().st_size - 8192)
        else:
            os.utime(path, ns=(1, 1))
        with pytest.raises(ModelFormatError, match=r"m\.gguf (became shorter|was changed) while it was read"):
            write_gguf(tmp_path / "o.gguf", opened.kv, opened.tensors)
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such model"):
        GgufSource.open(tmp_path / "none.gguf")
    with pytest.raises(ModelFormatError, match="directory"):
        GgufSource.open(tmp_path)
    with pytest.raises(ModelNotFoundError):
        GgufSource.open("a\0b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFormatError, match="not a regular file"):
        GgufSource.open(tmp_path / "pipe")


# whole or absent

_KILLED = """
import os, signal, sys
from dataclasses import dataclass, replace
from pathlib import Path
from mobile_gguf.convert.gguf.file import GgufSource, write_gguf
from mobile_gguf.convert import meter
from mobile_gguf.convert.gguf.data import Data

source, out, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

@dataclass(frozen=True)
class Deadly:
    data: Data
    number: int
    n_bytes: int
    def chunks(self):
        if self.number == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from self.data.chunks()

with GgufSource.open(source) as s:
    tensors = [replace(t, data=Deadly(t.data, n, t.n_bytes)) for n, t in enumerate(s.tensors)]
    write_gguf(out, s.kv, tensors, s.alignment)
"""


@pytest.mark.parametrize("at", [0, 5, 10])
def test_kill_leaves_no_output_and_the_next_run_none_of_its_remains(tmp_path, sample, at):
    out = tmp_path / "o.gguf"
    assert in_child(_KILLED, sample, out, at).returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["o.gguf.partial"]
    copy(sample, out)
    assert out.read_bytes() == sample.read_bytes()
    assert os.listdir(tmp_path) == ["o.gguf"]


def test_a_file_that_is_there_survives_a_kill(tmp_path, sample):
    out = tmp_path / "o.gguf"
    out.write_bytes(b"before")
    assert in_child(_KILLED, sample, out, 7).returncode == -signal.SIGKILL
    assert out.read_bytes() == b"before"


def test_two_writers_of_one_file(tmp_path, sample):
    out = tmp_path / "o.gguf"
    inside, leave = threading.Event(), threading.Event()

    def wait(_phase, _done):
        inside.set()
        leave.wait()

    first = threading.Thread(target=copy, args=(sample, out), kwargs={"progress": wait})
    first.start()
    try:
        assert inside.wait(300)
        with pytest.raises(MobileError, match="another process is writing it"):
            copy(sample, out)
    finally:
        leave.set()
        first.join()
    assert out.read_bytes() == sample.read_bytes()


def test_too_little_space_is_seen_before(tmp_path, sample, monkeypatch):
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    needed = sample.stat().st_size
    with pytest.raises(MobileError, match=rf"it needs {needed} bytes .*its disk has 1000 free"):
        copy(sample, tmp_path / "o.gguf")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up(tmp_path, sample, monkeypatch):
    real, room = os.write, [100_000]

    class Full:
        """The file, on a disk with room for so much."""

        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            room[0] -= len(data)
            if room[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(self.file.fileno(), data)

    monkeypatch.setattr("mobile_gguf.convert.gguf.file._write", lambda file, data: Full(file).write(data))
    with pytest.raises(MobileError, match="the disk is full"):
        copy(sample, tmp_path / "o.gguf")
    assert os.listdir(tmp_path) == []


def test_a_limit_on_file_sizes(tmp_path, sample):
    done = in_child(
        "import resource, sys; from pathlib import Path;"
        "from mobile_gguf.convert.gguf.file import update_gguf;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (65536, {resource.RLIM_INFINITY}));"
        "update_gguf(Path(sys.argv[1]), out=Path(sys.argv[2]))",
        sample,
        tmp_path / "o.gguf",
    )
    assert "larger than a file may be there" in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_written(tmp_path, sample):
    with pytest.raises(MobileError, match=r"cannot write .*none/o\.gguf"):
        copy(sample, tmp_path / "none" / "o.gguf")


def test_progress_says_tensor_bytes_and_time_left(tmp_path, sample, monkeypatch):
    seconds = itertools.count(0, 60)  # a minute between one look at the clock and the next
    monkeypatch.setattr(meter, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    said = []
    copy(sample, tmp_path / "o.gguf", progress=lambda phase, done: said.append((phase, done)), what="copying")
    assert said[0][0].startswith("copying: tensor 1/11, ")
    assert " KiB of " in said[0][0]
    for place, (phase, done) in enumerate(said[:-2], 1):
        assert phase.endswith(f", ETA {format_duration(60 * place * (1 - done) / done)}"), (phase, done)
    assert re.search(r", ETA \d+:\d\d$", said[0][0])
    assert said[-1][0] == "copying: waiting for the disk"
    assert said[-1][1] == 1.0
