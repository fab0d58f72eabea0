"""What the engine does when files and calls are bad: an error that says so, no crash, and it works afterwards.

Each fault runs in a subprocess that goes on after it; its later logits are held against the stock build's.
A spoilt read never ends in wrong logits: either the decode fails, or it gives the right ones.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import engine_libs
import pytest
import tiny_models

MODEL = "mixtral"
OFF, EIO, EOF, SHORT, EINTR, FAIL_HOLD = range(6)  # modes of shim/read_fault.c
OK, ERR_ARGUMENT, ERR_STATE = 0, -1, -2  # enum mobile_status

PROMPT = engine_libs.tokens(24, 11, tiny_models.VOCAB)
FOLLOWING = engine_libs.tokens(12, 12, tiny_models.VOCAB)


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled read shim."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the read shim needs Linux")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler for the read shim")
    source = Path(__file__).parent / "shim" / "read_fault.c"
    out = tmp_path_factory.mktemp("shim") / "read_fault.so"
    subprocess.run(
        [compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", out, source, "-ldl", "-lpthread"],
        check=True,
    )
    return out


@pytest.fixture
def own_copy(tmp_path: Path) -> Path:
    """A copy of the model that the test may damage."""
    return shutil.copy(tiny_models.path(MODEL), tmp_path / "model.gguf")


def good(name: str) -> list[dict[str, Any]]:
    """Ops that compute a prompt and some tokens from nothing."""
    return [
        {"op": "clear"},
        {"op": "decode", "tokens": PROMPT, "save": f"{name}-prompt"},
        {"op": "steps", "tokens": FOLLOWING, "pos": len(PROMPT), "save": f"{name}-steps"},
    ]


def run(
    name: str, model: Path | str, ops: list[dict[str, Any]], budget: int | str | None = "min", **more: Any
) -> Any:
    mobile = None if budget is None else {"budget": budget, **more.pop("mobile", {})}
    return {"name": name, "model": str(model), "mobile": mobile, "ops": ops, **more}


@cache
def expected() -> engine_libs.Outcome:
    return engine_libs.run_job(
        engine_libs.stock_lib(), [run("r", tiny_models.path(MODEL), good("good"), None)]
    )


def assert_good(outcome: engine_libs.Outcome, run_name: str, name: str) -> None:
    for part in ("prompt", "steps"):
        engine_libs.assert_same_bits(
            outcome.arrays[f"{run_name}/{name}-{part}"], expected().arrays[f"r/good-{part}"], f"{name} {part}"
        )


def assert_names_expert(error: str, path: Path) -> None:
    assert path.name in error, error
    assert "layer" in error and "expert" in error, error
    assert "\n" not in error.strip()


# reads that fail


@pytest.mark.parametrize("n_io_threads", [1, 4])
@pytest.mark.parametrize("mode", [EIO, EOF], ids=["EIO", "end of file"])
def test_failed_read_fails_the_decode(shim: Path, mode: int, n_io_threads: int) -> None:
    engine = engine_libs.engine_lib()
    path = tiny_models.path(MODEL)
    outcome = engine_libs.run_job(engine, [run("r", path, [
        *good("before"),
        {"op": "fault", "mode": mode}, {"op": "clear"}, {"op": "decode", "tokens": PROMPT},
        {"op": "fault"}, *good("between"),
        {"op": "fault", "mode": mode, "after": 3},
        {"op": "steps", "tokens": FOLLOWING, "pos": len(PROMPT) + len(FOLLOWING)},
        {"op": "fault"}, *good("after"),
    ], mobile={"n_io_threads": n_io_threads})], environment={"LD_PRELOAD": str(shim)})  # fmt: skip
    decodes, steps = outcome.ops("r", "decode"), outcome.ops("r", "steps")
    assert decodes[1]["rc"] != 0
    assert steps[2 - 1]["rc"] == 0
    assert_names_expert(decodes[1]["error"], path)
    failed = steps[2]
    assert failed["rc"] != 0 and failed["n_done"] < len(FOLLOWING)
    assert_names_expert(failed["error"], path)
    assert all(op["n_spoilt"] > 0 for op in outcome.ops("r", "fault")[1::2]), "the fault was never injected"
    for name in ("before", "between", "after"):
        assert_good(outcome, "r", name)
    assert decodes[-1]["error"] == "", "the text of an earlier failure is gone after a success"


@pytest.mark.parametrize("mode", [SHORT, EINTR], ids=["short", "interrupted"])
@pytest.mark.parametrize("io", [0, 2], ids=["direct", "buffered"])
def test_short_reads_are_continued(shim: Path, mode: int, io: int) -> None:
    """POSIX lets a read return early; that is no fault as long as it goes on."""
    engine = engine_libs.engine_lib()
    outcome = engine_libs.run_job(engine, [run("r", tiny_models.path(MODEL), [
        {"op": "fault", "mode": mode}, *good("spoilt"), {"op": "fault"},
    ], mobile={"io": io})], environment={"LD_PRELOAD": str(shim)})  # fmt: skip
    assert outcome.ops("r", "fault")[1]["n_spoilt"] > 0
    assert_good(outcome, "r", "spoilt")


@pytest.mark.parametrize("budget", ["min", "70%"])
def test_no_single_failed_read_corrupts(shim: Path, budget: str) -> None:
    """Wherever one read fails (also one ahead of need), the pass fails or its logits are right."""
    engine = engine_libs.engine_lib()
    places = range(0, 120, 3)
    ops: list[dict[str, Any]] = []
    for after in places:
        ops += [{"op": "fault", "mode": EIO, "after": after, "times": 1}, *good(f"{after}")]
    ops += [{"op": "fault"}, *good("last")]
    outcome = engine_libs.run_job(
        engine, [run("r", tiny_models.path(MODEL), ops, budget)], environment={"LD_PRELOAD": str(shim)}
    )
    decodes, steps = outcome.ops("r", "decode"), outcome.ops("r", "steps")
    assert sum(op["n_spoilt"] for op in outcome.ops("r", "fault")[1:]) > len(places) / 4
    for i, after in enumerate(places):
        if decodes[i]["rc"] == 0:
            engine_libs.assert_same_bits(
                outcome.arrays[f"r/{after}-prompt"],
                expected().arrays["r/good-prompt"],
                f"read {after} failed",
            )
            done = steps[i]["n_done"]
            engine_libs.assert_same_bits(
                outcome.arrays[f"r/{after}-steps"],
                expected().arrays["r/good-steps"][:done],
                f"read {after} failed",
            )
    assert_good(outcome, "r", "last")


def test_failed_prefetch_does_not_corrupt(shim: Path) -> None:
    """A read ahead fails before its expert is needed, while the rest of the expert is still on its way.

    With one I/O thread the shim can hold the second read until the decode has asked for the expert.
    """
    engine = engine_libs.engine_lib()
    ops: list[dict[str, Any]] = [{"op": "clear"}, {"op": "decode", "tokens": PROMPT}]
    for i, token in enumerate(FOLLOWING):
        position = len(PROMPT) + i
        ops += [
            {"op": "set_k", "k": 1},
            {"op": "steps", "tokens": [token], "pos": position},
            {"op": "remove", "pos": position},
            {"op": "set_k", "k": 0},
            {"op": "fault", "mode": FAIL_HOLD, "times": 1},
            {"op": "prefetch"},
            {"op": "steps", "tokens": [token], "pos": position, "save": f"again-{i}"},
            {"op": "fault"},
            # whether or not that failed, the position is there for the next token
            {"op": "remove", "pos": position},
            {"op": "steps", "tokens": [token], "pos": position, "save": f"sure-{i}"},
        ]
    outcome = engine_libs.run_job(
        engine, [run("r", tiny_models.path(MODEL), ops, "min", mobile={"n_io_threads": 1})],
        environment={"LD_PRELOAD": str(shim)},
    )  # fmt: skip
    assert sum(op["n_spoilt"] for op in outcome.ops("r", "fault")[1::2]) > 0, "no prefetch met the fault"
    right = expected().arrays["r/good-steps"]
    for i in range(len(FOLLOWING)):
        engine_libs.assert_same_bits(
            outcome.arrays[f"r/sure-{i}"], right[i : i + 1], f"token {i}, after the fault"
        )
        if (again := outcome.arrays[f"r/again-{i}"]).size:
            engine_libs.assert_same_bits(again, right[i : i + 1], f"token {i}, a prefetch of which failed")


def test_failed_read_while_loading(shim: Path) -> None:
    """With room for all experts they are read at load: that load fails, and the next one works."""
    engine = engine_libs.engine_lib()
    path = tiny_models.path(MODEL)
    outcome = engine_libs.run_job(engine, [
        run("fault", path, [], 0, load_fault={"mode": EIO, "after": 20}),
        run("next", path, good("good"), 0),
    ], environment={"LD_PRELOAD": str(shim)})  # fmt: skip
    assert outcome.runs["fault"]["n_spoilt"] > 0
    assert not outcome.runs["fault"]["loaded"]
    assert_names_expert(outcome.runs["fault"]["load_error"], path)
    assert_good(outcome, "next", "good")


# files that change


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["to nothing", "to half"])
def test_truncated_during_a_run(own_copy: Path, share: float) -> None:
    """The parent shortens the file between two decodes, and later puts it back."""
    engine = engine_libs.engine_lib()
    content = own_copy.read_bytes()

    def cut() -> None:
        os.truncate(own_copy, int(len(content) * share))

    def restore() -> None:
        with own_copy.open("r+b") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())

    outcome = engine_libs.run_job(engine, [run("r", own_copy, [
        *good("before"),
        {"op": "pause", "name": "cut"},
        {"op": "steps", "tokens": FOLLOWING * 4, "pos": len(PROMPT) + len(FOLLOWING)},
        {"op": "clear"}, {"op": "decode", "tokens": PROMPT},
        {"op": "pause", "name": "restore"},
        *good("after"),
    ])], on_pause={"cut": cut, "restore": restore})  # fmt: skip
    failed = [outcome.ops("r", "steps")[1], outcome.ops("r", "decode")[1]]
    for op in failed:
        assert op["rc"] != 0
        assert_names_expert(op["error"], own_copy)
    assert_good(outcome, "r", "before")
    assert_good(outcome, "r", "after")


def test_deleted_during_a_run(own_copy: Path) -> None:
    """An open file outlives its name: nothing to fail, and nothing read from what takes its place."""
    engine = engine_libs.engine_lib()

    def replace() -> None:
        own_copy.unlink()
        own_copy.write_bytes(bytes(1 << 20))

    outcome = engine_libs.run_job(
        engine,
        [run("r", own_copy, [*good("before"), {"op": "pause", "name": "replace"}, *good("after")])],
        on_pause={"replace": replace},
    )
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
    engine = engine_libs.engine_lib()
    own_copy.write_bytes(damaged(own_copy.read_bytes(), how))
    outcome = engine_libs.run_job(engine, [
        run("all", own_copy, [], 0), run("small", own_copy, [], 1 << 21),
        run("next", tiny_models.path(MODEL), good("good")),
    ])  # fmt: skip
    for name in ("all", "small"):
        assert not outcome.runs[name]["loaded"]
        assert outcome.runs[name]["log"].strip(), "nothing said why"
    assert_good(outcome, "next", "good")


def test_load_parameters_last_for_one_load(tmp_path: Path) -> None:
    """Whether it succeeds or not: a load after a failed one is a plain load."""
    engine = engine_libs.engine_lib()
    path = tiny_models.path(MODEL)
    (tmp_path / "folder.gguf").mkdir()
    outcome = engine_libs.run_job(engine, [
        run("missing", tmp_path / "missing.gguf", [], 0), run("after missing", path, good("good"), None),
        run("folder", tmp_path / "folder.gguf", [], 0), run("after folder", path, good("good"), None),
        run("small", path, [], 1), run("after small", path, good("good"), None),
        run("store", path, good("good"), "min"), run("after store", path, good("good"), None),
    ])  # fmt: skip
    assert [outcome.runs[name]["loaded"] for name in ("missing", "folder", "small", "store")] == [
        False
    ] * 3 + [True]
    for name in ("missing", "folder", "small", "store"):
        assert outcome.runs[f"after {name}"]["info_status"] == ERR_STATE, f"{name} left its parameters behind"
        assert_good(outcome, f"after {name}", "good")
    assert outcome.runs["store"]["info"] is not None


def test_budget_below_one_layer() -> None:
    engine = engine_libs.engine_lib()
    path = tiny_models.path(MODEL)
    smallest = engine_libs.run_job(engine, [run("r", path, [])]).runs["r"]["info"]["budget_min_bytes"]
    outcome = engine_libs.run_job(engine, [
        run("below", path, [], smallest - 1), run("smallest", path, good("good"), smallest),
        run("above all", path, good("good"), 1 << 40),
    ])  # fmt: skip
    assert not outcome.runs["below"]["loaded"]
    error = outcome.runs["below"]["load_error"]
    assert "budget" in error and str(smallest) in error and str(smallest - 1) in error, error
    assert_good(outcome, "smallest", "good")
    assert_good(outcome, "above all", "good")
    info = outcome.runs["above all"]["info"]
    assert info["budget_bytes"] == info["budget_all_bytes"], "the budget in force is no more than can be used"


# calls that do not fit


def test_dense_model_has_no_experts() -> None:
    engine = engine_libs.engine_lib()
    outcome = engine_libs.run_job(engine, [run("r", tiny_models.path("dense"), [
        {"op": "decode", "tokens": PROMPT, "save": "before"},
        {"op": "set_k", "k": 1}, {"op": "set_batch_k", "k": [1]}, {"op": "replay", "ids": [[[0]]]},
        {"op": "clear"}, {"op": "decode", "tokens": PROMPT, "save": "after"},
    ], 0)])  # fmt: skip
    assert outcome.runs["r"]["loaded"]
    assert outcome.runs["r"]["info"]["n_layer_moe"] == 0
    for kind in ("set_k", "set_batch_k", "replay"):
        assert outcome.ops("r", kind)[0]["status"] == ERR_STATE
    engine_libs.assert_same_bits(outcome.arrays["r/after"], outcome.arrays["r/before"], "after refused calls")


def test_model_without_store_refuses() -> None:
    """A model loaded without load parameters is a stock model: asking for fewer experts is an error."""
    engine = engine_libs.engine_lib()
    outcome = engine_libs.run_job(engine, [run("r", tiny_models.path(MODEL), [
        {"op": "set_k", "k": 1}, {"op": "set_batch_k", "k": [1]}, {"op": "prefetch"}, {"op": "counters"},
        {"op": "reset_counters"}, {"op": "trace_start", "path": os.devnull}, {"op": "trace_stop"},
        *good("good"),
    ], None)])  # fmt: skip
    for kind in (
        "set_k",
        "set_batch_k",
        "prefetch",
        "counters",
        "reset_counters",
        "trace_start",
        "trace_stop",
    ):
        assert outcome.ops("r", kind)[0]["status"] == ERR_STATE, kind
    assert_good(outcome, "r", "good")


@pytest.mark.parametrize("settings", [
    {"n_io_threads": 0}, {"n_io_threads": -1}, {"eviction": 7}, {"eviction": -1}, {"io": 9}, {"io": -1},
    {"reserved": 1},
], ids=str)  # fmt: skip
def test_bad_load_parameters_are_refused(settings: dict[str, int]) -> None:
    """Nothing is changed by a refused call: the load after it is a plain one."""
    engine = engine_libs.engine_lib()
    outcome = engine_libs.run_job(
        engine, [run("r", tiny_models.path(MODEL), good("good"), 0, mobile=settings)]
    )
    assert outcome.runs["r"]["set_params"] == ERR_ARGUMENT
    assert outcome.runs["r"]["info_status"] == ERR_STATE
    assert_good(outcome, "r", "good")


def test_a_mapped_load_is_refused() -> None:
    """load_mode mmap, and auto, which maps."""
    engine = engine_libs.engine_lib()
    path = tiny_models.path(MODEL)
    modes = {"auto": -1, "mmap": 1}
    outcome = engine_libs.run_job(engine, [
        *(run(name, path, [], 1 << 21, load_mode=mode) for name, mode in modes.items()),
        run("next", path, good("good")),
    ])  # fmt: skip
    for name in modes:
        assert not outcome.runs[name]["loaded"]
        assert "mmap" in outcome.runs[name]["load_error"]
    assert_good(outcome, "next", "good")


def test_checked_tensors() -> None:
    """check_tensors validates what it loads; experts are loaded later and must not get in its way."""
    engine = engine_libs.engine_lib()
    outcome = engine_libs.run_job(engine, [
        run("min", tiny_models.path(MODEL), good("good"), check_tensors=True),
        run("all", tiny_models.path(MODEL), good("good"), 0, check_tensors=True),
    ])  # fmt: skip
    assert_good(outcome, "min", "good")
    assert_good(outcome, "all", "good")


def test_bad_calls_change_nothing(tmp_path: Path) -> None:
    engine = engine_libs.engine_lib()
    spec = tiny_models.MODELS[MODEL]
    n_layer, k = 4, spec.top_k
    ids = [[list(range(k))] * n_layer]
    bad_replays = {
        "too few layers": [ids[0][:-1]],
        "fewer than top-k": [[[0]] * n_layer],
        "no such expert": [[[0, spec.n_expert]] * n_layer],
        "negative expert": [[[0, -1]] * n_layer],
    }
    outcome = engine_libs.run_job(engine, [run("r", tiny_models.path(MODEL), [
        {"op": "residency", "save": "residency", "size": 3},
        {"op": "trace_start", "path": str(tmp_path / "no" / "such" / "folder.csv")},
        *({"op": "replay", "ids": ids} for ids in bad_replays.values()),
        *good("good"),
    ])])  # fmt: skip
    assert outcome.ops("r", "residency")[0]["status"] == ERR_ARGUMENT
    assert outcome.ops("r", "trace_start")[0]["status"] < 0
    for name, op in zip(bad_replays, outcome.ops("r", "replay"), strict=True):
        assert op["status"] == ERR_ARGUMENT, name
    assert_good(outcome, "r", "good")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_trace_that_cannot_be_written() -> None:
    """The decode goes on; stopping the trace says that it is not whole."""
    engine = engine_libs.engine_lib()
    outcome = engine_libs.run_job(engine, [run("r", tiny_models.path(MODEL), [
        {"op": "trace_start", "path": "/dev/full"}, *good("good"), {"op": "trace_stop"},
    ])])  # fmt: skip
    assert outcome.ops("r", "trace_stop")[0]["status"] < 0
    assert_good(outcome, "r", "good")


def test_closing_while_reads_are_queued() -> None:
    """A context and its model go away while hints are still being read."""
    engine = engine_libs.engine_lib()
    path = tiny_models.path(MODEL)
    ops = [
        {"op": "decode", "tokens": PROMPT}, {"op": "set_k", "k": 1},
        {"op": "steps", "tokens": FOLLOWING[:1], "pos": len(PROMPT)}, {"op": "prefetch"},
    ]  # fmt: skip
    runs = [run(f"{i}", path, ops, "min", mobile={"n_io_threads": 1}) for i in range(8)]
    outcome = engine_libs.run_job(engine, [*runs, run("next", path, good("good"))])
    assert sum(outcome.ops(f"{i}", "prefetch")[0]["status"] for i in range(8)) > 0
    assert_good(outcome, "next", "good")
