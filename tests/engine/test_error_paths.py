"""What is thrown or goes wrong inside the engine becomes an error with a text, never the end of the process.

Faults are planted by preloaded shims: allocations that throw, and a ggml that uses the bytes where the engine
keeps its tags. Each runs in a process of its own, which goes on and decodes after it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine_libs
import pytest
from device_jobs import CPU, FETCH, device_run, rpc_servers
from device_oracle import assert_as_on_cpu, follow
from engine_jobs import FOLLOWING, GOOD_MODEL, PROMPT, assert_good, good, run
from places import SHIM, SUPPORT

MEMORY, INTERNAL = -5, -6  # enum mobile_status
CHILD = SUPPORT / "error_child.py"
THROW_OPS = [{"op": "throw", "what": what} for what in ("bad_alloc", "logic_error", "int")]


def preload(tmp_path: Path, source: str, *includes: Path) -> dict[str, str]:
    """The environment of a process with a compiled shim."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the shim needs Linux")
    compiler = shutil.which("c++" if source.endswith(".cpp") else "cc")
    if compiler is None:
        pytest.skip("no compiler for the shim")
    out = tmp_path / "shim.so"
    options = ["-O1", "-Wall", "-Werror", "-shared", "-fPIC", *(f"-I{folder}" for folder in includes)]
    subprocess.run([compiler, *options, "-o", out, SHIM / source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(out)}


def on_errors(*runs: dict[str, Any], **environment: str) -> engine_libs.Outcome:
    return engine_libs.run_job(engine_libs.engine_lib(), list(runs), child=CHILD, environment=environment)


def test_nothing_is_thrown_across_the_c_api(tmp_path: Path) -> None:
    outcome = on_errors(
        run("throws", GOOD_MODEL, [*THROW_OPS, *good("after")]), **preload(tmp_path, "throwing_new.cpp")
    )
    expected = {
        "bad_alloc": (MEMORY, "out of memory"),
        "logic_error": (INTERNAL, "planted"),
        "int": (INTERNAL, "something was thrown that says nothing"),
    }
    for op, (what, answer) in zip(outcome.ops("throws", "throw"), expected.items(), strict=True):
        for name, (n_thrown, status, text) in op["said"].items():
            assert n_thrown == 1, f"{name} was to throw and did not"
            assert (status, text) == answer, f"{name}, {what}"
    assert_good(outcome, "throws", "after")


# in the engine's own threads

DISARM = {"op": "arm", "what": "nothing"}


def steps_until_failed(n: int) -> dict[str, Any]:
    return {"op": "steps_until_failed", "rounds": 200, "tokens": FOLLOWING[:n], "pos": 0}


def assert_planted(outcome: engine_libs.Outcome, name: str, said: str) -> None:
    """It was thrown once, one decode failed with the text, and later ones are right."""
    assert outcome.ops(name, "arm")[1]["n_thrown"] == 1, f"{name} was to throw and did not"
    (failed,) = [op for op in outcome.runs[name]["ops"] if op.get("rc", 0) != 0]
    assert failed["error"] == said
    assert_good(outcome, name, "after")


@pytest.mark.parametrize("n_io_threads", [1, 4])
@pytest.mark.parametrize("what", ["read", "own read"])
def test_read_that_throws_is_a_failed_read(what: str, n_io_threads: int, tmp_path: Path) -> None:
    """In an I/O thread, and in a computing one that serves the queue while it waits."""
    arm, prompt = {"op": "arm", "what": what}, {"op": "decode", "tokens": PROMPT}
    spec = run(what, GOOD_MODEL, [arm, prompt, DISARM, *good("after")], mobile={"n_io_threads": n_io_threads})
    outcome = on_errors(spec, **preload(tmp_path, "throwing_threads.cpp"))
    assert_planted(outcome, what, "expert read failed: planted")


def test_guess_that_throws_fails_a_decode(tmp_path: Path) -> None:
    # what is missed is fetched by the thread that decodes: the uploader has nothing to do before a guess
    start = {"op": "device_start", "budget": 0.5, "miss": FETCH, "poison": 1}
    arm = {"op": "arm", "what": "memory"}
    ops = [{"op": "set_prefetch", "mode": 1}, start, arm, steps_until_failed(12), DISARM]
    with rpc_servers() as rpc:
        outcome = on_errors(
            device_run("guess", GOOD_MODEL, rpc, [*ops, *follow()]),
            **preload(tmp_path, "throwing_threads.cpp"),
        )
    assert outcome.ops("guess", "arm")[1]["n_thrown"] == 1
    (failed,) = [op for op in outcome.runs["guess"]["ops"] if op.get("rc", 0) != 0]
    assert failed["error"] == "guessing the next layer's experts failed: planted"
    assert_as_on_cpu(outcome, "guess", GOOD_MODEL)


def test_upload_that_throws_fails_a_decode(tmp_path: Path) -> None:
    """Of what has earned a slot, on the uploader's thread; nothing is computed from the slot."""
    arm = {"op": "arm", "what": "upload"}
    start = {"op": "device_start", "budget": 0.5, "miss": CPU, "poison": 1}
    residency = {"op": "device_residency", "save": "residency"}
    shim = preload(tmp_path, "throwing_threads.cpp")
    with rpc_servers() as rpc:
        outcome = on_errors(
            device_run("later", GOOD_MODEL, rpc, [
                start, arm, steps_until_failed(12), DISARM, *follow(), residency, {"op": "device_counters"},
            ]),
            device_run("start", GOOD_MODEL, rpc, [arm, start, DISARM, start, *follow()]),
            **shim,
        )  # fmt: skip
    said = "an upload of experts failed: planted"
    for name in ("later", "start"):
        assert outcome.ops(name, "arm")[1]["n_thrown"] == 1
        assert_as_on_cpu(outcome, name, GOOD_MODEL)
    (failed,) = [op for op in outcome.runs["later"]["ops"] if op.get("rc", 0) != 0]
    assert failed["error"].endswith(said)
    device = outcome.ops("later", "device_counters")[0]
    n_resident = outcome.ops("later", "device_residency")[0]["n_resident"]
    assert device["n_admitted"] - device["n_evictions"] == n_resident
    refused, started = outcome.ops("start", "device_start")
    assert refused["error"].endswith(said)
    assert started["status"] == 0


# tags


def op_params(tmp_path: Path, planted: str) -> dict[str, str]:
    include = engine_libs.source_tree() / "ggml" / "include"
    return {**preload(tmp_path, "op_params.c", include), "PLANTED": planted}


def test_custom_ops_that_ggml_lays_out_anew_are_noticed(tmp_path: Path) -> None:
    result = on_errors(run("custom", GOOD_MODEL, []), **op_params(tmp_path, "custom")).runs["custom"]
    assert result["loaded"]
    assert not result["context"]
    assert "ggml keeps a custom op's function elsewhere" in result["log"]


@pytest.mark.parametrize("budget", ["min", 0])
def test_weights_whose_op_params_ggml_uses_are_refused(budget: int | str, tmp_path: Path) -> None:
    outcome = on_errors(run("weight", GOOD_MODEL, [], budget), **op_params(tmp_path, "weight"))
    result = outcome.runs["weight"]
    assert not result["loaded"]
    assert "_exps.weight: ggml uses a weight's op_params" in result["load_error"]


def test_tag_that_was_overwritten_fails_passes(tmp_path: Path) -> None:
    before = {"op": "decode", "tokens": PROMPT, "outputs": [len(PROMPT) - 1]}
    after = {"op": "decode", "tokens": FOLLOWING, "pos": len(PROMPT), "outputs": [0]}
    outcome = on_errors(
        run("tag", GOOD_MODEL, [before, {"op": "scribble"}, after, after]), **op_params(tmp_path, "none")
    )
    first, *others = outcome.ops("tag", "decode")
    assert first["rc"] == 0
    for op in others:
        assert op["rc"] != 0
        assert "its op_params were written to, which hold where its experts are" in op["error"]
