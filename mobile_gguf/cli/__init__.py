"""The ``mobile-gguf`` command: verbs, exit codes, and every error as one line.

stdout is the answer, stderr the narration. Exit codes: 0 ok, 1 failure, 2 usage, 3 model not
found, 4 engine, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from mobile_gguf.config import VERBS
from mobile_gguf.errors import EngineError, MobileError, missing_package
from mobile_gguf.wording import why

from .parser import EXIT_USAGE, PROGRAM, Parser, finish, is_option, parser_named, print_error_object
from .progress import erase
from .streams import prepare_streams

EXIT_FAILURE, EXIT_INTERRUPTED = 1, 130

_EXAMPLES = """examples:
  mobile-gguf run demo "Why is the sky blue?"
  mobile-gguf run model.gguf --ram-budget 40% --mode big-little --json "..."
  mobile-gguf chat model.gguf --ram-budget 6G
  mobile-gguf show demo
  mobile-gguf convert model.gguf
"""


def make_parser(verbs: Sequence[str] = VERBS) -> Parser:
    """The whole command line, or that of some verbs alone: only their modules are imported."""
    parser = Parser(
        prog=PROGRAM,
        description="Run Mixture-of-Experts models that do not fit, under a memory budget.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"{PROGRAM} {_version()}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for verb in verbs:
        importlib.import_module(f"{__name__}.{verb}").register(subparsers)
    finish(subparsers)
    return parser


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; words of a prompt may also follow after options."""
    args, rest = parser.parse_known_args(argv)
    # argparse gives a list of words only the first run of them.
    options = rest[: rest.index("--")] if "--" in rest else rest
    if rest and (not hasattr(args, "prompt") or any(map(is_option, options))):
        parser_named(parser, args).refuse_words(rest)
    if rest:
        args.prompt += [word for word in rest if word != "--"]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    prepare_streams()
    errors, args = sys.stderr, argparse.Namespace()
    with _Notes(errors):
        try:
            words = [*(sys.argv[1:] if argv is None else argv)]  # `list` is a verb here
            parser = make_parser((words[0],) if words and words[0] in VERBS else VERBS)
            args = parse(parser, words)
            if args.verb is None:
                if not (sys.stdin and sys.stdin.isatty() and sys.stdout and sys.stdout.isatty()):
                    parser.print_help(sys.stderr)
                    return EXIT_USAGE
                # On a terminal the program alone is its chat, which lets one pick a model.
                args = parse(parser, ["chat"])
            with _quiet() if args.quiet else contextlib.nullcontext():
                code = args.func(args)
            sys.stdout.flush()
            return code
        except MobileError as error:
            return _failed(error, args, errors)
        except ImportError as error:
            missing = missing_package(error)
            if missing is None:
                raise
            return _failed(EngineError(missing), args, errors)
        except KeyboardInterrupt:
            if errors.isatty():
                erase(errors)  # what the terminal wrote of the key
                print(f"{PROGRAM}: interrupted", file=errors)
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            _drop_output()  # whoever read it has gone
            return EXIT_FAILURE
        except OSError as error:
            # A disk or a file that refuses, standard output included, is no fault of the program.
            if error.filename is None:
                _drop_output()
            what = error.filename if error.filename is not None else "standard output"
            return _failed(MobileError(f"{what}: {why(error)}"), args, errors)


def _failed(error: MobileError, args: argparse.Namespace, stream: TextIO) -> int:
    """Say an error as a line, and with --json as an object too; returns the exit code."""
    print_error(error, stream)
    if getattr(args, "json", False) is True:
        print_error_object(type(error).__name__, str(error), error.exit_code)
    return error.exit_code


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of the narration is written; errors and notes are."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def _drop_output() -> None:
    """Standard output goes nowhere: Python would complain again when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_error(error: MobileError, stream: TextIO | None = None) -> None:
    """Write an error as the one line that it is."""
    print(
        f"{PROGRAM}: error: {' '.join((error.command_line or str(error)).split())}", file=stream or sys.stderr
    )


class _NoteHandler(logging.StreamHandler[TextIO]):
    """Writes over a line of progress, where there may be one."""

    def emit(self, record: logging.LogRecord) -> None:
        from mobile_gguf.api.words import with_flags

        erase(self.stream)
        if isinstance(record.msg, str):
            record = copy.copy(record)
            record.msg = with_flags(record.msg)
        super().emit(record)


class _Notes:
    """While the command runs, the package's warnings are notes on stderr."""

    def __init__(self, stream: TextIO) -> None:
        self._handler = _NoteHandler(stream)
        self._handler.setFormatter(logging.Formatter(f"{PROGRAM}: note: %(message)s"))

    def __enter__(self) -> None:
        logging.getLogger("mobile_gguf").addHandler(self._handler)

    def __exit__(self, *_exception: object) -> None:
        logging.getLogger("mobile_gguf").removeHandler(self._handler)


def _version() -> str:
    from mobile_gguf import __version__

    return __version__
