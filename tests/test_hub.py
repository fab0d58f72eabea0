"""pull, list, show and rm against a stand-in for the Hub on the loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf_samples
import hub_stub
import pytest
from hub_stub import COMMIT, HubStub, etag_of

from mobile_gguf.cli import main
from mobile_gguf.errors import MobileError, ModelNotFoundError
from mobile_gguf.hub import HubError, find_pulled, parse_reference, pull, resolve_hub
from mobile_gguf.hub.cache import cache_root, repository_folder
from mobile_gguf.hub.download import DamagedError
from mobile_gguf.hub.meter import Meter, format_duration

huggingface_hub = pytest.importorskip("huggingface_hub")
LARGE = bytes(range(256)) * 20_000
OTHER = "beef" + "1" * 36
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("samples")
    gguf_samples.write_sample(folder / "m-Q4_K_M.gguf", n_tokens=50)
    gguf_samples.write_sample(folder / "m-Q8_0.gguf", n_tokens=50, split_max_tensors=4)
    gguf_samples.write_sample(folder / "dense-F16.gguf", n_tokens=50, moe=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def stub(samples: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    split = {name: data for name, data in samples.items() if name.startswith("m-Q8_0")}
    repositories = {
        "org/model": {"m-Q4_K_M.gguf": samples["m-Q4_K_M.gguf"], **split, "README.md": b"# model"},
        "org/large": {"large-Q8_0.gguf": LARGE},
        "org/dense": {"dense-F16.gguf": samples["dense-F16.gguf"]},
        "org/torch": {"config.json": b"{}", "model.safetensors": b"x"},
        "org/none": {"README.md": b"# nothing"},
        "org/half": dict(list(split.items())[:1]),
        "org/evil": {"../../evil-Q4_0.gguf": b"x"},
    }
    with hub_stub.serving(repositories) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits are noted, not waited."""
    waited: list[float] = []
    monkeypatch.setattr("mobile_gguf.hub.client.sleep", waited.append)
    return waited


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*argv: str) -> tuple[int, str, str]:
        try:
            code = main(argv)
        except SystemExit as end:
            code = int(str(end.code))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def blob(data: bytes, repo: str = "org/large") -> Path:
    return repository_folder(repo) / "blobs" / etag_of("x.gguf", data)


def partial(data: bytes) -> Path:
    return blob(data).with_name(blob(data).name + ".incomplete")


# pull


def test_pull(stub: HubStub, command: Command, samples: dict[str, bytes]) -> None:
    code, out, err = command("pull", "org/model")
    path = Path(out.strip())
    assert code == 0
    assert path.read_bytes() == samples["m-Q4_K_M.gguf"]
    assert path.is_relative_to(Path(os.environ["HF_HOME"]) / "hub")
    assert "taking Q4_K_M (the default); also there: Q8_0" in err
    assert "4 experts in each of 2 layers" in err
    assert "run it: mobile-gguf run hf:org/model:Q4_K_M" in err
    stub.requests.clear()
    code, out, err = command("pull", "https://huggingface.co/org/model", "--json")
    again = json.loads(out)
    assert (again["path"], again["received_bytes"], again["commit"]) == (str(path), 0, COMMIT)
    assert again["model"] == "hf:org/model:Q4_K_M"
    assert not any("resolve" in request for request in stub.requests)


def test_other_tools_share_the_files(stub: HubStub, samples: dict[str, bytes]) -> None:
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
    parts = {name: data for name, data in samples.items() if name.startswith("m-Q8_0")}
    ours = pull(parse_reference("hf:org/model:q8_0"))
    assert ours.received_bytes == sum(map(len, parts.values())) - len(parts["m-Q8_0-00001-of-00003.gguf"])


def test_parts_are_pulled_and_found_as_one(stub: HubStub, samples: dict[str, bytes]) -> None:
    pulled = pull(parse_reference("hf:org/model:Q8_0"))
    assert [path.read_bytes() for path in pulled.files] == [
        samples[f"m-Q8_0-{i:05}-of-00003.gguf"] for i in (1, 2, 3)
    ]
    stub.requests.clear()
    assert resolve_hub(parse_reference("hf:org/model:q8_0")) == pulled.path
    assert resolve_hub(parse_reference(f"hf:org/model@{COMMIT[:8]}")) == pulled.path
    assert not stub.requests
    pulled.files[1].unlink()
    assert find_pulled(parse_reference("hf:org/model:Q8_0")) is None
    assert resolve_hub(parse_reference("hf:org/model:Q8_0")).is_file()


def test_what_is_not_pulled_yet_is_pulled_where_it_is_used(
    stub: HubStub, fake_load: Callable[..., object], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobile_gguf import model, resolve

    fake_load()
    monkeypatch.setattr(model, "resolve_model", resolve.resolve_model)
    code, _, err = command("run", "hf:org/model", "hi", "-n", "1")
    assert code == 0
    assert "pulling model Q4_K_M: " in err
    assert find_pulled(parse_reference("hf:org/model")) is not None


def test_the_token_goes_to_the_hub_only(stub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull(parse_reference("hf:org/model"))
    assert set(stub.tokens) <= {"Bearer hf_secret", None}
    assert "Bearer hf_secret" in stub.tokens
    assert stub.cdn_tokens == [None]


def test_a_new_revision_replaces_the_old_one(stub: HubStub, samples: dict[str, bytes]) -> None:
    first = pull(parse_reference("hf:org/model"))
    stub.commit = OTHER
    stub.repositories["org/model"]["m-Q4_K_M.gguf"] = samples["dense-F16.gguf"]
    assert resolve_hub(parse_reference("hf:org/model")) == first.path
    second = pull(parse_reference("hf:org/model"))
    assert second.path != first.path
    assert resolve_hub(parse_reference("hf:org/model")) == second.path
    assert resolve_hub(parse_reference(f"hf:org/model@{COMMIT}")) == first.path


# broken downloads


@pytest.mark.parametrize("after", [0, 100_000, len(LARGE) - 1])
def test_a_cut_is_gone_on_with_at_once(stub: HubStub, pauses: list[float], after: int) -> None:
    stub.breaks_off, stub.break_after, stub.breaks = "large-Q8_0.gguf", after, 2
    pulled = pull(parse_reference("hf:org/large"))
    assert pulled.path.read_bytes() == LARGE
    assert len(pauses) == (2 if after < 200_000 else 1)
    assert pulled.received_bytes == len(LARGE)


def test_a_stopped_download_is_gone_on_with_by_the_next(stub: HubStub, pauses: list[float]) -> None:
    stub.breaks_off, stub.break_after, stub.breaks = "large-Q8_0.gguf", 3_000_000, 1
    stub.refusals = []

    def stop(text: str, _done: float) -> None:
        if "connection broke" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(parse_reference("hf:org/large"), stop)
    assert not blob(LARGE).exists()
    assert find_pulled(parse_reference("hf:org/large")) is None
    kept = partial(LARGE).read_bytes()
    assert 0 < len(kept) <= 3_000_000
    assert kept == LARGE[: len(kept)]
    pulled = pull(parse_reference("hf:org/large"))
    assert pulled.path.read_bytes() == LARGE
    assert pulled.received_bytes == len(LARGE) - len(kept)
    assert stub.ranges[-1] == f"large-Q8_0.gguf:{len(kept)}"
    assert not partial(LARGE).exists()


def test_ctrl_c_and_kill_leave_what_came(stub: HubStub) -> None:
    """The real command, which gets SIGINT and then SIGKILL in the middle of the bytes."""
    size = 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        stub.holds_at = stub.sent_bytes + 2_000_000
        with subprocess.Popen(
            [sys.executable, "-m", "mobile_gguf", "pull", "hf:org/large"],
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            while not partial(LARGE).exists() or partial(LARGE).stat().st_size <= size:
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.02)
            process.send_signal(number)
            _, err = process.communicate()
        assert process.returncode == code
        assert "Traceback" not in err
        if number == signal.SIGINT:
            assert "stopped: `mobile-gguf pull hf:org/large` goes on from here" in err
        size = partial(LARGE).stat().st_size
        stub.holds_at = None
        assert partial(LARGE).read_bytes() == LARGE[:size]
    assert pull(parse_reference("hf:org/large")).received_bytes == len(LARGE) - size


def test_a_wrong_hash_is_refused_and_removed(stub: HubStub) -> None:
    stub.damaged["large-Q8_0.gguf"] = LARGE[:-1] + b"?"
    with pytest.raises(DamagedError, match="is not what the Hub has"):
        pull(parse_reference("hf:org/large"))
    assert not blob(LARGE).exists()
    assert not partial(LARGE).exists()
    assert find_pulled(parse_reference("hf:org/large")) is None


def test_a_damaged_start_is_fetched_again(stub: HubStub) -> None:
    partial(LARGE).parent.mkdir(parents=True)
    partial(LARGE).write_bytes(b"?" * 1000)
    told = []
    assert pull(parse_reference("hf:org/large"), lambda text, _: told.append(text)).path.read_bytes() == LARGE
    assert stub.ranges == ["large-Q8_0.gguf:1000", "large-Q8_0.gguf:0"]
    assert any("is damaged: fetching it again" in text for text in told)


@pytest.mark.parametrize("content", [LARGE, LARGE + b"more"])
def test_a_partial_that_is_whole_or_too_long(stub: HubStub, content: bytes) -> None:
    partial(LARGE).parent.mkdir(parents=True)
    partial(LARGE).write_bytes(content)
    assert pull(parse_reference("hf:org/large")).path.read_bytes() == LARGE


@pytest.mark.parametrize("served", [LARGE[:-5], LARGE + b"more"])
def test_a_file_of_another_length_is_refused(stub: HubStub, pauses: list[float], served: bytes) -> None:
    stub.damaged["large-Q8_0.gguf"] = served
    stub.ranges_ignored = True
    with pytest.raises(HubError):
        pull(parse_reference("hf:org/large"))
    assert find_pulled(parse_reference("hf:org/large")) is None


def test_a_hub_that_ignores_ranges(stub: HubStub) -> None:
    partial(LARGE).parent.mkdir(parents=True)
    partial(LARGE).write_bytes(LARGE[:1000])
    stub.ranges_ignored = True
    assert pull(parse_reference("hf:org/large")).path.read_bytes() == LARGE


def test_a_partial_that_is_a_link_is_not_written_through(stub: HubStub, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"precious")
    partial(LARGE).parent.mkdir(parents=True)
    partial(LARGE).symlink_to(tmp_path / "mine")
    with pytest.raises(MobileError, match="cannot write"):
        pull(parse_reference("hf:org/large"))
    assert (tmp_path / "mine").read_bytes() == b"precious"


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
    stub: HubStub, pauses: list[float], command: Command, reference: str, code: int, said: str
) -> None:
    got, out, err = command("pull", reference)
    assert (got, out) == (code, "")
    error = [line for line in err.splitlines() if line.startswith("mobile-gguf: error: ")]
    assert len(error) == 1
    assert said in error[0]
    assert not cache_root().exists() or not list(cache_root().rglob("blobs/*"))


@pytest.mark.parametrize("status", [401, 403])
def test_a_file_that_may_not_be_read(stub: HubStub, status: int) -> None:
    stub.refusals = []
    seen = len(stub.requests)

    def refuse(_text: str, _done: float) -> None:
        if len(stub.requests) > seen and not stub.refusals and any("/api/models" in r for r in stub.requests):
            stub.refusals = [(status, {})]

    with pytest.raises(ModelNotFoundError, match=r"hf auth login"):
        pull(parse_reference("hf:org/large"), refuse)


def test_a_rate_limit_is_waited_for(stub: HubStub, pauses: list[float]) -> None:
    stub.refusals = [(429, {"Retry-After": "7"}), (503, {})]
    assert pull(parse_reference("hf:org/large")).path.is_file()
    assert pauses == [7.0, 2.0]


@pytest.mark.parametrize("headers", [{"Retry-After": "3600"}, {"RateLimit": '"api";r=0;t=3600'}])
def test_a_long_rate_limit_is_an_error(stub: HubStub, pauses: list[float], headers: dict[str, str]) -> None:
    stub.refusals = [(429, headers)]
    with pytest.raises(HubError, match="try again in 3600 s; with HF_TOKEN"):
        pull(parse_reference("hf:org/large"))
    assert not pauses


def test_nobody_answers(pauses: list[float], command: Command) -> None:
    code, _, err = command("pull", "hf:org/model")  # at conftest's endpoint, where nobody listens
    assert code == 1
    assert "the Hub cannot be reached" in err


def test_offline(stub: HubStub, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    pulled = pull(parse_reference("hf:org/model"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stub.requests.clear()
    assert resolve_hub(parse_reference("hf:org/model")) == pulled.path
    code, _, err = command("show", "hf:org/model:Q8_0")
    assert code == 3
    assert "offline mode, HF_HUB_OFFLINE" in err
    assert command("pull", "hf:org/model")[0] == 3
    assert not stub.requests


# disks


def test_too_little_space_is_said_before_a_byte_is_asked_for(
    stub: HubStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("mobile_gguf.hub.download.shutil.disk_usage", lambda _path: usage)
    with pytest.raises(MobileError, match=r"not enough space for 4\.9 MiB more .* set HF_HOME"):
        pull(parse_reference("hf:org/large"))
    assert not any("resolve" in request for request in stub.requests)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB; skips where one may not be mounted."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True)
    if done.returncode:
        pytest.skip("no file system may be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_fills_up_on_the_way(
    stub: HubStub, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setenv("HF_HUB_CACHE", str(small_disk))
    roomy = shutil.disk_usage("/")._replace(free=1 << 40)
    monkeypatch.setattr("mobile_gguf.hub.download.shutil.disk_usage", lambda _path: roomy)
    with pytest.raises(MobileError, match=r"the disk is full.*HF_HOME"):
        pull(parse_reference("hf:org/large"))
    assert find_pulled(parse_reference("hf:org/large")) is None
    kept = partial(LARGE).read_bytes()
    assert kept
    assert kept == LARGE[: len(kept)]


# list, show


def test_list(stub: HubStub, command: Command, samples: dict[str, bytes]) -> None:
    pull(parse_reference("hf:org/model"))
    pull(parse_reference("hf:org/model:Q8_0"))
    pull(parse_reference("hf:org/dense"))
    broken = pull(parse_reference("hf:org/large"))
    models = Path(os.environ["XDG_DATA_HOME"]) / "mobile-gguf" / "models"
    models.mkdir(parents=True)
    (models / "mine.gguf").write_bytes(samples["m-Q4_K_M.gguf"])
    (models / "cut.gguf").write_bytes(samples["m-Q4_K_M.gguf"][:-1000])
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
    assert listed["mine"]["fit"] == {"ram_expert_share": 1.0}
    assert listed["hf:org/large:Q8_0"]["path"] == str(broken.path)
    assert "is not a GGUF" in listed["hf:org/large:Q8_0"]["problem"]


def test_list_reads_a_header_once(stub: HubStub, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_list_knows_unfinished_downloads(stub: HubStub, command: Command) -> None:
    partial(LARGE).parent.mkdir(parents=True)
    partial(LARGE).write_bytes(LARGE[:2048])
    assert "hf:org/large  2.0 KiB  download not finished: pull it again" in command("list")[1]


def test_show_of_a_model_on_the_hub(stub: HubStub, command: Command, samples: dict[str, bytes]) -> None:
    before = stub.sent_bytes
    code, out, _ = command("show", "hf:org/model:Q8_0", "--json")
    remote = json.loads(out)
    assert code == 0
    assert (remote["pulled"], remote["n_files"], remote["n_expert"]) == (False, 3, 4)
    assert "pull hf:org/model:Q8_0` fetches it" in command("show", "hf:org/model:Q8_0")[2]
    assert stub.sent_bytes > before
    assert not list(cache_root().rglob("*.gguf"))
    command("pull", "hf:org/model:Q8_0")
    local = json.loads(command("show", "hf:org/model:Q8_0", "--json")[1])
    assert local["pulled"]
    for fact in ("expert_bytes", "dense_bytes", "file_bytes", "n_layer", "quantization", "budget_min_bytes"):
        assert local[fact] == remote[fact], fact


def test_show_fetches_the_header_only(
    stub: HubStub, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = gguf_samples.write_sample(tmp_path / "wide-Q4_0.gguf", n_ff=1024, n_expert=32)
    stub.repositories["org/wide"] = {path.name: path.read_bytes()}
    monkeypatch.setattr("mobile_gguf.hub.remote._BLOCK", 1 << 16)
    code, out, _ = command("show", "hf:org/wide", "--json")
    assert code == 0
    assert json.loads(out)["file_bytes"] == path.stat().st_size
    assert stub.sent_bytes < path.stat().st_size // 10


@pytest.mark.parametrize("data", [b"", b"GGUF", b"not a model" * 100])
def test_show_of_a_broken_file_on_the_hub(stub: HubStub, command: Command, data: bytes) -> None:
    stub.repositories["org/bad"] = {"bad-Q4_0.gguf": data}
    code, _, err = command("show", "hf:org/bad")
    assert code == 1
    assert "hf:org/bad/bad-Q4_0.gguf" in err
    assert "Traceback" not in err


# the cache is shared: nothing is changed there


def test_calibrate_does_not_write_into_the_cache(stub: HubStub, command: Command) -> None:
    code, _, err = command("calibrate", "hf:org/model")
    assert code == 2
    assert "which other programs share: give --out FILE" in err


def test_a_pulled_model_is_converted_to_here(
    stub: HubStub, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = command("convert", "hf:org/model:Q8_0")
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["m-Q8_0.mobile.gguf"]


# what is said of a transfer


def test_meter_and_durations() -> None:
    told: list[tuple[str, float]] = []
    meter = Meter("x", 2048, lambda text, done: told.append((text, done)))
    meter.add(2048)
    assert told[-1][0].startswith("x: 2.0 KiB of 2.0 KiB")
    assert told[-1][1] == 1
    assert [format_duration(s) for s in (0.4, 59, 61, 7650)] == ["0 s", "59 s", "1:01", "2:07:30"]
