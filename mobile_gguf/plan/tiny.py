"""What a token costs beside its bytes: a model of next to no weights, run by the engine itself.

Two models that differ only in their number of layers are written to a temporary directory (a few MiB) and
decoded; the slope is a layer's cost (norms, attention, routing, barriers), the rest a token's (graph,
output).
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile_gguf.engine.log import capture_log, last_errors
from mobile_gguf.errors import EngineError

_WIDTH = 32  # of everything: one block
_LAYERS = (4, 16)
_MAX_EXPERTS = 128
_VOCABULARY = 64
_CONTEXT = 256
_NO_MMAP, _MMAP = 0, 1  # enum llama_load_mode


@dataclass(frozen=True)
class OnDevice:
    """A device (of ggml.py or device/listing.py), and slots there for a share of the experts."""

    device: Any
    placement: str
    share: float


def measure_overhead(
    n_expert: int,
    k: int,
    threads: int,
    seconds: float,
    check: Callable[[], None] = lambda: None,
    on_device: OnDevice | None = None,
) -> tuple[list[float], list[float]]:
    """Samples of seconds per token for a model of ``_LAYERS[0]`` and of ``_LAYERS[1]`` layers.

    ``on_device``: a token takes the way through scheduler, link and route op that a run takes.
    Raises EngineError if the engine does not run them.
    """
    n_expert = max(1, min(n_expert, _MAX_EXPERTS))
    samples = []
    for n_layer in _LAYERS:
        check()
        with tempfile.TemporaryDirectory(prefix="mobile-gguf-plan-") as folder:
            path = Path(folder) / "tiny.gguf"
            _write(path, n_layer, n_expert, max(1, min(k, n_expert)))
            samples.append(_decode(path, threads, seconds / len(_LAYERS), check, on_device))
    return samples[0], samples[1]


def overhead(few: float, many: float) -> tuple[float, float]:
    """(seconds a token, seconds a layer) from the seconds per token of both models."""
    layer = max(0.0, (many - few) / (_LAYERS[1] - _LAYERS[0]))
    return max(0.0, few - _LAYERS[0] * layer), layer


def _write(path: Path, n_layer: int, n_expert: int, k: int) -> None:
    import gguf
    import numpy as np

    width = _WIDTH
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(n_layer)
    writer.add_context_length(4096)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_expert_count(n_expert)
    writer.add_expert_used_count(k)
    writer.add_expert_feed_forward_length(width)
    writer.add_vocab_size(_VOCABULARY)
    writer.add_tokenizer_model("none")
    rng = np.random.default_rng(0)
    half = np.float16

    def add(name: str, *shape: int, kind: Any = np.float32) -> None:
        writer.add_tensor(name, (rng.standard_normal(shape) / width).astype(kind))

    add("token_embd.weight", _VOCABULARY, width)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(n_layer):
        block = f"blk.{layer}."
        for name in ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm"):
            writer.add_tensor(f"{block}{name}.weight", np.ones(width, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"{block}{name}.weight", width, width, kind=half)
        add(f"{block}ffn_gate_inp.weight", n_expert, width)
        for name in ("gate", "up", "down"):
            add(f"{block}ffn_{name}_exps.weight", n_expert, width, width, kind=half)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _decode(
    path: Path,
    threads: int,
    seconds: float,
    check: Callable[[], None],
    on_device: OnDevice | None,
) -> list[float]:
    from llama_cpp import llama_cpp

    from mobile_gguf.engine.binding import find_engine
    from mobile_gguf.engine.devices import device_array

    capture_log()
    llama_cpp.llama_backend_init()
    engine = find_engine()
    if engine is not None:
        engine.set_load_params(budget_bytes=0, on_host=on_device is not None)
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    devices = device_array([on_device.device] if on_device else [])
    if on_device:
        params.n_gpu_layers = -1
        params.devices = ctypes.cast(devices, ctypes.c_void_p)  # pyright: ignore
    params.load_mode = _NO_MMAP if engine is not None else _MMAP
    try:
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    finally:
        if engine is not None:
            engine.clear_load_params()
    if not model:
        raise EngineError(f"the engine cannot be measured: {last_errors() or 'its test model does not load'}")
    ctx = None
    try:
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = _CONTEXT
        context.n_threads = context.n_threads_batch = threads
        context.no_perf = True
        ctx = llama_cpp.llama_init_from_model(model, context)
        if not ctx:
            raise EngineError(f"the engine cannot be measured: {last_errors() or 'no context'}")
        if on_device:
            _make_pool(engine, ctx, path, on_device)
        times: list[float] = []
        started = time.perf_counter()
        while len(times) < 4 or (time.perf_counter() - started < seconds and len(times) < _CONTEXT - 2):
            check()
            token = (ctypes.c_int32 * 1)(len(times) % _VOCABULARY)
            before = time.perf_counter()
            status = llama_cpp.llama_decode(ctx, llama_cpp.llama_batch_get_one(token, 1))
            llama_cpp.llama_synchronize(ctx)
            times.append(time.perf_counter() - before)
            if status != 0:
                raise EngineError(f"the engine cannot be measured: decoding failed with status {status}")
        return times[2:]
    finally:
        if ctx:
            llama_cpp.llama_free(ctx)
        llama_cpp.llama_model_free(model)


def _make_pool(engine: Any, ctx: Any, path: Path, on_device: OnDevice) -> None:
    from mobile_gguf.engine.device_calls import DeviceCalls
    from mobile_gguf.gguf.info import read_gguf_info

    if engine is None:
        raise EngineError("a device tier is measured with this package's engine only")
    budget = int(read_gguf_info(path).expert_bytes * on_device.share)
    DeviceCalls(engine, ctx).start(budget, placement=on_device.placement)
