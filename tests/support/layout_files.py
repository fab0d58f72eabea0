"""Per-expert GGUFs made from stacked ones with the ``gguf`` package, an oracle for the engine's reading."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

STACKED = re.compile(r"blk\.(\d+)\.ffn_(gate_up|up|gate|down)_exps\.weight")
ORDER = ("gate_up", "up", "gate", "down")
SINGLE = re.compile(r"blk\.(\d+)\.ffn_(gate_up|up|gate|down)\.(\d+)\.weight")

# one tensor of a file: name, rows as they lie in the file, type
Tensor = tuple[str, np.ndarray, gguf.GGMLQuantizationType]


def parts(path: Path) -> list[Path]:
    """The files of a model: one, or all parts of a split one."""
    match = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path.name)
    return [path] if match is None else sorted(path.parent.glob(f"{match[1]}-?????-of-{match[2]}.gguf"))


def cut(matrix: str, expert: np.ndarray, n_segments: int, neurons: np.ndarray | None) -> list[np.ndarray]:
    """One expert's matrix [rows, bytes or values] in segments; neurons: their order, unquantised only."""
    if matrix == "down":
        columns = expert if neurons is None else expert[:, neurons]
        return [np.ascontiguousarray(c) for c in np.split(columns, n_segments, axis=1)]
    halves = np.split(expert, 2) if matrix == "gate_up" else [expert]
    ordered = [half if neurons is None else half[neurons] for half in halves]
    pieces = [np.split(half, n_segments) for half in ordered]
    return [np.concatenate([piece[s] for piece in pieces]) for s in range(n_segments)]


def per_expert(tensors: list[Tensor], n_segments: int = 1, seed: int | None = None) -> Iterator[Tensor]:
    """The same tensors with one for every expert and matrix; seed: shuffles the neurons of each expert."""
    experts = {}
    for name, data, kind in tensors:
        match = STACKED.fullmatch(name)
        if match is None:
            yield name, data, kind
        else:
            experts[int(match[1]), match[2]] = data, kind
    for layer in sorted({layer for layer, _ in experts}):
        matrices = [m for m in ORDER if (layer, m) in experts]
        n_expert = len(experts[layer, "down"][0])
        n_ff = experts[layer, "down"][0].shape[2]
        for e in range(n_expert):
            neurons = None if seed is None else np.random.default_rng([seed, layer, e]).permutation(n_ff)
            pieces = {m: cut(m, experts[layer, m][0][e], n_segments, neurons) for m in matrices}
            for s in range(n_segments):
                for m in matrices:
                    yield (
                        f"blk.{layer}.ffn_{m}.{e * n_segments + s}.weight",
                        pieces[m][s],
                        experts[layer, m][1],
                    )


def rewrite(
    source: Path,
    out: Path,
    change: Callable[[list[Tensor]], list[Tensor]] = list,
    *,
    set_keys: dict[str, tuple[Any, gguf.GGUFValueType]] | None = None,
    drop_keys: str = r"$^",
    alignment: int = 4096,
    **writer_options: Any,
) -> Path:
    """Writes ``source`` (all its parts) with changed tensors and metadata; returns the (first) file."""
    readers = [gguf.GGUFReader(part) for part in parts(source)]
    tensors = [(t.name, t.data, t.tensor_type) for reader in readers for t in reader.tensors]
    architecture = readers[0].fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture, **writer_options)
    writer.add_custom_alignment(alignment)
    skipped = re.compile(rf"GGUF\..*|split\..*|general\.(architecture|alignment)|{drop_keys}")
    for key, field in readers[0].fields.items():
        if skipped.fullmatch(key) is None and key not in (set_keys or {}):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type)
    for key, (value, kind) in (set_keys or {}).items():
        writer.add_key_value(key, value, kind)
    for name, data, kind in change(tensors):
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(out.parent.glob(f"{out.stem}*.gguf"))


def mobile_keys(n_segments: int = 1, version: int = 1) -> dict[str, tuple[Any, gguf.GGUFValueType]]:
    """The metadata of a per-expert file."""
    keys: dict[str, tuple[Any, gguf.GGUFValueType]] = {
        "mobile.version": (version, gguf.GGUFValueType.UINT32),
        "mobile.layout": ("per-expert", gguf.GGUFValueType.STRING),
        "mobile.source.alignment": (0, gguf.GGUFValueType.UINT32),
    }
    if n_segments > 1:
        keys["mobile.segments"] = (n_segments, gguf.GGUFValueType.UINT32)
        keys["mobile.segments.order"] = ("natural", gguf.GGUFValueType.STRING)
    return keys


def write_per_expert(
    source: Path, out: Path, n_segments: int = 1, seed: int | None = None, **how: Any
) -> Path:
    """``source`` in the per-expert layout, with one calibration tensor that is no part of the model."""

    def change(tensors: list[Tensor]) -> list[Tensor]:
        hotness = ("mobile.hotness", np.ones((3, 5), np.float32), gguf.GGMLQuantizationType.F32)
        return [hotness, *per_expert(tensors, n_segments, seed)]

    return rewrite(source, out, change, set_keys=mobile_keys(n_segments), **how)


def check_per_expert(path: Path) -> gguf.GGUFReader:
    """The order and alignment of a per-expert file."""
    read = gguf.GGUFReader(path)
    assert read.fields["mobile.version"].contents() == 1
    assert read.fields["mobile.layout"].contents() == "per-expert"
    assert read.fields["general.alignment"].contents() == 4096
    assert all(tensor.data_offset % 4096 == 0 for tensor in read.tensors)
    offsets = [tensor.data_offset for tensor in read.tensors]
    assert offsets == sorted(offsets)
    singles = [match for tensor in read.tensors if (match := SINGLE.fullmatch(tensor.name))]
    assert [t.name for t in read.tensors][-len(singles) :] == [match[0] for match in singles]
    keys = [(int(match[1]), int(match[3]), ORDER.index(match[2])) for match in singles]
    assert keys == sorted(keys)
    assert path.stat().st_size % 4096 == 0
    return read
