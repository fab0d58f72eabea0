"""What the engine does when files are bad: an error that says so, no crash, and it works afterwards.

Each fault runs in a subprocess that goes on after it; its later logits are held against the stock build's.
A spoilt read never ends in wrong logits: either the decode fails, or it gives the right ones.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from engine_jobs import (
    FOLLOWING,
    GOOD_MODEL,
    PROMPT,
    assert_good,
    assert_same_bits,
    good,
    good_logits,
    on_engine,
    run,
)
from places import SHIM

OFF, EIO, EOF, SHORT, EINTR, FAIL_HOLD = range(6)  # modes of shim/read_fault.c
MORE_THAN_ALL = 1 << 60  # bytes


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process with the compiled read shim."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the read shim needs Linux")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler for the read shim")
    source = SHIM / "read_fault.c"
    out = tmp_path_factory.mktemp("shim") / "read_fault.so"
    options = [
        "-O1",
        "-Wall",
        "-Werror",
        "-shared",
        "-fPIC",
        "-o",
        str(out),
        str(source),
        "-ldl",
        "-lpthread",
    ]
    subprocess.run([compiler, *options], check=True)
    return {"LD_PRELOAD": str(out)}


@pytest.fixture
def own_copy(tmp_path: Path) -> Path:
    """A copy of the model that the test may damage."""
    return Path(shutil.copy(tiny_models.path(GOOD_MODEL), tmp_path / "own.gguf"))


def assert_names_expert(error: str, path: Path) -> None:
    assert path.name in error, error
    assert "layer" in error, error
    assert "expert" in error, error
    assert "\n" not in error.strip()


# reads that fail


@pytest.mark.parametrize("n_io_threads", [1, 4])
@pytest.mark.parametrize("mode", [EIO, EOF], ids=["EIO", "end of file"])
def test_failed_read_fails_the_decode(shim: dict[str, str], mode: int, n_io_threads: int) -> None:
    """In a prompt and in a single token; the next decode without the fault is right again."""
    next_pos = len(PROMPT) + len(FOLLOWING)
    outcome = on_engine(run("r", GOOD_MODEL, [
        *good("before"),
        {"op": "fault", "mode": mode}, {"op": "clear"}, {"op": "decode", "tokens": PROMPT},
        {"op": "fault", "mode": OFF}, *good("between"),
        {"op": "fault", "mode": mode, "after": 3}, {"op": "steps", "tokens": FOLLOWING, "pos": next_pos},
        {"op": "fault", "mode": OFF}, *good("after"),
    ], mobile={"n_io_threads": n_io_threads}), environment=shim)  # fmt: skip
    decodes, steps = outcome.ops("r", "decode"), outcome.ops("r", "steps")
    assert all(op["n_spoilt"] > 0 for op in outcome.ops("r", "fault")[1::2]), "the fault was never injected"
    for failed in (decodes[1], steps[2]):
        assert failed["rc"] != 0
        assert_names_expert(failed["error"], tiny_models.path(GOOD_MODEL))
    assert steps[2]["n_done"] < len(FOLLOWING)
    for name in ("before", "between", "after"):
        assert_good(outcome, "r", name)
    assert decodes[-1]["error"] == "", "the text of an earlier failure outlived a success"


def test_a_failed_read_for_the_warm_set_is_no_error(shim: dict[str, str]) -> None:
    """Nobody asked for it, and whoever does reads it again."""
    named = [[layer, expert] for layer in range(2) for expert in range(4)]
    outcome = on_engine(run("r", GOOD_MODEL, [
        {"op": "fault", "mode": EIO}, {"op": "warm", "experts": named, "wait": True},
        {"op": "fault", "mode": OFF},
        {"op": "residency", "save": "residency"}, *good("after"), {"op": "warm_counters"},
    ], "70%"), environment=shim)  # fmt: skip
    assert outcome.ops("r", "fault")[1]["n_spoilt"] > 0, "the fault was never injected"
    assert not outcome.arrays["r/residency"].any()
    assert_good(outcome, "r", "after")
    told = outcome.ops("r", "warm_counters")[0]
    assert (told["n_used"], told["n_wasted"], told["n_read"]) == (0, len(named), len(named))


def test_a_copy_that_cannot_be_read_fails_every_later_decode(shim: dict[str, str], tmp_path: Path) -> None:
    """Whoever copies a weight cannot be told that zeros are not what the file holds."""
    save = {"op": "save", "path": str(tmp_path / "copy.gguf"), "like": str(tiny_models.path(GOOD_MODEL))}
    outcome = on_engine(run("r", GOOD_MODEL, [
        *good("before"), save, *good("between"),
        {"op": "fault", "mode": EIO, "after": 3}, save, {"op": "fault", "mode": OFF},
        {"op": "clear"}, {"op": "decode", "tokens": PROMPT},
    ]), environment=shim)  # fmt: skip
    right, wrong = (op["n_wrong"] for op in outcome.ops("r", "save"))
    assert (right, wrong > 0) == (0, True)
    for name in ("before", "between"):
        assert_good(outcome, "r", name)
    last = outcome.ops("r", "decode")[-1]
    assert last["rc"] != 0
    assert "it was copied, and could not be read" in last["error"]
    assert_names_expert(last["error"], tiny_models.path(GOOD_MODEL))


@pytest.mark.parametrize("mode", [SHORT, EINTR], ids=["short", "interrupted"])
@pytest.mark.parametrize("io", [0, 2], ids=["direct", "buffered"])
def test_short_reads_are_continued(shim: dict[str, str], mode: int, io: int) -> None:
    """POSIX lets a read return early; that is no fault as long as it goes on."""
    ops = [{"op": "fault", "mode": mode}, *good("spoilt"), {"op": "fault", "mode": OFF}]
    outcome = on_engine(run("r", GOOD_MODEL, ops, mobile={"io": io}), environment=shim)
    assert outcome.ops("r", "fault")[1]["n_spoilt"] > 0
    assert_good(outcome, "r", "spoilt")


@pytest.mark.parametrize("budget", ["min", "70%"])
def test_no_single_failed_read_corrupts(shim: dict[str, str], budget: str) -> None:
    """Wherever one read fails (also one ahead of need), the pass fails or its logits are right."""
    places = range(0, 120, 3)
    ops: list[dict[str, Any]] = []
    for after in places:
        ops += [{"op": "fault", "mode": EIO, "after": after, "times": 1}, *good(f"{after}")]
    ops += [{"op": "fault", "mode": OFF}, *good("last")]
    outcome = on_engine(run("r", GOOD_MODEL, ops, budget), environment=shim)
    decodes, steps, right = outcome.ops("r", "decode"), outcome.ops("r", "steps"), good_logits()
    assert sum(op["n_spoilt"] for op in outcome.ops("r", "fault")[1:]) > len(places) / 4
    for i, after in enumerate(places):
        # where the prompt failed, the steps are those of another text
        if decodes[i]["rc"] == 0:
            label = f"read {after} failed"
            assert_same_bits(outcome.arrays[f"r/{after}-prompt"], right["prompt"], label)
            assert_same_bits(outcome.arrays[f"r/{after}-steps"], right["steps"][: steps[i]["n_done"]], label)
    assert_good(outcome, "r", "last")


def test_failed_prefetch_does_not_corrupt(shim: dict[str, str]) -> None:
    """A read ahead fails before its expert is needed, while the rest of the expert is still on its way.

    With one I/O thread the shim can hold the second read until the decode has asked for the expert.
    """
    ops: list[dict[str, Any]] = [
        {"op": "set_prefetch", "mode": 1}, {"op": "clear"}, {"op": "decode", "tokens": PROMPT}
    ]  # fmt: skip
    for i, token in enumerate(FOLLOWING):
        step = {"op": "steps", "tokens": [token], "pos": len(PROMPT) + i}
        forget = {"op": "remove", "pos": len(PROMPT) + i}
        ops += [
            {"op": "set_k", "k": 1}, step, forget, {"op": "set_k", "k": 0},
            {"op": "fault", "mode": FAIL_HOLD, "times": 1}, {"op": "prefetch"},
            {**step, "save": f"again-{i}"},
            # whether or not that failed, the position is there for the next token
            {"op": "fault", "mode": OFF}, forget, {**step, "save": f"sure-{i}"},
        ]  # fmt: skip
    outcome = on_engine(run("r", GOOD_MODEL, ops, mobile={"n_io_threads": 1}), environment=shim)
    assert sum(op["n_spoilt"] for op in outcome.ops("r", "fault")[1::2]) > 0, "no prefetch met the fault"
    for i in range(len(FOLLOWING)):
        right = good_logits()["steps"][i : i + 1]
        assert_same_bits(outcome.arrays[f"r/sure-{i}"], right, f"token {i}, after the fault")
        if (again := outcome.arrays[f"r/again-{i}"]).size:
            assert_same_bits(again, right, f"token {i}, a prefetch for which failed")


def test_failed_read_while_loading(shim: dict[str, str]) -> None:
    """With slots for all experts they are read at load: that load fails, and the next one works."""
    outcome = on_engine(
        run("fault", GOOD_MODEL, [], MORE_THAN_ALL, load_fault={"mode": EIO, "after": 20}),
        run("next", GOOD_MODEL, good("good"), 0),
        environment=shim,
    )
    assert outcome.runs["fault"]["n_spoilt"] > 0
    assert not outcome.runs["fault"]["loaded"]
    assert_names_expert(outcome.runs["fault"]["load_error"], tiny_models.path(GOOD_MODEL))
    assert_good(outcome, "next")


# files that change


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["to nothing", "to half"])
def test_truncated_during_a_run(own_copy: Path, share: float) -> None:
    """The parent shortens the file between two decodes, and later puts it back."""
    content = own_copy.read_bytes()

    def cut() -> None:
        os.truncate(own_copy, int(len(content) * share))

    def restore() -> None:
        with own_copy.open("r+b") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())

    outcome = on_engine(run("r", own_copy, [
        *good("before"),
        {"op": "pause", "name": "cut"},
        {"op": "steps", "tokens": FOLLOWING * 4, "pos": len(PROMPT) + len(FOLLOWING)},
        {"op": "clear"}, {"op": "decode", "tokens": PROMPT},
        {"op": "pause", "name": "restore"},
        *good("after"),
    ]), on_pause={"cut": cut, "restore": restore})  # fmt: skip
    for failed in (outcome.ops("r", "steps")[1], outcome.ops("r", "decode")[1]):
        assert failed["rc"] != 0
        assert_names_expert(failed["error"], own_copy)
    assert_good(outcome, "r", "before")
    assert_good(outcome, "r", "after")


def test_deleted_during_a_run(own_copy: Path) -> None:
    """An open file outlives its name: nothing to fail, and nothing read from what takes its place."""

    def replace() -> None:
        own_copy.unlink()
        own_copy.write_bytes(bytes(1 << 20))

    ops = [*good("before"), {"op": "pause", "name": "replace"}, *good("after")]
    outcome = on_engine(run("r", own_copy, ops), on_pause={"replace": replace})
    assert_good(outcome, "r", "before")
    assert_good(outcome, "r", "after")


def tensor_offset_position(content: bytes, tensor: str) -> int:
    """Where a GGUF header keeps the offset (u64) of a tensor: after name, n_dims, dims and type."""
    name = struct.pack("<Q", len(tensor)) + tensor.encode()
    at = content.index(name) + len(name)
    n_dims = struct.unpack_from("<I", content, at)[0]
    return at + 4 + 8 * n_dims + 4


def damaged(content: bytes, how: str) -> bytes:
    if how == "cut in the experts":
        return content[: len(content) * 2 // 3]
    if how == "cut by one byte":
        return content[:-1]
    if how == "cut in the header":
        return content[:1000]
    if how == "empty":
        return b""
    if how == "not a GGUF":
        return b"PK\x03\x04" + content[4:]
    at = tensor_offset_position(content, "blk.1.ffn_up_exps.weight")
    offset = {"offset beyond the file": 1 << 40, "offset that wraps": (1 << 64) - 4096}[how]
    return content[:at] + struct.pack("<Q", offset) + content[at + 8 :]


@pytest.mark.parametrize("how", [
    "cut in the experts", "cut by one byte", "cut in the header", "empty", "not a GGUF",
    "offset beyond the file", "offset that wraps",
])  # fmt: skip
def test_damaged_before_load(own_copy: Path, how: str) -> None:
    own_copy.write_bytes(damaged(own_copy.read_bytes(), how))
    outcome = on_engine(
        run("all", own_copy, [], 0),
        run("small", own_copy, [], 1 << 21),
        run("next", GOOD_MODEL, good("good")),
    )
    for name in ("all", "small"):
        assert not outcome.runs[name]["loaded"]
        assert outcome.runs[name]["log"].strip(), "nothing said why"
    assert_good(outcome, "next")
