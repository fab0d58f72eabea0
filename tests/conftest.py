"""Every test has directories of its own, and a scripted engine where it does not need the real one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import convert_checkpoints
import gguf_samples
import hub_stub
import pytest
from fake_backend import FakeBackend, fake_info
from hypothesis import HealthCheck, settings

from mobile_gguf.api import loading
from mobile_gguf.api import model as model_module
from mobile_gguf.api.model import Model
from mobile_gguf.files.paths import cache_dir, data_dir, engine_cache_dir
from mobile_gguf.options import GenerateOptions, LoadOptions, ServeOptions, declared

pytest_plugins = ["run_rules"]

# The user's own directories, looked up before any test is given others: the engine and the demo model
# are built there once and cost minutes.
REAL_ENGINE_CACHE = engine_cache_dir()
REAL_CACHE = cache_dir()
REAL_DATA = data_dir()

_DIRECTORIES = {
    "XDG_CACHE_HOME": "cache",
    "XDG_DATA_HOME": "data",
    "XDG_CONFIG_HOME": "config",
    "XDG_STATE_HOME": "state",
    "XDG_RUNTIME_DIR": "run",
    "HF_HOME": "hf",
    "HF_HUB_CACHE": "hf/hub",
    "HUGGINGFACE_HUB_CACHE": "hf/hub",
}

# What a shell may set and a test would see: how wide and how colourful, whose token, which key.
_SETTINGS = (
    "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "COLORTERM", "COLUMNS", "LINES",
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "OPENAI_API_KEY", "OPENAI_BASE_URL",
    "MOBILE_GGUF_API_KEY", "MOBILE_GGUF_RPC_TIMEOUT",
)  # fmt: skip

# Through a SOCKS proxy httpx makes no client at all without a package that nothing here needs.
_PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")

# The same examples on every machine however slow it is: a failure here is one everywhere.
settings.register_profile(
    "everywhere", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("everywhere")


def pytest_configure() -> None:
    """One environment for all tests, before anything reads it.

    An HTTP proxy stays, for what has to be fetched, but not for this machine; a SOCKS proxy goes.
    """
    for name in _SETTINGS:
        os.environ.pop(name, None)
    for name in {*declared(LoadOptions), *declared(GenerateOptions), *declared(ServeOptions)}:
        os.environ.pop(f"MOBILE_GGUF_{name.upper()}", None)
    for name in (*_PROXIES, *map(str.lower, _PROXIES)):
        if os.environ.get(name, "").lower().startswith("socks"):
            del os.environ[name]
    for name in ("no_proxy", "NO_PROXY"):
        named = [os.environ[name]] if os.environ.get(name) else []
        os.environ[name] = ",".join([*named, "127.0.0.1", "localhost"])


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_is_heard() -> None:
    """A shell's background job starts with SIGINT ignored, and its children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_directories(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Points every XDG and Hugging Face directory at a new one; the engine's cache stays the user's."""
    root = tmp_path_factory.mktemp("home")
    for variable, name in _DIRECTORIES.items():
        monkeypatch.setenv(variable, str(root / name))
    monkeypatch.setenv("MOBILE_GGUF_ENGINE_CACHE", str(REAL_ENGINE_CACHE))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # no test asks the real Hub
    return root


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> convert_checkpoints.Checkpoints:
    """Small Hugging Face checkpoints; skips without torch."""
    return convert_checkpoints.make(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def real_directories(own_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives a test the user's own cache and models, for what costs minutes to make."""
    _use_real_directories(monkeypatch)


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The real demo model, built if this machine has none."""
    from mobile_gguf.demo import ensure_demo

    with pytest.MonkeyPatch.context() as monkeypatch:
        _use_real_directories(monkeypatch)
        return ensure_demo()


def _use_real_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(REAL_CACHE.parent))
    monkeypatch.setenv("XDG_DATA_HOME", str(REAL_DATA.parent))


@pytest.fixture
def fake_model() -> Iterator[Callable[..., Model]]:
    """Makes Models over the scripted engine: ``fake_model(backend, info=..., **load_options)``."""
    made: list[Model] = []

    def make(backend: FakeBackend | None = None, *, info: Any = None, **options: Any) -> Model:
        made.append(Model(backend or FakeBackend(), info or fake_info(), LoadOptions(**options)))
        return made[-1]

    yield make
    for model in made:
        model.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium for the pages of a module: while it runs, its thread can have no other event loop."""
    from page_harness import chromium

    with chromium() as opened:
        yield opened


@pytest.fixture
def fake_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., FakeBackend]:
    """Makes ``load`` (and so the CLI) open the scripted engine for the model file it returns the path of."""

    def install(backend: FakeBackend | None = None, **facts: Any) -> FakeBackend:
        used = backend or FakeBackend()
        info = fake_info(**facts)
        monkeypatch.setattr(loading, "open_backend", lambda _info, _options, _progress=None: (used, []))
        monkeypatch.setattr(model_module, "read_gguf_info", lambda _path: info)
        monkeypatch.setattr(model_module, "resolve_model", lambda name, _progress=None: Path(str(name)))
        return used

    return install


@pytest.fixture(scope="session")
def hub_samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A MoE in one file and in parts, and a dense model, by their files' names."""
    folder = tmp_path_factory.mktemp("samples")
    gguf_samples.write_sample(folder / "m-Q4_K_M.gguf", n_tokens=50)
    gguf_samples.write_sample(folder / "m-Q8_0.gguf", n_tokens=50, split_max_tensors=4)
    gguf_samples.write_sample(folder / "dense-F16.gguf", n_tokens=50, moe=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(hub_samples: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_stub.HubStub]:
    """A Hub on the loopback, which this process takes for the real one."""
    split = {name: data for name, data in hub_samples.items() if name.startswith("m-Q8_0")}
    repositories = {
        "org/model": {"m-Q4_K_M.gguf": hub_samples["m-Q4_K_M.gguf"], **split, "README.md": b"# model"},
        "org/large": {"large-Q8_0.gguf": hub_stub.LARGE},
        "org/dense": {"dense-F16.gguf": hub_samples["dense-F16.gguf"]},
        "org/torch": {"config.json": b"{}", "model.safetensors": b"x"},
        "org/none": {"README.md": b"# nothing"},
        "org/half": dict(list(split.items())[:1]),
        "org/evil": {"../../evil-Q4_0.gguf": b"x"},
    }
    with hub_stub.serving(repositories) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "300")  # a busy machine's pauses break no connection
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running


@pytest.fixture
def hub_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits are noted, not waited."""
    waited: list[float] = []
    monkeypatch.setattr("mobile_gguf.hub.client.sleep", waited.append)
    return waited


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process: its exit code, stdout and stderr."""

    def run(*argv: str) -> tuple[int, str, str]:
        from mobile_gguf.cli import main

        try:
            code = main(argv)
        except SystemExit as end:
            code = int(str(end.code))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
