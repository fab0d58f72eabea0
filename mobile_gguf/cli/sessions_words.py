"""``sessions show`` and ``export``: what was said, and what is known of a state that is kept."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mobile_gguf.api.conversation import Conversation
from mobile_gguf.api.last_conversation import LAST, conversation_names, conversation_path, recall
from mobile_gguf.errors import UsageError
from mobile_gguf.files.atomic import replacing_file
from mobile_gguf.flags import OUT_FLAGS
from mobile_gguf.wording import plain

from .common import narrate


def add_name_argument(parser: argparse.ArgumentParser) -> None:
    """NAME, of a conversation."""
    name = parser.add_argument("name", metavar="NAME", help="that of the list, or last")
    vars(name)["completes"] = "sessions"


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of an export."""
    add_name_argument(parser)
    parser.add_argument(*OUT_FLAGS, dest="out", metavar="FILE", help="where to; standard output without it")
    parser.add_argument("--json", action="store_true", help="OpenAI's messages instead of Markdown")


def known_names() -> list[str]:
    """The conversations whose words are kept: the last one, and those with a name."""
    last = [LAST] if conversation_path(LAST).exists() else []
    return [*last, *conversation_names()]


def words_of(name: str) -> Conversation:
    """The conversation of a name. Raises UsageError if there is none."""
    conversation = recall(name)[0] if name in known_names() else None
    if conversation is None:
        known = ", ".join(known_names()) or "none yet"
        raise UsageError(f"no words are kept under the name {plain(name)}: there are {known}")
    return conversation


def export(args: argparse.Namespace) -> int:
    """Write a conversation as Markdown or JSON."""
    conversation = words_of(args.name)
    if args.json:
        text = json.dumps({"messages": conversation.messages}, ensure_ascii=False, indent=2) + "\n"
    else:
        text = markdown_of(conversation)
    if args.out in (None, "-"):
        sys.stdout.write(text)
        return 0
    data = text.encode("utf-8")
    with replacing_file(Path(args.out), len(data)) as file:
        file.write(data)
    narrate(f"written {args.out}")
    return 0


def markdown_of(conversation: Conversation) -> str:
    """A conversation as Markdown, the speaker before each message."""
    parts = [f"**{message['role']}**\n\n{message['content'] or ''}" for message in conversation.messages]
    return "\n\n".join(parts) + "\n"
