"""Any engine's own command as an arm: under the same cap, on the same file, its speed as it prints it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
from dataclasses import dataclass

from mobile_gguf.errors import UsageError
from mobile_gguf.memory.cap import CgroupError, MemoryCgroup
from mobile_gguf.wording import why

# what llama.cpp's commands and those made from them print when they end
DEFAULT_PATTERN = (
    r"(?s)prompt eval time =.*?(?P<prompt>[\d.]+) tokens per second.*?[^t] eval time =.*?(?P<decode>[\d.]+) "
    r"tokens per second"
)
_TAIL = 400


@dataclass(frozen=True)
class OtherCommand:
    """A command with {model}, {prompt}, {tokens} and the like in it, and the pattern of its tokens/s.

    The speed is the pattern's group ``decode``, or its first; a group ``prompt`` is the prompt's. Of several
    matches the last counts. Make one by ``parse_other``.
    """

    words: tuple[str, ...]
    pattern: str
    number: int = 1  # of those that are compared

    @property
    def name(self) -> str:
        return f"command {self.number}"

    @property
    def text(self) -> str:
        return shlex.join(self.words)


@dataclass(frozen=True)
class OtherResult:
    """What one run gave; ``error`` says why nothing else does."""

    tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    output: str = ""
    error: str = ""


def parse_other(command: str, pattern: str, number: int = 1) -> OtherCommand:
    """Raises UsageError for a command or a pattern that cannot work."""
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise UsageError(f"--vs-command {command!r}: {error}") from None
    if not words:
        raise UsageError("--vs-command is empty")
    if not any("{model}" in word for word in words):
        raise UsageError(f"--vs-command {command!r} has no {{model}} in it: which file would it run?")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--vs-pattern {pattern!r}: {error}") from None
    if compiled.groups == 0:
        raise UsageError(f"--vs-pattern {pattern!r} has no group (...) around the tokens/s")
    other = OtherCommand(words, pattern, number)
    fill(other, dict.fromkeys(PLACES, ""))
    return other


PLACES = ("model", "prompt", "tokens", "threads", "budget_bytes", "budget_mib", "cap_bytes")


def fill(other: OtherCommand, values: dict[str, str]) -> list[str]:
    """The words with values in their places. Raises UsageError naming a place that is unknown."""
    try:
        return [word.format_map(values) for word in other.words]
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise UsageError(
            f"--vs-command {other.text!r}: {error}; it may hold "
            f"{', '.join(f'{{{name}}}' for name in PLACES)}, and {{{{ }}}} for braces of its own"
        ) from None


def run_other(
    other: OtherCommand, values: dict[str, str], group: MemoryCgroup | None, limit_s: float
) -> OtherResult:
    """Run it once, in ``group``, for at most ``limit_s`` seconds; it is killed after them."""
    words = fill(other, values)
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        return OtherResult(error=f"cannot run {words[0]}: {why(error)}")
    if group is not None:
        with contextlib.suppress(CgroupError):
            group.attach(process.pid)
    raw: bytes | None = None
    try:
        raw, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # with all that it started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if raw is None:
        process.communicate()
        return OtherResult(error=f"stopped: not done after {limit_s:g} s")
    output = raw.decode("utf-8", errors="replace")
    if process.returncode != 0:
        tail = " ".join(output.split())[-_TAIL:]
        return OtherResult(
            output=output, error=f"ended with status {process.returncode}{': ' + tail if tail else ''}"
        )
    return read_speed(other.pattern, output)


def read_speed(pattern: str, output: str) -> OtherResult:
    """The speeds that ``output`` states."""
    matches = list(re.finditer(pattern, output))
    if not matches:
        return OtherResult(output=output, error=f"printed nothing that --vs-pattern {pattern!r} matches")
    found = matches[-1]
    named = found.groupdict()
    try:
        decode = float(named["decode"] if "decode" in named else found.group(1))
        prompt = float(named["prompt"]) if named.get("prompt") is not None else None
    except (TypeError, ValueError):
        return OtherResult(
            output=output, error=f"--vs-pattern {pattern!r} matches {found.groups()}, no number"
        )
    if not decode > 0:
        return OtherResult(output=output, error=f"says {decode:g} tokens/s")
    return OtherResult(decode, prompt, output)
