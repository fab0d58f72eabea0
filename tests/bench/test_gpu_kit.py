"""The GPU kit without a GPU: what it packs, and what is left of a phase that is cut."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from mobile_gguf.bench.geometry import scale_model
from mobile_gguf.bench.gpu_kit import answers, compile_once, pack, phase, run, tests
from mobile_gguf.bench.gpu_kit.pack import package_folders, wheels_of, write_archive, write_difference
from mobile_gguf.bench.gpu_kit.results import read_result, save_result
from mobile_gguf.bench.gpu_kit.run import BOXES, Box, run_all
from mobile_gguf.bench.gpu_kit.settings import Settings, read_settings
from mobile_gguf.errors import EngineError, UsageError
from mobile_gguf.sizes import MIB

PROJECT = Path(__file__).parents[2]


def test_an_archive_that_may_not_travel_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    folder, archive = tmp_path / "kit", tmp_path / "kit.tar.gz"
    folder.mkdir()
    (folder / "noise").write_bytes(os.urandom(5000))
    with pytest.raises(UsageError, match="may travel"):
        write_archive(folder, archive, limit=4000)
    assert [path.name for path in tmp_path.iterdir()] == ["kit"]
    assert write_archive(folder, archive, limit=9000) == archive.stat().st_size


def test_every_package_of_the_project_is_in_the_kit() -> None:
    folders = package_folders(PROJECT)
    assert folders["mobile_gguf.bench.gpu_kit"] == PROJECT / "bench" / "gpu_kit"
    assert all((folder / "__init__.py").is_file() for folder in folders.values())


def test_what_the_package_depends_on_is_in_the_kit() -> None:
    wheels = [re.match(r"[\w-]+", wheel) for wheel in wheels_of(PROJECT)]
    names = {found[0] for found in wheels if found}
    declared = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    for name in ("llguidance", "shtab", "greenlet", "gguf"):
        assert name in names
        assert f'"{name}' in declared
    assert not names & {"numpy", "llama-cpp-python", "tomli"}


def test_the_models_of_the_gpus_tests_are_in_the_kit(tmp_path: Path) -> None:
    text = (PROJECT / "tests" / "device" / "test_device_gpu.py").read_text()
    read = {name for name in re.findall(r'"([\w-]+)"', text) if name in tiny_models.MODELS}
    assert read == {*pack.TINY_MODELS, "bulky"}  # which is for Vulkan alone, and large
    made = tiny_models.path("gpt-oss")
    pack.copy_models(PROJECT, tmp_path / "models")
    copied = {path.stem: path for path in (tmp_path / "models").iterdir()}
    assert set(copied) == set(pack.TINY_MODELS)
    assert copied["gpt-oss"].read_bytes() == made.read_bytes()


def test_models_that_cannot_be_made_are_an_error(tmp_path: Path) -> None:
    support = tmp_path / "tests" / "support"
    support.mkdir(parents=True)
    (support / "tiny_models.py").write_text("raise SystemExit('no torch')\n")
    with pytest.raises(UsageError, match="models cannot be made: no torch"):
        pack.copy_models(tmp_path, tmp_path / "models")


def test_the_gpus_tests_run_without_plugins_of_the_machine(tmp_path: Path) -> None:
    """A plugin of another package breaks every run that loads it; a test finds its models, and is told of."""
    distribution = tmp_path / "site" / "broken-1.dist-info"
    distribution.mkdir(parents=True)
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (distribution / "entry_points.txt").write_text("[pytest11]\nbroken = broken\n")
    (tmp_path / "site" / "broken.py").write_text("raise RuntimeError('for another pytest')\n")
    project = tmp_path / "project"
    (project / "tests" / "device").mkdir(parents=True)
    (project / "models").mkdir()
    (project / "tests" / "device" / "test_device_gpu.py").write_text(
        "import os\n\n\ndef test_one():\n    assert os.listdir(os.environ['MOBILE_GGUF_TEST_MODELS']) == []\n"
        "    print('one is near')\n\n\ndef test_two():\n    assert False\n"
    )
    settings = Settings(root=str(tmp_path), out=str(tmp_path), engine=str(tmp_path), stock=str(tmp_path))
    result: dict[str, Any] = {}
    saved: list[dict[str, str]] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        tests.run(settings, result, lambda: saved.append(dict(result["tests"])))
    assert result["tests"] == {"test_one": "passed", "test_two": "failed"}, result
    assert saved == [{"test_one": "passed"}, {"test_one": "passed", "test_two": "failed"}]
    assert "pytest ended with 1" in result["error"]
    assert "one is near" in result["output"]  # what a test that passes has to say, too


def test_the_stock_tree_is_ours_and_the_difference(tmp_path: Path) -> None:
    ours, stock, kept = tmp_path / "ours", tmp_path / "stock", tmp_path / "kept"
    for folder, texts in (
        (ours, {"same": "1", "changed": "2", "new": "3"}),
        (stock, {"same": "1", "changed": "0"}),
    ):
        folder.mkdir()
        for name, text in texts.items():
            (folder / name).write_text(text)
    (stock / "deep").mkdir()
    (stock / "deep" / "gone").write_text("4")
    assert write_difference(ours, stock, kept) == ["new"]
    files = {path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()}
    assert files == {"changed", "deep/gone"}


def test_an_answer_that_is_not_the_trace_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first arm says something else, the second fails; the others are run all the same."""
    settings = Settings(root=str(tmp_path), out=str(tmp_path), n_prompt=2, n_decode=4)
    shape = scale_model(settings.read_trace(), 256 * MIB)
    monkeypatch.setattr(answers, "model_of", lambda _settings: (tmp_path / "replay.gguf", shape))
    asked = []

    def run_arm(_settings: Any, _path: Path, arm: Any, *rest: Any) -> None:
        asked.append(arm.name)
        rest[3]["right"] = len(asked) != 1
        if len(asked) == 2:
            raise EngineError("no such device")

    monkeypatch.setattr(answers, "_run_arm", run_arm)
    result: dict[str, Any] = {}
    with pytest.raises(EngineError, match=f": {answers.ARMS[0].name}, {answers.ARMS[1].name}$"):
        answers.run(settings, result, lambda: None)
    assert asked == [arm.name for arm in answers.ARMS]
    assert "no such device" in "\n".join(answers.page(result))


def test_settings_are_what_they_were(tmp_path: Path) -> None:
    settings = Settings(root=str(tmp_path), out=str(tmp_path), trace="t.csv", repeats=2)
    assert read_settings(settings.write()) == settings


def test_boxes_fit_a_borrowed_machine() -> None:
    assert sum(box.seconds for box in BOXES) < 9 * 60
    assert {box.name for box in BOXES} == set(phase.TITLES)


def test_a_phase_that_is_killed_leaves_its_result_and_the_next_start_does_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tools of the phase of facts are this one, which never answers."""
    tools = tmp_path / "tools"
    tools.mkdir()
    slow = tools / "nvcc"
    slow.write_text("#!/bin/sh\nexec sleep 600\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    out = tmp_path / "out"
    out.mkdir()
    settings = Settings(root=str(tmp_path), out=str(out))
    command = [sys.executable, "-m", "mobile_gguf.bench.gpu_kit.phase", "facts", str(settings.write())]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        while "topology" not in ((read_result(out, "facts") or {}).get("said") or {}):
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    left = read_result(out, "facts")
    assert left is not None
    assert not left["finished"]
    assert "Not finished" in (out / "facts.md").read_text()

    slow.write_text("#!/bin/sh\necho release\n")
    assert run_all(settings, [Box("facts", 600)], 600)
    known = read_result(out, "facts")
    assert known is not None
    assert known["said"]["nvcc"] == "release"


def test_what_is_finished_is_left_alone_and_a_box_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    asked = []

    def run_phase(box: Box, _settings: Path, seconds: float) -> str:
        asked.append((box.name, seconds))
        return "cut"

    monkeypatch.setattr(run, "run_phase", run_phase)
    save_result(tmp_path, "facts", {"title": "t", "finished": True}, lambda _result: [])
    assert not run_all(
        Settings(root=str(tmp_path), out=str(tmp_path)), [Box("facts", 5), Box("link", 7)], 100
    )
    assert [name for name, _ in asked] == ["link"]
    assert "cut" in (tmp_path / "README.md").read_text()


def test_a_cuda_source_is_compiled_once_for_two_trees(tmp_path: Path) -> None:
    """The compiler is a script that counts its calls; another header makes another object."""
    compiler = tmp_path / "nvcc"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo release 13 && exit\necho x >>{tmp_path}/calls\n'
        'while [ "$1" != -o ]; do shift; done\necho object >"$2"\n'
    )
    compiler.chmod(0o755)
    for tree, header in (("a", "1"), ("b", "1"), ("c", "2")):
        folder = tmp_path / tree / "ggml" / "src" / "ggml-cuda"
        folder.mkdir(parents=True)
        (folder / "add.cu").write_text("kernel")
        (folder / "common.cuh").write_text(header)
        target = tmp_path / tree / "add.o"
        command = [str(compiler), "-DX", f"-I{folder}", "-c", str(folder / "add.cu"), "-o", str(target)]
        assert compile_once.main([str(tmp_path / "store"), *command]) == 0
        assert target.read_text() == "object\n"
    assert (tmp_path / "calls").read_text().count("x") == 2
    assert len(list((tmp_path / "store").glob("*.o"))) == 2
    assert json.dumps([path.name for path in (tmp_path / "store").glob("*.seconds")]).count("add-") == 2
