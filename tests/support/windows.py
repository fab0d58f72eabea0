"""``make windows``: the engine for Windows, compiled by mingw-w64 and run by Wine.

    windows.py LAYERS SESSIONS MODEL...

The barrier, the store and what it has of the system by themselves; then tiny models on the whole engine, held
against Linux'. Faults are planted in all of them, which must be seen.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import stress
import tiny_models
import windows_build
import windows_engine

from mobile_gguf.demo.build import ensure_demo

IMPATIENT = 5
JOBS = 2

# of the whole engine: each must be seen by one of the comparisons
FAULTS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "a budget that is not kept": {
        "store/mobile-store-slots.cpp": (
            "if (committed + c.slot_bytes <= budget_bytes && take_memory",
            "if (committed + c.slot_bytes <= budget_bytes + 2*c.slot_bytes && take_memory",
        )
    },
    "a read from another place": {
        "store/mobile-os-win32.cpp": ("(DWORD) (offset + n_read)", "(DWORD) (offset + n_read + file.align)")
    },
    "two experts are swapped": {
        "store/mobile-load.cpp": ("weight.offs + e*t->nb[2]", "weight.offs + (e < 2 ? 1 - e : e)*t->nb[2]")
    },
}


def programs(n_layers: int, n_sessions: int, folder: Path) -> bool:
    """The stress programs, each after its planted faults."""
    good = True
    spoilt = folder / "spoilt"
    spoilt.mkdir()
    arguments: dict[str, list[object]] = {
        "os_check": [folder],
        "barrier_stress": [n_layers, 1],
        "store_stress": [n_sessions, 1],
    }
    more: dict[str, list[object]] = {
        "os_check": [],
        "barrier_stress": [],
        "store_stress": [folder / "experts"],
    }
    for program, words in arguments.items():
        made = stress.build(program, folder, windows=True)
        is_stress = program != "os_check"
        for changes in stress.ON_WINDOWS[program]:
            place = Path(tempfile.mkdtemp(dir=spoilt))
            faulty = stress.build(program, place, windows=True, changes=changes, compiled=folder)
            started = time.monotonic()
            patience = [IMPATIENT] if is_stress else []
            done = stress.run(faulty, *words, *patience, *more[program])
            # memory that is gone ends the program in another way
            seen = done.returncode == 1 if is_stress else done.returncode != 0
            good &= stress.say(f"{program}, spoilt", seen, started, f"not seen: {changes}")
        started = time.monotonic()
        patience = [stress.PATIENCE] if is_stress else []
        done = stress.run(made, *words, *patience, *more[program])
        good &= stress.say(program, done.returncode == 0, started, done.stderr)
    return good


def engine(models: list[str], folder: Path) -> bool:
    """The whole engine on both systems."""
    windows, linux = windows_build.Engine(windows=True), windows_build.Engine(windows=False)
    for one in (windows, linux):
        started = time.monotonic()
        one.build(JOBS)
        stress.say(f"{one.runner.name} and its libraries", True, started, "")
    good = True
    for name in models:
        path = tiny_models.path(name)

        def both(path: Path = path, name: str = name) -> str:
            found = windows_engine.generate(windows, path, folder / "windows")
            windows_engine.check_alone(found, name)
            expected = windows_engine.generate(linux, path, folder / "linux")
            return f"{windows_engine.check_alike(found, expected, name)} logits"

        good &= _check(name, both)

    def misfortunes() -> str:
        file = tiny_models.path("mixtral")
        found, expected = (
            windows_engine.misfortunes(one, file, folder / one.folder.name) for one in (windows, linux)
        )
        windows_engine.check_misfortunes(found, expected)
        return ""

    def chats() -> str:
        found, expected = (windows_engine.chats(one, folder / one.folder.name) for one in (windows, linux))
        return f"{windows_engine.check_chats(found, expected)} answers"

    def promises() -> str:
        taken = windows_engine.check_promises(windows, ensure_demo(), folder / "demo")
        return "{} to {} bytes".format(*taken)

    good &= _check("files that are missing, cut or of a strange name", misfortunes)
    good &= _check("chat templates and answers", chats)
    good &= _check("what is promised under a budget", promises)
    for what, changes in FAULTS.items():
        with windows_build.planted(windows, JOBS, changes):
            good &= _check(f"{what}, planted", lambda: _seen(windows, folder / "spoilt-run"))
    return good


def _seen(windows: windows_build.Engine, out: Path) -> str:
    """That a comparison sees what is planted. Raises Differs where none does."""
    try:
        name = "qwen3moe-q4_k"
        windows_engine.check_alone(windows_engine.generate(windows, tiny_models.path(name), out), name)
    except windows_engine.Differs as difference:
        return str(difference)
    raise windows_engine.Differs("it was not seen")


def _check(what: str, check: Callable[[], str]) -> bool:
    started = time.monotonic()
    try:
        found = check()
    except windows_engine.Differs as difference:
        return stress.say(what, False, started, str(difference))
    return stress.say(f"{what}{f' ({found})' if found else ''}", True, started, "")


def main(n_layers: int, n_sessions: int, models: list[str]) -> int:
    """The exit status: 0 if the planted faults were seen and nothing else was."""
    with tempfile.TemporaryDirectory() as name:
        good = programs(n_layers, n_sessions, Path(name))
        windows_build.update_sources()
        good &= engine(models, Path(name))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
