"""``embed``: where texts come from, what is written, and what cannot be embedded."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai_stub import OpenAiStub, serving

from mobile_gguf.api.embedding import Embedding
from mobile_gguf.api.model import Model
from mobile_gguf.cli import main
from mobile_gguf.errors import PromptTooLongError
from mobile_gguf.generate.answer.receipt import Receipt


@pytest.fixture
def asked(fake_load: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """A model whose vectors tell the text; what it was asked."""
    fake_load()
    found: list[tuple[str, str | None]] = []

    def embed(_self: Model, text: str, *, pooling: str | None = None) -> Embedding:
        found.append((text, pooling))
        if text == "long":
            raise PromptTooLongError("the text has 9 tokens")
        return Embedding(np.asarray([len(text), 0.1], np.float32), len(text), Receipt())

    monkeypatch.setattr(Model, "embed", embed)
    return found


def test_texts_are_arguments_or_lines(
    asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["embed", "m.gguf", "ab", "a b c"]) == 0
    assert capsys.readouterr().out == "2.0 0.1\n5.0 0.1\n"
    (tmp_path / "lines").write_text("x\nyy\n")
    assert main(["embed", "m.gguf", "-f", str(tmp_path / "lines"), "--pooling", "last"]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("zzz\n"))
    assert main(["embed", "m.gguf", "-q"]) == 0
    assert asked == [("ab", "mean"), ("a b c", "mean"), ("x", "last"), ("yy", "last"), ("zzz", "mean")]


def test_what_is_written(asked: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", "m.gguf", "ab", "c", "--format", "json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["pooling"], said["tokens"]) == ("mean", 3)
    assert said["embeddings"] == [[2.0, 0.1], [1.0, 0.1]]
    assert main(["embed", "m.gguf", "ü", "--format", "jsonl"]) == 0
    assert json.loads(capsys.readouterr().out) == {"text": "ü", "tokens": 1, "embedding": [1.0, 0.1]}
    out = tmp_path / "v.npy"
    assert main(["embed", "m.gguf", "ab", "c", "--format", "npy", "--out", str(out)]) == 0
    loaded = np.load(out)
    assert (loaded.dtype, loaded.tolist()) == (np.float32, [[2.0, np.float32(0.1)], [1.0, np.float32(0.1)]])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", ""], "text 2 is empty"),
        (["-f", "lines"], "lines, line 2 is empty"),
        (["-f", "none"], "cannot read none"),
        (["a", "-f", "lines"], "give texts or --file, not both"),
        (["a", "long"], "text 2: the text has 9 tokens"),
        (["-f", "nothing"], "there is no text"),
    ],
)
def test_what_cannot_be_embedded_is_a_line_and_nothing_is_written(
    asked: Any,
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lines").write_text("a\n\nb\n")
    Path("nothing").write_text("")
    assert main(["embed", "m.gguf", "-q", *words, "--out", "out"]) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert (out, err.count("\n")) == ("", 1)
    assert not Path("out").exists()


# the plain chat with a server


@pytest.fixture
def stub() -> Iterator[OpenAiStub]:
    with serving(OpenAiStub()) as made:
        yield made


def test_the_plain_chat_with_a_server(
    stub: OpenAiStub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def chat(lines: str, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        code = main(["chat", "--plain", "--attach", stub.url, *words])
        out, err = capsys.readouterr()
        return code, out, err

    monkeypatch.setenv("MOBILE_GGUF_API_KEY", "own")
    code, out, err = chat("why?\n/stats\n/set temp 0.5\n", "--temp", "0.25", "--system", "S")
    assert (code, out) == (0, "Blue light.\n")
    assert err.startswith("2 tokens | ")
    assert stub.url in err
    assert stub.bodies[0]["temperature"] == 0.25
    assert [one["role"] for one in stub.bodies[0]["messages"]] == ["system", "user"]
    assert stub.keys[-1] == "Bearer own"
    (tmp_path / "key").write_text("other\n")
    stub.fails = "no memory"
    code, out, err = chat("why?\n", "--api-key-file", str(tmp_path / "key"), "-m", "m")
    assert (code, out) == (0, "Blue light.\n")
    assert err == f"mobile-gguf: error: {stub.url}: no memory\n"
    assert stub.keys[-1] == "Bearer other"
    code, _, err = chat("", "--mode", "little")
    assert (code, "is no mobile-gguf server: it has no mode" in err) == (2, True)
    assert "is for loading a model" in chat("", "-c", "100")[2]
    assert chat("", "-m", "none")[0] == 3
    assert main(["chat", "--plain", "--api-key", "k", "demo"]) == 2
    assert "give its address by --attach URL" in capsys.readouterr().err
