"""Conversations on disk: found again if all of them is as it was written, within a limit; no engine."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobile_gguf.files.atomic import partial_path
from mobile_gguf.files.lock import exclusive, try_lock
from mobile_gguf.generate.sessions.prefix_cache import Checkpoint, Kept, PrefixCache
from mobile_gguf.generate.sessions.session_files import DamagedError, Saved, read, read_head
from mobile_gguf.generate.sessions.session_store import SessionFolder, SessionStore
from mobile_gguf.generate.sessions.sessions import Sessions

MIB = 1 << 20
FITS = {"model": "a", "engine": "e", "flash attention": "off"}


def text(seed: int, n: int = 100) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(1000) for _ in range(n)]


def state(n_bytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, n_bytes, np.uint8)


def kept(tokens: list[int], n_bytes: int = 1000, points: tuple[int, ...] | None = None) -> Kept:
    marks = None if points is None else [Checkpoint(at, state(50, at)) for at in points]
    return Kept(tokens, len(tokens), state(n_bytes), marks)


class Store(SessionStore):
    """A store of ``folder`` that remembers what it told."""

    def __init__(self, folder: Path, limit: int = MIB, model: str = "m.gguf", **fits: str) -> None:
        self.told: list[str] = []
        super().__init__(SessionFolder(folder), limit, FITS | fits, model, 10_000, self.told.append)

    def found(self, prompt: list[int]) -> Kept | None:
        saved, _ = self.best(prompt, only_big=True)
        return None if saved is None else self.take(saved)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.session"))


@pytest.mark.parametrize("points", [None, (40, 90)])
def test_another_process_goes_on_with_what_was_written(
    tmp_path: Path, points: tuple[int, ...] | None
) -> None:
    folder = tmp_path / "cache" / "sessions"
    one = kept(text(1), 5000, points)
    Store(folder).save(one)
    (file,) = files(folder)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    back = Store(folder).found([*text(1), 5, 6])
    assert back is not None
    assert (back.tokens, back.n_big, back.is_saved) == (one.tokens, one.n_big, True)
    assert np.array_equal(back.state, one.state)
    assert (back.checkpoints is None) == (points is None)
    for mine, theirs in zip(back.checkpoints or [], one.checkpoints or [], strict=True):
        assert mine.n_tokens == theirs.n_tokens
        assert np.array_equal(mine.state, theirs.state)


def test_a_prompt_finds_the_text_that_saves_most(tmp_path: Path) -> None:
    store = Store(tmp_path)
    system = text(9, 50)
    for i in range(3):
        store.save(kept(system + text(i, 40 + i)))
    saved, n = store.best([*system, *text(2, 42), 7], only_big=True)
    assert (saved and len(saved.tokens), n) == (92, 92)
    assert store.best([*system, 5000, 5001], only_big=True)[1] == 50
    assert store.best(text(8), only_big=True) == (None, 0)
    assert store.best([*system[:20], 5000], only_big=True) == (None, 0), "fewer are computed sooner"
    long = kept(text(7, 5000))
    store.save(long)
    assert store.best([*long.tokens[:100], 5000], only_big=True) == (None, 0), "5000 are read for 100"


def test_a_text_takes_the_place_of_what_it_has_all_of(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(kept(text(1, 200)[:100]))
    store.save(kept(text(2)))
    store.save(kept(text(1, 200)))
    assert sorted(len(read_head(file).tokens) for file in files(tmp_path)) == [100, 200]
    before = files(tmp_path)
    store.save(kept(text(1, 200)[:100]))
    store.save(kept(text(1, 200)))
    assert files(tmp_path) == before, "what is there is not written again"
    little = replace(kept(text(1, 200) + text(3)), n_big=50)
    store.save(little)
    assert len(files(tmp_path)) == 3, "rows that all experts wrote are worth more"


@pytest.mark.parametrize("where", [0, 10, 23, 30, 60, 400, 1000, -40, -1, "cut", "empty"])
def test_a_damaged_file_is_dropped_in_a_line(tmp_path: Path, where: int | str) -> None:
    store = Store(tmp_path)
    store.save(kept(text(1), points=(60,)))
    (file,) = files(tmp_path)
    data = bytearray(file.read_bytes())
    if where == "cut":
        del data[-100:]
    elif where == "empty":
        data.clear()
    else:
        data[int(where)] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError):
        read(file)
    again = Store(tmp_path)
    assert again.found([*text(1), 5]) is None
    assert again.best([*text(1), 5], only_big=True) == (None, 0)
    assert len(again.told) <= 1
    again.save(kept(text(1)))
    if isinstance(where, str) or where < 0 or where > 400:
        assert again.told == [] or "damaged" in again.told[0]
    assert Store(tmp_path).found([*text(1), 5]) is not None, "its place is taken"


def heads() -> dict[str, bytes]:
    """Files that are no sessions of this version."""
    magic = b"mobile-gguf session 1\n"

    def head(header: bytes) -> bytes:
        return magic + len(header).to_bytes(4, "little") + header

    whole = {"fits": FITS, "model": "m", "n_tokens": 1, "n_big": 1, "state_bytes": 0, "checkpoints": None}
    return {
        "noise": bytes(state(5000)),
        "of another version": magic.replace(b"1", b"2") + bytes(900),
        "no JSON": head(b"{"),
        "nested": head(b"[" * 100_000),
        "no object": head(b"[1]") + bytes(900),
        "tokens without end": head(json.dumps(whole | {"n_tokens": 1 << 60}).encode()),
        "fewer than none": head(json.dumps(whole | {"state_bytes": -9}).encode()),
        "a long header": magic + b"\xff" * 900,
    }


@pytest.mark.parametrize("kind", heads())
def test_a_foreign_file_is_told_in_one_line_and_goes_first(tmp_path: Path, kind: str) -> None:
    content = heads()[kind].ljust(3500, b"-")
    (tmp_path / "foreign.session").write_bytes(content)
    store = Store(tmp_path, limit=len(content) + 500)
    for _ in range(3):
        assert store.best([*text(1), 5], only_big=True) == (None, 0)
    (line,) = store.told
    assert "damaged, or of another version" in line
    store.save(kept(text(1), 1500))
    store.save(kept(text(2, 90), 500))
    assert not (tmp_path / "foreign.session").exists()
    assert store.found([*text(1), 5]) is not None


def test_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "folder.session").mkdir()
    (tmp_path / "link.session").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.session")
    store = Store(tmp_path, limit=2000)
    for i in range(3):
        store.save(kept(text(i), 1000))
    assert store.found([*text(2), 5]) is not None
    assert store.told == []
    assert {path.name for path in tmp_path.iterdir()} >= {"folder.session", "link.session", "pipe.session"}


def test_what_does_not_fit_is_not_used_and_told_once(tmp_path: Path) -> None:
    Store(tmp_path).save(kept(text(1)))
    otherwise: dict[str, Any] = {"flash attention": "on"}
    other = Store(tmp_path, **otherwise)
    for _ in range(2):
        assert other.found([*text(1), 5]) is None
    assert other.told == [
        "a saved conversation of 100 tokens is not used: it was made with flash attention off, now on"
    ]
    engine = Store(tmp_path, engine="f")
    assert engine.found([*text(1), 5]) is None
    assert "another build" in engine.told[0]
    changed = Store(tmp_path, model="m.gguf")
    changed._fits = FITS | {"model": "b"}
    assert changed.found([*text(1), 5]) is None
    assert "another file then" in changed.told[0]
    stranger = Store(tmp_path, model="n.gguf")
    stranger._fits = FITS | {"model": "b"}
    assert stranger.found([*text(1), 5]) is None
    assert stranger.told == [], "another model's conversations are no news"
    assert Store(tmp_path, model="moved.gguf").found([*text(1), 5]) is not None


def test_a_context_that_is_too_short_does_not_take_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(kept(text(1)))
    store._n_max = 99
    assert store.best([*text(1)[:80], 5], only_big=True) == (None, 0)


def test_the_limit_holds_and_the_least_worthy_goes_first(tmp_path: Path) -> None:
    store, chance = Store(tmp_path, limit=20_000), random.Random(3)
    for i in range(60):
        store.save(kept(text(i, chance.randrange(40, 400)), chance.randrange(1, 9000)))
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 20_000
    assert store.told == []
    before = files(tmp_path)
    store.save(kept(text(99), 30_000))
    assert files(tmp_path) == before, "what is larger than all may be drops nothing"
    long, short = kept(text(100, 400), 9000), kept(text(101, 50), 9000)
    for file in before:
        os.utime(file, (0, 0))
    store.save(long)
    store.save(short)
    store.save(kept(text(102, 60), 9000))
    left = [len(read_head(file).tokens) for file in files(tmp_path)]
    assert 400 in left
    assert 50 not in left


def test_the_oldest_checkpoints_go_where_all_do_not_fit(tmp_path: Path) -> None:
    store = Store(tmp_path, limit=20_000)
    one = kept(text(1), 4000)
    one.checkpoints = [Checkpoint(at, state(3000)) for at in (20, 40, 60)]
    store.save(one)
    back = store.found([*text(1), 5])
    assert back is not None
    assert [point.n_tokens for point in back.checkpoints or []] == [60]


def test_a_folder_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    store = Store(blocked / "sessions")
    for i in range(2):
        store.save(kept(text(i)))
    assert store.best(text(1), only_big=True) == (None, 0)
    (line,) = store.told
    assert "not kept for the next start" in line


def test_a_text_that_goes_while_it_is_found_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, saved = Store(tmp_path), SessionFolder.saved
    store.save(kept(text(1, 60), 3000))

    def saved_and_gone(folder: SessionFolder) -> list[Saved]:
        found = saved(folder)
        for one in found:
            one.path.unlink()
        return found

    monkeypatch.setattr(SessionFolder, "saved", saved_and_gone)
    store.save(kept(text(1, 60), 3000))
    assert store.told == []
    assert len(files(tmp_path)) == 1


def test_a_file_gets_its_name_while_nobody_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks into a folder a file that is renamed would be seen under neither name."""
    locked, replace_file = [], os.replace

    def replacing(*paths: Path) -> None:
        descriptor = os.open(tmp_path / "lock", os.O_RDWR)
        locked.append(not try_lock(descriptor))
        os.close(descriptor)
        replace_file(*paths)

    monkeypatch.setattr(os, "replace", replacing)
    Store(tmp_path).save(kept(text(1), 3000))
    assert locked == [True]
    assert len(files(tmp_path)) == 1


def test_many_writers_share_a_folder(tmp_path: Path) -> None:
    stores = [Store(tmp_path, limit=30_000) for _ in range(4)]
    most, ends = 0, threading.Event()

    def look() -> None:
        nonlocal most
        folder = SessionFolder(tmp_path)
        while not ends.is_set():
            with exclusive(tmp_path / "lock"):  # or files come and go while they are counted
                most = max(most, folder.n_bytes)

    def work(store: Store, seed: int) -> None:
        for i in range(25):
            store.save(kept(text(seed + i % 7, 60 + i), 3000))
            if (one := store.found([*text(seed + i % 5, 60 + i), 1])) is not None:
                assert len(one.state) == 3000

    looking = threading.Thread(target=look)
    workers = [threading.Thread(target=work, args=(store, at % 2 * 3)) for at, store in enumerate(stores)]
    for thread in (looking, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    ends.set()
    looking.join()
    assert most <= 30_000
    assert [line for store in stores for line in store.told] == []
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".session"] == ["lock"]
    for file in files(tmp_path):
        read(file)


_CHILD = """
import sys
from pathlib import Path
from mobile_gguf.generate.sessions.session_files import SUFFIX
from mobile_gguf.files.atomic import replacing_file
with replacing_file(Path(sys.argv[1]) / ("x" + SUFFIX), 5000, 0o600) as file:
    file.truncate(5000)
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_writer_left_counts_until_it_is_dead_and_goes_then(tmp_path: Path) -> None:
    folder = SessionFolder(tmp_path)
    command = [sys.executable, "-c", _CHILD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"writing\n"
        partial = partial_path(tmp_path / "x.session")
        assert folder.n_bytes == 5000
        Store(tmp_path, limit=6000).save(kept(text(1), 900))
        assert files(tmp_path) == [], "the room is another's"
        assert partial.exists()
        child.send_signal(signal.SIGKILL)
    store = Store(tmp_path, limit=6000)
    assert store.found([*text(1), 5]) is None
    store.save(kept(text(1), 900))
    assert not partial.exists()
    assert len(files(tmp_path)) == 1
    assert store.told == []


_WRITER = """
import sys
from pathlib import Path
import numpy as np
from mobile_gguf.generate.sessions.prefix_cache import Kept
from mobile_gguf.generate.sessions.session_store import SessionFolder, SessionStore
store = SessionStore(SessionFolder(Path(sys.argv[1])), 5 << 20, {"model": "a"}, "m.gguf", 10_000, print)
for i in range(int(sys.argv[2]), 10_000):
    store.save(Kept([i] * 100, 100, np.full(1 << 20, i % 251, np.uint8)))
    print(i, flush=True)
"""


def test_writers_that_are_killed_leave_whole_files_and_no_others(tmp_path: Path) -> None:
    """At any point of a file, again and again: the next one goes on within the limit."""
    chance, first = random.Random(4), 0
    for mine in range(10_000, 10_005):
        command = [sys.executable, "-c", _WRITER, str(tmp_path), str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for _ in range(chance.randrange(1, 12)):
                first = int(child.stdout.readline()) + 1  # else than a number: something was told
            for _ in range(chance.randrange(200_000)):
                pass  # it is somewhere in the next one
            child.send_signal(signal.SIGKILL)
        store = SessionStore(SessionFolder(tmp_path), 5 * MIB, {"model": "a"}, "m.gguf", 10_000, pytest.fail)
        store.save(Kept([mine] * 100, 100, state(MIB)))  # none that the child may have written
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 5 * MIB
        assert {file.suffix for file in tmp_path.iterdir()} == {".session", ""}
        for file in files(tmp_path):
            read(file)
        assert store.best([mine] * 101, only_big=True)[1] == 100
        first += 1


# when they are written


def make(tmp_path: Path, limit: int, *, rest: float = 0.0) -> tuple[PrefixCache, Sessions]:
    sessions = Sessions(Store(tmp_path), rest)
    return PrefixCache(limit, lambda _: MIB, sessions), sessions


def put(cache: PrefixCache, one: Kept) -> None:
    cache.put(one, cache.make_room(one.tokens, one.n_bytes))


def test_what_rests_is_written_and_what_goes_on_is_not(tmp_path: Path) -> None:
    cache, sessions = make(tmp_path, MIB)
    put(cache, kept(text(1)))
    while not files(tmp_path):
        sessions._withdraw(kept([]))  # lets the thread have its turn
    found, _ = cache.best([*text(1), 5], only_big=True)
    assert isinstance(found, Kept), "memory is nearer"
    sessions.close()
    patient, waiting = make(tmp_path / "other", MIB, rest=1000.0)
    put(patient, kept(text(1)))
    found, _ = patient.best([*text(1), 5], only_big=True)
    assert found is not None
    assert patient.take(found) is not None
    put(patient, kept([*text(1), 5, 6]))
    waiting.flush()
    waiting.close()
    (file,) = files(tmp_path / "other")
    assert len(read_head(file).tokens) == 102


def test_what_memory_has_no_room_for_is_written_at_once(tmp_path: Path) -> None:
    cache, sessions = make(tmp_path, 2500, rest=1000.0)
    for i in range(4):
        put(cache, kept(text(i)))
    assert cache.n_bytes <= 2500
    assert len(files(tmp_path)) == 2
    put(cache, kept(text(9), 3000))
    assert len(files(tmp_path)) == 3, "what never fits is on disk alone"
    for i in (0, 1, 2, 3, 9):
        found, n = cache.best([*text(i), 5], only_big=True)
        assert n == 100
        assert found is not None
        taken = cache.take(found)
        assert taken is not None
        assert taken.tokens == text(i)
    sessions.close()


def test_short_texts_are_not_written_and_none_are_found_where_nobody_goes_on(tmp_path: Path) -> None:
    cache, sessions = make(tmp_path, 0)
    sessions.least_tokens = 120
    put(cache, kept(text(1)))
    assert files(tmp_path) == []
    put(cache, kept(text(1, 200)))
    assert len(files(tmp_path)) == 1
    sessions.finds = False
    assert cache.best([*text(1, 200), 5], only_big=True) == (None, 0)
    sessions.close()


def test_a_forked_child_writes_nothing(tmp_path: Path) -> None:
    cache, sessions = make(tmp_path, MIB, rest=1000.0)
    put(cache, kept(text(1)))
    child = os.fork()
    if child == 0:
        os._exit(int(sessions.is_open))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    sessions.flush()
    sessions.close()
    assert len(files(tmp_path)) == 1
