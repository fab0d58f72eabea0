"""``sessions``, and going on with the last conversation."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from fake_backend import FakeBackend, scripted

from mobile_gguf.api.conversation import Conversation
from mobile_gguf.api.last_conversation import conversation_path, last_conversation_path, recall, remember
from mobile_gguf.cli import main
from mobile_gguf.errors import UsageError
from mobile_gguf.files.paths import sessions_dir
from mobile_gguf.generate.sessions.prefix_cache import Kept
from mobile_gguf.generate.sessions.session_store import SessionFolder, SessionStore

FITS = {"model": "a", "engine": "e"}


@pytest.fixture
def saved() -> list[Path]:
    """Two sessions, the longer one used last."""
    store = SessionStore(SessionFolder(sessions_dir()), 1 << 20, FITS, "/models/m.gguf", 5000, print)
    for seed, n in ((1, 100), (2, 200)):
        store.save(Kept([seed] * n, n, np.zeros(1000, np.uint8)))
    return sorted(sessions_dir().glob("*.session"), key=lambda file: file.stat().st_size)


def test_sessions_are_listed(saved: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    (sessions_dir() / "bad.session").write_bytes(b"x" * 50)
    assert main(["sessions"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "TOKENS", "SIZE", "USED", "MODEL"]
    assert {line.split()[0] for line in lines[1:3]} == {file.stem[:12] for file in saved}
    assert all(line.endswith("m.gguf") for line in lines[1:3])
    assert lines[3].startswith("bad")
    assert lines[3].endswith("damaged, or of another version")
    assert main(["sessions", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == 50 + sum(file.stat().st_size for file in saved)
    assert sorted(one.get("tokens", 0) for one in told["sessions"]) == [0, 100, 200]


def test_sessions_are_removed_by_name_or_all(saved: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    remember(Conversation("", [{"role": "user", "content": "hi"}]))
    assert main(["sessions", "rm", "--yes", saved[0].stem[:12]]) == 0
    assert "removed 1 session: " in capsys.readouterr().out
    assert [file.exists() for file in saved] == [False, True]
    assert last_conversation_path().exists()
    assert main(["sessions", "rm", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == [saved[1].stem]
    assert not last_conversation_path().exists()
    assert main(["sessions", "rm", "-y"]) == 0
    assert "removed 0 sessions: 0 bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["rm", "--yes", "nothing"], "there is no such session"),
        (["rm", "--yes", ""], "there is no such session"),
        (["rm"], "no terminal to ask on"),
    ],
)
def test_what_cannot_be_removed(
    saved: list[Path], argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sessions", *argv]) == 2
    assert said in capsys.readouterr().err
    assert all(file.exists() for file in saved)


def test_the_last_conversation_is_kept_whole_and_private() -> None:
    assert recall() == (None, "last")
    said = Conversation("S", [{"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "ß"}])
    remember(said)
    assert recall() == (said, "last")
    assert last_conversation_path().stat().st_mode & 0o77 == 0
    for broken in ("{", "[]", '{"system": 1, "turns": []}', '{"system": "", "turns": [1]}'):
        last_conversation_path().write_text(broken)
        with pytest.raises(UsageError, match=r"cannot be read .* sessions rm last` removes it"):
            recall()


def test_continue_has_no_meaning_for_what_is_no_chat(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--continue", "--raw", "m.gguf", "hi"]) == 2
    assert "leave out --raw" in capsys.readouterr().err
    assert main(["run", "--continue", "--batch", "x", "m.gguf"]) == 2
    assert "leave out --batch" in capsys.readouterr().err


@pytest.mark.engine
def test_run_goes_on_with_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tiny_models.path("qwen3moe"))

    def run(prompt: str, *flags: str) -> dict[str, Any]:
        argv = ["run", *flags, "--json", "-c", "2048", "--temp", "0", "-n", "4", "-sys", "S", path, prompt]
        assert main(argv) == 0
        return json.loads(capsys.readouterr().out)

    first = run("one two three " * 60)
    n_first = first["usage"]["prompt_tokens"]
    assert n_first > 300
    again = run("four", "--continue")
    assert again["usage"]["prompt_tokens"] > n_first
    assert again["timings"]["prompt_n"] <= 64
    assert run("five", "--continue")["timings"]["prompt_n"] <= 64
    conversation, _ = recall()
    assert conversation is not None
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"] * 3
    afresh = run("one two three " * 60)
    assert afresh["timings"]["prompt_n"] == n_first, "without --continue each start computes alike"
    assert afresh["text"] == first["text"]
    last_conversation_path().unlink()
    run("four", "--session-cache", "off")
    assert not last_conversation_path().exists()


def test_a_conversation_of_a_name_goes_on_and_is_the_last_one(
    fake_load: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_load(FakeBackend(scripted("ok")))
    assert main(["run", "--continue=trip", "m.gguf", "one"]) == 0
    assert "there is no conversation trip: this one begins" in capsys.readouterr().err
    assert main(["run", "m.gguf", "--continue", "two"]) == 0
    conversation, name = recall("trip")
    assert conversation is not None
    assert (name, [turn["content"] for turn in conversation.turns]) == ("trip", ["one", "ok", "two", "ok"])
    assert recall() == (conversation, "trip")
    with pytest.raises(SystemExit):
        main(["run", "--continue=a/b", "m.gguf", "hi"])
    assert "'a/b' is no name of a conversation" in capsys.readouterr().err


def test_words_that_cannot_be_kept_are_told(
    fake_load: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_load(FakeBackend(scripted("ok")))
    path = conversation_path("trip")
    path.with_name(f"{path.name}.partial").mkdir(parents=True)  # where the file would be written first
    assert main(["run", "--continue=trip", "m.gguf", "one"]) == 0
    said = capsys.readouterr()
    assert said.out == "ok\n"
    assert said.err.count("this conversation is not kept for --continue: ") == 1
    assert f"cannot write {path}: Is a directory" in said.err
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert main(["chat", "--plain", "--continue=trip", "m.gguf"]) == 0
    assert capsys.readouterr().err.count("is not kept for --continue: ") == 1, "once for all answers"


def test_words_are_listed_shown_exported_and_removed(
    saved: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "ß"}]
    remember(Conversation("S", turns), "trip")
    assert main(["sessions"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()[-2:]] == [["last", "2"], ["trip", "2"]]
    assert main(["sessions", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["conversations"]
    assert [(one["name"], one["message_count"]) for one in told] == [("last", 2), ("trip", 2)]
    text = "**system**\n\nS\n\n**user**\n\nGrüße\n\n**assistant**\n\nß\n"
    assert main(["sessions", "show", "trip"]) == 0
    assert capsys.readouterr().out == text
    assert main(["sessions", "export", "trip", "--out", str(tmp_path / "chat.md")]) == 0
    assert (tmp_path / "chat.md").read_text(encoding="utf-8") == text
    assert capsys.readouterr() == ("", f"written {tmp_path / 'chat.md'}\n")
    nowhere = tmp_path / "nosuch" / "chat.md"
    assert main(["sessions", "export", "trip", "--out", str(nowhere)]) == 1
    said = capsys.readouterr().err
    assert f"cannot write {nowhere}: No such file or directory" in said
    assert "XDG" not in said, "the folder is one that was named"
    assert not nowhere.parent.exists()
    assert main(["sessions", "export", "last", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["messages"] == [{"role": "system", "content": "S"}, *turns]
    assert main(["sessions", "show", saved[0].stem[:12]]) == 0
    out = capsys.readouterr().out
    assert "tokens: " in out
    assert "engine: " in out
    assert main(["sessions", "show", saved[0].stem[:12], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 100
    assert main(["sessions", "export", saved[0].stem]) == 2
    assert "no words are kept under the name" in capsys.readouterr().err
    assert main(["sessions", "rm", "--yes", "trip"]) == 0
    assert "removed the words of trip: " in capsys.readouterr().out
    assert recall("trip")[0] is None
    assert recall()[0] is not None
    assert all(file.exists() for file in saved)


def test_nothing_is_an_empty_list_and_what_is_damaged_can_be_removed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["sessions"]) == 0
    assert capsys.readouterr().out == ""
    remember(Conversation("", [{"role": "user", "content": "hi"}]), "trip")
    conversation_path("trip").write_text("{", encoding="utf-8")
    assert main(["sessions"]) == 0
    heads, *rows = capsys.readouterr().out.splitlines()
    assert heads.split() == ["CONVERSATION", "MESSAGES", "USED"]
    assert rows[-1].split(maxsplit=2) == ["trip", "-", "damaged: `mobile-gguf sessions show trip` says how"]
    for argv in (["show", "trip"], ["export", "trip"]):
        assert main(["sessions", *argv]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert "trip.json cannot be read" in said.err
        assert "`mobile-gguf sessions rm trip` removes it" in said.err
    assert main(["sessions", "rm", "--yes", "trip"]) == 0
    assert recall("trip")[0] is None
