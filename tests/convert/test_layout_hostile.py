"""Files whose experts make up no model: the engine and the header reader say why, and nothing crashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import layout_files
import numpy as np
import pytest
import tiny_models
from engine_jobs import on_engine, run

from mobile_gguf.errors import ModelFormatError
from mobile_gguf.gguf.info import read_gguf_info

U32, STRING = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING


def without(name: str) -> Any:
    return lambda tensors: [t for t in tensors if name not in t[0]]


def plus(name: str, *shape: int) -> Any:
    extra = (name, np.ones(shape, np.float32), gguf.GGMLQuantizationType.F32)
    return lambda tensors: [*tensors, extra]


def instead(name: str, *shape: int, kind: Any = np.float32) -> Any:
    data = np.ones(shape, kind)
    type_id = gguf.GGMLQuantizationType.F16 if kind == np.float16 else gguf.GGMLQuantizationType.F32
    return lambda tensors: [(name, data, type_id) if t[0] == name else t for t in tensors]


# what is done to the tiny Mixtral in n segments, and the words that say what is wrong with it
HOSTILE: dict[str, tuple[Any, int, tuple[str, ...]]] = {
    "gap": (without("blk.1.ffn_up.2."), 1, ("layer 1, ffn_up", "expert 2 is missing")),
    "no first": (without("blk.1.ffn_up.0."), 1, ("layer 1, ffn_up", "expert 0 is missing")),
    "no last": (without("ffn_down.7."), 1, ("ffn_down", "expert 7 is missing")),
    "one too many": (plus("blk.0.ffn_gate.8.weight", 112, 96), 1, ("layer 0, ffn_gate", "9 experts")),
    "another type": (
        instead("blk.0.ffn_gate.1.weight", 112, 96, kind=np.float16), 1, ("expert 1", "type or shape"),
    ),
    "another shape": (instead("blk.0.ffn_gate.1.weight", 96, 112), 1, ("expert 1", "type or shape")),
    "not a matrix": (
        lambda tensors: [(n, np.stack([d, d]) if ".ffn_up." in n else d, k) for n, d, k in tensors], 1,
        ("not a matrix",),
    ),
    "twice": (plus("blk.0.ffn_gate_exps.weight", 8, 112, 96), 1, ("layer 0, ffn_gate", "twice")),
    "segment missing": (without("blk.1.ffn_up.5."), 2, ("layer 1", "expert 2, segment 1 is missing")),
    "segments and biases": (
        plus("blk.0.ffn_up_exps.bias", 8, 112), 2, ("blk.0.ffn_up_exps.bias", "segments"),
    ),
}  # fmt: skip

# metadata instead of a per-expert file's own, and the word that says what is wrong with it
METADATA: dict[str, tuple[str, Any, str]] = {
    "newer version": ("mobile.version", (2, U32), "newer"),
    "version of text": ("mobile.version", ("1", STRING), "mobile.version"),
    "unknown layout": ("mobile.layout", ("spiral", STRING), "mobile.layout"),
    "numeric layout": ("mobile.layout", (1, U32), "mobile.layout"),
    "no segments": ("mobile.segments", (0, U32), "mobile.segments"),
    "segments of text": ("mobile.segments", ("2", STRING), "mobile.segments"),
    "segments that are not there": ("mobile.segments", (3, U32), "missing"),
    "too many segments": ("mobile.segments", (4_000_000_000, U32), "mobile.segments"),
}
STACKED: dict[str, tuple[str, Any, str]] = {
    "stacked and newer": ("mobile.version", (9, U32), "mobile.version 9"),
    "stacked in segments": ("mobile.segments", (2, U32), "segments"),
}
CASES = [*HOSTILE, *METADATA, *STACKED]


def write(case: str, path: Path) -> Path:
    source = tiny_models.path("mixtral")
    if case in STACKED:
        key, value, _ = STACKED[case]
        return layout_files.rewrite(source, path, set_keys={key: value})
    change, n_segments, keys = list, 1, {}
    if case in METADATA:
        keys = {METADATA[case][0]: METADATA[case][1]}
    else:
        change, n_segments, _ = HOSTILE[case]
    return layout_files.rewrite(
        source, path, lambda tensors: change(list(layout_files.per_expert(tensors, n_segments))),
        set_keys=layout_files.mobile_keys(n_segments) | keys,
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hostile")
    return {case: write(case, folder / f"{case}.gguf") for case in CASES}


@pytest.fixture(scope="module")
def loads(files: dict[str, Path]) -> dict[str, Any]:
    """What became of loading each file without load parameters and into the store, all in one process."""
    return on_engine(
        *(
            run(f"{case} {budget}", path, [], budget)
            for case, path in files.items()
            for budget in (None, 1 << 60)
        )
    ).runs


@pytest.mark.parametrize("case", CASES)
def test_the_engine_says_what_is_wrong(case: str, loads: dict[str, Any]) -> None:
    words = HOSTILE[case][2] if case in HOSTILE else ((METADATA | STACKED)[case][2],)
    for budget in (None, 1 << 60):
        result = loads[f"{case} {budget}"]
        assert not result["loaded"]
        assert "\n" not in result["load_error"]
        assert f"{case}.gguf" in result["load_error"]
        assert all(word in result["load_error"] for word in words), result["load_error"]


@pytest.mark.parametrize("case", CASES)
def test_the_header_reader_refuses_it_first(case: str, files: dict[str, Path]) -> None:
    with pytest.raises(ModelFormatError) as caught:
        read_gguf_info(files[case])
    assert f"{case}.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)
