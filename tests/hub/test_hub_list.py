"""list and show of models on the Hub and in its cache, and what uses them without changing the cache."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import gguf_samples
import pytest
from hub_stub import LARGE, HubStub, partial

from mobile_gguf.hub import parse_reference, pull
from mobile_gguf.hub.cache import cache_root

pytest.importorskip("huggingface_hub")
Command = Callable[..., tuple[int, str, str]]

pytest.importorskip("huggingface_hub")


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has."""
    monkeypatch.setattr("mobile_gguf.plan.known.ask_devices", lambda _servers: [])


# list, show


def test_list(hub: HubStub, command: Command, hub_samples: dict[str, bytes]) -> None:
    pull(parse_reference("hf:org/model"))
    pull(parse_reference("hf:org/model:Q8_0"))
    pull(parse_reference("hf:org/dense"))
    broken = pull(parse_reference("hf:org/large"))
    models = Path(os.environ["XDG_DATA_HOME"]) / "mobile-gguf" / "models"
    models.mkdir(parents=True)
    (models / "mine.gguf").write_bytes(hub_samples["m-Q4_K_M.gguf"])
    (models / "cut.gguf").write_bytes(hub_samples["m-Q4_K_M.gguf"][:-1000])
    code, out, err = command("list")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert list(rows) == [
        "NAME", "demo", "cut", "mine", "hf:org/dense:F16", "hf:org/large:Q8_0", "hf:org/model:Q4_K_M",
        "hf:org/model:Q8_0",
    ]  # fmt: skip
    assert "broken: is truncated: its tensors need" in rows["cut"]
    assert "broken: is not a GGUF file" in rows["hf:org/large:Q8_0"]
    assert "192.0 KiB  all in RAM" in rows["mine"]
    assert rows["mine"].endswith("models")
    assert rows["hf:org/model:Q8_0"].endswith("HF cache")
    assert "none  dense" in rows["hf:org/dense:F16"]
    listed = {m["name"]: m for m in json.loads(command("list", "--json")[1])["models"]}
    assert listed["mine"]["expert_bytes"] == 196608
    assert listed["mine"]["fit"] == {"ram_expert_share": 1.0, "vram_expert_share": None, "devices": []}
    assert listed["hf:org/large:Q8_0"]["path"] == str(broken.path)
    assert "is not a GGUF" in listed["hf:org/large:Q8_0"]["problem"]


def test_list_reads_a_header_once(hub: HubStub, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from mobile_gguf.hub import facts

    pulled = pull(parse_reference("hf:org/model"))
    read: list[Path] = []
    real = facts.read_gguf_info
    monkeypatch.setattr(facts, "read_gguf_info", lambda path: read.append(path) or real(path))
    first = command("list", "--json")[1]
    assert read == [pulled.path]
    assert json.loads(command("list", "--json")[1]) == json.loads(first)
    assert read == [pulled.path]
    os.utime(pulled.path, ns=(1, 1))
    command("list")
    assert read == [pulled.path] * 2
    (Path(os.environ["XDG_CACHE_HOME"]) / "mobile-gguf" / "gguf-facts.json").write_text(
        '{"version": 1, "models": 3}'
    )
    assert command("list")[0] == 0


def test_list_knows_unfinished_downloads(hub: HubStub, command: Command) -> None:
    partial(LARGE).parent.mkdir(parents=True)
    partial(LARGE).write_bytes(LARGE[:2048])
    assert "hf:org/large  2.0 KiB  download not finished: pull it again" in command("list")[1]


def test_show_of_a_model_on_the_hub(hub: HubStub, command: Command, hub_samples: dict[str, bytes]) -> None:
    before = hub.sent_bytes
    code, out, _ = command("show", "hf:org/model:Q8_0", "--json")
    remote = json.loads(out)
    assert code == 0
    assert (remote["pulled"], remote["n_files"], remote["n_expert"]) == (False, 3, 4)
    assert "pull hf:org/model:Q8_0` fetches it" in command("show", "hf:org/model:Q8_0")[2]
    assert hub.sent_bytes > before
    assert not list(cache_root().rglob("*.gguf"))
    command("pull", "hf:org/model:Q8_0")
    local = json.loads(command("show", "hf:org/model:Q8_0", "--json")[1])
    assert local["pulled"]
    for fact in ("expert_bytes", "dense_bytes", "file_bytes", "n_layer", "quantization", "budget_min_bytes"):
        assert local[fact] == remote[fact], fact


def test_show_fetches_the_header_only(
    hub: HubStub, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = gguf_samples.write_sample(tmp_path / "wide-Q4_0.gguf", n_ff=1024, n_expert=32)
    hub.repositories["org/wide"] = {path.name: path.read_bytes()}
    monkeypatch.setattr("mobile_gguf.hub.remote._BLOCK", 1 << 16)
    code, out, _ = command("show", "hf:org/wide", "--json")
    assert code == 0
    assert json.loads(out)["file_bytes"] == path.stat().st_size
    assert hub.sent_bytes < path.stat().st_size // 10


@pytest.mark.parametrize("data", [b"", b"GGUF", b"not a model" * 100])
def test_show_of_a_broken_file_on_the_hub(hub: HubStub, command: Command, data: bytes) -> None:
    hub.repositories["org/bad"] = {"bad-Q4_0.gguf": data}
    code, _, err = command("show", "hf:org/bad")
    assert code == 1
    assert "hf:org/bad/bad-Q4_0.gguf" in err
    assert "Traceback" not in err


# the cache is shared: nothing is changed there


def test_calibrate_does_not_write_into_the_cache(hub: HubStub, command: Command) -> None:
    code, _, err = command("calibrate", "hf:org/model")
    assert code == 2
    assert "which other programs share: give --out FILE" in err


def test_a_pulled_model_is_converted_to_here(
    hub: HubStub, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = command("convert", "hf:org/model:Q8_0")
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["m-Q8_0.mobile.gguf"]
