"""Keys and values in blocks: they take what is counted, and the buffers no more than those of f16."""

from __future__ import annotations

import json
import subprocess
import sys

import engine_libs
import pytest
import tiny_models
from places import SUPPORT

import mobile_gguf
from mobile_gguf.errors import UsageError
from mobile_gguf.gguf.caches import KvTypes
from mobile_gguf.gguf.info import read_gguf_info
from mobile_gguf.memory.demand import estimate_demand
from mobile_gguf.sizes import MIB

pytestmark = pytest.mark.engine
MODELS = ("qwen3moe", "nemotron-h")
TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8}
PAIRS = (("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"), ("q8_0", "f16"), ("f16", "q4_0"))
CASES = [KvTypes(*pair) for pair in PAIRS]
N_CTX, N_UBATCH = 4096, 64


def test_what_is_counted_is_what_is_allocated() -> None:
    paths = {name: tiny_models.path(name) for name in MODELS}
    contexts = [[N_CTX, N_UBATCH, True, TYPES[kv.keys], TYPES[kv.values]] for kv in CASES]
    job = {"models": {name: str(path) for name, path in paths.items()}, "contexts": contexts}
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "memory_child.py")],
        input=json.dumps(job), env=engine_libs.child_environment(engine_libs.engine_lib()),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name, found in json.loads(done.stdout).items():
        info = read_gguf_info(paths[name])
        for kv, sizes in zip(CASES, found, strict=True):
            demand = estimate_demand(info, n_ctx=N_CTX, n_ubatch=N_UBATCH, flash_attn=True, kv=kv)
            assert demand.kv_bytes / MIB == pytest.approx(sizes["caches"], abs=0.01 * sizes["n"]), (name, kv)
            assert sizes["compute"] <= 1.02 * found[0]["compute"] + 0.1, (name, kv)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("keys", "values"), [("q8_0", "q8_0"), ("q8_0", "f16"), ("q4_0", "q4_0")])
def test_answers_come_of_blocks(name: str, keys: str, values: str) -> None:
    prompt = list(range(3, 120))
    with mobile_gguf.load(
        tiny_models.path(name), n_ctx=512, threads=1, cache_type_k=keys, cache_type_v=values
    ) as model:
        reply = model.generate(prompt, max_tokens=8, temperature=0)
        assert 1 <= len(reply.tokens) <= 8  # it may end it
        again = model.generate([*prompt, *reply.tokens, 7, 8], max_tokens=4, temperature=0)
        assert again.timings["prompt_n"] <= 4


def test_what_the_engine_would_end_on_is_refused() -> None:
    with pytest.raises(UsageError, match="-ctv q8_0 needs flash attention"):
        mobile_gguf.load(tiny_models.path("qwen3moe"), cache_type_v="q8_0", flash_attn=False)
