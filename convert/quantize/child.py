"""libllama's own quantiser, as a process: a stacked GGUF in, a quantised one out.

Run as ``python -m mobile_gguf.convert.quantize.child`` by ``quantize``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from pathlib import Path
from typing import Any

from ..child_side import ChildChannel

# "[  3/ 27] blk.0.x.weight - [ 1024,  128, 1, 1], type = bf16, " and then, in pieces, one of
# "size = 0.1 MiB", "converting to q4_K .. size = 0.2 MiB -> 0.1 MiB", "size = 0.2 MiB -> 0.1 MiB (q4_K)"
_TENSOR = re.compile(
    r"\[\s*(\d+)/\s*(\d+)\]\s+(\S+)\s+- \[.*?\], type =\s*(\w+), (?:converting to (\w+) \.\. )?"
    r"size =\s*([\d.]+) MiB(?: ->\s*([\d.]+) MiB)?(?: \((\w+)\))?"
)
_ERROR, _WARNING, _CONTINUED = 4, 3, 5  # enum ggml_log_level
_FILE_TYPE = "general.file_type"
_MIB = 1 << 20


class _Log:
    """Puts the quantiser's log together again and tells the parent of each tensor and warning."""

    def __init__(self, channel: ChildChannel) -> None:
        self.channel = channel
        self.errors: list[str] = []
        self._level, self._text = 0, ""

    def __call__(self, level: int, text: bytes, _data: Any) -> None:
        self._level = self._level if level == _CONTINUED else level
        piece = text.decode("utf-8", errors="replace")
        if self._level == _ERROR:
            self.errors.append(piece.strip())
        *lines, self._text = (self._text + piece).split("\n")
        for line in lines:
            if match := _TENSOR.search(line):
                index, total, name, source, target, before, after, planned = match.groups()
                self.channel.send(
                    tensor=int(index), n_tensors=int(total), name=name, source=source,
                    target=target or planned or source, done=round(float(before) * _MIB),
                    written=round(float(after or before) * _MIB),
                )  # fmt: skip
            elif "WARNING" in line:
                self.channel.send(warning=line.rpartition("WARNING: ")[2].strip())


def main() -> int:
    channel = ChildChannel()
    job = channel.job
    from llama_cpp import llama_cpp

    log = _Log(channel)
    callback = llama_cpp.llama_log_callback(log)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = int(job["threads"])
    params.ftype = int(job["ftype"])
    params.pure = bool(job["pure"])
    params.dry_run = bool(job["dry_run"])
    params.max_buf_size = int(job["max_buf_size"])
    # the arrays that params points to must outlive the call
    held = [_tensor_types(params, job["types"]), _metadata(params, job)]
    if job["imatrix"]:
        held.append(_imatrix(params, Path(job["imatrix"])))
    status = llama_cpp.llama_model_quantize(
        os.fsencode(job["source"]), os.fsencode(job["out"]), ctypes.pointer(params)
    )
    del held
    if status != 0:
        said = " ".join(" ".join(log.errors).replace("=", " ").split())
        said = re.sub(r"\b\w+: failed to quantize: ", "", said)
        channel.send(error=said or f"the quantiser failed (status {status})")
        return 1
    channel.send(finished=True)
    return 0


def _tensor_types(params: Any, types: list[list[Any]]) -> Any:
    from llama_cpp import llama_cpp

    if not types:
        return None
    array = (llama_cpp.llama_model_tensor_override * (len(types) + 1))()
    for place, (pattern, type_id) in zip(array, types, strict=False):
        place.pattern, place.type = pattern.encode(), type_id
    array[len(types)].pattern = None
    params.tt_overrides = ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_model_tensor_override))
    return array


def _metadata(params: Any, job: dict[str, Any]) -> Any:
    from llama_cpp import llama_cpp

    entries: list[tuple[str, int | str]] = []
    if job["file_type"] is not None:
        entries.append((_FILE_TYPE, int(job["file_type"])))
    entries += job["metadata"]
    if not entries:
        return None
    array = (llama_cpp.llama_model_kv_override * (len(entries) + 1))()
    for place, (key, value) in zip(array, entries, strict=False):
        place.key = key.encode()
        if isinstance(value, int):
            place.tag, place.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            place.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
            place.value.val_str = value.encode()[:127].decode("utf-8", errors="ignore").encode()
    params.kv_overrides = ctypes.cast(array, type(params.kv_overrides))
    return array


def _imatrix(params: Any, path: Path) -> Any:
    from llama_cpp import llama_cpp

    from .imatrix import read_imatrix

    values = read_imatrix(path).values
    array = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()
    for place, (name, data) in zip(array, values.items(), strict=False):
        place.name, place.size = name.encode(), data.size
        place.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    array[len(values)].name = None
    params.imatrix = ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    return array, values


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        raise SystemExit(main())
