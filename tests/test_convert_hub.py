"""Checkpoints from the Hub, which is a stub on the loopback: nothing else is reachable in tests."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub_stub
import pytest
from hub_stub import HubStub

from mobile_gguf.convert.hf import hub
from mobile_gguf.errors import UsageError

if importlib.util.find_spec("huggingface_hub") is None:
    pytest.skip("huggingface_hub is not installed", allow_module_level=True)

# HF_ENDPOINT and HF_HOME are read when huggingface_hub is imported: a process of its own for each
CODE = """
import json, sys
from mobile_gguf.convert.hf.hub import fetch_checkpoint
from mobile_gguf.errors import MobileError
texts = []
try:
    progress = lambda text, done: texts.append([text, done])
    folder = fetch_checkpoint(sys.argv[1], with_code=False, progress=progress)
    print(json.dumps({"folder": str(folder), "texts": texts}))
except MobileError as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""
WEIGHTS = bytes(range(256)) * 4096
FILES = {
    "config.json": b"{}", "tokenizer.json": b"{}", "README.md": b"# model", "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"the same again", "evil.py": b"raise SystemExit", "picture.png": b"png",
    "original/model.safetensors": b"x",
}  # fmt: skip
# the client keeps what it has of a file by tens of megabytes
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


def fetch(reference: str, endpoint: str, **environment: str) -> dict[str, object]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB_OFFLINE")}
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, reference], capture_output=True, text=True, check=False,
        env={**clean, "HF_ENDPOINT": endpoint, "no_proxy": "*", **quiet, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert "\n" not in str(answer.get("error", ""))
    return answer


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
    assert said in str(fetch(reference, stub.url).get("error"))


def test_no_hub_and_nothing_cached() -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert "hf:org/model" in str(fetch("hf:org/model", url).get("error"))
    answer = fetch("hf:org/model", "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert "offline" in str(answer.get("error"))


def test_a_download_that_breaks_off_goes_on(stub: HubStub) -> None:
    stub.breaks_off = "model.safetensors"
    answer = fetch("hf:org/big", stub.url)
    if "error" in answer:
        answer = fetch("hf:org/big", stub.url)
    assert (Path(str(answer["folder"])) / "model.safetensors").read_bytes() == LARGE["model.safetensors"]
    (resumed,) = stub.ranges
    assert int(resumed.partition(":")[2]) > 0
    texts = [text for text, _ in answer["texts"]]  # type: ignore[attr-defined]
    assert any(text.startswith("downloading org/model") or " of 25 MB" in text for text in texts)


@pytest.mark.parametrize("text", ["hf:", "hf:model", "hf:a/b/c", "hf:org/model name", "hf:org/../x"])
def test_references_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="no repository on the Hub"):
        hub.repository_name(text)


def test_a_gguf_of_a_repository_is_not_for_this_version() -> None:
    with pytest.raises(UsageError, match="names a GGUF"):
        hub.repository_name("hf:org/model:q4_k_m")
    assert hub.repository_name("hf:org/Model-8x7B@main") == "Model-8x7B"
