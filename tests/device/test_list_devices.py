"""Models listed for a machine with devices, and the process that asks for these."""

import json
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from device_server import rpc_server
from gguf_samples import write_sample

from mobile_gguf.cli import main
from mobile_gguf.device import ask
from mobile_gguf.device.ask import ask_devices, may_have_devices
from mobile_gguf.engine.devices import Device
from mobile_gguf.errors import BudgetError, EngineError
from mobile_gguf.gguf.info import read_gguf_info
from mobile_gguf.memory.machine import Memory
from mobile_gguf.options import LoadOptions
from mobile_gguf.plan import known as here_module
from mobile_gguf.plan.ggml import device_key
from mobile_gguf.plan.known import Here
from mobile_gguf.plan.machine import Rate, read_measurements, write_measurements
from mobile_gguf.plan.planner import make_plan
from mobile_gguf.plan.workload import read_workload
from mobile_gguf.sizes import Size, format_bytes
from mobile_gguf.tui.store.models import Candidate, fit_of

GIB, MIB = 1 << 30, 1 << 20
GPU = Device(0, "CUDA0", "a GPU", 8 * GIB, 16 * GIB)


@pytest.fixture
def model():
    """A model in the data directory."""
    models = Path(os.environ["XDG_DATA_HOME"]) / "mobile-gguf" / "models"
    models.mkdir(parents=True)
    return write_sample(models / "mine.gguf", kind="Q8_0")


class Installed:
    """Makes its arguments the devices there are, or a text why they are not known; ``asked`` records."""

    def __init__(self, monkeypatch):
        self.asked = []
        self.found = []
        monkeypatch.setattr(here_module, "ask_devices", self.answer)

    def __call__(self, *found):
        self.found = list(found)

    def answer(self, servers):
        self.asked.append(servers)
        if self.found and isinstance(self.found[0], str):
            raise EngineError(self.found[0])
        return self.found


@pytest.fixture
def devices(monkeypatch):
    return Installed(monkeypatch)


@pytest.fixture
def listed(capfd):
    """Runs ``list``: the row of the model, its object of ``--json``, and what stderr says."""

    def run():
        assert main(["list"]) == 0
        out, err = capfd.readouterr()
        assert main(["list", "--json"]) == 0
        models = json.loads(capfd.readouterr().out)["models"]
        (row,) = (line for line in out.splitlines() if line.startswith("mine "))
        return row, next(one for one in models if one["name"] == "mine"), err

    return run


def measured(info, device=None):
    """Keep a machine's measurements, and a device's that is ten times as fast."""
    known = read_measurements()
    for product in (*read_workload(info).dense, *read_workload(info).experts):
        for where in ("usual", "plain"):
            for threads in range(1, 65):
                known.put(f"cpu.{threads}.{where}.{product.type_id}.x", Rate(1e8, 0.9e8, 1.1e8))
        if device is not None:
            prefix = device_key(device.name, device.description)
            known.put(f"{prefix}.{product.type_id}.1x1.1of1", Rate(1e9, 0.9e9, 1.1e9))
            known.put(f"{prefix}.upload", Rate(1e10, 0.9e10, 1.1e10))
    write_measurements(known)


# list


def test_without_a_device_list_is_about_the_host(model, devices, listed):
    devices()
    row, entry, err = listed()
    assert "  all in RAM  " in row
    assert entry["fit"] == {"ram_expert_share": 1.0, "vram_expert_share": None, "devices": []}
    assert err == ""
    assert devices.asked == ["", ""]


def test_with_a_device_list_says_what_a_run_would_put_there(model, devices, listed):
    devices(GPU)
    row, entry, err = listed()
    assert "  all in VRAM  " in row
    assert entry["fit"] == {"ram_expert_share": 1.0, "vram_expert_share": 1.0, "devices": ["CUDA0"]}
    assert err == ""


def test_a_device_with_room_for_some(model, devices, listed):
    info = read_gguf_info(model)
    whole = Here()
    devices(GPU)
    demand = whole.fit(info).demand.total_bytes
    free = 16 * GIB // 20 + demand + info.expert_bytes * 3 // 4
    devices(Device(0, "CUDA0", "a GPU", free, 16 * GIB))
    row, entry, _ = listed()
    share = entry["fit"]["vram_expert_share"]
    assert 0.4 < share < 0.75
    assert f"{100 * share:.0f}% in VRAM, all in RAM" in row


def test_a_device_that_is_too_full_is_left_out_as_a_run_does(model, devices, listed):
    devices(Device(0, "CUDA0", "a GPU", 4 * MIB, 16 * GIB))
    row, entry, err = listed()
    assert "all in RAM" in row
    assert entry["fit"] == {"ram_expert_share": 1.0, "vram_expert_share": None, "devices": []}
    assert err == ""


def test_a_model_that_fits_nowhere(model, devices, listed, monkeypatch):
    devices(GPU)
    monkeypatch.setattr(here_module, "read_memory", lambda: Memory(0, 4 * GIB, "the machine"))
    row, entry, _ = listed()
    assert "too big" in row
    assert entry["fit"] == {"ram_expert_share": 0.0, "vram_expert_share": None, "devices": []}


def test_a_broken_driver_is_one_line_and_no_reason_to_list_nothing(model, devices, listed):
    devices("libcuda.so.1: cannot open shared object file")
    row, _, err = listed()
    assert "all in RAM" in row
    assert err == (
        "FIT and TOK/S are for the host alone, the devices cannot be asked: libcuda.so.1: "
        "cannot open shared object file\n"
    )


def test_the_speed_is_the_plans_with_the_device(model, devices, listed):
    info = read_gguf_info(model)
    devices(GPU)
    measured(info)
    assert listed()[1]["predicted"] is None  # the processor's measurements say nothing of the GPU
    measured(info, GPU)
    _, entry, _ = listed()
    plan = make_plan(info, read_workload(info), read_measurements(), LoadOptions(), devices=Here().devices)
    expected = plan.prediction("exact")
    assert expected is not None
    assert entry["predicted"]["predicted_tps"] == pytest.approx(expected.predicted_tps)
    devices()
    assert listed()[1]["predicted"]["predicted_tps"] < expected.predicted_tps


def test_devices_are_asked_for_once_and_only_where_they_may_be_used(model, devices):
    info = read_gguf_info(model)
    devices(GPU)
    here = Here("host:1")
    assert not here.fit(info, LoadOptions(vram_budget="off")).devices
    assert devices.asked == []
    assert here.fit(info).devices
    assert here.fit(info, LoadOptions(n_ctx=32)).devices
    assert devices.asked == ["host:1"]
    devices(Device(0, "CUDA0", "a GPU", 4 * MIB, 16 * GIB))
    assert not Here().fit(info).devices
    with pytest.raises(BudgetError):
        Here().fit(info, LoadOptions(vram_budget=Size(n_bytes=1 << 20)))  # asked for: not left out


# the chat's model picker


def test_the_picker_shows_the_same(model, devices):
    def shown(**options):
        fit = fit_of(Candidate("mine", model, 1), options, Here(options.get("rpc", "")))
        return fit.fit, fit.speed

    info = read_gguf_info(model)
    all_bytes = format_bytes(info.expert_bytes)
    devices()
    assert shown() == (f"{all_bytes} of experts, all in RAM", "")
    devices(GPU)
    measured(info, GPU)
    text, speed = shown()
    assert text == f"{all_bytes} of experts, all in VRAM"
    assert re.fullmatch(r"about [0-9.]+ tok/s", speed)
    assert shown(vram_budget="off")[0].endswith("all in RAM")
    assert shown(vram_budget="64GiB")[0].endswith("all in VRAM")  # more than all is all
    devices(Device(0, "CUDA0", "a GPU", 4 * MIB, 16 * GIB))
    assert shown(vram_budget="1MiB")[0].startswith("does not fit: CUDA0 (a GPU) has 4.0 MiB free, and this")
    assert shown(ram_budget="1K")[0].startswith("does not fit: ")
    devices("the driver is broken")
    assert shown()[0].endswith("all in RAM")


# the process that asks


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """Installs an engine of which there is only the manifest; None: no llama_cpp."""
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)

    def install(manifest, package=True):
        spec = SimpleNamespace(origin=str(tmp_path / "__init__.py")) if package else None
        monkeypatch.setattr(ask.importlib.util, "find_spec", lambda _name: spec)
        if manifest is not None:
            (tmp_path / ask.MANIFEST).write_text(manifest)

    return install


def manifest(*backends, flags=()):
    return json.dumps({"backends": backends, "options": {"cmake_args": flags}})


@pytest.mark.parametrize(
    ("text", "may"),
    [
        (manifest("cpu", "rpc"), False),
        (manifest("cpu", "cuda", "rpc"), True),
        (manifest("cpu", "metal", "rpc"), True),
        (manifest("cpu", "rpc", flags=["-DGGML_SYCL=ON"]), True),
        (manifest("cpu", "rpc", flags=["-DCMAKE_BUILD_TYPE=Debug"]), False),
        ("not JSON", True),
        ("{}", True),
        ("[]", True),
        (None, False),
    ],
)
def test_the_manifest_says_whether_there_can_be_a_device(engine, text, may):
    engine(text)
    assert may_have_devices() is may


def test_no_engine_no_device_and_another_library_is_asked(engine, monkeypatch):
    engine(None, package=False)
    assert not may_have_devices()
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", "/elsewhere")
    assert may_have_devices()


def test_the_manifest_is_the_one_that_the_build_writes():
    from mobile_gguf.vendor import build

    assert ask.MANIFEST == build.MARKER


def test_without_a_backend_nothing_is_started(engine, monkeypatch):
    engine(manifest("cpu", "rpc"))
    monkeypatch.setattr(ask.subprocess, "run", None)
    assert ask_devices() == []


@pytest.fixture
def child(engine, tmp_path, monkeypatch):
    """An engine with a backend, and a shell script in the place of Python."""
    engine(manifest("cpu", "cuda", "rpc"))

    def install(script):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return install


def test_what_the_other_process_found(child):
    found = [{"handle": 0, "name": "CUDA0", "description": "a GPU", "free_bytes": 8 * GIB,
              "total_bytes": 16 * GIB, "type": "gpu", "is_rpc": False}]  # fmt: skip
    child(f"echo ggml_cuda_init: found 1 device >&2; echo noise; echo '{json.dumps(found)}'")
    assert ask_devices() == [GPU]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("kill -ABRT $$", f"ended with signal {signal.SIGABRT}"),
        ("echo CUDA error: out of memory >&2; kill -ABRT $$", "CUDA error: out of memory"),
        ("exit 3", "ended with exit code 3"),
        ("echo the library does not load >&2; exit 4", "the library does not load"),
        ("echo nonsense", "brought no answer"),
        ("true", "brought no answer"),
        ("echo '[{}]'", "brought no answer"),
    ],
)
def test_whatever_a_driver_does_is_an_error(child, script, words):
    child(script)
    with pytest.raises(EngineError, match=words):
        ask_devices()


def test_a_driver_that_hangs(child, monkeypatch):
    child("exec sleep 600")
    monkeypatch.setattr(ask, "TIMEOUT_S", 0.05)
    with pytest.raises(EngineError, match="does not answer"):
        ask_devices()


def test_no_python_to_start(child, monkeypatch, tmp_path):
    child("true")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    with pytest.raises(EngineError, match="cannot be asked for"):
        ask_devices()


def test_a_real_device_behind_a_server(monkeypatch):
    monkeypatch.setattr(ask, "TIMEOUT_S", 600)
    with rpc_server() as server:
        (found,) = ask_devices(server.endpoint)
    assert (found.handle, found.is_rpc, found.shares_host_memory) == (0, True, True)
    assert found.total_bytes > 0
    assert server.endpoint in found.description
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:1"):
        ask_devices("127.0.0.1:1")
