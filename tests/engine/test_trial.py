"""A file whose header ends llama.cpp ends a child and is refused in one line; what loads is remembered."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny_models

from mobile_gguf.engine import trial, tried
from mobile_gguf.engine.binding import Engine, find_engine
from mobile_gguf.engine.buffers import Context
from mobile_gguf.engine.trial import check_file, measure_buffers, try_file
from mobile_gguf.engine.tried import TriedFiles, known_buffers
from mobile_gguf.errors import ModelFormatError
from mobile_gguf.gguf.header import read_header
from mobile_gguf.gguf.info import read_gguf_info


@pytest.fixture
def engine() -> Engine:
    found = find_engine()
    assert found is not None
    return found


def with_number(name: str, key: str, number: int, path: Path) -> Path:
    """A tiny model with another number in its header, of 32 bits."""
    source = tiny_models.path(name)
    entry = read_header(source).entries[key]
    raw = bytearray(source.read_bytes())
    raw[entry.offset + entry.n_bytes - 4 : entry.offset + entry.n_bytes] = struct.pack("<I", number)
    path.write_bytes(raw)
    return path


def with_a_token_twice(path: Path) -> Path:
    """A tiny model whose vocabulary has one text for two tokens, which llama.cpp asserts cannot be."""
    source = tiny_models.path("qwen3moe")
    entry = read_header(source).entries["tokenizer.ggml.tokens"]
    raw = bytearray(source.read_bytes())
    at = raw.index(b"tokenizer.ggml.tokens", entry.offset) + len(b"tokenizer.ggml.tokens") + 4 + 12
    texts: dict[int, tuple[int, int]] = {}
    for _ in range(200):
        (length,) = struct.unpack_from("<Q", raw, at)
        if length in texts:
            first, _ = texts[length]
            raw[at + 8 : at + 8 + length] = raw[first : first + length]
            break
        texts[length] = (at + 8, length)
        at += 8 + length
    path.write_bytes(raw)
    return path


def test_what_the_header_check_cannot_foresee_ends_a_child(engine: Engine, tmp_path: Path) -> None:
    path = with_a_token_twice(tmp_path / "twice.gguf")
    read_gguf_info(path)
    with pytest.raises(ModelFormatError) as error:
        try_file(engine, path, [path])
    text = str(error.value)
    assert text.startswith(f"{path} cannot be used: llama.cpp ends on it (llama-vocab.cpp:")
    assert "token_to_id.size()" in text
    assert text.endswith("its header is damaged")
    assert not TriedFiles(engine.path).holds(path, [path])


def test_an_error_that_llama_cpp_reports_is_the_loads(engine: Engine, tmp_path: Path) -> None:
    path = with_number("nemotron-h", "nemotron_h_moe.ssm.state_size", 17, tmp_path / "wrong.gguf")
    assert "has wrong shape" in check_file(engine, path)
    try_file(engine, path, [path])
    assert not TriedFiles(engine.path).holds(path, [path])


@pytest.mark.parametrize("name", ["qwen3moe", "mixtral-split", "dense"])
def test_a_file_is_tried_once(
    engine: Engine, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_models.path(name)
    for part in source.parent.glob("*.gguf"):
        shutil.copy(part, tmp_path)
    path = tmp_path / source.name
    files = read_gguf_info(path).files
    ended: list[int] = []
    end_of_child = trial._end_of_child
    monkeypatch.setattr(
        trial, "_end_of_child", lambda *arguments: ended.append(1) or end_of_child(*arguments)
    )
    for _ in range(2):
        try_file(engine, path, files)
    assert len(ended) == 1
    os.utime(files[-1], (1, 1))
    try_file(engine, path, files)
    assert len(ended) == 2
    monkeypatch.setattr(tried, "_identity", lambda _library: "another engine")
    try_file(engine, path, files)
    assert len(ended) == 3


def test_buffers_are_measured_once_for_a_context(
    engine: Engine, own_directories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(tiny_models.path("qwen3moe"), path)
    asked: list[tuple[str, ...]] = []
    end_of_child = trial._end_of_child

    def count(library: str, path: Path, keep_on: Callable[[], object], words: Sequence[str] = ()) -> object:
        asked.append(tuple(words))
        return end_of_child(library, path, keep_on, words)

    monkeypatch.setattr(trial, "_end_of_child", count)
    small, large = Context(512, 64, False), Context(4096, 64, False)
    first = measure_buffers(engine, path, [path], [small])
    assert measure_buffers(engine, path, [path], [small, large])[small] == first[small]
    both = measure_buffers(engine, path, [path], [large, small])
    assert asked == [("512", "64", "0"), ("4096", "64", "0")]
    assert 0 < both[small].used <= both[small].reserved < both[large].reserved
    assert known_buffers(path, [path]) == both
    assert not TriedFiles(engine.path).holds(path, [path]), "it was measured and never loaded"
    try_file(engine, path, [path])
    assert known_buffers(path, [path]) == both
    os.utime(path, (1, 1))
    assert known_buffers(path, [path]) == {}


def test_what_cannot_be_measured_is_not_known(engine: Engine, tmp_path: Path) -> None:
    for path in (with_a_token_twice(tmp_path / "twice.gguf"), tmp_path / "absent.gguf"):
        assert measure_buffers(engine, path, [path], [Context(512, 64, False)]) == {}
        assert known_buffers(path, [path]) == {}


def test_whoever_waits_may_end_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_CHILD", "import time; time.sleep(600)")
    path = tiny_models.path("dense")

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        try_file(engine, path, [path], stop)


def test_a_child_that_comes_to_no_end(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_CHILD", "import time; time.sleep(600)")
    monkeypatch.setattr(trial, "_SECONDS", 0.2)
    path = tiny_models.path("dense")
    with pytest.raises(ModelFormatError, match="does not come to an end with it in 0 seconds"):
        try_file(engine, path, [path])


def test_a_cache_that_cannot_be_read_or_written_is_none(
    engine: Engine, own_directories: Path, tmp_path: Path
) -> None:
    path = tiny_models.path("dense")
    for text in ("", "[]", '{"engine": 1, "files": 2}'):
        cache = own_directories / "cache" / "mobile-gguf"
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "tried-files.json").write_text(text)
        assert not TriedFiles(engine.path).holds(path, [path])
        TriedFiles(engine.path).add(path, [path])
        assert TriedFiles(engine.path).holds(path, [path])
    absent = tmp_path / "absent.gguf"
    TriedFiles(engine.path).add(absent, [absent])
    assert not TriedFiles(engine.path).holds(absent, [absent])
