"""Writes a random-weight ``qwen3moe`` GGUF that follows a trace's routing in any engine, without a hook.

Token id s is step s of the trace. Its embedding is a large number in dimension s and nothing elsewhere;
attention and experts compute on random quantised blocks of tiny scale, so what they add to the residual
stays far below it, and after the RMS norm every layer's router sees dimension s alone. Column s of the
router then holds that step's logits: the trace's experts, best first, clearly above all others.

So: all the work and all the bytes of a real model, the routing of the trace, and text that means nothing.
The output head names the next step (text.py), so that an engine that takes the likeliest token goes through
the trace by itself.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mobile_gguf.errors import MobileError
from mobile_gguf.files.paths import cache_dir
from mobile_gguf.sizes import MIB, format_bytes
from mobile_gguf.wording import why

from .geometry import HEAD_SIZE, Q4_0_BLOCK, Q4_0_BLOCK_BYTES, ModelShape
from .text import add_tokenizer, output_matrix
from .trace import Trace

Progress = Callable[[int, int], None]  # bytes written, bytes in all

FORMAT = 2  # raise when the contents of built models change
ARCHITECTURE = "qwen3moe"
EMBEDDING = 1e6
CHOSEN_LOGIT = 6.0  # of the last expert chosen; the others have 0
SMALLEST_GAP = 0.05  # between neighbouring ranks, far above what attention and experts add
LARGEST_GAP = 2.0
CONTEXT_LENGTH = 32768
DISK_RESERVE = 256 * MIB


def router_logits(trace: Trace, layer: int) -> npt.NDArray[np.float32]:
    """Logits [n_expert, n_steps] whose top-k are the trace's experts of each step, in rank order.

    Differences follow the trace's router weights (a softmax's logarithms), within bounds that keep ranks
    apart. Steps that the trace did not route in this layer get those of the nearest later step.
    """
    experts, weights = trace.experts[:, layer], trace.weights[:, layer]
    routed = np.flatnonzero(experts[:, 0] >= 0)
    if not len(routed):
        raise MobileError(f"the trace {trace.source} routes nothing in layer {layer}")
    source = routed[np.minimum(np.searchsorted(routed, np.arange(trace.n_steps)), len(routed) - 1)]
    experts, weights = experts[source], weights[source]
    gaps = -np.diff(np.log(np.maximum(weights, 1e-6)), axis=1)
    gaps = np.clip(gaps, SMALLEST_GAP, LARGEST_GAP)
    below_first = np.concatenate([np.zeros((trace.n_steps, 1)), np.cumsum(gaps, axis=1)], axis=1)
    chosen = CHOSEN_LOGIT + below_first[:, -1:] - below_first
    logits = np.zeros((trace.n_expert, trace.n_steps), dtype=np.float32)
    logits[experts, np.arange(trace.n_steps)[:, None]] = chosen
    return logits


def router_matrix(trace: Trace, layer: int, n_embd: int) -> npt.NDArray[np.float32]:
    """The router [n_expert, n_embd]: it gives ``router_logits`` for normalised one-hot states.

    The RMS norm turns a one-hot state into sqrt(n_embd) in its dimension.
    """
    matrix = np.zeros((trace.n_expert, n_embd), dtype=np.float32)
    matrix[:, : trace.n_steps] = router_logits(trace, layer) / np.sqrt(n_embd)
    return matrix


def random_blocks(rng: np.random.Generator, n_weights: int) -> npt.NDArray[np.uint8]:
    """Q4_0 blocks [n_blocks, 18] of random nibbles and scales between 2^-10 and 2^-9; all of it is noise,
    so that neither a compressing nor a deduplicating disk can save anything."""
    n_blocks = n_weights // Q4_0_BLOCK
    blocks = np.frombuffer(bytearray(rng.bytes(n_blocks * Q4_0_BLOCK_BYTES)), dtype=np.uint8)
    blocks = blocks.reshape(n_blocks, Q4_0_BLOCK_BYTES)
    # the first two bytes are the scale, a little-endian half: exponent fixed, mantissa left random
    blocks[:, 1] = (blocks[:, 1] & 0x03) | 0x14
    return blocks


def model_path(trace: Trace, shape: ModelShape, directory: Path | None = None) -> Path:
    """Where the model of this trace and shape is kept: the cache directory unless told otherwise."""
    directory = directory or cache_dir() / "bench"
    right = "" if shape.right == 1.0 else f"-right{shape.right:g}"
    return directory / f"{trace.name}-{shape.n_embd}x{shape.n_ff}-{trace.digest()}{right}-v{FORMAT}.gguf"


def ensure_model(
    trace: Trace, shape: ModelShape, directory: Path | None = None, progress: Progress | None = None
) -> Path:
    """The model's path; it is written if it is not there yet, and appears only when complete.

    Needs memory for one layer's largest tensor at a time. Raises MobileError if the disk has no room or
    refuses.
    """
    path = model_path(trace, shape, directory)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MobileError(f"cannot make the folder {path.parent}: {why(error)}") from None
    return write_model(path, trace, shape, progress)


def write_model(
    path: Path, trace: Trace, shape: ModelShape, progress: Progress | None = None, *, replace: bool = False
) -> Path:
    """The same at a path of one's own; ``replace``: also where there is a file."""
    if not replace and path.is_file() and path.stat().st_size >= shape.file_bytes:
        return path
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        free = shutil.disk_usage(path.parent).free
        if free < shape.file_bytes + DISK_RESERVE:
            raise MobileError(
                f"the benchmark model needs {format_bytes(shape.file_bytes)} in {path.parent}, which has "
                f"{format_bytes(free)} free: make room, set XDG_CACHE_HOME, or ask for a smaller --size"
            )
        _write(partial, trace, shape, progress)
        os.replace(partial, path)
    except OSError as error:
        raise MobileError(f"cannot write the benchmark model {path}: {why(error)}") from None
    finally:
        partial.unlink(missing_ok=True)
    return path


def _write(path: Path, trace: Trace, shape: ModelShape, progress: Progress | None) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    try:
        _add_metadata(writer, trace, shape)
        for name, dims, quantised in _tensors(shape):
            kind = gguf.GGMLQuantizationType.Q4_0 if quantised else gguf.GGMLQuantizationType.F32
            writer.add_tensor_info(name, dims, np.dtype(np.float32), _tensor_bytes(dims, quantised), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        n_written = 0
        rng = np.random.Generator(np.random.SFC64(int(trace.digest(), 16)))
        for name, dims, quantised in _tensors(shape):
            data = (
                random_blocks(rng, int(np.prod(dims)))
                if quantised
                else _dense_values(name, dims, trace, shape.right)
            )
            writer.write_tensor_data(data)
            n_written += data.nbytes
            if progress is not None:
                progress(n_written, shape.file_bytes)
    finally:
        writer.close()
    with path.open("rb+") as stream:
        # dirty pages could not be dropped before the first measurement
        os.fsync(stream.fileno())


def _add_metadata(writer: Any, trace: Trace, shape: ModelShape) -> None:
    writer.add_name(f"mobile-gguf benchmark, routing of {trace.name}")
    writer.add_description("random weights that follow a recorded routing; for measuring speed only")
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(HEAD_SIZE)
    writer.add_value_length(HEAD_SIZE)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_expert_count(shape.n_expert)
    writer.add_expert_used_count(shape.k)
    writer.add_expert_feed_forward_length(shape.n_ff)
    writer.add_vocab_size(shape.n_vocab)
    add_tokenizer(writer, trace.n_steps)


def _tensors(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """(name, numpy shape, quantised) in file order."""
    yield "token_embd.weight", (shape.n_vocab, shape.n_embd), False
    yield "output_norm.weight", (shape.n_embd,), False
    yield "output.weight", (shape.n_vocab, shape.n_embd), False
    query, key = shape.n_head * HEAD_SIZE, shape.n_head_kv * HEAD_SIZE
    for layer in range(shape.n_layer):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", (shape.n_embd,), False
        yield block + "attn_q.weight", (query, shape.n_embd), True
        yield block + "attn_k.weight", (key, shape.n_embd), True
        yield block + "attn_v.weight", (key, shape.n_embd), True
        yield block + "attn_output.weight", (shape.n_embd, query), True
        yield block + "attn_q_norm.weight", (HEAD_SIZE,), False
        yield block + "attn_k_norm.weight", (HEAD_SIZE,), False
        yield block + "ffn_norm.weight", (shape.n_embd,), False
        yield block + "ffn_gate_inp.weight", (shape.n_expert, shape.n_embd), False
        yield block + "ffn_gate_exps.weight", (shape.n_expert, shape.n_ff, shape.n_embd), True
        yield block + "ffn_up_exps.weight", (shape.n_expert, shape.n_ff, shape.n_embd), True
        yield block + "ffn_down_exps.weight", (shape.n_expert, shape.n_embd, shape.n_ff), True


def _tensor_bytes(dims: tuple[int, ...], quantised: bool) -> int:
    n_weights = int(np.prod(dims))
    return n_weights // Q4_0_BLOCK * Q4_0_BLOCK_BYTES if quantised else 4 * n_weights


def _dense_values(name: str, dims: tuple[int, ...], trace: Trace, right: float) -> npt.NDArray[np.float32]:
    if name == "token_embd.weight":
        values = np.zeros(dims, dtype=np.float32)
        steps = np.arange(min(dims))
        values[steps, steps] = EMBEDDING
        return values
    if name == "output.weight":
        return output_matrix(trace.n_steps, *dims, right=right)
    if name.endswith("ffn_gate_inp.weight"):
        return router_matrix(trace, int(name.split(".")[1]), dims[1])
    return np.ones(dims, dtype=np.float32)
