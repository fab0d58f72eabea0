"""rm: what goes, what stays because others use it, and the bytes that come back."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mobile_gguf.cli import main
from mobile_gguf.files.paths import models_dir
from mobile_gguf.hub.cache import cache_root, repository_folder, write_ref

OLD, NEW = "0" * 40, "1" * 40
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    def run(*argv: str, answer: str | None = None) -> tuple[int, str, str]:
        stream = io.StringIO(answer or "")
        stream.isatty = lambda: answer is not None  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", stream)
        monkeypatch.setattr("builtins.input", lambda: stream.readline())
        code = main(argv)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def cached(repo: str, commit: str, name: str, content: bytes, ref: str = "main") -> Path:
    """A file in the Hugging Face cache, as huggingface_hub lays it out."""
    folder = repository_folder(repo)
    blob = folder / "blobs" / content.hex().ljust(64, "0")
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    pointer = folder / "snapshots" / commit / name
    pointer.parent.mkdir(parents=True, exist_ok=True)
    pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    write_ref(repo, ref, commit)
    return pointer


def blobs(repo: str) -> list[bytes]:
    return sorted(path.read_bytes() for path in (repository_folder(repo) / "blobs").glob("*"))


def test_a_model_of_the_cache(command: Command) -> None:
    cached("org/m", NEW, "m-Q4_K_M.gguf", b"four")
    cached("org/m", NEW, "m-Q8_0.gguf", b"eight")
    code, out, _ = command("rm", "--yes", "hf:org/m:q4_k_m")
    assert (code, out) == (0, "removed hf:org/m:Q4_K_M: 4 bytes freed\n")
    assert blobs("org/m") == [b"eight"]
    code, out, _ = command("rm", "--yes", "hf:org/m", "--json")
    assert json.loads(out)["freed_bytes"] == 5
    assert not repository_folder("org/m").exists()


def test_what_another_revision_uses_stays(command: Command) -> None:
    cached("org/m", OLD, "m-Q4_K_M.gguf", b"four", ref="v1")
    cached("org/m", NEW, "m-Q4_K_M.gguf", b"four")
    code, out, err = command("rm", "-y", "hf:org/m")
    assert (code, out) == (0, "removed hf:org/m:Q4_K_M: 0 bytes freed\n")
    assert "another revision or name in the cache uses them" in err
    assert blobs("org/m") == [b"four"]
    assert (repository_folder("org/m") / "snapshots" / OLD / "m-Q4_K_M.gguf").read_bytes() == b"four"
    code, out, _ = command("rm", "-y", "hf:org/m@v1")
    assert out == "removed hf:org/m:Q4_K_M@v1: 4 bytes freed\n"
    assert not repository_folder("org/m").exists()


def test_files_of_other_tools_stay(command: Command) -> None:
    cached("org/m", NEW, "m-Q4_K_M.gguf", b"four")
    config = cached("org/m", NEW, "config.json", b"{}")
    command("rm", "-y", "hf:org/m:Q4_K_M")
    assert config.read_bytes() == b"{}"
    assert (repository_folder("org/m") / "refs" / "main").read_text() == NEW


def test_all_parts_go(command: Command) -> None:
    for number in (1, 2):
        cached("org/m", NEW, f"Q4_0/m-0000{number}-of-00002.gguf", b"part%d" % number)
    assert command("rm", "-y", "hf:org/m")[1] == "removed hf:org/m:Q4_0: 10 bytes freed\n"
    assert list(cache_root().rglob("*.gguf")) == []


def test_a_whole_repository(command: Command) -> None:
    cached("org/m", OLD, "m-Q4_K_M.gguf", b"four", ref="v1")
    cached("org/m", NEW, "m-Q8_0.gguf", b"eight")
    (repository_folder("org/m") / "blobs" / ("a" * 64 + ".incomplete")).write_bytes(b"half")
    cached("org/other", NEW, "o-Q4_0.gguf", b"other")
    code, out, _ = command("rm", "-y", "--all", "hf:org/m")
    assert code == 0
    assert "removed hf:org/m: 93 bytes freed" in out  # the names of two revisions are files too
    assert not repository_folder("org/m").exists()
    assert blobs("org/other") == [b"other"]


def test_an_unfinished_download(command: Command) -> None:
    folder = repository_folder("org/m") / "blobs"
    folder.mkdir(parents=True)
    (folder / ("a" * 64 + ".incomplete")).write_bytes(b"half")
    assert command("rm", "-y", "hf:org/m")[1] == "removed hf:org/m: 4 bytes freed\n"
    assert not folder.exists()


def test_several_models_are_not_guessed_among(command: Command) -> None:
    cached("org/m", NEW, "m-Q4_K_M.gguf", b"four")
    cached("org/m", NEW, "m-Q8_0.gguf", b"eight")
    code, _, err = command("rm", "-y", "hf:org/m")
    assert code == 2
    assert "name one, or give --all: hf:org/m:Q4_K_M, hf:org/m:Q8_0" in err
    assert len(blobs("org/m")) == 2


def test_a_blob_that_is_a_link_is_not_followed(command: Command, tmp_path: Path) -> None:
    """huggingface_hub may keep contents in a store that repositories share."""
    pointer = cached("org/m", NEW, "m-Q4_K_M.gguf", b"four")
    blob = pointer.resolve()
    store = tmp_path / "store"
    blob.rename(store)
    blob.symlink_to(store)
    assert command("rm", "-y", "hf:org/m")[1] == "removed hf:org/m:Q4_K_M: 0 bytes freed\n"
    assert store.read_bytes() == b"four"
    assert not blob.is_symlink()


def test_a_link_out_of_the_cache_is_only_unlinked(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"precious")
    pointer = cached("org/m", NEW, "m-Q4_K_M.gguf", b"four")
    pointer.unlink()
    pointer.symlink_to(tmp_path / "mine")
    command("rm", "-y", "hf:org/m:Q4_K_M")
    assert (tmp_path / "mine").read_bytes() == b"precious"


def test_models_of_the_data_directory(command: Command) -> None:
    models_dir().mkdir(parents=True)
    for name in ("one", "big-00001-of-00002", "big-00002-of-00002", "big-00001-of-00003"):
        (models_dir() / f"{name}.gguf").write_bytes(b"12345")
    assert command("rm", "-y", "one")[1] == "removed one: 5 bytes freed\n"
    assert command("rm", "-y", "big-00001-of-00002.gguf")[1] == "removed big-00001-of-00002: 10 bytes freed\n"
    assert [path.name for path in models_dir().iterdir()] == ["big-00001-of-00003.gguf"]
    path = str(models_dir() / "big-00001-of-00003.gguf")
    assert command("rm", "-y", path)[0] == 0


@pytest.mark.parametrize(
    ("answer", "gone"), [("y\n", True), ("YES\n", True), ("\n", False), ("no\n", False), ("", False)]
)
def test_it_asks(command: Command, answer: str, gone: bool) -> None:
    pointer = cached("org/m", NEW, "m-Q4_K_M.gguf", b"four")
    code, out, err = command("rm", "hf:org/m", answer=answer)
    assert "remove hf:org/m:Q4_K_M, 4 B? [y/N] " in err
    assert code == (0 if gone else 1)
    assert pointer.exists() != gone
    assert ("kept hf:org/m:Q4_K_M" in err) != gone
    assert bool(out) == gone


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["hf:org/m"], 2, "give --yes"),
        (["-y", "nothing"], 3, "no such model: nothing"),
        (["-y", "hf:org/none"], 3, "is not in the Hugging Face cache"),
        (["-y", "hf:org/m:Q2_K"], 3, "in the Hugging Face cache, hf:org/m has no Q2_K"),
        (["-y", "demo"], 3, "is not built"),
        (["-y", "--all", "demo"], 2, "--all is for a repository"),
        (["-y", "--all", "hf:org/m:Q4_0"], 2, "write hf:org/m"),
        (["-y", "FILE"], 2, "delete it by hand"),
    ],
)
def test_what_is_not_removed(command: Command, tmp_path: Path, argv: list[str], code: int, said: str) -> None:
    cached("org/m", NEW, "m-Q4_K_M.gguf", b"four")
    (tmp_path / "mine.gguf").write_bytes(b"mine")
    got, out, err = command("rm", *(str(tmp_path / "mine.gguf") if word == "FILE" else word for word in argv))
    assert (got, out) == (code, "")
    assert said in err
    assert blobs("org/m") == [b"four"]
    assert (tmp_path / "mine.gguf").exists()
