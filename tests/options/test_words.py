"""The words are said once: the engine's numbers, the defaults and what others offer follow them."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from places import C_SOURCES, ROOT

from mobile_gguf.cli import bench
from mobile_gguf.engine import binding, loss, prefetch, structs
from mobile_gguf.engine.device_calls import DeviceCalls
from mobile_gguf.generate.passes.decode import Policy
from mobile_gguf.options import DEFAULT_GAMMA, LoadOptions, declared, defaults, words


@pytest.mark.parametrize(
    ("numbers", "offered"),
    [
        (binding.EVICTION, words.EVICTION),
        (binding.IO, words.IO),
        (structs.MISS, words.MISS),
        # a model is on the host where nothing was placed; nobody asks for that by a placement
        (structs.PLACEMENT, (words.HOST, *words.PLACEMENTS[1:])),
        (prefetch.PREFETCH, words.PREFETCH),
        # a control of experiments, which nobody is offered
        (structs.SUBSTITUTE, (*words.SUBSTITUTE, loss.RANDOM)),
    ],
    ids=["eviction", "io", "miss", "placement", "prefetch", "substitute"],
)
def test_the_engine_has_a_number_for_every_word(numbers: dict[str, int], offered: tuple[str, ...]) -> None:
    assert set(numbers) == set(offered)
    assert len(set(numbers.values())) == len(numbers)


def test_the_options_offer_the_words() -> None:
    choices = {name: opt.choices for name, opt in declared(LoadOptions).items() if opt.choices}
    assert choices == {
        "miss": words.MISS,
        "placement": words.PLACEMENTS,
        "prefetch": words.PREFETCH,
        "mode": words.MODES,
        "cache_type_k": words.CACHE_TYPES,
        "cache_type_v": words.CACHE_TYPES,
        "importance": words.IMPORTANCE,
        "io": words.IO,
        "eviction": words.EVICTION,
        "threads_auto": (words.ON, words.OFF),
        "warm": (words.ON, words.OFF),
        "little_correction": (words.OFF, words.ON),
        "little_on_miss": (words.OFF, words.ON),
        "substitute": words.SUBSTITUTE,
        "split": words.SPLIT,
    }
    assert set(bench.MODES) < set(words.MODES)


def test_a_default_is_the_same_wherever_it_is_one() -> None:
    usual = defaults(LoadOptions)
    assert Policy().gamma == usual["gamma"] == DEFAULT_GAMMA
    assert Policy().mode == usual["mode"] == words.EXACT
    load = inspect.signature(binding.Engine.set_load_params).parameters
    assert {name: load[name].default for name in ("eviction", "io")} == {
        name: usual[name] for name in ("eviction", "io")
    }
    start = inspect.signature(DeviceCalls.start).parameters
    assert {name: start[name].default for name in ("eviction", "miss")} == {
        name: usual[name] for name in ("eviction", "miss")
    }


def test_the_engine_reads_with_as_many_threads_as_is_said() -> None:
    sources = "\n".join(path.read_text() for path in C_SOURCES.rglob("*.cpp"))
    assert re.findall(r"params\.n_io_threads = (\d+);", sources) == [str(words.DEFAULT_IO_THREADS)]
    assert f"(default: {words.DEFAULT_IO_THREADS})" in declared(LoadOptions)["io_threads"].help


def _defaults_in(path: Path) -> dict[str, set[Any]]:
    """The constants that names get in a file, as a default of a parameter, a field or a module's own."""
    found: dict[str, set[Any]] = {}

    def note(name: str, value: ast.expr | None) -> None:
        if isinstance(value, ast.Constant):
            found.setdefault(name.lower(), set()).add(value.value)

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            note(node.target.id, node.value)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            note(node.targets[0].id, node.value)
        elif isinstance(node, ast.arguments):
            named = [*node.posonlyargs, *node.args]
            for argument, value in zip(named[len(named) - len(node.defaults) :], node.defaults, strict=True):
                note(argument.arg, value)
            for argument, value in zip(node.kwonlyargs, node.kw_defaults, strict=True):
                note(argument.arg, value)
    return found


def _said_again(names: set[str], folders: tuple[Path, ...]) -> set[str]:
    own = ROOT / "mobile_gguf" / "options"
    return {
        f"{path.name}: {name} = {value!r}"
        for folder in folders
        for path in folder.rglob("*.py")
        if own not in path.parents and any(name in path.read_text(encoding="utf-8").lower() for name in names)
        for name, values in _defaults_in(path).items()
        for value in values
        if name in names and value not in (None, "", 0)
    }


NAMES = {"gamma", "default_gamma", "eviction", "policy", "io_threads", "default_io_threads"}


def test_nobody_has_a_default_of_his_own() -> None:
    folders = tuple(ROOT / name for name in ("mobile_gguf", "convert", "tui", "bench"))
    assert _said_again(NAMES, folders) == set()


def test_a_default_of_ones_own_is_found(tmp_path: Path) -> None:
    file = tmp_path / "planted.py"
    file.write_text(
        "def f(*, gamma: float = 0.7, eviction='decay'): ...\nclass P:\n    io_threads: int = 4\n"
    )
    assert _said_again(NAMES, (tmp_path,)) == {
        "planted.py: gamma = 0.7", "planted.py: eviction = 'decay'", "planted.py: io_threads = 4",
    }  # fmt: skip
