"""Renders chat templates in a process that may be stopped: a template is a program out of a file.

Run by ``templates.py``; imports nothing of this package, so that it starts quickly. On standard input come
lines of JSON, an ``Order`` and the names that its template may use, which are answered by one line. Jinja's
sandbox keeps a template from the process; the limits that the kernel holds for the process keep it from the
machine: loops, recursion and texts that grow end the child at worst (Windows has no such limits: there it is
ended after a time). The names that templates may use are those of Transformers.
"""

from __future__ import annotations

import datetime
import json
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


class Order(TypedDict):
    """A rendering: at most ``max_characters``, ``cpu_seconds``, and ``memory_bytes`` more than are used."""

    template: str
    max_characters: int
    cpu_seconds: int
    memory_bytes: int


class _GenerationTag(jinja2.ext.Extension):
    """Transformers' ``{% generation %}``, which marks what an assistant said; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> Any:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _RefusedError(Exception):
    """What a template calls ``raise_exception`` with."""


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
    templates = Templates()
    while line := sys.stdin.buffer.readline():
        order: Order = json.loads(line)
        names = json.loads(sys.stdin.buffer.readline())
        encoded = b""
        try:
            _limit(order["cpu_seconds"], order["memory_bytes"])
            answer = templates.render(order["template"], names, order["max_characters"])
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
