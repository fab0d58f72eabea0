"""Presets: a file that is named, its place among flags and defaults, and what it may not say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_backend import FakeBackend, scripted

from mobile_gguf.cli import main
from mobile_gguf.cli.serve import read_key
from mobile_gguf.config import VERBS, config_path, preset_names, presets_dir, read_defaults, read_preset
from mobile_gguf.errors import UsageError
from mobile_gguf.tui.store.settings import Settings

Write = Callable[[str, str], Path]


@pytest.fixture
def write() -> Write:
    def write_preset(name: str, text: str) -> Path:
        path = presets_dir() / f"{name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_preset


def test_flags_come_before_a_preset_before_environment_and_file(
    write: Write, fake_load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = fake_load(FakeBackend(scripted("x")))
    write("p", "temperature = 0.5\ntop-k = 9\nmode = 'little'\nsystem = 'S'\n[serve]\ntop_p = 0.1\n")
    config_path().parent.mkdir(parents=True, exist_ok=True)
    config_path().write_text("top_k = 5\nmin_p = 0.25\n")
    monkeypatch.setenv("MOBILE_GGUF_TEMPERATURE", "0.75")
    assert main(["run", "--preset", "p", "m.gguf", "hi", "--json", "--top-k", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["receipt"]["mode"] == "little"
    assert [backend.sampling[name] for name in ("temp", "top_k", "top_p", "min_p")] == [0.5, 3, 0.95, 0.25]
    assert bytes(row[0] for row in backend.rows[1:]).startswith(b"<system>S\n<user>hi\n")
    main(["run", "--preset", "p", "m.gguf", "hi", "--system", "T"])
    assert bytes(row[0] for row in backend.rows[1:]).startswith(b"<system>T\n")


@pytest.mark.parametrize(
    "words",
    [
        ["--preset", "p", "why", "not?"],
        ["why", "--preset", "p", "not?"],
        ["-m", "other.gguf", "--preset", "p", "why not?"],
        ["--model", "other.gguf", "why", "--top-k", "3", "not?"],
    ],
)
def test_a_model_that_is_named_leaves_all_words_to_the_prompt(
    write: Write, fake_load: Any, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    backend = fake_load(FakeBackend(scripted("x")))
    write("p", "model = 'm.gguf'\n")
    assert main(["run", *words]) == 0
    assert bytes(row[0] for row in backend.rows[1:]).startswith(b"<user>why not?\n")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["run", "--preset", "p", "demo", "hi"], "demo is a model, and the preset p names one already"),
        (["run", "--model", "x.gguf", "demo", "hi"], "demo is a model, and --model names one already"),
        (["serve", "--model", "x.gguf", "y.gguf"], "give MODEL or --model, not both"),
        (["run", "--preset", "coder2", "x"], "did you mean coder?"),
        (["run", "--preset", "../p", "x"], "there is no preset '../p'"),
        (["run", "--preset", "", "x"], "there is no preset ''"),
        (["plan", "--preset", "s"], "required: MODEL"),
        (
            ["run", "--preset", "s", "m.gguf", "x", "--raw"],
            "--system, or a preset's, has no effect with --raw",
        ),
    ],
)
def test_what_cannot_be_meant_is_a_line(
    write: Write, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write("p", "model = 'm.gguf'\n")
    write("s", "system = 'S'\n")
    write("coder", "")
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("temprature = 1", "p.toml: temprature is no option; did you mean temperature?"),
        ("sistem = 'x'", "p.toml: sistem is no option; did you mean system?"),
        ("temperature = 'hot'", "p.toml: temperature: temperature is 'hot': it must be a number"),
        ("model = 3", "p.toml: model is 3: it must be text"),
        ("model = ''", "p.toml: model is '': it must be text"),
        ("[run]\nsystem = 'x'", "p.toml: run.system is no option"),
        ("[run]\nport = 80", "p.toml: run.port is no option of run"),
        ("temperature = ", "p.toml cannot be read"),
    ],
)
def test_an_error_of_a_preset_is_a_line_with_file_and_key(write: Write, text: str, said: str) -> None:
    write("p", text)
    with pytest.raises(UsageError) as raised:
        read_preset("p", "run", VERBS)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_preset_is_of_a_verb_and_beats_what_the_chat_has_saved(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("p", "temperature = 0.5\nport = 1\napi_key = 'of-preset'\n[chat]\ntop_k = 7\n")
    assert preset_names() == ["p"]
    found = read_defaults("chat", VERBS) | read_preset("p", "chat", VERBS).options
    (tmp_path / "chat.json").write_text('{"options": {"temperature": "0.9"}}')
    settings = Settings(tmp_path / "chat.json", {}, found)
    assert (settings.value("temperature"), settings.value("top_k")) == (0.5, 7)
    settings.set("temperature", "0.1")  # what is set now is later than what the command said
    assert settings.value("temperature") == 0.1
    monkeypatch.setenv("MOBILE_GGUF_API_KEY", "of-environment")
    found = read_defaults("serve", VERBS) | read_preset("p", "serve", VERBS).options
    assert read_key({}, found) == "of-preset"
    assert read_key({"api_key": "of-flag"}, found) == "of-flag"


def test_config_shows_what_a_preset_says(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("p", "temperature = 0.5\n")
    assert main(["config", "--preset", "p", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["options"]["temperature"]
    assert said["value"] == 0.5
    assert said["from"].endswith("p.toml: temperature")
