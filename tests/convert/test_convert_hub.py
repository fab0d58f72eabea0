"""Checkpoints from the Hub, which is a stub on the loopback: nothing else is reachable in tests."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import hub_stub
import pytest
from hub_stub import HubStub

from mobile_gguf.convert.hf import hub
from mobile_gguf.errors import MobileError, UsageError

if importlib.util.find_spec("huggingface_hub") is None:
    pytest.skip("huggingface_hub is not installed", allow_module_level=True)

WEIGHTS = bytes(range(256)) * 4096
FILES = {
    "config.json": b"{}", "tokenizer.json": b"{}", "README.md": b"# model", "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"the same again", "evil.py": b"raise SystemExit", "picture.png": b"png",
    "original/model.safetensors": b"x",
}  # fmt: skip
LARGE = {"config.json": b"{}", "model.safetensors": WEIGHTS * 24}


@pytest.fixture
def stub() -> Iterator[HubStub]:
    old = {"config.json": b"{}", "pytorch_model-00001-of-00001.bin": b"weights"}
    repositories = {
        "org/model": FILES,
        "org/old": old,
        "org/ggufs": {"m-Q4.gguf": b"GGUF"},
        "org/none": {},
        "org/big": LARGE,
    }
    with hub_stub.serving(repositories) as running:
        yield running


@pytest.fixture(autouse=True)
def on_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("mobile_gguf.hub.client.sleep", lambda _seconds: None)


def fetch(reference: str, endpoint: str, **environment: str) -> dict[str, object]:
    texts: list[tuple[str, float]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HF_ENDPOINT": endpoint, **environment}.items():
            patch.setenv(name, value)
        try:
            folder = hub.fetch_checkpoint(
                reference, with_code=False, progress=lambda text, done: texts.append((text, done))
            )
        except MobileError as error:
            return {"error": f"{type(error).__name__}: {error}", "texts": texts}
    return {"folder": str(folder), "texts": texts}


def error_of(answer: dict[str, object]) -> str:
    """What was raised, which is one line."""
    text = str(answer["error"])
    assert "\n" not in text
    return text


def test_what_is_fetched(stub: HubStub) -> None:
    answer = fetch("hf:org/model", stub.url)
    folder = Path(str(answer["folder"]))
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "tokenizer.json", "README.md", "model.safetensors",
    }  # fmt: skip
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert folder.is_relative_to(os.environ["HF_HOME"])
    stub.requests.clear()
    again = fetch("hf:org/model", stub.url)
    assert again["folder"] == answer["folder"]
    assert not any("resolve" in path and path.endswith("model.safetensors") for path in stub.requests)
    # and without the Hub
    offline = fetch("hf:org/model", "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert offline["folder"] == answer["folder"]


def test_old_weights_where_there_are_no_others(stub: HubStub) -> None:
    folder = Path(str(fetch("hf:org/old@v1", stub.url)["folder"]))
    assert (folder / "pytorch_model-00001-of-00001.bin").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("hf:org/absent", "ModelNotFoundError: hf:org/absent does not exist on the Hub, or is private"),
        ("hf:org/private", "does not exist on the Hub, or is private"),
        ("hf:org/gated", "is gated: accept its conditions"),
        ("hf:org/model@v9", "no such revision"),
        ("hf:org/broken", "HTTP 500"),
        ("hf:org/ggufs", "holds GGUF files, no checkpoint"),
        ("hf:org/none", "holds no model*.safetensors"),
    ],
)
def test_what_the_hub_refuses(stub: HubStub, reference: str, said: str) -> None:
    assert said in error_of(fetch(reference, stub.url))


def test_no_hub_and_nothing_cached() -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert "hf:org/model" in error_of(fetch("hf:org/model", url))
    answer = fetch("hf:org/model", "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert "offline" in error_of(answer)


def test_a_download_that_breaks_off_goes_on(stub: HubStub) -> None:
    stub.breaks_off = "model.safetensors"
    answer = fetch("hf:org/big", stub.url)
    assert (Path(str(answer["folder"])) / "model.safetensors").read_bytes() == LARGE["model.safetensors"]
    begun, resumed = (int(name.partition(":")[2]) for name in stub.ranges if name.startswith("model."))
    assert begun == 0 < resumed
    texts = [text for text, _ in answer["texts"]]  # type: ignore[attr-defined]
    assert any(text.startswith("downloading org/big: ") and " of 24.0 MiB" in text for text in texts)


@pytest.mark.parametrize("text", ["hf:", "hf:model", "hf:a/b/c", "hf:org/model name", "hf:org/../x"])
def test_references_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"no repository on the Hub|names no GGUF|no model on the Hub"):
        hub.repository_name(text)


def test_a_gguf_of_a_repository_is_no_checkpoint() -> None:
    with pytest.raises(UsageError, match="names a GGUF"):
        hub.repository_name("hf:org/model:q4_k_m")
    assert not hub.is_checkpoint_reference("hf:org/model:q4_k_m")
    assert hub.is_checkpoint_reference("https://huggingface.co/org/model")
    assert hub.repository_name("hf:org/Model-8x7B@main") == "Model-8x7B"
