"""Plans a model as the command does; if that says it fits, loads it and talks: ``promise_child.py JOB``.

JOB: {"path", "flags" of ``plan``, "options" of a load, "seed"}; with "blind" it does not see limits. The last
line of stdout is {"fits": false}, or with "n_ctx", "split", the tokens that were computed, and how many
sessions were written.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import mobile_gguf
from mobile_gguf.api import loading
from mobile_gguf.cli import main as command
from mobile_gguf.cli import plan
from mobile_gguf.files.paths import sessions_dir
from mobile_gguf.memory.machine import Memory

_LONGEST = 800


def talk(job: dict[str, Any]) -> dict[str, Any]:
    chance, n_computed = random.Random(job["seed"]), 0
    with mobile_gguf.load(job["path"], **job["options"]) as model:
        assert model.fit is not None
        n = min(model.n_ctx - 20, _LONGEST)
        texts = [[chance.randrange(3, 200) for _ in range(n - 40 * i)] for i in range(2)]
        for text in (*texts, *texts):
            reply = model.generate(text, max_tokens=8, temperature=0)
            n_computed += int(reply.timings["prompt_n"])
        told = {"n_ctx": model.n_ctx, "split": model.stats()["memory"], "computed": n_computed}
    return told | {"sessions": len(list(sessions_dir().glob("*.session")))}


def main(job: dict[str, Any]) -> None:
    if job.get("blind"):
        for module in (loading, plan):
            setattr(module, "read_memory", lambda: Memory(1 << 40, 1 << 40, "the machine"))  # noqa: B010
    fits = command(["plan", "--no-measure", job["path"], *job["flags"]]) == 0
    print(json.dumps({"fits": fits} | (talk(job) if fits else {})), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
