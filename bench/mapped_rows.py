"""Rows of tables beyond memory, mapped or read: ``python -m mobile_gguf.bench.mapped_rows TEXT...``.

Models with n-gram embeddings (Qwen3.8-Flash-Next: 320 million rows) look up rows of a table that llama.cpp
leaves in the file. Is a cache of rows inside the budget, filled by unbuffered reads, worth having beside
the system's page cache? Both look up the same rows under the same memory cap (``mapped_rows.c``), in turn,
round after round: what a token costs once the cache is full (second half of the text), and what each token
of a prompt costs from an empty cache.

The rows are those of a text's bigrams and trigrams, 8 hashes of each, as that model has them. ``--out
FOLDER`` writes the page and its figures.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import statistics
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError
from mobile_gguf.files.paths import cache_dir
from mobile_gguf.memory.cap import create_memory_cgroup
from mobile_gguf.sizes import format_bytes

from .disk import drop_page_cache
from .plan import absolute_bytes
from .record import begin_record, keep_record

_HASHES = 8
_PROMPT_TOKENS = 512
_SLACK_BYTES = 24 << 20  # the process itself
_ARMS = ("map", "read")


def words_of(paths: Sequence[Path]) -> list[str]:
    """Tokens for want of a vocabulary: words, numbers and signs."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    return re.findall(r"\w+|[^\w\s]", text)


def rows_of(words: Sequence[str], n_rows: int) -> list[list[int]]:
    """For each word the rows of its bigram and trigram."""
    rows = []
    for at in range(len(words)):
        of_word = []
        for n_words in (2, 3):
            gram = "\0".join(words[max(0, at - n_words + 1) : at + 1])
            for number in range(_HASHES):
                digest = hashlib.blake2b(f"{n_words} {number} {gram}".encode(), digest_size=8).digest()
                of_word.append(int.from_bytes(digest, "little") % n_rows)
        rows.append(of_word)
    return rows


def _table(size: int) -> Path:
    """A file of that many bytes that are really on the disk."""
    path = cache_dir() / "bench" / f"rows-{size}.bin"
    if path.exists() and path.stat().st_size == size:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    block = os.urandom(4 << 20)
    with partial.open("wb") as stream:
        for start in range(0, size, len(block)):
            stream.write(block[: size - start])
        os.fsync(stream.fileno())
    partial.replace(path)
    return path


def _build(folder: Path) -> Path:
    program = folder / "mapped_rows"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["cc", "-O2", "-pthread", "-o", program, source], check=True)
    return program


def _run(
    program: Path, arm: str, table: Path, batches: list[list[int]], memory: int, args: argparse.Namespace
) -> list[float]:
    """Microseconds of each batch."""
    drop_page_cache(table)
    job = b"".join(struct.pack(f"<{len(rows) + 1}I", len(rows), *rows) for rows in batches)
    command = [program, table, arm, str(args.row_bytes), str(memory), str(args.io_threads)]
    with create_memory_cgroup(memory + _SLACK_BYTES) as group:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        group.attach(child.pid)
        out, _ = child.communicate(job)
        if child.returncode or group.oom_kills():
            raise MobileError(f"{arm} ended with status {child.returncode} under {format_bytes(memory)}")
    return [int(line) / 1e3 for line in out.split()]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each cap."""
    table = _table(absolute_bytes(args.table, "--table"))
    words = words_of(args.text)
    rows = rows_of(words, table.stat().st_size // args.row_bytes)
    prompts = [
        list(chain.from_iterable(rows[at : at + _PROMPT_TOKENS]))
        for at in range(0, len(rows), _PROMPT_TOKENS)
    ]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        program = _build(Path(folder))
        for memory in (absolute_bytes(text, "--memory") for text in args.memory.split(",")):
            found: dict[str, dict[str, list[float]]] = {
                arm: {"token": [], "p99": [], "prompt": []} for arm in _ARMS
            }
            for _round in range(args.rounds):
                for arm in _ARMS:
                    tokens = sorted(_run(program, arm, table, rows, memory, args)[len(rows) // 2 :])
                    found[arm]["token"].append(statistics.fmean(tokens))
                    found[arm]["p99"].append(tokens[len(tokens) * 99 // 100])
                    prompt = _run(program, arm, table, prompts[:2], memory, args)
                    found[arm]["prompt"].append(sum(prompt) / sum(map(len, prompts[:2])) * 2 * _HASHES)
            results.append({"memory": memory, "n_tokens": len(rows), "arms": found})
    return results


def page(result: dict[str, Any]) -> str:
    """The table, as Markdown."""

    def cell(values: Sequence[float]) -> str:
        return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"

    lines = [
        "# Rows of a table beyond memory",
        "",
        f"{result['hardware']}. A table of {result['table']}, rows of {result['row_bytes']} bytes,"
        f" {2 * _HASHES} a token (of {result['caps'][0]['n_tokens']} tokens of text), {result['rounds']}"
        " rounds in turn; microseconds a token, median (range).",
        "",
        "| memory for rows | arm | a token, cache full | 99th percentile | a prompt's token, cache empty |",
        "|---|---|---|---|---|",
    ]
    for cap in result["caps"]:
        for arm, name in (("map", "mapped, page cache"), ("read", "row cache, unbuffered reads")):
            found = cap["arms"][arm]
            cells = " | ".join(cell(found[key]) for key in ("token", "p99", "prompt"))
            lines.append(f"| {format_bytes(cap['memory'])} | {name} | {cells} |")
    return "\n".join([*lines, "", "```", result["command"], "```", ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m mobile_gguf.bench.mapped_rows", description=__doc__)
    parser.add_argument("text", nargs="+", type=Path, help="text whose n-grams are looked up")
    parser.add_argument("--table", default="12GiB", help="size of the table")
    parser.add_argument("--row-bytes", type=int, default=90, help="of a row: 160 values of q4_0")
    parser.add_argument("--memory", default="32MiB,128MiB,512MiB", help="for rows, beside the process")
    parser.add_argument("--io-threads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for rows.json and rows.md")
    args = parser.parse_args(argv)
    result = {
        **begin_record("mapped_rows", argv),
        "table": args.table,
        "row_bytes": args.row_bytes,
        "rounds": args.rounds,
        "caps": measure(args),
    }
    text = page(result)
    keep_record(args.out, "rows", result, text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
