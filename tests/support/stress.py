"""Builds and runs the stress programs of ``shim/``: the barrier and the expert store, without the engine.

``changes`` plants a fault: a part of a source's text is replaced in a copy, and has to be there once. With
``sanitize`` the program is built for ThreadSanitizer, and a data race ends it; with ``windows`` by mingw-w64,
and Wine runs it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from engine_libs import source_tree
from places import C_SOURCES, SHIM

Changes = Mapping[str, tuple[str, str]]  # by the file's name: what is replaced, and by what

RACE = 66  # exit status after a data race
_STORE = C_SOURCES / "store"
# compiled as one, since most of the time goes into headers; the first is C
_PARTS = {
    "barrier": [C_SOURCES / "ggml" / "ggml-barrier.c", SHIM / "stress_barrier.c"],
    "store": [*sorted(_STORE.glob("mobile-store*.cpp")), C_SOURCES / "mobile-error.cpp"],
    "planted": [SHIM / "planted_reads.cpp", SHIM / "planted_store.cpp"],
    "os": [_STORE / "mobile-os-posix.cpp", _STORE / "mobile-os-win32.cpp"],  # one of them is empty
}
_INCLUDED = {
    "planted": [_STORE / "mobile-os-posix.cpp", _STORE / "mobile-os-win32.cpp"]
}  # by planted_reads.cpp
_PROGRAMS = {
    "barrier_stress": ("barrier",),
    "store_stress": ("barrier", "store", "planted"),
    "store_order": ("barrier", "store", "planted"),
    "os_check": ("os",),
}
LIBRARY = "store_order"  # for ctypes
PATIENCE = 300  # seconds without a step, after which a program says that it hangs
# addresses have more random bits than older runtimes of the sanitizer can do with
_MANY_BITS = 28


def _compilers(windows: bool = False) -> tuple[str, str]:
    # threads as POSIX has them: those of Windows came to the standard library with GCC 13
    names = [f"x86_64-w64-mingw32-{name}-posix" for name in ("gcc", "g++")] if windows else ("cc", "c++")
    c, cpp = map(shutil.which, names)
    if c is None or cpp is None:
        pytest.skip("no compilers for the stress programs")
    return c, cpp


def _includes() -> list[str]:
    llama = source_tree()
    folders = (SHIM, C_SOURCES, C_SOURCES / "ggml", llama / "include", llama / "ggml" / "include")
    return [f"-I{folder}" for folder in folders]


def _names(sources: Sequence[Path]) -> set[str]:
    return {source.name for source in sources}


def _changed(source: Path, changes: Changes, folder: Path) -> Path:
    """A source, or its changed copy."""
    if source.name not in changes:
        return source
    old, new = changes[source.name]
    text = source.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{source.name} has {text.count(old)} times {old!r}"
    copy = folder / source.name
    copy.write_text(text.replace(old, new), encoding="utf-8")
    return copy


def _compile(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def build(
    name: str,
    folder: Path,
    *,
    sanitize: bool = False,
    windows: bool = False,
    changes: Changes | None = None,
    compiled: Path | None = None,
) -> Path:
    """Make a program of ``shim/`` in ``folder``, or the library.

    What was compiled there, or in ``compiled``, is used again where it has no ``changes``.
    """
    c, cpp = _compilers(windows)
    changes = changes or {}
    options = [
        "-O1" if sanitize else "-O0",
        *(["-g"] if sanitize else []),
        "-Wall",
        "-pthread",
        "-fPIC",
        *(["-fsanitize=thread"] if sanitize else []),
        *(["-static", "-D_WIN32_WINNT=0x0A00"] if windows else []),
    ]
    commands = {"c": [c, *options], "cpp": [cpp, "-std=c++17", *options]}
    objects = []
    parts = {part: _PARTS[part] for part in _PROGRAMS[name]} | {name: [SHIM / f"{name}.cpp"]}
    included = [source for part in parts for source in _INCLUDED.get(part, ())]
    known = {name for sources in (*parts.values(), included) for name in _names(sources)}
    assert set(changes) <= known, f"no such source: {set(changes) - known}"
    for source in included:
        if source.name in changes:  # the copy is found first
            (folder / "store").mkdir(exist_ok=True)
            _changed(source, changes, folder / "store")
            commands = {language: [*words, f"-I{folder}"] for language, words in commands.items()}
    for part, sources in parts.items():
        language = sources[0].suffix[1:]
        whole, out = folder / f"{part}-whole.{language}", folder / f"{part}.o"
        objects.append(out)
        touched = changes.keys() & _names([*sources, *_INCLUDED.get(part, ())])
        before = None if compiled is None or touched else compiled / out.name
        if before is not None and before.exists():
            shutil.copyfile(before, out)
        if not out.exists():
            taken = [_changed(source, changes, folder) for source in sources]
            whole.write_text("".join(f'#include "{source}"\n' for source in taken), encoding="utf-8")
            _compile([*commands[language], *_includes(), "-c", whole, "-o", out])
    program = folder / (f"{name}.so" if name == LIBRARY else f"{name}.exe" if windows else name)
    _compile([cpp, *options, *(["-shared"] if name == LIBRARY else []), *objects, "-o", program])
    return program


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a stress program to its end."""
    environment = os.environ | {"TSAN_OPTIONS": f"halt_on_error=1 exitcode={RACE}", "WINEDEBUG": "-all"}
    bits = Path("/proc/sys/vm/mmap_rnd_bits")
    if program.suffix == ".exe":
        prefix = ["wine"]
    elif bits.is_file() and int(bits.read_text()) > _MANY_BITS and (setarch := shutil.which("setarch")):
        prefix = [setarch, "-R"]
    else:
        prefix = []
    return subprocess.run(
        [*prefix, program, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )


def say(what: str, good: bool, started: float, said: str) -> bool:
    """Print what came of a program, and what it said where that is not good."""
    print(f"{what}: {'ok' if good else 'FAILED'} ({time.monotonic() - started:.0f} s)", flush=True)
    if not good:
        print(said, file=sys.stderr)
    return good


# faults for the checks to catch

_WIN32 = "mobile-os-win32.cpp"
ON_WINDOWS: dict[str, list[Changes]] = {
    "os_check": [
        {_WIN32: ("(DWORD) ((offset + n_read) >> 32)", "0")},  # above 4 GiB
        {_WIN32: ("((uintptr_t) addr + page - 1)/page*page", "(uintptr_t) addr/page*page")},
        {_WIN32: ("MEM_RESERVE, PAGE_READWRITE", "MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE")},
        {_WIN32: ("UnmapViewOfFile(base + offset);", "(void) base;")},
        {_WIN32: ("return utf8_of(path);", "return std::string(path.begin(), path.end());")},
    ],
    "barrier_stress": [
        {"ggml-barrier.c": ("WakeAllConditionVariable(&g_come)", "WakeConditionVariable(&g_come)")}
    ],
    "store_stress": [{_WIN32: ("(DWORD) (offset + n_read)", "(DWORD) n_read")}],
}
NEIGHBOURS: Changes = {
    "mobile-os-posix.cpp": ("((uintptr_t) addr + page - 1)/page*page", "(uintptr_t) addr/page*page")
}
LOST: dict[str, Changes] = {
    "one of the sleepers is woken": {
        "ggml-barrier.c": ("FUTEX_WAKE_PRIVATE, INT_MAX", "FUTEX_WAKE_PRIVATE, 1")
    },
    "nobody counts as asleep": {
        "ggml-barrier.c": ("atomic_fetch_add(&g_sleepers, 1)", "atomic_fetch_add(&g_sleepers, 0)")
    },
}
UNORDERED: dict[str, Changes] = {
    "barrier_stress": {"stress_barrier.c": ("    atomic_load(&barrier->n_passed);", "")},
    "store_stress": {
        "mobile-store-pass.cpp": (
            "if (x.piece_state[piece].load(std::memory_order_acquire) == MOBILE_PIECE_READY)",
            "if (x.piece_state[piece].load(std::memory_order_relaxed) == MOBILE_PIECE_READY)",
        )
    },
}
