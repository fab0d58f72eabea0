"""Defaults of every verb: a file, the environment, and which comes first."""

from __future__ import annotations

import json

import pytest
from fake_backend import FakeBackend, fake_info, scripted

from mobile_gguf.cli import main
from mobile_gguf.config import config_path, read_defaults
from mobile_gguf.errors import UsageError
from mobile_gguf.generate.request.recommended import recommended
from mobile_gguf.options import GenerateOptions, LoadOptions, ServeOptions, declared
from mobile_gguf.tui.store.settings import Settings


@pytest.fixture
def write():
    def write_file(text: str) -> None:
        path = config_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    return write_file


def test_flags_come_before_the_environment_before_the_file_before_the_model(
    write, fake_load, monkeypatch, capsys
):
    asked = {"general.sampling.temp": 0.25, "general.sampling.top_k": 7, "general.sampling.min_p": 0.125}
    backend = fake_load(FakeBackend(scripted("x")), metadata=asked)
    write("temperature = 0.5\ntop-k = 9\ntop_p = 0.75\nmode = 'little'\n[serve]\ntop_p = 0.1\n")
    monkeypatch.setenv("MOBILE_GGUF_TEMPERATURE", "0.75")
    assert main(["run", "m.gguf", "hi", "--temp", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["receipt"]["mode"] == "little"
    names = ("temp", "top_k", "top_p", "min_p")
    assert [backend.sampling[name] for name in names] == [1.0, 9, 0.75, 0.125]
    assert main(["run", "m.gguf", "hi"]) == 0
    assert backend.sampling["temp"] == 0.75
    monkeypatch.delenv("MOBILE_GGUF_TEMPERATURE")
    config_path().unlink()
    assert main(["run", "m.gguf", "hi"]) == 0
    assert [backend.sampling[name] for name in names] == [0.25, 7, 0.95, 0.125]


def test_python_follows_the_file_too_and_no_configuration(fake_load, monkeypatch):
    import mobile_gguf

    monkeypatch.setenv("MOBILE_GGUF_TEMPERATURE", "0.75")
    backend = fake_load(FakeBackend(scripted("x")), metadata={"general.sampling.temp": 0.25})
    with mobile_gguf.load("m.gguf") as model:
        model.generate("hi")
        assert backend.sampling["temp"] == 0.25
        model.chat("hi", temperature=0)
        assert backend.sampling["temp"] == 0


def test_a_file_asks_only_for_what_can_be_meant():
    keys = {"temp": 0.60000002384, "top_k": 20, "top_p": 9.0, "min_p": float("nan"), "mirostat": 2}
    info = fake_info(metadata={f"general.sampling.{name}": value for name, value in keys.items()})
    options, left = recommended(info)
    assert options == {"temperature": 0.6, "top_k": 20}
    assert [key.rpartition(".")[2] for key in left] == ["top_p", "min_p", "mirostat"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("temprature = 1", "config.toml: temprature is no option; did you mean temperature?"),
        ("[serv]\nmode = 'little'", "config.toml: serv is no option; did you mean serve?"),
        ("[serve]\nmoed = 'little'", "config.toml: serve.moed is no option; did you mean mode?"),
        ("temperature = 'hot'", "config.toml: temperature: temperature is 'hot': it must be a number"),
        ("[plan]\nn_ctx = -1", "config.toml: plan.n_ctx: n_ctx is -1: it must be at least 0"),
        ("port = 70000", "config.toml: port: port is 70000: it must be at most 65535"),
        ("max_request = '40%'", "max_request: 40% is no number of bytes: give a size such as 4MiB"),
        ("[run]\nport = 80", "config.toml: run.port is no option of run"),
        ("temperature = ", "config.toml cannot be read: Invalid value (at end of document)"),
    ],
)
def test_an_error_of_the_file_is_a_line_with_file_and_key(write, text, said, capsys):
    write(text)
    assert main(["run", "m.gguf", "hi"]) == 2
    err = capsys.readouterr().err
    assert err.endswith(f"{said}\n")
    assert err.count("\n") == 1


def test_an_error_of_the_environment_names_the_variable(monkeypatch):
    monkeypatch.setenv("MOBILE_GGUF_RAM_BUGDET", "2G")
    with pytest.raises(UsageError, match="did you mean MOBILE_GGUF_RAM_BUDGET"):
        read_defaults()
    monkeypatch.delenv("MOBILE_GGUF_RAM_BUGDET")
    monkeypatch.setenv("MOBILE_GGUF_RAM_BUDGET", "much")
    with pytest.raises(UsageError, match="MOBILE_GGUF_RAM_BUDGET: "):
        read_defaults()


def test_every_option_can_be_a_default(monkeypatch):
    every = {*declared(LoadOptions), *declared(GenerateOptions), *declared(ServeOptions)}
    for name in every:
        monkeypatch.setenv(f"MOBILE_GGUF_{name.upper()}", "4MiB" if name == "max_request" else "default")
    assert set(read_defaults()) == every


def test_config_shows_where_each_value_comes_from(write, command, monkeypatch):
    write("ram_budget = '40%'\nstop = ['a', 'b']\n[serve]\ntemperature = 0.5\n")
    monkeypatch.setenv("MOBILE_GGUF_TOP_K", "5")
    code, out, _ = command("config", "--json")
    options = json.loads(out)["options"]
    assert code == 0
    assert options["ram_budget"] == {"value": "40%", "from": f"{config_path()}: ram_budget"}
    assert options["top_k"] == {"value": 5, "from": "MOBILE_GGUF_TOP_K"}
    assert options["stop"]["value"] == ["a", "b"]
    assert options["temperature"] == {"value": 0.8, "from": "built in"}
    code, out, _ = command("config", "--for", "serve")
    rows = [line.split(maxsplit=2) for line in out.splitlines()]
    assert ["temperature", "0.5", f"{config_path()}: serve.temperature"] in rows
    assert ["mode", "exact", "built in"] in rows


def test_the_chat_has_them_as_its_own_defaults(tmp_path, write, monkeypatch):
    write("temperature = 0.5\ntop_k = 9\n")
    monkeypatch.setenv("MOBILE_GGUF_MIN_P", "0.25")
    settings = Settings(tmp_path / "chat.json", {}, read_defaults("chat"))
    settings.of_model = {"temperature": 0.1, "top_p": 0.75}
    settings.set("top_k", "3")
    assert [settings.value(name) for name in ("temperature", "top_k", "top_p", "min_p")] == [
        0.5,
        3,
        0.75,
        0.25,
    ]
    assert settings.answer_options() == {"temperature": 0.5, "top_k": 3, "min_p": 0.25}
    settings.set("top_k", "default")
    assert settings.value("top_k") == 9


@pytest.fixture
def served(fake_load, monkeypatch):
    """What ``serve`` would listen on and how, by its command line."""
    import mobile_gguf.server.run as server

    fake_load(FakeBackend(scripted("x")))
    seen: dict = {}

    class Bound:
        def close(self):
            pass

    def bind(host, port):
        seen.update(host=host, port=port)
        return Bound()

    def serve(_model, settings, _bound, **_more):
        seen.update(settings=settings)

    monkeypatch.setattr(server, "bind", bind)
    monkeypatch.setattr(server, "serve", serve)

    def run(*flags: str):
        assert main(["serve", "m.gguf", *flags]) == 0
        return seen

    return run


def test_a_server_has_its_options_from_file_environment_and_flags(write, served, monkeypatch, tmp_path):
    (tmp_path / "key.txt").write_text("of-the-file\n")
    write(
        f"port = 9000\ncors = ['https://a.example']\napi_key_file = '{tmp_path}/key.txt'\n"
        "[serve]\nport = 9001\nhost = '0.0.0.0'\nqueue = 3\nmax-request = '1MiB'\ntimeout = 2.5\n"
    )
    seen = served()
    assert (seen["host"], seen["port"]) == ("0.0.0.0", 9001)
    settings = seen["settings"]
    assert (settings.queue, settings.max_request_bytes, settings.timeout) == (3, 1 << 20, 2.5)
    assert (settings.origins, settings.api_key) == (("https://a.example",), "of-the-file")
    monkeypatch.setenv("MOBILE_GGUF_PORT", "9002")
    monkeypatch.setenv("MOBILE_GGUF_API_KEY", "default")  # a key like any other
    seen = served("--host", "127.0.0.1", "--queue", "0")
    assert (seen["host"], seen["port"], seen["settings"].queue) == ("127.0.0.1", 9002, 0)
    assert seen["settings"].api_key == "default"
    (tmp_path / "other.txt").write_text("of-a-flag")
    seen = served("--port", "9003", "--api-key-file", str(tmp_path / "other.txt"))
    assert (seen["port"], seen["settings"].api_key) == (9003, "of-a-flag")


def test_options_of_a_server_cost_other_verbs_nothing(write, fake_load, command):
    fake_load(FakeBackend(scripted("x")))
    write("port = 9000\nlog_requests = true\n")
    assert main(["run", "m.gguf", "hi"]) == 0
    code, out, _ = command("config", "--for", "run")
    assert code == 0
    assert "\nport" not in out


@pytest.mark.parametrize("key", ["", "a b", "\u00e9"])
def test_a_key_that_is_none_is_told_with_its_place(write, command, monkeypatch, key):
    write(f'api_key = "{key}"')
    code, _, error = command("serve", "m.gguf")
    assert (code, error.count("\n")) == (2, 1)
    assert f"the API key in {config_path()}: api_key must be" in error
    monkeypatch.setenv("MOBILE_GGUF_API_KEY", key)
    assert "the API key in MOBILE_GGUF_API_KEY must be" in command("serve", "m.gguf")[2]


def test_config_shows_a_server_options_and_no_key(write, command, monkeypatch):
    write("[serve]\nport = 9001\n")
    monkeypatch.setenv("MOBILE_GGUF_API_KEY", "hush")
    code, out, _ = command("config", "--for", "serve")
    rows = [line.split(maxsplit=2) for line in out.splitlines()]
    assert code == 0
    assert ["port", "9001", f"{config_path()}: serve.port"] in rows
    assert ["host", "127.0.0.1", "built in"] in rows
    assert "hush" not in out + command("config", "--json")[1]
    assert ["api_key", "(hidden)", "MOBILE_GGUF_API_KEY"] in rows
