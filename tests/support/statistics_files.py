"""Models with nothing but what statistics look at, and statistics of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mobile_gguf.convert.calibrate.statistics import RouteCounts, Statistics
from mobile_gguf.convert.calibrate.store import PREFIXES, statistics_metadata, statistics_tensors
from mobile_gguf.convert.gguf.file import update_gguf


def routing(seed: int, n_layer: int, n_tokens: int, n_expert: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Random ids without repetition, unevenly liked, and weights; [n_layer, n_tokens, k]."""
    rng = np.random.default_rng(seed)
    liking = rng.gumbel(size=(n_layer, n_tokens, n_expert)) + rng.normal(scale=2, size=(n_layer, 1, n_expert))
    ids = np.argsort(-liking, axis=-1)[..., :k].astype(np.int32)
    return ids, rng.random(ids.shape, np.float32)


def model_file(path: Path, *, n_layer: int = 2, n_expert: int = 6, stacked: bool = True) -> Path:
    """A GGUF with nothing but what statistics look at: experts of 32 neurons, and their geometry."""
    import gguf

    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(n_layer + 1)
    writer.add_embedding_length(4)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_expert_count(n_expert)
    writer.add_expert_used_count(2)
    rng = np.random.default_rng(1)
    for layer in range(1, n_layer + 1):  # layer 0 is dense
        down = rng.normal(size=(n_expert, 4, 32)).astype(np.float32)
        up = rng.normal(size=(n_expert, 32, 4)).astype(np.float32)
        if stacked:
            data = gguf.quantize(down, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"blk.{layer}.ffn_up_exps.weight", up)
            writer.add_tensor(
                f"blk.{layer}.ffn_down_exps.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q8_0
            )
        else:
            for expert in range(n_expert):
                writer.add_tensor(f"blk.{layer}.ffn_up.{expert}.weight", up[expert])
                writer.add_tensor(f"blk.{layer}.ffn_down.{expert}.weight", down[expert])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def statistics_for(n_layer: int = 2, n_expert: int = 6) -> Statistics:
    ids, weights = routing(7, n_layer, 50, n_expert, 2)
    counts = RouteCounts(tuple(range(1, n_layer + 1)), n_expert, 2)
    counts.add(ids, weights)
    rng = np.random.default_rng(2)
    importance = {layer: rng.random((n_expert, 32), np.float32) for layer in counts.layers}
    return counts.statistics(importance=importance)


def write_statistics(path: Path, statistics: Statistics, *, out: Path | None = None) -> None:
    """Puts statistics into the GGUF at ``path``, or into a copy at ``out``, as a calibration does."""
    update_gguf(
        path,
        set=statistics_metadata(statistics),
        drop=PREFIXES,
        add_tensors=statistics_tensors(statistics),
        out=out,
    )


GOOD = statistics_for()
