"""``mobile-gguf embed``: texts as vectors, one text an argument or a line."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

from mobile_gguf.api.embedding import choose_pooling
from mobile_gguf.api.model import Model
from mobile_gguf.errors import MobileError, UsageError, require_unicode
from mobile_gguf.files.atomic import complete_or_absent
from mobile_gguf.flags import OUT_FLAGS, add_arguments, read_text_file
from mobile_gguf.options import LoadOptions
from mobile_gguf.options.words import MEAN, POOLINGS
from mobile_gguf.wording import why

from .chosen import add_chosen_arguments, settle
from .common import load_model, narrate
from .progress import Progress

PLAIN, JSON, JSONL, NPY = FORMATS = ("plain", "json", "jsonl", "npy")
_DESCRIPTION = """Make a vector of length 1 of every text: of each TEXT, else of each line of a file (-f) or
of standard input. They are pooled as the model's file says, or by --pooling (default: mean). plain: a line of
numbers for each text; json: one object; jsonl: an object for each text; npy: numpy's file, float32 [texts,
numbers]."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "embed", help="make vectors of texts", description=_DESCRIPTION, allow_abbrev=False
    )
    add_chosen_arguments(parser)
    parser.add_argument("prompt", metavar="TEXT", nargs="*", help="a text each")
    parser.add_argument("-f", "--file", metavar="FILE", help="texts, a line each")
    parser.add_argument("--format", choices=FORMATS, default=PLAIN, help="what is written (default: plain)")
    parser.add_argument("--pooling", choices=POOLINGS, help="how, where the model's file does not say")
    parser.add_argument(*OUT_FLAGS, dest="out", metavar="FILE", help="write to a file, whole or not at all")
    add_arguments(parser, LoadOptions)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    settle(args)
    texts = read_texts(args)
    if args.format == NPY and args.out is None and sys.stdout.isatty():
        raise UsageError("a terminal cannot show numpy's file: give --out FILE, or redirect the output")
    with load_model(args, keeps_sessions=False) as model:
        pooling = args.pooling or (MEAN if model.pooling is None else None)
        choose_pooling(model.pooling, pooling, model.path.name)
        vectors, n_tokens = _vectors(model, texts, pooling)
        told = {"model": model.info.name or model.path.stem, "pooling": pooling or model.pooling}
    _write(args, _bytes_of(args.format, texts, vectors, n_tokens, told))
    n = len(texts)
    narrate(f"{n} text{'' if n == 1 else 's'}, {sum(n_tokens)} tokens, {len(vectors[0])} numbers each")
    return 0


def read_texts(args: argparse.Namespace) -> list[str]:
    """The texts from where they were given. Raises UsageError if one is empty or none there."""
    if args.prompt and args.prompt != ["-"]:
        if args.file is not None:
            raise UsageError("give texts or --file, not both")
        texts, what = [require_unicode("a text", text) for text in args.prompt], "text"
    elif args.file is not None:
        texts, what = read_text_file(args.file).splitlines(), f"{args.file}, line"
    else:
        said = sys.stdin.read() if sys.stdin is not None else ""
        texts, what = require_unicode("standard input", said).splitlines(), "standard input, line"
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise UsageError(f"{what} {number} is empty: there is nothing to embed")
    if not texts:
        raise UsageError("there is no text: give some, or a line each on standard input")
    return texts


def _vectors(model: Model, texts: list[str], pooling: str | None) -> tuple[list[Any], list[int]]:
    vectors, n_tokens = [], []
    with Progress(sys.stderr) as progress:
        for number, text in enumerate(texts, 1):
            try:
                made = model.embed(text, pooling=pooling)
            except UsageError as error:
                raise type(error)(f"text {number}: {error}") from None
            vectors.append(made.vector)
            n_tokens.append(made.n_tokens)
            if len(texts) > 1:
                progress(f"{number} of {len(texts)} texts", number / len(texts))
    return vectors, n_tokens


def _bytes_of(
    form: str, texts: list[str], vectors: list[Any], n_tokens: list[int], told: dict[str, Any]
) -> bytes:
    """What is written, in one of the formats."""
    import numpy as np

    if form == NPY:
        file = io.BytesIO()
        np.save(file, np.stack(vectors).astype(np.float32))
        return file.getvalue()
    # the shortest decimals that are the same float32
    rows = [[float(str(number)) for number in vector] for vector in vectors]
    if form == PLAIN:
        lines = [" ".join(map(repr, row)) for row in rows]
    elif form == JSON:
        lines = [json.dumps({**told, "tokens": sum(n_tokens), "embeddings": rows})]
    else:
        lines = [
            json.dumps({"text": text, "tokens": n, "embedding": row}, ensure_ascii=False)
            for text, n, row in zip(texts, n_tokens, rows, strict=True)
        ]
    return "".join(f"{line}\n" for line in lines).encode()


def _write(args: argparse.Namespace, data: bytes) -> None:
    if args.out in (None, "-"):
        sys.stdout.flush()
        buffer = getattr(sys.stdout, "buffer", None)
        if buffer is not None:
            buffer.write(data)
            buffer.flush()
        else:
            sys.stdout.write(data.decode())
        return
    path = Path(args.out)
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        with complete_or_absent(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise MobileError(f"cannot write {path}: {why(error)}") from None
