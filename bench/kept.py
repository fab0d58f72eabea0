"""Whether ``--max-kld`` is kept: mode auto on texts that calibration never saw, against exact logits.

    python -m mobile_gguf.bench.kept MODEL.gguf --text FILE --budget 25% --max-kld 0.005,0.02,0.05

Each text is cut into answers of ``--context`` tokens, since small models know no longer ones. An answer is
run token by token as if the model had said it behind its first tokens; the distribution after each is held
against the exact one, as ``bench/judge.py`` does. A row, a text, has the KL that was measured, what receipts
would say (``estimate``), how many tokens were audited and what share of the time that took, and the bytes
that were missed beside those of exact. One model answers all texts of a row's budget in turn, as it would in
a session, with what it has learnt. ``--untrained`` hides the file's prices: the model has to learn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mobile_gguf.errors import MobileError
from mobile_gguf.generate.llama import MobileLlama
from mobile_gguf.generate.passes.buddies import read_buddies
from mobile_gguf.generate.passes.decode import Policy
from mobile_gguf.generate.passes.rungs import Rung, parse_rung
from mobile_gguf.generate.pricing import EVERYTHING, cut_text, exact_rows, opened, price
from mobile_gguf.generate.request.auto_policy import auto_policy
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info
from mobile_gguf.options import LoadOptions
from mobile_gguf.options.words import AUTO_MODE
from mobile_gguf.wording import markdown_table

from .plan import budget_of
from .record import record_measured


@dataclass(frozen=True)
class Kept:
    """A text under a budget of nats; bytes are missed ones of a token.

    ``audit_share`` is of the time, ``foreseeing_share`` what foreseeing takes beside that.
    """

    max_kld: float
    budget: str
    text: int
    kl: float
    estimate: float
    audited: int
    audit_share: float
    foreseeing_share: float
    agreement: float
    missed_bytes: float
    exact_bytes: float
    answers: int
    answers_kept: int

    @property
    def is_kept(self) -> bool:
        return self.kl <= self.max_kld

    @property
    def error(self) -> float:
        """Of the estimate, relative to what was measured; 0 where nothing was lost."""
        return self.estimate / self.kl - 1 if self.kl > 0 else 0.0


@dataclass(frozen=True)
class _Answer:
    kl: float
    estimate: float
    audited: int
    audit_seconds: float
    foreseeing_seconds: float
    seconds: float
    agreement: float
    missed_bytes: float


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All rows, budgets of bytes first."""
    info = read_gguf_info(args.model)
    exact = parse_rung("exact", info, None)
    shape: dict[str, Any] = {"n_ctx": args.context, "threads": args.threads}
    found: list[Kept] = []
    with tempfile.TemporaryFile() as file:
        with opened(info, EVERYTHING, **shape) as llama:
            assert llama.store is not None
            all_bytes = llama.store.budget_all_bytes
            texts = [text for path in args.text for text in _texts_of(llama, path, args)]
            n = args.context - args.prompt - 1
            n_answers = len(texts[0])
            rows = np.memmap(file, np.float32, "w+", shape=(len(texts), n_answers, n, info.n_vocab))
            for of_text, text in zip(rows, texts, strict=True):
                for row, answer in zip(of_text, text, strict=True):
                    exact_rows(llama, exact, [answer], args.prompt, row)
        seen = _without_prices(info) if args.untrained else info
        for budget in args.budget.split(","):
            n_bytes = budget_of(budget, all_bytes)
            with opened(info, n_bytes, **shape) as llama:
                exact_bytes = [
                    price(llama, exact, budget, text, args.prompt, row.reshape(-1, info.n_vocab))
                    for text, row in zip(texts, rows, strict=True)
                ]
            for max_kld in map(float, args.max_kld.split(",")):
                with opened(info, n_bytes, **shape, buddies=read_buddies(info)) as llama:
                    options = LoadOptions(mode=AUTO_MODE, max_kld=max_kld)
                    policy = auto_policy(options, seen, llama, exact.policy, _say)
                    for i, (text, of_text) in enumerate(zip(texts, rows, strict=True)):
                        answers = [
                            _answer(llama, policy, budget, answer, row, args.prompt)
                            for answer, row in zip(text, of_text, strict=True)
                        ]
                        kept = sum(answer.kl <= max_kld for answer in answers)
                        found.append(
                            Kept(
                                max_kld, budget, i, _of(answers, "kl"), _of(answers, "estimate"),
                                sum(answer.audited for answer in answers),
                                _of(answers, "audit_seconds") / _of(answers, "seconds"),
                                _of(answers, "foreseeing_seconds") / _of(answers, "seconds"),
                                _of(answers, "agreement"), _of(answers, "missed_bytes"),
                                exact_bytes[i].price.demand_bytes, len(answers), kept,
                            )
                        )  # fmt: skip
                        print(_line(found[-1]), file=sys.stderr, flush=True)
    return {
        "model": info.path.name, "texts": len(texts), "tokens": n_answers * n,
        "rows": [asdict(row) | {"kept": row.is_kept, "error": row.error} for row in found],
    }  # fmt: skip


def _texts_of(llama: MobileLlama, path: Path, args: argparse.Namespace) -> list[list[list[int]]]:
    """The texts of a file: pieces of it from all over, each cut into as many answers."""
    start = llama.tokenize(b"", add_bos=True)
    n_answers = max(1, args.tokens // args.context)
    length = n_answers * (args.context - len(start))
    share = max(1, args.texts // len(args.text))
    pieces = cut_text(llama.tokenize(path.read_bytes(), add_bos=False), [], length, share * length)
    if n_answers == 1:
        return [[[*start, *piece]] for piece in pieces]
    return [cut_text(piece, start, args.context, args.tokens) for piece in pieces]


def _answer(
    llama: MobileLlama,
    policy: Policy,
    budget: str,
    tokens: list[int],
    row: npt.NDArray[np.float32],
    n_prompt: int,
) -> _Answer:
    of_answer = policy.of_answer(n_prompt)
    spending = of_answer.spending
    if spending is None:
        raise MobileError("mode auto has no effect on this model")
    found = price(llama, Rung("auto", of_answer), budget, [tokens], n_prompt, row).price
    return _Answer(
        found.kl, spending.estimate, spending.n_audited, spending.audit_seconds,
        spending.foreseeing_seconds, spending.seconds, found.agreement, found.demand_bytes,
    )  # fmt: skip


def _of(answers: Sequence[_Answer], name: str) -> float:
    return float(np.mean([getattr(answer, name) for answer in answers]))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _without_prices(info: GgufInfo) -> GgufInfo:
    metadata = {key: value for key, value in info.metadata.items() if not key.startswith(keys.LOSS)}
    return replace(info, metadata=metadata)


def _line(row: Kept) -> str:
    return (
        f"{row.budget} {row.max_kld:g} text {row.text}: KL {row.kl:.5f}, estimate {row.estimate:.5f} "
        f"({100 * row.error:+.0f}%), {row.audited} audited, {100 * row.audit_share:.1f}% of the time, "
        f"{row.missed_bytes / 1024:.0f} of {row.exact_bytes / 1024:.0f} KiB"
    )


def page_of(record: dict[str, Any]) -> str:
    """A line for each budget, of the worst and of all texts."""
    heads = ("budget", "max-kld", "kept", "KL, mean", "largest", "estimate, mean error", "largest", "audits",
             "of the time", "foreseeing", "bytes of exact", "top-1", "answers kept")  # fmt: skip
    lines = []
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in record["rows"]:
        groups.setdefault((row["budget"], row["max_kld"]), []).append(row)
    for (budget, max_kld), rows in groups.items():
        errors = [abs(row["error"]) for row in rows]
        lines.append(
            (
                budget, f"{max_kld:g}", f"{sum(row['kept'] for row in rows)} of {len(rows)}",
                f"{_mean(rows, 'kl'):.5f}", f"{max(row['kl'] for row in rows):.5f}",
                f"{100 * np.mean(errors):.0f}%", f"{100 * max(errors):.0f}%", f"{_mean(rows, 'audited'):.0f}",
                f"{100 * _mean(rows, 'audit_share'):.1f}%", f"{100 * _mean(rows, 'foreseeing_share'):.1f}%",
                f"{100 * _mean(rows, 'missed_bytes') / _mean(rows, 'exact_bytes'):.0f}%",
                f"{100 * _mean(rows, 'agreement'):.1f}%",
                f"{sum(row['answers_kept'] for row in rows)} of {sum(row['answers'] for row in rows)}",
            )
        )  # fmt: skip
    head = f"{record['texts']} texts of {record['tokens']} tokens that calibration never saw"
    return "\n".join([head, "", *markdown_table([heads, *lines]), ""])


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mobile_gguf.bench.kept", description=__doc__)
    parser.add_argument("model", type=Path, help="a GGUF, calibrated with prices")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="what no calibration has seen")
    parser.add_argument("--texts", type=int, default=10, help="of the files, in all")
    parser.add_argument("--tokens", type=int, default=2048, help="of a text")
    parser.add_argument("--context", type=int, default=256, help="of an answer, its prompt included")
    parser.add_argument("--prompt", type=int, default=32, help="of its tokens that stand for a prompt")
    parser.add_argument("--budget", default="25%", help="bytes, or a share of the slots of all experts")
    parser.add_argument("--max-kld", default="0.005,0.02,0.05", help="nats a token, several by commas")
    parser.add_argument("--untrained", action="store_true", help="as if the file had no prices")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for kept.json and kept.md")
    args = parser.parse_args(argv)
    if not 0 < args.prompt < args.context - 1:
        parser.error("an answer is longer than its prompt by two tokens at least")
    return record_measured("kept", argv, lambda: measure(args), page_of, args.out)


if __name__ == "__main__":
    raise SystemExit(main())
