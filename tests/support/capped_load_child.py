"""Loads a model as a user does, answers, and says what it took: ``capped_load_child.py FILE BUDGET``."""

from __future__ import annotations

import json
import sys

from peak_memory import peak_resident_bytes

import mobile_gguf


def main(path: str, budget: str) -> None:
    with mobile_gguf.load(
        path, ram_budget=budget, n_ctx=256, threads=1, warm="off", vram_budget="off"
    ) as model:
        reply = model.generate("One two three four", max_tokens=24, temperature=0)
        stats = model.stats()
        told = {
            "notices": model.notices,
            "tokens": list(reply.tokens),
            "budget": stats["store"]["budget_bytes"],
            "resident": stats["counters"]["resident_bytes_peak"],
        }
    print(json.dumps(told | {"peak": peak_resident_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
