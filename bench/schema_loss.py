"""Whether answers under a JSON schema hold, and say the same, where experts are missing.

    python -m mobile_gguf.bench.schema_loss MODEL.gguf --budget 25%

Fifty prompts ask for an object of a schema that bounds every part of it. Each is answered exactly, and under
every rung that an option asks for, greedily, in one session a rung. The grammar guarantees the form at every
rung: an answer that ended is read and checked against the schema here, and a wrong one ends the run with an
error. What it says may differ: counted are answers that are equal to the exact one, and keys whose value is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mobile_gguf
from mobile_gguf.errors import MobileError
from mobile_gguf.wording import markdown_table

from .record import record_measured

KINDS = ("animal", "place", "tool", "food")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": list(KINDS)},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "is_old": {"type": "boolean"},
        "parts": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 2},
    },
    "required": ["name", "kind", "count", "is_old", "parts"],
    "additionalProperties": False,
}
_THINGS = (
    "a horse",
    "the harbour",
    "a hammer",
    "bread",
    "an old clock",
    "the river",
    "a lamp",
    "rice",
    "a fox",
    "a mill",
)
_WORDS = ("Describe", "Write down", "Tell me about", "List the parts of", "Count")
PROMPTS = tuple(f"{word} {thing}, as JSON:\n" for word, thing in itertools.product(_WORDS, _THINGS))
RUNGS: dict[str, dict[str, Any]] = {
    "little": {"mode": "little"},
    "drop 0.75": {"drop": 0.75},
    "drop 1": {"drop": 1.0},
    "little-on-miss": {"little_on_miss": "on"},
    "live": {"substitute": "live"},
    "prior": {"substitute": "prior"},
    "prompt-drop 0.05": {"prompt_drop": 0.05},
    "auto, 0.05": {"mode": "auto", "max_kld": 0.05},
}


@dataclass(frozen=True)
class Compared:
    """A rung's answers beside the exact ones: all, those that ended, equal ones, the share of equal keys."""

    rung: str
    answers: int
    ended: int
    equal: int
    equal_keys: float


def wrong_in(value: Any) -> str:
    """What of a value breaks SCHEMA; empty: nothing."""
    if not isinstance(value, dict) or set(value) != set(SCHEMA["required"]):
        return "its keys"
    checks = {
        "name": isinstance(value["name"], str) and len(value["name"]) <= 12,
        "kind": value["kind"] in KINDS,
        "count": type(value["count"]) is int and 0 <= value["count"] <= 999,
        "is_old": type(value["is_old"]) is bool,
        "parts": isinstance(value["parts"], list)
        and len(value["parts"]) <= 2
        and all(isinstance(part, str) and len(part) <= 8 for part in value["parts"]),
    }
    return ", ".join(key for key, holds in checks.items() if not holds)


def _answers(args: argparse.Namespace, options: dict[str, Any]) -> list[Any]:
    """A value for each prompt, None where the answer was cut off."""
    values = []
    with mobile_gguf.load(
        args.model, ram_budget=args.budget, n_ctx=512, vram_budget="off", threads=args.threads, **options
    ) as model:
        for prompt in PROMPTS[: args.prompts]:
            reply = model.generate(prompt, json_schema=SCHEMA, temperature=0.0, max_tokens=args.tokens)
            if reply.finish_reason != "stop":
                values.append(None)
                continue
            value = json.loads(reply.text)
            if wrong := wrong_in(value):
                raise MobileError(f"{options}: {reply.text!r:.200} breaks the schema: {wrong}")
            values.append(value)
    return values


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All rungs against exact. Raises MobileError, ValueError for an answer that is no JSON."""
    exact = _answers(args, {})
    found = []
    for name, options in RUNGS.items():
        values = _answers(args, options)
        both = [(a, b) for a, b in zip(exact, values, strict=True) if a is not None and b is not None]
        keys = [a[key] == b[key] for a, b in both for key in a]
        ended = sum(value is not None for value in values)
        equal = sum(a == b for a, b in both)
        found.append(Compared(name, len(values), ended, equal, sum(keys) / len(keys) if keys else 0.0))
        print(f"{name}: {ended} of {len(values)} ended and hold, {equal} equal", file=sys.stderr, flush=True)
    return {"model": args.model.name, "budget": args.budget, "rows": [asdict(row) for row in found]}


def page_of(record: dict[str, Any]) -> str:
    """A line for each rung."""
    heads = ("rung", "answers", "ended, all valid", "equal to exact", "equal keys")
    rows = [
        (
            row["rung"],
            str(row["answers"]),
            str(row["ended"]),
            str(row["equal"]),
            f"{100 * row['equal_keys']:.0f}%",
        )
        for row in record["rows"]
    ]
    about = f"{record['model']}, budget {record['budget']}, greedy"
    return "\n".join([about, "", *markdown_table([heads, *rows]), ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mobile_gguf.bench.schema_loss", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--budget", default="25%", help="for experts, as --ram-budget")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=120, help="of an answer at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for schema_loss.json and schema_loss.md")
    args = parser.parse_args(argv)
    return record_measured("schema_loss", argv, lambda: measure(args), page_of, args.out)


if __name__ == "__main__":
    raise SystemExit(main())
