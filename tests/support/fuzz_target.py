"""What the fuzzer and the property tests run: from a GGUF's first byte to a planned conversion, what a
safetensors file says about itself, and from a schema or a grammar to an answer that follows it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from gguf_samples import N_EXPERT, N_FF, N_LAYER, write_sample
from grammar_walk import byte_table, walk
from schema_samples import SCHEMAS

from mobile_gguf.convert.gguf.file import GgufSource, write_gguf
from mobile_gguf.convert.gguf.layout import FilePlan, plan_mobile, plan_stacked
from mobile_gguf.convert.hf.safetensors_header import read_safetensors_header
from mobile_gguf.errors import MobileError
from mobile_gguf.generate.constraint.making import constraint_of, followable
from mobile_gguf.gguf.info import read_gguf_info

_READ_UP_TO = 1 << 20  # bytes of a planned file that are really read


def samples(folder: Path) -> list[Path]:
    """Files that a corpus starts from: stacked, per-expert, in segments, with calibration."""
    orders = {f"mobile.importance.{n}": np.ones((N_EXPERT, N_FF), np.float32) for n in range(N_LAYER)}
    stacked = write_sample(folder / "stacked.gguf", kind="Q8_0", n_tokens=3, more=orders)
    merged = write_sample(folder / "merged.gguf", kind="F16", n_tokens=3, merged=True, n_ff=8)
    made = [stacked, merged]
    with GgufSource.open(stacked) as source:
        plans = {n: plan_mobile(source, n, order) for n, order in ((1, "natural"), (2, "importance"))}
        for n, plan in plans.items():
            # small alignment makes small files: more of each is worth changing
            made.append(folder / f"segments-{n}.gguf")
            write_gguf(made[-1], plan.kv, plan.tensors, 32)
    return made


def check(path: Path) -> int:
    """Read a file and plan every conversion of it; returns how many plans there were.

    Raises what is not a MobileError, and AssertionError for one of more than a line.
    """
    _is_planned(lambda: read_gguf_info(path))
    planned = 0
    try:
        with GgufSource.open(path) as source:
            for segments, order in ((1, "natural"), (2, "natural"), (2, "importance"), (4, "importance")):
                planned += _is_planned(lambda n=segments, o=order: _consume(plan_mobile(source, n, o)))
            for keep in (True, False):
                planned += _is_planned(lambda k=keep: _consume(plan_stacked(source, keep_mobile=k)))
    except MobileError as error:
        _check_line(error)
    return planned


def _consume(plan: FilePlan) -> None:
    if plan.file_bytes > _READ_UP_TO:
        return
    for entry in (*plan.kv, *plan.tensors):
        if sum(len(chunk) for chunk in entry.data.chunks()) != entry.n_bytes:
            raise AssertionError(f"{entry.name} has another size than planned")


def _is_planned(action: Callable[[], object]) -> bool:
    try:
        action()
    except MobileError as error:
        _check_line(error)
        return False
    return True


def _check_line(error: MobileError) -> None:
    if not str(error).isprintable():
        raise AssertionError(f"more than a line: {error!r}") from error


def safetensors_samples(folder: Path) -> list[Path]:
    """Files that a corpus of safetensors starts from."""
    rng = np.random.default_rng(5)
    tensors = {
        "model.embed_tokens.weight": rng.standard_normal((4, 3)).astype(np.float32),
        "model.layers.0.mlp.experts.0.up_proj.weight": rng.standard_normal((2, 4)).astype(np.float16),
        "model.layers.0.mlp.gate.weight": np.arange(3, dtype=np.int64),
        "scalar": np.array(1, np.uint8),
    }
    made = [folder / "one.safetensors", folder / "none.safetensors"]
    safetensors.numpy.save_file(tensors, made[0], metadata={"format": "pt"})
    safetensors.numpy.save_file({}, made[1])
    return made


def check_safetensors(path: Path) -> int:
    """Read a safetensors header; returns how many tensors were accepted.

    What is accepted, the safetensors package must accept as well, and read the same bytes.
    """
    try:
        found = read_safetensors_header(path)
    except MobileError as error:
        _check_line(error)
        return 0
    raw = path.read_bytes()
    theirs = dict(safetensors.deserialize(raw))
    ours = {tensor.name: raw[tensor.offset : tensor.offset + tensor.n_bytes] for tensor in found}
    if {name: bytes(entry["data"]) for name, entry in theirs.items()} != ours:
        raise AssertionError(f"safetensors reads something else: {sorted(theirs)} and {sorted(ours)}")
    return len(found)


def schema_samples(folder: Path) -> list[Path]:
    """Schemas that a corpus starts from: one of each in the list."""
    return _written(folder, (json.dumps(schema).encode() for schema in SCHEMAS))


def grammar_samples(folder: Path) -> list[Path]:
    """Grammars that a corpus starts from."""
    texts = (
        r'root ::= "{" [ \t\n]* (pair ("," pair)*)? "}"' + '\npair ::= [a-z]+ ":" ([0-9]{1,3} | root)',
        'root ::= (x "=" [0-9]+ "\\n")+ # words\nx ::= y ([-+*/] y)*\ny ::= "(" x ")" | [a-z] [a-z0-9_]*',
        r'root ::= <think> !<think>* <|im_end|> | . [^\x00-\u00ff\U0001F600]{2,} | "" | <[257]>',
    )
    return _written(folder, (text.encode() for text in texts))


def _written(folder: Path, texts: Iterable[bytes]) -> list[Path]:
    made = []
    for number, text in enumerate(texts):
        made.append(folder / f"{number}.txt")
        made[-1].write_bytes(text)
    return made


def check_schema(path: Path) -> int:
    """Make a constraint of a file as a JSON schema and walk along it, then again without what is refused."""
    text = path.read_text(errors="replace")
    made = _is_planned(lambda: walk(constraint_of(byte_table(), None, text), 1, 40))
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        return made
    if isinstance(schema, dict):
        loose, _notes = followable(schema)
        _is_planned(lambda: walk(constraint_of(byte_table(), None, loose), 2, 40))
    return made


def check_grammar(path: Path) -> int:
    """Make a constraint of a file as a grammar and walk along it."""
    text = path.read_text(errors="replace")
    return _is_planned(lambda: walk(constraint_of(byte_table(), text, None), 1, 40))


class Target(NamedTuple):
    """Something to fuzz: where a corpus starts, and what is done with every file."""

    samples: Callable[[Path], list[Path]]
    check: Callable[[Path], int]


TARGETS = {
    "gguf": Target(samples, check),
    "safetensors": Target(safetensors_samples, check_safetensors),
    "schema": Target(schema_samples, check_schema),
    "grammar": Target(grammar_samples, check_grammar),
}
