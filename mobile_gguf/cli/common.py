"""What the verbs that load a model share: arguments, loading with progress, showing an answer."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any, TextIO

from mobile_gguf.api.conversation import Conversation
from mobile_gguf.api.last_conversation import LAST, checked_name, recall, remember
from mobile_gguf.api.model import Model, load
from mobile_gguf.api.session_cache import with_sessions
from mobile_gguf.config import Default, Preset, read_defaults, values_of
from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.files.atomic import WriterBusyError
from mobile_gguf.flags import add_arguments, given, text_argument
from mobile_gguf.generate.answer.answer import INTERRUPTED, Chunk
from mobile_gguf.memory.split import split_line
from mobile_gguf.options import GenerateOptions, LoadOptions, declared

from .chosen import add_chosen_arguments
from .progress import Progress, PromptProgress

# What to do when the context is full.
MORE_CONTEXT = "-c makes it larger"


def add_model_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """MODEL, a preset, and the flags of loading and generating; a flag of both belongs to loading."""
    add_chosen_arguments(parser, optional=optional)
    add_arguments(parser, LoadOptions)
    add_arguments(parser, GenerateOptions, skip=declared(LoadOptions))


def add_system_argument(parser: argparse.ArgumentParser) -> None:
    """The flag of the system message."""
    read = text_argument("the system message")
    parser.add_argument("-sys", "--system", metavar="TEXT", type=read, help="system message")


def add_continue_argument(parser: argparse.ArgumentParser) -> None:
    """The flag of going on with what was said last, or under a name."""
    action = parser.add_argument(
        "--continue",
        dest="goes_on",
        nargs="?",
        const=LAST,
        metavar="NAME",
        type=_conversation_name,
        help="go on with the last conversation; --continue=NAME with that of a name, or begin it",
    )
    # a model or a prompt that follows is none
    vars(action)["stands_alone"] = True
    vars(action)["completes"] = "conversations"


def _conversation_name(text: str) -> str:
    try:
        return checked_name(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def conversation_of(args: argparse.Namespace) -> Conversation:
    """What ``--continue`` goes on with, else a new one; ``--system`` counts for both.

    ``args.goes_on`` is its name afterwards. Raises UsageError if it cannot be read.
    """
    known = None
    if args.goes_on:
        asked = args.goes_on
        known, args.goes_on = recall(asked)
        if known is None:
            which = "no earlier conversation" if asked == LAST else f"no conversation {asked}"
            narrate(f"there is {which}: this one begins")
    conversation = known or Conversation()
    if args.system is not None:
        conversation.system = args.system
    return conversation


def go_on(model: Model, goes_on: str | None, least_tokens: int = 0) -> None:
    """Have prompts continue what is on disk only where that was asked for: else each start computes alike.

    What is shorter than ``least_tokens`` is not written then.
    """
    if model.sessions is not None and not goes_on:
        model.sessions.finds = False
        model.sessions.least_tokens = max(model.sessions.least_tokens, least_tokens)


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of loading that were given by flags, else by a preset, the environment or the file."""
    return values_of(configured(args), LoadOptions) | given(args, LoadOptions)


def generate_options(args: argparse.Namespace) -> dict[str, Any]:
    """The same of answering."""
    of_both = declared(LoadOptions)
    flags = {name: value for name, value in given(args, GenerateOptions).items() if name not in of_both}
    return values_of(configured(args), GenerateOptions) | flags


def configured(args: argparse.Namespace) -> dict[str, Default]:
    """What the preset, the environment and the configuration file say for this verb. Raises UsageError."""
    from . import VERBS

    preset: Preset | None = getattr(args, "found_preset", None)
    return read_defaults(args.verb, VERBS) | (preset.options if preset is not None else {})


def load_model(args: argparse.Namespace, *, keeps_sessions: bool = True, **usual: Any) -> Model:
    """Load what the arguments say, showing progress on stderr; ``keeps_sessions``: on disk, by default.

    ``usual``: defaults of the options here.
    """
    options = {**usual, **load_options(args)}
    if keeps_sessions:
        options = with_sessions(options)
    with Progress(sys.stderr) as progress:
        progress.show(f"loading {args.model}")
        model = load(args.model, progress=progress, **options)
    if not model.options.memory.is_auto and model.fit is not None:
        narrate(split_line(model.fit))
    return model


def show_answer(
    answer: Callable[[PromptProgress], Generator[Chunk, None, None]], out: TextIO
) -> Chunk | None:
    """Write an answer as it comes; returns its last chunk, None if there was none.

    ``answer`` begins it, with what is to be told how far its prompt is. Ctrl-C, wherever it strikes, ends the
    answer and keeps the text. What the model thinks goes to stderr, if somebody is looking there.
    """
    last: Chunk | None = None
    text = thought = ""
    with PromptProgress(sys.stderr) as progress:
        chunks = answer(progress)
        try:
            for chunk in chunks:
                progress.wipe()
                last = chunk
                if chunk.reasoning and sys.stderr.isatty():
                    thought = chunk.reasoning
                    sys.stderr.write(thought)
                    sys.stderr.flush()
                if chunk.text:
                    if thought:
                        sys.stderr.write("\n" if thought.endswith("\n") else "\n\n")
                        sys.stderr.flush()
                        thought = ""
                    text = chunk.text
                    out.write(text)
                    out.flush()
        except KeyboardInterrupt:
            chunks.close()
            if last is not None:
                last = replace(last, finish_reason=INTERRUPTED)
        finally:
            if text and not text.endswith("\n"):
                out.write("\n")
                out.flush()
    return last


def show_receipt(chunk: Chunk | None, more: str = "", *, way_out: str = MORE_CONTEXT) -> None:
    """Write an answer's receipt to stderr, as one line, with ``more`` at its end.

    ``way_out`` is what helps an answer that the end of the context cut.
    """
    if chunk is None:
        return
    ends = [more] if more else []
    if chunk.finish_reason == INTERRUPTED:
        ends.append("interrupted")
    if chunk.receipt.context_full:
        ends.append(f"cut: the context of {chunk.prompt_tokens + chunk.completion_tokens} is full; {way_out}")
    narrate(" | ".join([chunk.receipt.summary(chunk.tokens_per_second), *ends]))


def require_terminal() -> None:
    """Raise UsageError where nobody can be asked whether something shall be removed."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask on: give --yes to remove without asking")


def confirmed(question: str) -> bool:
    """Whether a person on the terminal says yes."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        return False


def tell_if_not_kept(conversation: Conversation, name: str, told: str = "") -> str:
    """Keep a conversation for --continue; say why that was not done, once, and return it to be ``told``."""
    try:
        remember(conversation, name)
    except WriterBusyError as error:
        if name in ("", LAST):
            return told  # who writes at this moment has the last one
        said = str(error)
    except MobileError as error:
        said = str(error)
    else:
        return ""
    if said != told:
        narrate(f"this conversation is not kept for --continue: {said}")
    return said


def narrate(text: str) -> None:
    """Write a line to stderr, dim on a terminal that can."""
    dim = sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    print(f"\033[2m{text}\033[0m" if dim else text, file=sys.stderr, flush=True)
