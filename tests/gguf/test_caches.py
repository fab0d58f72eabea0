"""What a context keeps, of the models that people run, by the numbers in their headers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from real_dimensions import BY_NAME, REAL_MODELS
from real_models import RealModel

from mobile_gguf.gguf.caches import Caches, layers_that_run, read_caches
from mobile_gguf.gguf.facts import Facts
from mobile_gguf.gguf.info import read_gguf_info
from mobile_gguf.hub.facts import FactsCache
from mobile_gguf.memory.demand import estimate_demand

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
# bytes of a token with flash attention, and of the state
EXPECTED = {
    "Qwen3-30B-A3B": (48 * 2 * 4 * 128 * 2, 0),
    "Qwen3-Next-80B-A3B": (24 * KIB, 36 * 2144 * KIB),
    "Qwen3.6-35B-A3B": (20 * KIB, 30 * 2144 * KIB),
    "gpt-oss-20b": (48 * KIB, 0),
    "gpt-oss-120b": (72 * KIB, 0),
    "GLM-4.5-Air": (184 * KIB, 0),
    "GLM-4.7-Flash": (47 * 576 * 2, 0),
    "Gemma-4-26B-A4B": (2 * 2 * (25 * 8 * 256 + 5 * 2 * 512), 0),
    # of every position; of every 4 and 128 together; of every 4 an indexer's
    "DeepSeek-V4-Flash": (2 * (43 * 512 + 21 * 512 / 4 + 20 * 512 / 128 + 21 * 128 / 4), 11.640625 * MIB),
    # keys and values, an indexer's keys
    "Qwen3.8-Flash-Next": (
        12 * 2 * (2 * 2 * 256 + 128),
        36 * (3 * 10240 + 128 * 6144) * 4 + 3 * 3 * 10240 * 4,
    ),
}


def caches(architecture: str, numbers: Mapping[str, object]) -> Caches:
    metadata = {f"{architecture}.{name}": value for name, value in numbers.items()}
    facts = Facts(Path("model.gguf"), architecture, metadata)
    return read_caches(facts, layers_that_run(facts, ()))


@pytest.mark.parametrize("model", REAL_MODELS, ids=lambda model: model.name)
def test_a_token_and_the_state(model: RealModel) -> None:
    found = caches(model.architecture, model.numbers)
    assert (found.token_bytes(True), found.state_bytes) == EXPECTED[model.name]
    if not found.compressed:
        token_bytes, state_bytes = EXPECTED[model.name]
        assert found.n_bytes(4096, True) == 4096 * token_bytes + state_bytes


def test_mla_keeps_a_latent_vector() -> None:
    """DeepSeek-V3."""
    numbers = {
        "block_count": 61, "attention.head_count": 128, "attention.head_count_kv": 1,
        "attention.key_length": 576, "attention.value_length": 512, "attention.key_length_mla": 192,
        "attention.value_length_mla": 128,
    }  # fmt: skip
    assert caches("deepseek2", numbers).token_bytes(True) == 61 * 576 * 2


def test_a_hybrid_at_its_longest() -> None:
    """Keys and values of every block would be 24.5 GiB."""
    model = BY_NAME["Qwen3-Next-80B-A3B"]
    assert caches(model.architecture, model.numbers).n_bytes(262144, True) == 6 * GIB + 36 * 2144 * KIB


def test_without_flash_attention_values_are_as_wide_as_the_widest_layers() -> None:
    numbers = {
        "block_count": 2, "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32,
        "attention.value_length": 32, "attention.key_length_swa": 16, "attention.value_length_swa": 16,
        "attention.sliding_window": 128, "attention.sliding_window_pattern": [True, False],
    }  # fmt: skip
    found = caches("gemma4", numbers)
    assert found.token_bytes(True) == 2 * 2 * (16 + 16 + 32 + 32)
    assert found.token_bytes(False) == 2 * 2 * (16 + 32 + 32 + 32)
    assert found.windows


def test_layers_that_use_the_keys_of_others() -> None:
    numbers = {
        "block_count": 6,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "embedding_length": 64,
    }
    all_own = caches("gemma4", numbers).token_bytes(True)
    assert caches("gemma4", numbers | {"attention.shared_kv_layers": 2}).token_bytes(True) == all_own * 4 / 6


def test_mamba_layers_are_those_without_heads_for_keys() -> None:
    numbers = {
        "block_count": 3, "attention.head_count": 4, "attention.head_count_kv": [0, 2, 0],
        "embedding_length": 64,
        "ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": 16, "ssm.group_count": 1,
    }  # fmt: skip
    found = caches("granitehybrid", numbers)
    assert found.token_bytes(True) == 2 * 2 * 2 * 16
    assert found.state_bytes == 2 * 4 * (3 * (128 + 2 * 16) + 16 * 128)


def test_a_model_that_keeps_nothing() -> None:
    assert (
        caches(
            "nomic-bert-moe", {"block_count": 12, "attention.head_count": 12, "embedding_length": 768}
        ).n_bytes(512, False)
        == 0
    )


def test_deepseek_4_without_the_blocks_that_its_header_counts() -> None:
    metadata = {"deepseek4.block_count": 6, "deepseek4.nextn_predict_layers": 1}
    facts = Facts(Path("model.gguf"), "deepseek4", metadata)
    assert layers_that_run(facts, ()) == 6
    assert layers_that_run(facts, ["blk.5.nextn.eh_proj.weight"]) == 5


# files


def write(path: Path, architecture: str, n_block: int, n_mtp: int, table_rows: int = 0) -> Path:
    """A MoE of ``n_block`` blocks, the last of them for multi-token prediction; a hole in a sparse file."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(n_block)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    if n_mtp:
        writer.add_uint32(f"{architecture}.nextn_predict_layers", n_mtp)
    arrays: dict[str, Any] = {"token_embd.weight": np.zeros((100, 64), np.float32)}
    for block in range(n_block):
        for name in ("gate", "up", "down"):
            arrays[f"blk.{block}.ffn_{name}_exps.weight"] = np.zeros((4, 64, 64), np.float32)
        arrays[f"blk.{block}.attn_q.weight"] = np.zeros((64, 64), np.float32)
        if block >= n_block - n_mtp:
            arrays[f"blk.{block}.nextn.eh_proj.weight"] = np.zeros((64, 128), np.float32)
    for name, array in arrays.items():
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
    size = sum(array.nbytes for array in arrays.values())
    if table_rows:
        writer.add_tensor_info(
            "per_layer_token_embd.weight", (table_rows, 64), np.dtype(np.float32), table_rows * 256
        )
        size += table_rows * 256
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "r+b") as file:
        file.truncate(file.seek(0, 2) + 32 + size)
    return path


EXPERTS = 3 * 4 * 64 * 64 * 4


def test_blocks_that_nothing_runs_are_counted_apart(tmp_path: Path) -> None:
    plain = read_gguf_info(write(tmp_path / "plain.gguf", "glm4moe", 3, 0))
    info = read_gguf_info(write(tmp_path / "mtp.gguf", "glm4moe", 4, 1))
    same = ("n_layer", "n_layer_moe", "moe_layers", "expert_layers", "expert_bytes", "dense_bytes", "caches")
    assert [getattr(info, name) for name in same] == [getattr(plain, name) for name in same]
    assert (info.n_layer_mtp, info.mtp_expert_bytes) == (1, EXPERTS)
    assert info.mtp_bytes == EXPERTS + (64 * 64 + 64 * 128) * 4
    assert info.tensor_bytes == plain.tensor_bytes + info.mtp_bytes


@pytest.mark.parametrize(("rows", "is_lazy"), [(1 << 24, False), ((1 << 24) + 1, True)])
def test_a_table_beyond_4_gib_stays_in_the_file(tmp_path: Path, rows: int, is_lazy: bool) -> None:
    plain = read_gguf_info(write(tmp_path / "plain.gguf", "gemma4", 2, 0))
    info = read_gguf_info(write(tmp_path / "table.gguf", "gemma4", 2, 0, rows))
    assert info.lazy_bytes == (rows * 256 if is_lazy else 0)
    assert info.dense_bytes == plain.dense_bytes + (0 if is_lazy else rows * 256)
    demand = estimate_demand(info, n_ctx=512, n_ubatch=64)
    assert demand.dense_bytes == info.dense_bytes
    assert info.embedding_bytes <= info.dense_bytes


def test_such_a_table_of_another_family_is_read_in_full(tmp_path: Path) -> None:
    assert read_gguf_info(write(tmp_path / "m.gguf", "gemma3n", 2, 0, (1 << 24) + 1)).lazy_bytes == 0


def test_lists_remember_all_of_it(tmp_path: Path) -> None:
    path = write(tmp_path / "mtp.gguf", "deepseek4", 4, 1)
    first = FactsCache()
    info, problem = first.read(path, (path,))
    assert not problem
    first.save()
    assert FactsCache().read(path, (path,)) == (info, "")
    assert info == read_gguf_info(path)
