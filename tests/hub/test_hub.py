"""Models pulled from a stand-in for the Hub on the loopback, and pulls that are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_stub import COMMIT, HubStub

from mobile_gguf.errors import ModelNotFoundError
from mobile_gguf.hub import HubError, find_pulled, parse_reference, pull, resolve_hub
from mobile_gguf.hub.cache import cache_root

huggingface_hub = pytest.importorskip("huggingface_hub")
OTHER = "beef" + "1" * 36
Command = Callable[..., tuple[int, str, str]]


# pull


def test_pull(hub: HubStub, command: Command, hub_samples: dict[str, bytes]) -> None:
    code, out, err = command("pull", "org/model")
    path = Path(out.strip())
    assert code == 0
    assert path.read_bytes() == hub_samples["m-Q4_K_M.gguf"]
    assert path.is_relative_to(Path(os.environ["HF_HOME"]) / "hub")
    assert "taking Q4_K_M (the default); also there: Q8_0" in err
    assert "4 experts in each of 2 layers" in err
    assert "run it: mobile-gguf run hf:org/model:Q4_K_M" in err
    hub.requests.clear()
    code, out, err = command("pull", "https://huggingface.co/org/model", "--json")
    again = json.loads(out)
    assert (again["path"], again["received_bytes"], again["commit"]) == (str(path), 0, COMMIT)
    assert again["model"] == "hf:org/model:Q4_K_M"
    assert not any("resolve" in request for request in hub.requests)


def test_other_tools_share_the_files(hub: HubStub, hub_samples: dict[str, bytes]) -> None:
    """huggingface_hub finds what was pulled, and what it downloaded is not pulled again."""
    code = (
        "import sys, huggingface_hub as h\n"
        "print(h.hf_hub_download('org/model', sys.argv[1], local_files_only=sys.argv[2] == 'local'))\n"
        "print([(r.repo_id, sorted(f.file_name for v in r.revisions for f in v.files))"
        " for r in h.scan_cache_dir().repos])"
    )

    def theirs(name: str, how: str) -> list[str]:
        environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code, name, how],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        return done.stdout.splitlines()

    pulled = pull(parse_reference("hf:org/model"))
    path, scanned = theirs("m-Q4_K_M.gguf", "local")
    assert Path(path) == pulled.path
    assert scanned == "[('org/model', ['m-Q4_K_M.gguf'])]"
    theirs("m-Q8_0-00001-of-00003.gguf", "ask")
    parts = {name: data for name, data in hub_samples.items() if name.startswith("m-Q8_0")}
    ours = pull(parse_reference("hf:org/model:q8_0"))
    assert ours.received_bytes == sum(map(len, parts.values())) - len(parts["m-Q8_0-00001-of-00003.gguf"])


def test_parts_are_pulled_and_found_as_one(hub: HubStub, hub_samples: dict[str, bytes]) -> None:
    pulled = pull(parse_reference("hf:org/model:Q8_0"))
    assert [path.read_bytes() for path in pulled.files] == [
        hub_samples[f"m-Q8_0-{i:05}-of-00003.gguf"] for i in (1, 2, 3)
    ]
    hub.requests.clear()
    assert resolve_hub(parse_reference("hf:org/model:q8_0")) == pulled.path
    assert resolve_hub(parse_reference(f"hf:org/model@{COMMIT[:8]}")) == pulled.path
    assert not hub.requests
    pulled.files[1].unlink()
    assert find_pulled(parse_reference("hf:org/model:Q8_0")) is None
    assert resolve_hub(parse_reference("hf:org/model:Q8_0")).is_file()


def test_what_is_not_pulled_yet_is_pulled_where_it_is_used(
    hub: HubStub, fake_load: Callable[..., object], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobile_gguf.api import model
    from mobile_gguf.hub import resolve

    fake_load()
    monkeypatch.setattr(model, "resolve_model", resolve.resolve_model)
    code, _, err = command("run", "hf:org/model", "hi", "-n", "1")
    assert code == 0
    assert "pulling model Q4_K_M: " in err
    assert find_pulled(parse_reference("hf:org/model")) is not None


def test_the_token_goes_to_the_hub_only(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull(parse_reference("hf:org/model"))
    assert set(hub.tokens) <= {"Bearer hf_secret", None}
    assert "Bearer hf_secret" in hub.tokens
    assert hub.cdn_tokens == [None]


def test_a_new_revision_replaces_the_old_one(hub: HubStub, hub_samples: dict[str, bytes]) -> None:
    first = pull(parse_reference("hf:org/model"))
    hub.commit = OTHER
    hub.repositories["org/model"]["m-Q4_K_M.gguf"] = hub_samples["dense-F16.gguf"]
    assert resolve_hub(parse_reference("hf:org/model")) == first.path
    second = pull(parse_reference("hf:org/model"))
    assert second.path != first.path
    assert resolve_hub(parse_reference("hf:org/model")) == second.path
    assert resolve_hub(parse_reference(f"hf:org/model@{COMMIT}")) == first.path


# refusals


@pytest.mark.parametrize(
    ("reference", "code", "said"),
    [
        ("hf:org/absent", 3, "does not exist on the Hub, or is private: check the name, or log in"),
        ("hf:org/private", 3, "does not exist on the Hub, or is private"),
        ("hf:org/gated", 3, "/org/gated, then `hf auth login` or set HF_TOKEN"),
        ("hf:org/broken", 1, "HTTP 500"),
        ("hf:org/model@v9", 3, "no such revision, v9"),
        ("hf:org/model:Q5_K_M", 3, "There is Q4_K_M ("),
        ("hf:org/model/x.gguf", 3, "has no file x.gguf"),
        ("hf:org/torch", 3, "`mobile-gguf convert hf:org/torch` makes one of it"),
        ("hf:org/none", 3, "holds no GGUF file"),
        ("hf:org/half", 3, "is one of 3 parts, and the repository has only 1 of them"),
        ("hf:org/evil", 1, "which cannot be one here"),
    ],
)
def test_what_cannot_be_pulled(
    hub: HubStub, hub_pauses: list[float], command: Command, reference: str, code: int, said: str
) -> None:
    got, out, err = command("pull", reference)
    assert (got, out) == (code, "")
    error = [line for line in err.splitlines() if line.startswith("mobile-gguf: error: ")]
    assert len(error) == 1
    assert said in error[0]
    assert not cache_root().exists() or not list(cache_root().rglob("blobs/*"))


@pytest.mark.parametrize("status", [401, 403])
def test_a_file_that_may_not_be_read(hub: HubStub, status: int) -> None:
    hub.refusals = []
    seen = len(hub.requests)

    def refuse(_text: str, _done: float) -> None:
        if len(hub.requests) > seen and not hub.refusals and any("/api/models" in r for r in hub.requests):
            hub.refusals = [(status, {})]

    with pytest.raises(ModelNotFoundError, match=r"hf auth login"):
        pull(parse_reference("hf:org/large"), refuse)


def test_a_rate_limit_is_waited_for(hub: HubStub, hub_pauses: list[float]) -> None:
    hub.refusals = [(429, {"Retry-After": "7"}), (503, {})]
    assert pull(parse_reference("hf:org/large")).path.is_file()
    assert hub_pauses == [7.0, 2.0]


@pytest.mark.parametrize("headers", [{"Retry-After": "3600"}, {"RateLimit": '"api";r=0;t=3600'}])
def test_a_long_rate_limit_is_an_error(
    hub: HubStub, hub_pauses: list[float], headers: dict[str, str]
) -> None:
    hub.refusals = [(429, headers)]
    with pytest.raises(HubError, match="try again in 3600 s; with HF_TOKEN"):
        pull(parse_reference("hf:org/large"))
    assert not hub_pauses


def test_nobody_answers(hub_pauses: list[float], command: Command) -> None:
    code, _, err = command("pull", "hf:org/model")  # at conftest's endpoint, where nobody listens
    assert code == 1
    assert "the Hub cannot be reached" in err


def test_offline(hub: HubStub, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    pulled = pull(parse_reference("hf:org/model"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    assert resolve_hub(parse_reference("hf:org/model")) == pulled.path
    code, _, err = command("show", "hf:org/model:Q8_0")
    assert code == 3
    assert "offline mode, HF_HUB_OFFLINE" in err
    assert command("pull", "hf:org/model")[0] == 3
    assert not hub.requests
