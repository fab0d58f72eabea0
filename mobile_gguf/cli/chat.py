"""``mobile-gguf chat``: the screen, or with ``--plain`` a chat line by line."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

from mobile_gguf.api.attached_files import files_like, with_files
from mobile_gguf.api.context import way_out
from mobile_gguf.api.conversation import Conversation
from mobile_gguf.api.model import Model
from mobile_gguf.api.stats import running_facts, stats_lines
from mobile_gguf.errors import MobileError, PromptTooLongError, UsageError, require_unicode
from mobile_gguf.files.paths import data_dir
from mobile_gguf.files.running import CHAT, announced
from mobile_gguf.flags import given, parse_setting
from mobile_gguf.generate.answer.answer import Chunk
from mobile_gguf.options import POLICY_OPTIONS, GenerateOptions, LoadOptions, declared

from .attached import add_attach_arguments, server_of
from .chosen import settle
from .common import (
    MORE_CONTEXT,
    add_continue_argument,
    add_model_arguments,
    add_system_argument,
    configured,
    conversation_of,
    generate_options,
    go_on,
    load_model,
    load_options,
    narrate,
    show_answer,
    show_receipt,
    tell_if_not_kept,
)

if TYPE_CHECKING:
    from mobile_gguf.remote.connection import Server
    from mobile_gguf.remote.model import RemoteModel

PROMPT = ">>> "
# These belong to the model, which refuses at once what it cannot do.
_OF_MODEL = ("mode", "gamma", "little_k")

_COMMANDS = ("/help", "/clear", "/system", "/set", "/stats", "/exit")

HELP = """/help               this text
/clear, /new        forget the conversation
/system [TEXT]      set the system message; without TEXT show it, `/system none` removes it
/set [NAME VALUE]   set an option of the answers, as in /set temp 0.2; without a name show them
/stats              what the model and its expert store did so far
@FILE               in a question: the file's text in its place; Tab completes it, \\@ is the character
/exit               leave, as does Ctrl-D; Ctrl-C ends an answer"""


_DESCRIPTION = """Chat with a model: on a screen with its experts (F1 shows the keys), or line by line with
--plain, which is also what runs when standard input or output is no terminal. Without MODEL the screen
lets you pick one. With --attach the model is one that a server has. /help lists the commands."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "chat",
        help="chat with a model",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    add_model_arguments(parser, optional=True)
    parser.add_argument("--plain", action="store_true", help="chat line by line, without a screen")
    add_attach_arguments(parser)
    add_system_argument(parser)
    add_continue_argument(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    settle(args, optional=True)
    server = server_of(args)
    if server is not None:
        _refuse_loading(args)
    if not getattr(args, "plain", False) and _is_terminal():
        return _run_screen(args, server)
    if server is not None:
        return _run_attached(args, server)
    if args.model is None:
        raise UsageError("the plain chat needs a MODEL: give one, as in `mobile-gguf chat demo`")
    return _run_plain(args)


def _refuse_loading(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that only a load follows: a server has loaded its model."""
    of_answers = {*POLICY_OPTIONS, *declared(GenerateOptions)}
    for name in given(args, LoadOptions):
        if name not in of_answers:
            flag = declared(LoadOptions)[name].flags[-1]
            raise UsageError(f"{flag} is for loading a model, and the server of --attach has loaded its own")


def _is_terminal() -> bool:
    streams = (sys.stdin, sys.stdout)
    return os.environ.get("TERM") != "dumb" and all(stream and stream.isatty() for stream in streams)


def _run_screen(args: argparse.Namespace, server: Server | None) -> int:
    from mobile_gguf.tui import Launch, run_tui

    flags = given(args, LoadOptions) | given(args, GenerateOptions)
    reference = args.model or (server.url if server is not None else "")
    found, goes_on = configured(args), args.goes_on or ""
    return run_tui(Launch(reference, flags, args.system or "", found, goes_on, server))


def _run_attached(args: argparse.Namespace, server: Server) -> int:
    """The plain chat with a server's model."""
    from mobile_gguf.remote.model import attach

    interactive = sys.stdin.isatty()
    options = generate_options(args)
    conversation = conversation_of(args)
    with attach(server, args.model) as model, _history(interactive) as save_line:
        if interactive:
            narrate(f"{model.name} at {server.url}; /help for commands, Ctrl-D to leave")
        policy = {name: value for name, value in load_options(args).items() if name in POLICY_OPTIONS}
        if policy:
            model.configure(**policy)
        return Repl(model, conversation, options, args.goes_on or "").run(_reader(interactive, save_line))


def _reader(interactive: bool, save_line: Callable[[], None]) -> Callable[[], str]:
    def read_line() -> str:
        line = input(PROMPT if interactive else "")
        save_line()
        return line

    return read_line


def _run_plain(args: argparse.Namespace) -> int:
    interactive = sys.stdin.isatty()
    options = generate_options(args)
    conversation = conversation_of(args)
    with load_model(args) as model, _history(interactive) as save_line, announced(CHAT, _facts_of(model)):
        if interactive:
            narrate(f"{model.info.name} ({model.mode}); /help for commands, Ctrl-D to leave")
            if conversation.turns:
                narrate(f"going on with {len(conversation.turns)} messages; /clear begins again")
        go_on(model, args.goes_on)
        repl = Repl(model, conversation, options, args.goes_on or "")
        return repl.run(_reader(interactive, save_line))


def _facts_of(model: Model) -> Callable[[], dict[str, Any]]:
    said = {"model": model.info.name or model.path.stem, "since": time.time()}
    return lambda: said | running_facts(model)


class Repl:
    """Reads lines, answers them, obeys commands; one conversation with one model."""

    def __init__(
        self, model: Model | RemoteModel, conversation: Conversation, options: dict[str, Any], name: str = ""
    ) -> None:
        self.model = model
        self.name = name
        self.conversation = conversation
        self.options = options
        self._usual, self._loaded = dict(options), model.options  # what `/set NAME default` goes back to
        self.last: Chunk | None = None
        self._told = ""  # why the conversation is not kept
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/clear": self._clear,
            "/new": self._clear,  # as on the screen
            "/system": self._system,
            "/set": self._set,
            "/stats": self._stats,
        }

    def run(self, read_line: Callable[[], str]) -> int:
        """Serve lines from ``read_line`` until it raises EOFError or /exit comes; returns the exit code."""
        while True:
            try:
                line = require_unicode("that line", read_line().strip())
            except EOFError:
                if sys.stdin.isatty():
                    print(file=sys.stderr)
                return 0
            except KeyboardInterrupt:
                narrate("\nCtrl-D or /exit to leave")
                continue
            except UsageError as error:
                narrate(str(error))
                continue
            if line in ("/exit", "/quit", "/bye"):
                return 0
            try:
                self.serve(line)
            except MobileError as error:
                from . import print_error

                print_error(error)
                if isinstance(error, PromptTooLongError):
                    narrate(way_out(self.options, MORE_CONTEXT, "/clear"))

    def serve(self, line: str) -> None:
        """Answer one line or obey it."""
        if not line:
            return
        if not line.startswith("/"):
            line = with_files(line)
            self.last = show_answer(
                lambda told: self.conversation.ask(
                    cast("Model", self.model), line, on_prompt=told, **self.options
                ),
                sys.stdout,
            )
            if self.model.sessions is not None or self.name:
                self._told = tell_if_not_kept(self.conversation, self.name, self._told)
            show_receipt(self.last, way_out=f"/clear begins again, {MORE_CONTEXT}")
            return
        name, _, rest = line.partition(" ")
        command = self._commands.get(name)
        if command is None:
            narrate(f"unknown command {name}; /help lists the commands")
        else:
            command(rest.strip())

    def _help(self, _rest: str) -> None:
        narrate(HELP)

    def _clear(self, _rest: str) -> None:
        self.conversation.clear()
        narrate("conversation cleared")

    def _system(self, rest: str) -> None:
        if rest:
            self.conversation.system = "" if rest.lower() == "none" else rest
        narrate(f"system message: {self.conversation.system or 'none'}")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if value.strip():
            name, parsed = parse_setting(name, value.strip(), GenerateOptions)
            is_default = value.strip().lower() in ("none", "default")
            if name in _OF_MODEL:
                usual = getattr(self._loaded, name)
                self.model.configure(**{name: usual if is_default else parsed})
            elif is_default:
                self.options.pop(name, None)
                if name in self._usual:
                    self.options[name] = self._usual[name]
            else:
                self.options[name] = parsed
            narrate(f"{name} = {self._settings()[name]}")
        elif name:
            known, _ = parse_setting(name, "default", GenerateOptions)
            narrate(f"{known} = {self._settings()[known]}")
        else:
            narrate("\n".join(f"{name} = {value}" for name, value in self._settings().items()))

    def _settings(self) -> dict[str, Any]:
        own = {name: getattr(self.model, name) for name in _OF_MODEL}
        seed = {"seed": self.model.options.seed}
        return vars(self.model.defaults) | seed | self.options | own

    def _stats(self, _rest: str) -> None:
        facts = self.model.stats()
        if self.last is not None:
            facts |= {"mode": self.last.receipt.mode, "little_k": self.last.receipt.little_k}
        narrate("\n".join(stats_lines(facts)))


@contextlib.contextmanager
def _history(interactive: bool) -> Iterator[Callable[[], None]]:
    """Line editing with a history kept in the data directory; nothing without a terminal.

    Gives what saves the line that was read last: at once, because the terminal may die, and behind what
    another chat has saved meanwhile.
    """
    readline = _readline() if interactive else None
    if readline is None:
        yield lambda: None
        return
    file = data_dir() / "chat_history"
    words = [*_COMMANDS, *declared(GenerateOptions)]
    readline.set_completer(_completer(words))
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
    readline.set_history_length(1000)
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    n_saved = readline.get_current_history_length()

    def save() -> None:
        nonlocal n_saved
        n_lines = readline.get_current_history_length()
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(0o600)
            readline.append_history_file(n_lines - n_saved, file)
        n_saved = n_lines

    yield save


def _readline() -> Any:
    """The standard library's readline; None where there is none, as on Windows."""
    try:
        return importlib.import_module("readline")
    except ImportError:
        return None


def _completer(words: list[str]) -> Callable[[str, int], str | None]:
    """Completes commands, names of options, and files behind an @."""

    def complete(text: str, state: int) -> str | None:
        if text.startswith("@"):
            # a name with a blank is several words for readline, and is left alone
            found = [f"@{name}" for name in files_like(text[1:]) if " " not in name]
        else:
            found = [word for word in words if word.startswith(text)]
        return found[state] if state < len(found) else None

    return complete
