"""Renders chat templates in a process that may be stopped: a template is a program out of a file.

Run by ``templates.py``; imports nothing of this package, so that it starts quickly. On standard input come
lines of JSON, an ``Order`` and what it is about, which are answered by one line. Jinja's
sandbox keeps a template from the process; the limits that the kernel holds for the process keep it from the
machine: loops, recursion and texts that grow end the child at worst (Windows has no such limits: there it is
ended after a time). The names that templates may use are those of Transformers.

Where the engine has llama.cpp's chat parser (``patches/src/mobile-chat.h``), it is called here too: ``apply``
has it make a prompt, and what an answer to it looks like; ``parse`` has it read an answer.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import signal
import sys
from typing import Any, TypedDict

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

if sys.platform != "win32":
    import resource

# What an order may be answered with beside a text.
REFUSED, FAILED, TOO_LONG = "refused", "failed", "too long"
ENDS = "ends"  # and that the process ends with it
UNKNOWN = "unknown"  # a parser by its key alone, which is not kept any more
_PARSERS_KEPT = 32  # one for each answer that is made


class Order(TypedDict):
    """What to do: ``render``, ``apply`` or ``parse``, within ``cpu_seconds``, and ``memory_bytes`` more than
    are used. ``source`` is a template, or the parser that ``apply`` has made; a parser that was given before
    is known by its ``key``. ``library`` is the engine's."""

    kind: str
    source: str
    key: str
    library: str
    max_characters: int
    cpu_seconds: int
    memory_bytes: int


class _RefusedError(Exception):
    """What a template calls ``raise_exception`` with, or the chat parser says."""


class _GenerationTag(jinja2.ext.Extension):
    """Transformers' ``{% generation %}``, which marks what an assistant said; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> Any:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> None:
    raise _RefusedError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # not Jinja's own, which escapes for HTML
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def make_environment() -> jinja2.Environment:
    """The environment that chat templates expect."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class Templates:
    """Renders; remembers the template that it has compiled last."""

    def __init__(self) -> None:
        self._environment = make_environment()
        self._compiled: tuple[str, jinja2.Template] | None = None

    def render(self, template: str, names: dict[str, Any], max_characters: int) -> dict[str, str]:
        """``{"text": ...}``, or what became of it and why."""
        try:
            if self._compiled is None or self._compiled[0] != template:
                self._compiled = template, self._environment.from_string(template)
            pieces, n = [], 0
            for piece in self._compiled[1].generate(names):
                pieces.append(piece)
                n += len(piece)
                if n > max_characters:
                    return {TOO_LONG: ""}
            return {"text": "".join(pieces)}
        except (_RefusedError, jinja2.TemplateError) as error:
            return {REFUSED: _line(error)}
        except MemoryError:
            raise
        except Exception as error:  # whatever a template may do wrong, Python has an exception for it
            return {FAILED: f"{type(error).__name__}: {_line(error)}"}


class ChatParser:
    """llama.cpp's chat parser in the engine's library; remembers what it has compiled last."""

    def __init__(self, path: str) -> None:
        self.path = path
        folder = os.path.dirname(path)
        if sys.platform == "win32" and folder:
            os.add_dll_directory(folder)
        self._library = ctypes.CDLL(path)
        self._library.mobile_last_error.restype = ctypes.c_char_p
        self._template: tuple[tuple[str, str, str], ctypes.c_void_p] | None = None
        self._parsers: dict[str, ctypes.c_void_p] = {}

    def apply(self, order: Order, given: dict[str, Any]) -> dict[str, Any]:
        """What mobile_chat_apply answers to ``given``: a request, and the texts ``bos`` and ``eos``."""
        wanted = order["source"], given["bos"], given["eos"]
        if self._template is None or self._template[0] != wanted:
            if self._template is not None:
                self._library.mobile_chat_template_free(self._template[1])
                self._template = None
            self._template = wanted, self._make("template", *wanted)
        return self._json("apply", self._template[1], json.dumps(given["request"]).encode())

    def parse(self, order: Order, given: dict[str, Any]) -> dict[str, Any]:
        """The message of ``given["text"]``, which goes on if it ``is_partial``."""
        parser = self._parsers.pop(order["key"], None)
        if parser is None:
            if not order["source"]:
                return {UNKNOWN: ""}
            parser = self._make("parser", order["source"])
            if len(self._parsers) >= _PARSERS_KEPT:
                self._library.mobile_chat_parser_free(self._parsers.pop(next(iter(self._parsers))))
        self._parsers[order["key"]] = parser
        text = given["text"].encode(errors="replace")
        return self._json(
            "parse", parser, text, ctypes.c_size_t(len(text)), ctypes.c_bool(given["is_partial"])
        )

    def _make(self, kind: str, *sources: str) -> ctypes.c_void_p:
        make = self._library[f"mobile_chat_{kind}_init"]
        make.restype = ctypes.c_void_p
        made = make(*(source.encode(errors="replace") for source in sources))
        if not made:
            raise self._failed()
        return ctypes.c_void_p(made)

    def _json(self, name: str, *arguments: Any) -> dict[str, Any]:
        text = ctypes.c_char_p()
        if self._library[f"mobile_chat_{name}"](*arguments, ctypes.byref(text)) != 0:
            raise self._failed()
        made = text.value or b""
        self._library.mobile_chat_text_free(text)
        return json.loads(made.decode(errors="replace"))

    def _failed(self) -> Exception:
        said = (self._library.mobile_last_error() or b"").decode(errors="replace")
        return MemoryError() if said == "out of memory" else _RefusedError(said)


class Worker:
    """Carries out orders."""

    def __init__(self) -> None:
        self._templates = Templates()
        self._parser: ChatParser | None = None

    def prepare(self, order: Order) -> None:
        """Load the engine's library where it is needed: it is not what the limits are for."""
        if order["library"] and (self._parser is None or self._parser.path != order["library"]):
            self._parser = ChatParser(order["library"])

    def do(self, order: Order, given: dict[str, Any]) -> dict[str, Any]:
        """An answer to ``given``, or what became of it and why."""
        if order["kind"] == "render":
            return self._templates.render(order["source"], given, order["max_characters"])
        assert self._parser is not None
        try:
            made = getattr(self._parser, order["kind"])(order, given)
            return {TOO_LONG: ""} if len(made.get("prompt", "")) > order["max_characters"] else made
        except _RefusedError as error:
            return {REFUSED: _line(error)}
        except (ValueError, KeyError) as error:  # what the parser has made is no JSON
            return {FAILED: f"{type(error).__name__}: {_line(error)}"}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _limit(cpu_seconds: int, memory_bytes: int) -> None:
    if sys.platform == "win32":
        return
    spent = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    seconds = int(spent.ru_utime + spent.ru_stime) + 1 + cpu_seconds
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, hard))


def _unlimited() -> None:
    if sys.platform == "win32":
        return
    for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (hard, hard))


def main() -> None:
    """Answer orders until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asks
    if sys.platform != "win32":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    worker = Worker()
    while line := sys.stdin.buffer.readline():
        order: Order = json.loads(line)
        given = json.loads(sys.stdin.buffer.readline())
        encoded = b""
        try:
            worker.prepare(order)
            _limit(order["cpu_seconds"], order["memory_bytes"])
            answer = worker.do(order, given)
            encoded = json.dumps(answer).encode()
        except MemoryError:
            pass  # what was taken is given back behind this
        _unlimited()
        full = not encoded
        if full:
            encoded = json.dumps({FAILED: "it needs too much memory", ENDS: ""}).encode()
        sys.stdout.buffer.write(encoded + b"\n")
        sys.stdout.buffer.flush()
        if full:  # what it took is not all given back: the next order has a new process
            return
