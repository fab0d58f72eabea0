"""Building the engine without compiling it: keys, the source, the cache, and doing only what is missing."""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_source import write_patches, write_sdist

from mobile_gguf.errors import EngineBuildError
from mobile_gguf.files.lock import exclusive
from mobile_gguf.vendor import build, engine, failures, install, source, toolchain
from mobile_gguf.vendor.pin import load_pin
from mobile_gguf.vendor.progress import Progress
from mobile_gguf.vendor.recipe import EngineOptions, Recipe

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")

TOOLS = toolchain.Toolchain("cmake", "ninja", "Ninja", "cc", "c++", "cc 1")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine cache of its own."""
    monkeypatch.setenv("MOBILE_GGUF_ENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(cache: Path, tmp_path: Path) -> tuple[Recipe, Path]:
    """The recipe of the tiny source distribution, and its patches."""
    patches = write_patches(tmp_path / "patches")
    return Recipe.create(write_sdist(cache), EngineOptions(), patches=patches, environ={}), patches


# --- keys


def test_key_depends_on_everything_that_decides_the_library(tiny: tuple[Recipe, Path]) -> None:
    recipe, _ = tiny
    others = {
        "pin": replace(recipe, pin=replace(recipe.pin, sha256="0" * 64)),
        "label": replace(recipe, pin=replace(recipe.pin, local="mobile.2")),
        "backend": replace(recipe, options=EngineOptions(("cuda",))),
        "argument": replace(recipe, options=EngineOptions((), ("-DGGML_AVX2=OFF",))),
        "patch": replace(recipe, patches=(*recipe.patches[:-1], ("0002-hook.patch", "0" * 64))),
        "order": replace(recipe, patches=recipe.patches[::-1]),
        "source": replace(recipe, sources=(("mobile.h", "0" * 64),)),
        "compiler": replace(recipe, compiler="other"),
        "machine": replace(recipe, machine=(("isa", "avx512f"),)),
        "flags": replace(recipe, environment=(("CXXFLAGS", "-O1"),)),
    }
    keys = {name: other.key for name, other in others.items()}
    assert len({recipe.key, *keys.values()}) == len(others) + 1
    # the stock library has neither our patches nor our label
    ours = {"label", "patch", "order", "source"}
    assert {name for name, other in others.items() if other.stock_key == recipe.stock_key} == ours
    fixed = replace(recipe, fixes=(("0001-fix.patch", "0" * 64),))
    assert fixed.stock_key != recipe.stock_key
    # objects are used again when only the source changed: ninja sees to the rest
    assert {name for name, other in others.items() if other.build_key == recipe.build_key} == ours - {"label"}


def test_key_is_read_from_the_files(tiny: tuple[Recipe, Path]) -> None:
    recipe, patches = tiny
    again = Recipe.create(recipe.pin, EngineOptions(), patches=patches, environ={})
    assert again == recipe
    (patches / "src" / "mobile.h").write_text("#define MOBILE_ABI_VERSION 8\n", encoding="utf-8")
    assert Recipe.create(recipe.pin, EngineOptions(), patches=patches, environ={}).key != recipe.key


def test_options_come_from_arguments_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "cuda_arguments", lambda environ: [])  # this machine's
    options = EngineOptions.create(
        ["vulkan", "cpu", "cuda"], cuda_architectures="86;89", environ={"CMAKE_ARGS": "-DA=1 '-DB=x y'"}
    )
    assert options == EngineOptions(
        ("cuda", "vulkan"), ("-DA=1", "-DB=x y", "-DCMAKE_CUDA_ARCHITECTURES=86;89")
    )
    arguments = options.wheel_arguments()
    assert {"-DGGML_RPC=ON", "-DGGML_CUDA=ON", "-DGGML_VULKAN=ON", "-DLLAVA_BUILD=OFF"} <= set(arguments)
    assert arguments[-3:] == list(options.cmake_args)  # the user's win
    assert shlex.split(shlex.join(arguments)) == arguments
    assert "-DGGML_CUDA=ON" in options.stock_arguments()
    assert options.all_backends[0] == "cpu"
    assert set(options.all_backends) >= {"cuda", "rpc", "vulkan"}


def test_instruction_sets_of_a_processor() -> None:
    x86 = (
        "processor\t: 0\nflags\t\t: fpu sse2 avx2 ibrs pti fma bmi2 arat\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    )
    assert toolchain.parse_instruction_sets(x86) == "avx2 bmi2 fma sse2"
    assert toolchain.parse_instruction_sets("Features\t: fp asimd sve\n") == "asimd fp sve"
    assert toolchain.parse_instruction_sets("") == ""


# --- the source


def test_corrupted_source_is_refused(cache: Path) -> None:
    pin = write_sdist(cache)
    path = source.sdist_path(pin)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EngineBuildError, match="hash mismatch") as caught:
        source.unpacked_source(pin)
    assert pin.sha256 in str(caught.value)
    assert str(path) in str(caught.value)
    assert not source.source_path(pin).exists()


def test_unpacked_source_has_no_repository_in_it(cache: Path) -> None:
    unpacked = source.unpacked_source(write_sdist(cache))
    assert not list(unpacked.rglob(".git"))
    assert (unpacked / "vendor/llama.cpp/docs/long.md").is_file()
    source.copy_source(unpacked, cache / "copy")
    assert not (cache / "copy/vendor/llama.cpp/docs").exists()
    assert (cache / "copy/vendor/llama.cpp/src/graph.cpp").is_file()


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package index at a local port where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.usefixtures("no_index")
def test_unreachable_index(cache: Path) -> None:
    pin = load_pin()
    with pytest.raises(EngineBuildError) as caught:
        source.fetch_sdist(pin)
    message = str(caught.value)
    assert message.startswith(f"cannot fetch {pin.package} {pin.version}: {failures.NO_INDEX}")
    assert f"put {pin.sdist} into {cache / 'sdist'}" in message
    assert "\n" not in message
    assert list((cache / "sdist").iterdir()) == []  # nothing half-written


def test_pip_checks_the_hash_before_it_runs_the_source(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = cache / "index"
    pin = write_sdist(index)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index / "sdist"))
    with pytest.raises(
        EngineBuildError, match=f"hash mismatch .expected sha256 {'0' * 64}, got {pin.sha256}"
    ):
        source.fetch_sdist(replace(pin, sha256="0" * 64))


# --- the cache


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    """Replaces pip and the compiler: ``packed(name)`` makes builds write a wheel of that name."""

    def install_fake(name: str, before: Callable[[], None] = lambda: None) -> list[Path]:
        trees: list[Path] = []

        def pip_wheel(recipe: Recipe, tools: Any, tree: Path, out: Path, *_: Any) -> None:
            trees.append(tree)
            (out / name).write_bytes(b"a wheel")
            before()

        monkeypatch.setattr(build, "_pip_wheel", pip_wheel)
        monkeypatch.setattr(build.toolchain, "find_toolchain", lambda: TOOLS)
        return trees

    return install_fake


WHEEL = "tiny-1.2.3+mobile.1-py3-none-any.whl"


def test_build_is_cached_under_its_key(
    tiny: tuple[Recipe, Path], cache: Path, packed: Callable[..., list[Path]]
) -> None:
    recipe, patches = tiny
    trees = packed(WHEEL)
    assert build.cached_wheel(recipe.key) is None
    wheel = build.build_wheel(recipe, patches=patches)
    assert wheel == build.cached_wheel(recipe.key) == cache / "engine" / recipe.key / WHEEL
    manifest = json.loads((wheel.parent / "engine.json").read_text(encoding="utf-8"))
    assert manifest["key"] == recipe.key
    assert manifest["backends"] == recipe.options.all_backends
    assert [patch["name"] for patch in manifest["patches"]] == ["0001-version.patch", "0002-hook.patch"]
    # the wheel carries the same, which is how an installed engine is recognised
    inside = json.loads((trees[0] / "llama_cpp" / build.MARKER).read_text(encoding="utf-8"))
    assert inside == recipe.manifest()
    assert "mobile_hook" in (trees[0] / "vendor/llama.cpp/src/graph.cpp").read_text(encoding="utf-8")


def test_interrupted_build_leaves_nothing_behind(
    tiny: tuple[Recipe, Path], cache: Path, packed: Callable[..., list[Path]]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    packed(WHEEL, before=interrupt)
    with pytest.raises(KeyboardInterrupt):
        build.build_wheel(tiny[0], patches=tiny[1])
    assert build.cached_wheel(tiny[0].key) is None
    assert list((cache / "engine").iterdir()) == []
    assert not list(cache.rglob("tmp-*"))


def test_killed_build_is_cleaned_up_by_the_next(
    tiny: tuple[Recipe, Path], cache: Path, packed: Callable[..., list[Path]]
) -> None:
    (cache / "engine" / "tmp-killed").mkdir(parents=True)
    packed(WHEEL)
    build.build_wheel(tiny[0], patches=tiny[1])
    assert [path.name for path in (cache / "engine").iterdir()] == [tiny[0].key]


def test_wheel_of_another_version_is_refused(
    tiny: tuple[Recipe, Path], packed: Callable[..., list[Path]]
) -> None:
    packed("tiny-1.2.3-py3-none-any.whl")
    with pytest.raises(EngineBuildError, match=r"made tiny-1\.2\.3-py3.* where version 1\.2\.3\+mobile\.1"):
        build.build_wheel(tiny[0], patches=tiny[1])
    assert build.cached_wheel(tiny[0].key) is None


def test_patches_that_change_under_a_build_are_noticed(
    tiny: tuple[Recipe, Path], packed: Callable[..., list[Path]]
) -> None:
    recipe, patches = tiny
    packed(WHEEL)
    (patches / "src" / "mobile.h").write_text("// edited\n", encoding="utf-8")
    with pytest.raises(EngineBuildError, match="changed while the build started"):
        build.build_wheel(recipe, patches=patches)


def test_full_disk_is_seen_before_and_during_a_build(
    tiny: tuple[Recipe, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, patches = tiny
    usage = lambda path: type("Usage", (), {"free": 100_000_000})()  # noqa: E731
    monkeypatch.setattr(build.shutil, "disk_usage", usage)
    with pytest.raises(EngineBuildError, match=r"has 0\.1 GB free and a build takes 0\.7 GB"):
        build.check_space(recipe)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(cache))

    monkeypatch.setattr(build.source, "copy_source", full)
    monkeypatch.setattr(build.toolchain, "find_toolchain", lambda: TOOLS)
    with pytest.raises(EngineBuildError, match="the disk is full"):
        build.build_wheel(recipe, patches=patches)


def test_stock_library_belongs_to_the_installed_engine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = install.Installed(cache, "1", {"key": "k", "stock_key": "s"})
    monkeypatch.setattr(engine, "installed_engine", lambda: found)
    assert engine.stock_lib_dir() is None
    (cache / "engine" / "stock-other" / "lib").mkdir(parents=True)
    assert engine.stock_lib_dir() is None
    (cache / "engine" / "stock-s" / "lib").mkdir(parents=True)
    assert engine.stock_lib_dir() == cache / "engine" / "stock-s" / "lib"


@posix_only
def test_libraries_are_copied_with_their_links(tmp_path: Path) -> None:
    built = tmp_path / "bin"
    built.mkdir()
    (built / "libllama.so.0.5.0").write_bytes(b"library")
    (built / "libllama.so").symlink_to("libllama.so.0.5.0")
    (built / "a-tool").write_bytes(b"program")
    build._copy_libraries(built, tmp_path / "lib")
    assert sorted(path.name for path in (tmp_path / "lib").iterdir()) == ["libllama.so", "libllama.so.0.5.0"]
    assert (tmp_path / "lib" / "libllama.so").is_symlink()


# --- one call that makes the engine ready


class FakeEngine:
    """An environment with an engine in it, and builds that take no time."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache = cache
        self.calls: list[str] = []
        self.installed: install.Installed | None = None
        monkeypatch.setattr(engine, "installed_engine", lambda: self.installed)
        monkeypatch.setattr(engine, "missing_dependencies", lambda: [])
        monkeypatch.setattr(engine, "install_wheel", self.install)
        monkeypatch.setattr(build, "build_wheel", self.build_wheel)
        monkeypatch.setattr(build, "build_stock", self.build_stock)
        monkeypatch.setattr(build, "check_space", lambda recipe: None)

    def build_wheel(self, recipe: Recipe, **_: Any) -> Path:
        self.calls.append(f"build {','.join(recipe.options.backends) or 'cpu'}")
        entry = build.engine_dir(recipe.key)
        entry.mkdir(parents=True)
        (entry / "x.whl").write_text(json.dumps(recipe.manifest()), encoding="utf-8")
        return entry / "x.whl"

    def build_stock(self, recipe: Recipe, **_: Any) -> Path:
        self.calls.append("stock")
        directory = build.stock_dir(recipe.stock_key) / "lib"
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def install(self, wheel: Path, **_: Any) -> None:
        self.calls.append("install")
        (self.cache / "site" / "lib").mkdir(parents=True, exist_ok=True)
        (self.cache / "site" / "lib" / "libllama.so").touch()
        manifest = json.loads(wheel.read_text(encoding="utf-8"))
        self.installed = install.Installed(self.cache / "site", manifest["version"], manifest)

    def take_calls(self) -> list[str]:
        taken, self.calls = self.calls, []
        return taken


@pytest.fixture
def fake_engine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    return FakeEngine(cache, monkeypatch)


def test_only_what_is_missing_is_done(fake_engine: FakeEngine) -> None:
    engine.ensure_engine()
    assert fake_engine.take_calls() == ["build cpu", "install"]
    engine.ensure_engine()
    assert fake_engine.take_calls() == []
    engine.ensure_engine(stock=True)
    assert fake_engine.take_calls() == ["stock"]
    engine.ensure_engine(stock=True)
    assert fake_engine.take_calls() == []
    fake_engine.installed = None  # another virtual environment
    engine.ensure_engine()
    assert fake_engine.take_calls() == ["install"]
    engine.ensure_engine(force=True)
    assert fake_engine.take_calls() == ["build cpu", "install"]


def test_options_of_the_installed_engine_are_kept(fake_engine: FakeEngine) -> None:
    engine.ensure_engine(EngineOptions(("cuda",), ("-DA=1",)))
    assert fake_engine.take_calls() == ["build cuda", "install"]
    engine.ensure_engine()
    assert fake_engine.take_calls() == []
    engine.ensure_engine(EngineOptions())
    assert fake_engine.take_calls() == ["build cpu", "install"]


def test_stock_llama_cpp_python_is_replaced(fake_engine: FakeEngine) -> None:
    fake_engine.installed = install.Installed(fake_engine.cache, "0.3.36", None)
    assert engine.ensure_engine().version == load_pin().engine_version
    assert fake_engine.take_calls() == ["build cpu", "install"]


def test_second_build_waits_and_then_finds_the_first(fake_engine: FakeEngine, cache: Path) -> None:
    waits = threading.Event()

    def progress(step: Progress) -> None:
        if step.stage.startswith("waiting"):
            waits.set()

    done: list[install.Installed] = []
    second = threading.Thread(target=lambda: done.append(engine.ensure_engine(progress=progress)))
    with exclusive(cache / "engine" / "lock"):
        second.start()
        assert waits.wait(300)
        recipe = Recipe.create(load_pin(), EngineOptions())
        fake_engine.install(fake_engine.build_wheel(recipe))
        fake_engine.take_calls()
    second.join(300)
    assert len(done) == 1
    assert fake_engine.take_calls() == []


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOBILE_GGUF_ENGINE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(engine, "installed_engine", lambda: None)
    with pytest.raises(EngineBuildError, match=r"cannot use .*file.*point XDG_CACHE_HOME"):
        engine.ensure_engine()
