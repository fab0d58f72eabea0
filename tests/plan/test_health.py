"""What doctor says: rules over facts, and real set-ups that are broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_libs import stock_lib
from memory_caps import capped, inside
from real_dimensions import BY_NAME

from mobile_gguf.cli.doctor import lines
from mobile_gguf.memory.machine import Memory
from mobile_gguf.plan import facts as facts_module
from mobile_gguf.plan.facts import CACHE, MODELS, Facts, Folder, LocalModel, Reads, Settings
from mobile_gguf.plan.health import OK, WARNING, WRONG, Finding, examine, is_well
from mobile_gguf.sizes import GIB, MIB

ENGINE: dict[str, Any] = {
    "installed": {
        "version": "0.3.36+mobile.1",
        "patched": True,
        "backends": ["cpu", "rpc"],
        "target": "",
        "instruction_sets": "avx2 fma",
    },
    "library": "/lib/libllama.so",
    "problem": None,
    "abi_version": 7,
    "abi_version_expected": 7,
    "current": True,
    "devices": [
        {"name": "CPU", "type": "cpu", "description": "EPYC", "memory_free": 1, "memory_total": 2},
        {"name": "CUDA0", "type": "gpu", "description": "H200", "memory_free": 0, "memory_total": GIB},
    ],
}
WELL = Facts(
    system="Linux 6.1 x86_64",
    machine="x86_64",
    processor="EPYC",
    processors=2,
    cpu_quota=None,
    instruction_sets=frozenset({"avx2", "fma"}),
    memory=Memory(20 * GIB, 24 * GIB, "the machine"),
    address_space=None,
    never_overcommits=False,
    engine=ENGINE,
    engine_problem="",
    build_problem="",
    folders=(Folder(CACHE, Path("/c"), 9 * GIB), Folder(MODELS, Path("/m"), 9 * GIB)),
    settings=Settings(Path("/e/config.toml"), exists=True),
    models=(LocalModel("a"),),
    reads=Reads(Path("/m/a.gguf"), 2e9),
)


def engine(**changes: Any) -> Facts:
    """A machine that is well but for its engine."""
    return replace(WELL, engine=ENGINE | changes)


def folders(name: str, **changes: Any) -> Facts:
    """A machine that is well but for one of its folders."""
    return replace(WELL, folders=tuple(replace(f, **changes) if f.name == name else f for f in WELL.folders))


def other(**changes: Any) -> dict[str, Any]:
    return {"installed": ENGINE["installed"] | changes}


def amiss(facts: Facts) -> list[Finding]:
    return [finding for finding in examine(facts) if finding.status != OK]


def test_a_machine_that_is_well_has_nothing_to_do() -> None:
    assert amiss(WELL) == []
    assert not any(finding.advice for finding in examine(WELL))
    names = [finding.name for finding in examine(WELL)]
    assert names == ["processor", "memory", "engine", "devices", "settings", "cache", "models", "disk"]
    assert "H200" in examine(WELL)[3].text


BROKEN = {
    "no engine": (engine(installed=None, library=None), "engine", WRONG, "engine build"),
    "no engine and no compiler": (
        replace(engine(installed=None, library=None), build_problem="no C compiler was found"),
        "engine", WRONG, "wheel",
    ),
    "a stock llama.cpp": (engine(**other(patched=False)), "engine", WRONG, "engine build"),
    "an engine of another version": (engine(abi_version=6), "engine", WRONG, "engine build"),
    "an engine that does not load": (engine(problem="libgomp is missing"), "engine", WRONG, "engine build"),
    "a stock library in place of it": (
        replace(engine(problem="/l/libllama.so is a stock llama.cpp's"), other_library="/l"),
        "engine", WRONG, "LLAMA_CPP_LIB_PATH",
    ),
    "an engine that ends the process": (
        replace(WELL, engine=None, engine_problem="the process that loaded it crashed (signal 4)"),
        "engine", WRONG, "--force",
    ),
    "an engine of another processor": (
        engine(**other(instruction_sets="avx2 avx512f")), "engine", WRONG, "engine build",
    ),
    "an engine of other patches": (engine(current=False), "engine", WARNING, "engine build"),
    "an engine without kernels": (engine(devices=[]), "devices", WRONG, "wheel"),
    "a cgroup's cap": (
        replace(WELL, memory=Memory(100 * MIB, GIB, "cgroup /sys/fs/cgroup/x")), "memory", WRONG, "MemoryMax",
    ),
    "little memory": (replace(WELL, memory=Memory(GIB, 2 * GIB, "the machine")), "memory", WARNING, "plan"),
    "few addresses": (replace(WELL, address_space=4 * GIB), "memory", WRONG, "ulimit -v"),
    "no overcommitment": (replace(WELL, never_overcommits=True), "memory", WARNING, "sysctl"),
    "no AVX2": (replace(engine(**other(instruction_sets="")), instruction_sets=frozenset({"sse2"})),
                "processor", WARNING, "slower"),
    "part of a processor": (replace(WELL, cpu_quota=0.25), "processor", WARNING, "--cpus"),
    "a read-only cache": (folders(CACHE, problem="/c: read-only"), "cache", WRONG, "XDG_CACHE_HOME"),
    "a full disk": (folders(MODELS, free_bytes=MIB), "models", WRONG, "XDG_DATA_HOME"),
    "a disk with little room": (folders(MODELS, free_bytes=GIB), "models", WARNING, "XDG_DATA_HOME"),
    "a broken configuration": (
        replace(WELL, settings=Settings(Path("/e/config.toml"), True, "/e/config.toml: top_q is no option")),
        "settings", WRONG, "docs/config.md",
    ),
    "a broken preset": (
        replace(WELL, settings=Settings(Path("/e"), presets=("/e/a.toml cannot be read",))),
        "presets", WARNING, "correct it",
    ),
    "a broken model": (
        replace(WELL, models=(LocalModel("a", problem="broken: no GGUF"),)), "model", WARNING, "rm",
    ),
    "a model that is too big": (
        replace(WELL, models=(LocalModel("a", refusal="not enough memory for this model"),)),
        "model", WARNING, "plan",
    ),
    "a slow disk": (replace(WELL, reads=Reads(Path("/m/a"), 30e6)), "disk", WARNING, "SSD"),
    "a disk that fails": (replace(WELL, reads=Reads(Path("/m"), problem="I/O")), "disk", WARNING, "disk"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_the_one_finding_and_says_what_to_do(name: str) -> None:
    facts, where, status, advice = BROKEN[name]
    [found] = amiss(facts)
    assert (found.name, found.status) == (where, status)
    assert advice in found.advice
    assert is_well(examine(facts)) == (status == WARNING)
    assert any(line.startswith("  -> ") and advice in line for line in lines(examine(facts)))


def test_an_engine_for_any_processor_needs_none_of_the_instruction_sets_it_has_kernels_for() -> None:
    facts = engine(**other(target="manylinux_2_28_x86_64", instruction_sets=""))
    assert amiss(facts) == []
    assert "any processor" in examine(facts)[2].text


# --- for real


def test_what_the_child_says_last_is_told_and_a_crash_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    child = "import sys; print('noise'); sys.exit('libllama.so: no such file')"
    monkeypatch.setattr(facts_module, "_ENGINE_CHILD", child)
    engine, problem = facts_module._ask_engine()
    assert engine is None
    assert problem.endswith("failed (exit status 1): libllama.so: no such file")
    monkeypatch.setattr(
        facts_module, "_ENGINE_CHILD", "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
    )
    assert "crashed (signal 4)" in facts_module._ask_engine()[1]
    monkeypatch.setattr(facts_module, "_ENGINE_CHILD", "print('noise'); print('{\"library\": null}')")
    assert facts_module._ask_engine() == ({"library": None}, "")


def test_folders_are_tried_where_they_would_be_made(tmp_path: Path) -> None:
    good = facts_module._folder(CACHE, tmp_path / "not" / "yet")
    assert good.problem == ""
    assert good.free_bytes > 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("", encoding="utf-8")
    bad = facts_module._folder(CACHE, tmp_path / "file" / "below")
    assert "not a directory" in bad.problem


def test_disk_of_a_model_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(bytes(4 * MIB))
    assert facts_module._reads([path, tmp_path / "gone.gguf"]).bytes_per_second > 0
    path.write_bytes(b"")
    assert "too small" in facts_module._reads([path]).problem
    assert facts_module._reads([]).path is None


def doctor(folder: Path, *, prefix: tuple[str, ...] = (), **surroundings: str) -> tuple[int, Any]:
    """Exit status and object of the real command, with folders of its own."""
    homes = {f"XDG_{name}_HOME": str(folder / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "mobile_gguf", "doctor", "--json"],
        env={**os.environ, **homes, **surroundings}, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow
def test_two_broken_set_ups_at_once(tmp_path: Path) -> None:
    """An engine's folder without a library, and a cache that is a file."""
    (tmp_path / "cache").write_text("", encoding="utf-8")
    code, said = doctor(tmp_path, LLAMA_CPP_LIB_PATH=str(tmp_path))
    wrong = {finding["name"]: finding for finding in said["findings"] if finding["status"] == WRONG}
    assert (code, said["ok"], set(wrong)) == (1, False, {"engine", "cache"})
    assert "library does not load" in wrong["engine"]["text"]
    assert "LLAMA_CPP_LIB_PATH" in wrong["engine"]["advice"]
    assert "not a directory" in wrong["cache"]["text"]


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="cgroups are Linux's")
def test_five_more_at_once(tmp_path: Path) -> None:
    """Another library in the engine's place, files of settings and of a model that are none, a memory limit
    below what a model has beside its experts."""
    config, models = tmp_path / "config" / "mobile-gguf", tmp_path / "data" / "mobile-gguf" / "models"
    (config / "presets").mkdir(parents=True)
    models.mkdir(parents=True)
    (config / "config.toml").write_text("ram_bugdet = 3\n", encoding="utf-8")
    (config / "presets" / "mine.toml").write_text("ram_budget = [\n", encoding="utf-8")
    (models / "cut.gguf").write_bytes(b"GGUF")
    BY_NAME["Qwen3-30B-A3B"].write(models / "large.gguf")
    with capped(400 * MIB) as group:
        code, said = doctor(tmp_path, prefix=tuple(inside(group)), LLAMA_CPP_LIB_PATH=str(stock_lib()))
    amiss = {
        (finding["name"], finding["status"]): finding for finding in said["findings"] if finding["advice"]
    }
    expected = {
        ("memory", WARNING): "says cgroup",
        ("engine", WRONG): "a stock llama.cpp's",
        ("settings", WRONG): "ram_bugdet is no option; did you mean ram_budget?",
        ("presets", WARNING): "mine.toml cannot be read",
        ("model", WARNING): "large cannot be loaded: not enough memory",
    }
    assert (code, said["ok"]) == (1, False)
    assert {where: text in amiss[where]["text"] for where, text in expected.items()} == dict.fromkeys(
        expected, True
    )
    assert any("cut cannot be used: broken" in finding["text"] for finding in said["findings"])
