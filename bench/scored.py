"""One run of the scoreboard in a process of its own: ``python -m mobile_gguf.bench.scored``.

Reads one JSON job from stdin (so that the parent can move the process into its cgroup first), runs blocks of
text under one system and writes the price as one line of JSON, ``{"error": ...}`` if there is none. The first
job cuts a text into blocks, runs them exactly, and says what they are.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mobile_gguf.errors import MobileError
from mobile_gguf.generate.llama import MobileLlama
from mobile_gguf.generate.passes.buddies import read_buddies
from mobile_gguf.generate.passes.head import read_head
from mobile_gguf.generate.passes.rungs import Rung, parse_rung
from mobile_gguf.generate.pricing import cut_text, exact_rows, n_positions, opened, price
from mobile_gguf.generate.request.auto_policy import auto_policy
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info
from mobile_gguf.options import LoadOptions
from mobile_gguf.options.words import AUTO_MODE, EXACT

from .child import end_with_parent


@dataclass(frozen=True)
class ScoredJob:
    """What to run: ``rung`` as ``parse_rung`` reads it, or ``auto:NATS``, on blocks of ``block`` token ids.

    ``exact`` is the file of the exact log probabilities [positions, n_vocab]. Where ``text`` is given, blocks
    are cut from it, ``n_tokens`` in all, and that file is made.
    """

    model: str
    rung: str
    budget: str
    budget_bytes: int
    block: int
    n_prompt: int
    threads: int
    exact: str
    blocks: list[list[int]] = field(default_factory=list)
    text: str = ""
    n_tokens: int = 0


def main() -> int:
    """Run the job on stdin."""
    end_with_parent()
    job = ScoredJob(**json.loads(sys.stdin.readline()))
    try:
        said = _run(job)
    except MobileError as error:
        said = {"error": str(error)}
    print(json.dumps(said), flush=True)
    return 0


def _run(job: ScoredJob) -> dict[str, Any]:
    info = read_gguf_info(Path(job.model))
    with opened(
        info, job.budget_bytes, n_ctx=job.block, threads=job.threads, n_prompt=job.n_prompt,
        head=read_head(info), buddies=read_buddies(info),
    ) as llama:  # fmt: skip
        rung = _rung(job.rung, info, llama)
        if job.text:
            start = llama.tokenize(b"", add_bos=True)
            tokens = llama.tokenize(Path(job.text).read_bytes(), add_bos=False)
            blocks = cut_text(tokens, start, job.block, job.n_tokens)
            rows = _rows(job, blocks, info, "w+")
            exact_rows(llama, rung, blocks, job.n_prompt, rows)
            rows.flush()
            return {"blocks": blocks}
        exact = _rows(job, job.blocks, info, "r")
        return asdict(price(llama, rung, job.budget, job.blocks, job.n_prompt, exact, timed=True).price)


def _rows(
    job: ScoredJob, blocks: list[list[int]], info: GgufInfo, mode: Literal["r", "w+"]
) -> np.memmap[Any, np.dtype[np.float32]]:
    return np.memmap(job.exact, np.float32, mode, shape=(n_positions(blocks, job.n_prompt), info.n_vocab))


def _rung(text: str, info: GgufInfo, llama: MobileLlama) -> Rung:
    word, _, number = text.partition(":")
    if word != AUTO_MODE:
        return parse_rung(text, info, read_head(info))
    options = LoadOptions(mode=AUTO_MODE, max_kld=float(number))
    exact = parse_rung(EXACT, info, None).policy
    return Rung(text, auto_policy(options, info, llama, exact, lambda text: print(text, file=sys.stderr)))


if __name__ == "__main__":
    sys.exit(main())
