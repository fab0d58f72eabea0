"""``@file`` in a prompt: what becomes a file's text, what stays, and what is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from mobile_gguf.api import attached_files
from mobile_gguf.api.attached_files import folded, mention, with_files
from mobile_gguf.errors import UsageError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "my file.md").write_text("last line without an end")
    (tmp_path / "Makefile").write_text("all:\n")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "x.py").write_text("pass\n")
    (tmp_path / "empty.txt").write_text("")
    return tmp_path


A = "=== a.txt ===\none\ntwo\n=== end of a.txt ==="

B = "=== my file.md ===\nlast line without an end\n=== end of my file.md ==="


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("@a.txt", A),
        ("sum up @a.txt", f"sum up \n{A}"),
        ("sum up @a.txt, please", f"sum up \n{A}\n, please"),
        ("(@a.txt)", f"(\n{A}\n)"),
        ("@a.txt @a.txt", f"{A}\n \n{A}"),
        (
            'of @"my file.md"!',
            "of \n=== my file.md ===\nlast line without an end\n=== end of my file.md ===\n!",
        ),
        ("@src/x.py", "=== src/x.py ===\npass\n=== end of src/x.py ==="),
        ("@Makefile", "=== Makefile ===\nall:\n=== end of Makefile ==="),
        ("@empty.txt", "=== empty.txt ===\n=== end of empty.txt ==="),
        (r"\@a.txt", "@a.txt"),
        (r"a \@ b", "a @ b"),
        ("me@a.txt and x@example.com", "me@a.txt and x@example.com"),
        ("ask @alice, @pytest.fixture or @src", "ask @alice, @pytest.fixture or @src"),
        ("@ and @@a.txt", "@ and @@a.txt"),
        ("", ""),
    ],
)
def test_what_a_prompt_means(typed: str, meant: str) -> None:
    assert with_files(typed) == meant


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("@none.txt?", "@none.txt: there is no such file"),
        ("@src/none", "@src/none: there is no such file"),
        ('@"none at all"', "@none at all: there is no such file"),
        ("@~/none", "there is no such file"),
        ("@src/", "@src/ is a folder"),
        ("@zero", "@zero is no text: it has a zero byte"),
        ("@latin.txt", "@latin.txt is not UTF-8 text (byte 3)"),
        ("@/dev/null", "@/dev/null is no file with a text in it"),
        ("@large.txt", "no context has room"),
    ],
)
def test_what_is_an_error_is_one_line(
    typed: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attached_files, "MOST_BYTES", 100)
    (folder / "zero").write_bytes(b"a\0b")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "large.txt").write_text("x" * 101)
    with pytest.raises(UsageError) as raised:
        with_files(typed)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_who_reads_it_sees_mentions() -> None:
    typed = 'compare @a.txt\nwith @"my file.md"'
    assert folded(with_files(typed)) == 'compare \n@a.txt\nwith \n@"my file.md"'
    assert with_files(folded(with_files(typed))) == with_files(typed)
    assert mention("a b") == '@"a b"'
    assert folded("nothing === of it ===") == "nothing === of it ==="
