"""``mobile-gguf run``: answer one prompt; without one, on a terminal, chat."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Generator
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from mobile_gguf.api.attached_files import with_files
from mobile_gguf.api.context import of_a_chat
from mobile_gguf.api.last_conversation import LAST
from mobile_gguf.api.messages import as_answer
from mobile_gguf.api.model import Model
from mobile_gguf.errors import UsageError, require_unicode
from mobile_gguf.flags import read_text_file
from mobile_gguf.generate.answer.answer import INTERRUPTED, Chunk
from mobile_gguf.generate.answer.receipt import Receipt

from .batch import add_batch_arguments
from .batch import run as run_batch
from .chosen import settle
from .common import (
    add_continue_argument,
    add_model_arguments,
    add_system_argument,
    conversation_of,
    generate_options,
    go_on,
    load_model,
    show_answer,
    show_receipt,
    tell_if_not_kept,
)

if TYPE_CHECKING:
    from mobile_gguf.plan.known import Comparison

# The state of a shorter conversation is computed as soon as it is written and read.
_LEAST_TOKENS = 256
_DESCRIPTION = """Answer a prompt by the model's chat template, or continue it with --raw. The prompt comes
from the command line, a file (-f) or standard input (also as the word -). Without one, on a terminal, this
is `mobile-gguf chat`. With --continue it goes on with the last conversation. The answer goes to stdout, its
receipt to stderr. In words of the command line @FILE stands for a file's text, \\@ for the character."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "run", help="answer one prompt, or chat", description=_DESCRIPTION, allow_abbrev=False
    )
    add_model_arguments(parser)
    parser.add_argument("prompt", metavar="PROMPT", nargs="*", help="the prompt; its words are joined")
    parser.add_argument("-f", "--file", metavar="FILE", help="read the prompt from a file")
    add_system_argument(parser)
    add_continue_argument(parser)
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it is, without a template")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    add_batch_arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from . import EXIT_INTERRUPTED

    settle(args)
    if args.raw and args.system is not None:
        raise UsageError("--system, or a preset's, has no effect with --raw: put it into the prompt")
    if args.goes_on and (args.raw or args.batch is not None):
        raise UsageError(f"--continue goes on with a chat: leave out {'--raw' if args.raw else '--batch'}")
    if args.batch is not None:
        return run_batch(args)
    if args.out is not None or args.overwrite or args.strict:
        raise UsageError("--out, --overwrite and --strict need --batch FILE")
    prompt = read_prompt(args)
    if prompt is None:
        from .chat import run as chat

        return chat(args)
    conversation = conversation_of(args)
    options = generate_options(args)
    if args.goes_on:
        options = of_a_chat(options)
    with load_model(args) as model:
        go_on(model, args.goes_on, _LEAST_TOKENS)
        # A model without a template was not taught to chat.
        raw = args.raw or (model.info.chat_template is None and args.system is None and not args.goes_on)
        messages = [*conversation.messages, {"role": "user", "content": prompt}]
        heard: list[tuple[str, str]] = []  # words and thoughts
        if args.json:
            reply = model.generate(prompt, **options) if raw else model.chat(messages, **options)
            heard.append((reply.text, reply.reasoning))
            n_tokens, speed = reply.usage["completion_tokens"], reply.timings["predicted_per_second"]
            foreseen = compare(model, reply.receipt, n_tokens, speed)
            plan = None if foreseen is None else foreseen.to_dict()
            print(json.dumps(reply.to_dict() | {"plan": plan}, ensure_ascii=False))
            reason = reply.finish_reason
        else:
            ask = partial(model.stream, prompt) if raw else partial(model.stream_chat, messages)
            last = show_answer(lambda told: _heard(ask(on_prompt=told, **options), heard), sys.stdout)
            foreseen = None
            if last is not None:
                foreseen = compare(model, last.receipt, last.completion_tokens, last.tokens_per_second)
            show_receipt(last, "" if foreseen is None else str(foreseen))
            reason = last.finish_reason if last is not None else INTERRUPTED
        if not raw and (model.sessions is not None or args.goes_on):
            said, thought = map("".join, zip(*heard, strict=True)) if heard else ("", "")
            conversation.turns += [messages[-1], as_answer(said, thought)]
            tell_if_not_kept(conversation, args.goes_on or LAST)
    return EXIT_INTERRUPTED if reason == INTERRUPTED else 0


def compare(model: Model, receipt: Receipt, n_tokens: int, tokens_per_second: float) -> Comparison | None:
    """The prediction beside an answer; None unless this machine was measured before."""
    from mobile_gguf.plan import compare_run

    device = model.stats().get("device")
    return compare_run(model.info, model.options, receipt, n_tokens, tokens_per_second, device)


def _heard(
    chunks: Generator[Chunk, None, None], heard: list[tuple[str, str]]
) -> Generator[Chunk, None, None]:
    """The chunks of an answer, whose words and thoughts are kept."""
    with closing(chunks):
        for chunk in chunks:
            heard.append((chunk.text, chunk.reasoning))
            yield chunk


def read_prompt(args: argparse.Namespace) -> str | None:
    """The prompt from where it was given; None to chat. Raises UsageError if it cannot be had or is empty."""
    if args.file is not None:
        if args.prompt:
            raise UsageError("give a prompt or --file, not both")
        text = read_text_file(args.file)
    elif args.prompt and args.prompt != ["-"]:
        text = with_files(require_unicode("the prompt", " ".join(args.prompt)))
    elif not args.prompt and not args.json and sys.stdin is not None and sys.stdin.isatty():
        return None
    else:
        text = require_unicode("standard input", sys.stdin.read()) if sys.stdin is not None else ""
    if not text.strip():
        raise UsageError("the prompt is empty: give one, or use `mobile-gguf chat`")
    return text
