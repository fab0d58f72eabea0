"""Memory of slots that is there before it is needed: all of the budget and no more.

That it changes no logits is in test_exactness.py, with slots of one shape and of two.
"""

from __future__ import annotations

import json
import subprocess
import sys

import engine_libs
import tiny_models

MIB = 1 << 20
BUDGET, SLOT = 60 * MIB, 2 * MIB
# Runs under a job on stdin, says what it took before the first token and after the last.
_CHILD = """
import ctypes, json, sys, time
from mobile_gguf.engine import binding
binding.load_library()
from llama_cpp import llama_cpp as lib
job = json.loads(sys.stdin.readline())
engine = binding.find_engine()
lib.llama_backend_init()

def anonymous():
    words = [line.split() for line in open("/proc/self/status")]
    return next(int(word[1]) << 10 for word in words if word[0] == "RssAnon:")

engine.set_load_params(budget_bytes=job["budget"], prefault=job["prefault"])
params = lib.llama_model_default_params()
params.n_gpu_layers, params.load_mode, params.use_extra_bufts = 0, 0, False
before = anonymous()
model = lib.llama_model_load_from_file(job["model"].encode(), params)
info = engine.model_info(model)
seen, since, end = -1, time.monotonic(), time.monotonic() + job["seconds"]
while time.monotonic() < end and (seen - before < job["least"] or time.monotonic() - since < job["patience"]):
    time.sleep(0.02)
    now = anonymous()
    if now != seen:
        seen, since = now, time.monotonic()
idle = seen - before
context_params = lib.llama_context_default_params()
context_params.n_ctx, context_params.n_threads, context_params.n_threads_batch = 256, 1, 1
ctx = lib.llama_init_from_model(model, context_params)
for start in range(0, 200, 50):
    tokens = (lib.llama_token * 50)(*range(start + 3, start + 53))
    assert lib.llama_decode(ctx, lib.llama_batch_get_one(tokens, 50)) == 0
used = anonymous() - before
lib.llama_free(ctx)
lib.llama_model_free(model)
print(json.dumps({"idle": idle, "used": used, "left": anonymous() - before, "budget": info.budget_bytes}))
"""


def load(*, prefault: bool, least: int = 0) -> dict[str, int]:
    """Bytes of anonymous memory: while idle after the load, after a prompt, and after the end.

    Idle is when ``least`` is there, however long that takes, and nothing more comes.
    """
    job = {
        "model": str(tiny_models.path("bulky")), "budget": BUDGET, "prefault": prefault,
        "least": least, "patience": 1.0, "seconds": 600,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=json.dumps(job) + "\n", text=True, capture_output=True, check=False,
        env=engine_libs.child_environment(engine_libs.engine_lib()),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_budget_is_taken_while_nobody_asks() -> None:
    without = load(prefault=False)
    found = load(prefault=True, least=without["idle"] + without["budget"] - SLOT)
    assert found["budget"] - SLOT <= found["idle"] - without["idle"] <= found["budget"]
    # what a run uses is the same with and without, and all of it goes with the model
    assert abs(found["used"] - without["used"]) <= 2 * SLOT
    assert found["left"] < found["budget"] // 2
