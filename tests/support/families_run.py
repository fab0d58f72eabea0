"""Runs what the product does with a file on the files of ``family_table``: a process for each family.

Run as a script on either library; stdin: {"models": {name: stacked GGUF}, "cells": names of cells, "scratch":
folder, "n_ctx", "prompt", "steps": tokens}. stdout: {name: {cell: what was found}}, or how its process died.
scratch/NAME/logits.npz gets logits by layout and budget, stock.npz those of the library as it is. Each
family runs in a fork of this process, which has everything imported; two at a time.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from families_ops import ops
from forks import in_forks

import mobile_gguf
from mobile_gguf.api.model import Model
from mobile_gguf.convert.calibrate import curves, head, price
from mobile_gguf.convert.calibrate import run as calibration
from mobile_gguf.convert.gguf.layout import to_mobile, to_stacked
from mobile_gguf.errors import MobileError
from mobile_gguf.gguf.info import read_gguf_info

N_TOKENS, WORKERS = 400, 2
_GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 10}
# few settings: what is asked is whether it runs, not what is best
curves.GAMMAS, head.SHARES = (0.7,), (30,)
price.SHARES, price.RUNGS, price.LITTLE = (0.5,), ("drop:0.75",), ()


class Cells:
    """One family's cells; each is what was found, in plain values."""

    def __init__(self, name: str, gguf: Path, job: dict[str, Any]) -> None:
        self.name, self.gguf, self.job = name, gguf, job
        self.folder = Path(job["scratch"]) / name
        self.folder.mkdir(exist_ok=True)
        self.mobile = self.folder / "mobile.gguf"
        self.calibrated = self.folder / "calibrated.gguf"

    def run(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for cell in self.job["cells"]:
            try:
                found[cell] = getattr(self, cell)()
            except Exception:  # a cell must not hide the others
                found[cell] = {"error": traceback.format_exc()}
        return found

    def layouts(self) -> dict[str, Any]:
        """Per expert and back, bit for bit; in segments."""
        to_mobile(self.gguf, self.mobile)
        back, parts = self.folder / "back.gguf", self.folder / "segments.gguf"
        to_stacked(self.mobile, back)
        same = filecmp.cmp(back, self.gguf, shallow=False)
        back.unlink()
        refused = said(lambda: to_mobile(self.gguf, parts, segments=2, segment_order="natural"))
        return {"same": same, "segments": refused, "likeliest": None if refused else self.likeliest(parts)}

    def stock(self) -> dict[str, Any]:
        """What the library computes without a budget."""
        arrays: dict[str, np.ndarray] = {}
        error = self.computed({"name": "stock", "model": str(self.gguf)}, arrays)["load_error"]
        assert not error, error
        np.savez(self.folder / "stock.npz", **arrays)  # type: ignore[arg-type]
        return {"n_arrays": len(arrays)}

    def logits(self) -> dict[str, Any]:
        """By layout and budget, as ``engine_child`` computes them."""
        arrays: dict[str, np.ndarray] = {}
        loaded = {}
        for layout, path in (("stacked", self.gguf), ("per-expert", self.mobile)):
            info = read_gguf_info(path)
            budgets = {
                "100%": info.budget_all_bytes,
                "40%": max(info.budget_min_bytes, int(info.budget_all_bytes * 0.4)),
                "smallest": info.budget_min_bytes,
            }
            for budget, n_bytes in budgets.items():
                name = f"{layout}, {budget}"
                spec = {"name": name, "model": str(path), "mobile": {"budget": n_bytes}}
                result = self.computed(spec, arrays)
                loaded[name] = result["info"] or result["load_error"]
        np.savez(self.folder / "logits.npz", **arrays)  # type: ignore[arg-type]
        return loaded

    def computed(self, spec: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """A run of ``engine_child`` in this process."""
        import engine_child

        run = engine_child.Run(spec | {"n_ctx": self.job["n_ctx"], "ops": ops(self.job)}, arrays)
        if run.open():
            for op in run.spec["ops"]:
                getattr(run, f"op_{op['op']}")(op)
        run.close()
        return run.result

    def modes(self) -> dict[str, Any]:
        """What each mode did: tokens by pass, or the refusal."""
        found: dict[str, Any] = {}
        with self.loaded(self.mobile) as model:
            for mode in ("exact", "little", "big-little"):
                found[mode] = self.mode(model, mode=mode)
        return found

    def second_turn(self) -> dict[str, Any]:
        """A conversation goes on where it was; what a little pass left is not built on."""
        prompt, more = self.job["prompt"], self.job["steps"]
        with self.loaded(self.mobile) as model:
            first = model.generate(prompt, **_GREEDY)
            longer = [*prompt, *first.tokens, *more]
            second = list(model.stream(longer, **_GREEDY))
            fresh = model.generate(longer, **_GREEDY, cache_prompt=False)
            if read_gguf_info(self.mobile).n_expert_used > 1:
                model.generate(prompt, **_GREEDY, mode="little")
            again = model.generate(prompt, **_GREEDY)
            # the last token of an answer is never run
            return {
                "reused": len(longer) - second[-1].prompt_evaluated,
                "in_context": len(prompt) + len(first.tokens) - 1,
                "same": [c.token for c in second if c.token is not None] == list(fresh.tokens),
                "exact_after_little": again.tokens == first.tokens,
            }

    def calibration(self) -> dict[str, Any]:
        """Calibrated on a short text; by the head then, and back to the stock file."""
        options = calibration.CalibrateOptions(
            tokens=N_TOKENS, out=self.calibrated, threads=1, resume=False, price_blocks=1
        )
        refused = said(lambda: calibration.calibrate(self.mobile, options))
        if refused:
            return {"refused": refused}
        back = self.folder / "back.gguf"
        to_stacked(self.calibrated, back)
        with self.loaded(self.calibrated) as model:
            head_mode = self.mode(model, mode="big-little", head_threshold=0.3)
            always = model.generate(self.job["prompt"], **_GREEDY, mode="big-little", head_threshold=0.0)
            exact = model.generate(self.job["prompt"], **_GREEDY, mode="exact")
        return {
            "refused": "", "same": filecmp.cmp(back, self.gguf, shallow=False), "head": head_mode,
            "all_big_is_exact": always.tokens == exact.tokens,
        }  # fmt: skip

    def mode(self, model: Model, **options: Any) -> Any:
        """Tokens that were big, little, fallback; or why not."""
        try:
            receipt = model.generate(self.job["prompt"], **_GREEDY, **options).receipt
        except MobileError as error:
            return str(error)
        return [receipt.tokens_big, receipt.tokens_little, receipt.tokens_fallback]

    def likeliest(self, path: Path) -> bool:
        """Whether another layout gives the same tokens."""
        answers = []
        for each in (self.gguf, path):
            with self.loaded(each) as model:
                answers.append(model.generate(self.job["prompt"], **_GREEDY).tokens)
        return answers[0] == answers[1]

    @contextlib.contextmanager
    def loaded(self, path: Path) -> Iterator[Model]:
        info = read_gguf_info(path)
        budget = max(info.budget_min_bytes, int(info.budget_all_bytes * 0.4))
        n_ctx = self.job["n_ctx"]
        with mobile_gguf.load(path, n_ctx=n_ctx, threads=1, ram_budget=budget, vram_budget="off") as model:
            yield model


def said(call: Callable[[], object]) -> str:
    """What a call was refused with; empty if it was not."""
    try:
        call()
    except MobileError as error:
        return str(error)
    return ""


def in_this_process(function: Callable[..., Any], *arguments: Any, progress: Callable[..., None]) -> Any:
    """``engine_task.in_child`` without another start of Python: this process is one family's own."""
    return function(*arguments, progress)


def main() -> int:
    job = json.load(sys.stdin)
    calibration.in_child = in_this_process  # type: ignore[assignment]
    # one warm interpreter for all: what they need is imported before the forks
    import engine_child  # noqa: F401

    if "calibration" in job["cells"]:
        import sklearn.linear_model
        import sklearn.model_selection  # noqa: F401

    tasks = {name: Cells(name, Path(gguf), job).run for name, gguf in job["models"].items()}
    print(json.dumps(in_forks(tasks, workers=WORKERS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
