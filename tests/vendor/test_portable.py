"""An engine for any processor: its recipe, and how an installed one is judged. None is compiled here."""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mobile_gguf.engine.binding import bind_backend_function, load_backends
from mobile_gguf.errors import EngineBuildError, EngineError
from mobile_gguf.vendor import build, engine, install, portable, process, toolchain
from mobile_gguf.vendor.install import Installed
from mobile_gguf.vendor.pin import load_pin
from mobile_gguf.vendor.progress import Progress
from mobile_gguf.vendor.recipe import EngineOptions, Recipe

TARGET, OTHER = portable.TARGETS
PORTABLE = EngineOptions(target=TARGET)


@pytest.fixture
def recipe() -> Recipe:
    """The recipe of an engine for any processor."""
    return Recipe.create(load_pin(), PORTABLE, environ={})


def on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "machine_id", lambda: {"system": "linux", "isa": "other"})
    monkeypatch.setattr(toolchain, "compiler_version", lambda environ: "another")
    monkeypatch.setattr(portable, "compiler_version", lambda: "zig of another version")


def test_every_kernel_is_built_and_chosen_at_run_time() -> None:
    arguments = EngineOptions(("vulkan",), ("-DMINE=1",), TARGET).wheel_arguments()
    wanted = {"-DGGML_CPU_ALL_VARIANTS=ON", "-DGGML_BACKEND_DL=ON", "-DGGML_RPC=ON", "-DGGML_VULKAN=ON"}
    assert wanted <= set(arguments)
    # the last one of a name counts, and the user's is the last
    last = dict(argument.split("=", 1) for argument in arguments)
    assert (last["-DGGML_NATIVE"], arguments[-1]) == ("OFF", "-DMINE=1")
    assert "-DGGML_BACKEND_DL=ON" not in EngineOptions().wheel_arguments()


def test_nothing_of_the_machine_that_compiles_is_in_the_key(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(toolchain, "machine_id", lambda: {"system": "linux", "isa": "other"})
        mine = {"CC": "/opt/cc", "CXX": "/opt/c++"}
        assert Recipe.create(recipe.pin, PORTABLE, environ=mine).key == recipe.key
    optimised = Recipe.create(recipe.pin, PORTABLE, environ={"CFLAGS": "-O1"})
    other = Recipe.create(recipe.pin, EngineOptions(target=OTHER), environ={})
    native = Recipe.create(recipe.pin, EngineOptions(), environ={})
    assert len({recipe.key, optimised.key, other.key, native.key}) == 4


def test_tools_are_one_word_each_and_compile_for_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOBILE_GGUF_ENGINE_CACHE", str(tmp_path / "a cache"))
    zig = tmp_path / "a zig"
    zig.write_text('#!/bin/sh\necho "$@"\n', encoding="utf-8")
    zig.chmod(zig.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(portable, "_zig", lambda: str(zig))
    made = portable.environment(OTHER)
    for variable, tool in (("CC", "cc"), ("CXX", "c++")):
        said = subprocess.run([made[variable], "-c", "a b.c"], capture_output=True, text=True, check=True)
        assert said.stdout == f"{tool} -target aarch64-linux-gnu.2.28 -c a b.c\n"
    # as ggml asks for a kind of processor, and as zig knows it
    for asked, known in (
        ("armv8-a+nosve", "generic+v8a-sve"),
        ("armv8.2-a+dotprod+fp16+sve", "generic+v8_2a+dotprod+fullfp16+sve"),
        ("armv9.2-a+dotprod+fp16+sve+i8mm+sve2+sme", "generic+v9_2a+dotprod+fullfp16+sve+i8mm+sve2+sme"),
    ):
        command = [made["CC"], f"-march={asked}", "-DA=-march=armv8-a", "a b.c"]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        assert said.stdout == f"cc -target aarch64-linux-gnu.2.28 -mcpu={known} -DA=-march=armv8-a a b.c\n"
    assert made["_PYTHON_HOST_PLATFORM"] == "linux-aarch64"
    archiver = next(word for word in portable.cmake_arguments(OTHER) if word.startswith("-DCMAKE_AR="))
    assert os.access(archiver.partition("=")[2], os.X_OK)


CORE = """
VKAPI_ATTR VkResult VKAPI_CALL vkCreateInstance(
VKAPI_ATTR void VKAPI_CALL vkDestroyInstance(VkInstance instance);
#define VK_KHR_surface 1
VKAPI_ATTR void VKAPI_CALL vkDestroySurfaceKHR(
"""


@pytest.fixture
def linker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zig that keeps what it is asked for in the file it returns."""
    zig, asked = tmp_path / "zig", tmp_path / "asked"
    zig.write_text(f'#!/bin/sh\necho "$@" >>{asked}\n', encoding="utf-8")
    zig.chmod(0o755)
    monkeypatch.setenv("MOBILE_GGUF_ENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(portable, "_zig", lambda: str(zig))
    return asked


def vulkan_sdk(folder: Path) -> dict[str, str]:
    for name in ("vulkan", "vk_video", "spirv"):
        (folder / "include" / name).mkdir(parents=True)
    (folder / "include" / "stdio.h").touch()
    (folder / "include" / "vulkan" / "vulkan_core.h").write_text(CORE, encoding="utf-8")
    return {"VULKAN_SDK": str(folder)}


def test_vulkan_is_compiled_with_its_own_headers_and_the_targets_loader(linker: Path, tmp_path: Path) -> None:
    environ = vulkan_sdk(tmp_path / "sdk")
    portable.write_vulkan(OTHER, environ)
    folder = portable.write_vulkan(OTHER, environ)  # once more, over what is there
    include = folder / "include"
    assert {path.name for path in include.iterdir()} == {"vulkan", "vk_video", "spirv"}
    assert (include / "vulkan" / "vulkan_core.h").read_text() == CORE
    loader = (folder / "loader.c").read_text()
    assert loader == "void vkCreateInstance(void) {}\nvoid vkDestroyInstance(void) {}\n"
    last = linker.read_text().splitlines()[-1]
    assert last == (
        f"cc -target aarch64-linux-gnu.2.28 -shared -fPIC -Wl,-soname,libvulkan.so.1 "
        f"-o {folder / 'libvulkan.so'} {folder / 'loader.c'}"
    )
    arguments = portable.cmake_arguments(OTHER, ("vulkan",))
    assert arguments[-2:] == [
        f"-DVulkan_INCLUDE_DIR={include}",
        f"-DVulkan_LIBRARY={folder / 'libvulkan.so'}",
    ]
    assert not [argument for argument in portable.cmake_arguments(OTHER) if "Vulkan" in argument]


def test_vulkan_without_a_part_is_one_line(linker: Path, tmp_path: Path) -> None:
    environ = vulkan_sdk(tmp_path / "sdk")
    linker.with_name("zig").write_text("#!/bin/sh\necho no such target\nexit 1\n", encoding="utf-8")
    with pytest.raises(EngineBuildError, match=r"cannot be linked for .*: no such target; log: "):
        portable.write_vulkan(TARGET, environ)


def test_vulkan_without_headers_is_one_line(
    linker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portable, "_SYSTEM_HEADERS", (str(tmp_path / "none"),))
    with pytest.raises(EngineBuildError, match=r"no headers of Vulkan .* \(vulkan\): .*libvulkan-dev"):
        portable.write_vulkan(TARGET, {})
    (tmp_path / "none" / "include" / "vulkan").mkdir(parents=True)
    with pytest.raises(EngineBuildError, match=r"\(vk_video\)"):
        portable.write_vulkan(TARGET, {})


def test_what_vulkan_needs_is_made_before_anything_is_compiled(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setattr(toolchain, "find_toolchain", lambda *_: "tools")
    monkeypatch.setattr(toolchain, "check_backend", lambda _: None)
    monkeypatch.setattr(portable, "environment", lambda _: {})
    monkeypatch.setattr(portable, "write_vulkan", made.append)
    build._check_tools(recipe)
    assert made == []
    build._check_tools(replace(recipe, options=EngineOptions(("vulkan",), target=TARGET)))
    assert made == [TARGET]


def test_without_zig_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "_zig", lambda: "")
    assert portable.compiler_version() == "none"
    with pytest.raises(EngineBuildError, match="pip install ziglang"):
        portable.environment(TARGET)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (["ModuleNotFoundError: No module named 'auditwheel'"], "pip install auditwheel"),
        (["usage", "auditwheel: error: cannot repair to manylinux_2_28", ""], "cannot repair"),
        ([], "no output"),
    ],
)
def test_a_wheel_that_auditwheel_refuses_is_none(
    said: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "run", lambda *_, **__: (1, said))
    with pytest.raises(EngineBuildError, match=expected):
        portable.check_wheel(tmp_path / "a.whl", TARGET, tmp_path)


def test_a_wheel_is_checked_for_the_processor_that_it_is_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "auditwheel"
    package.mkdir()
    (package / "__init__.py").touch()
    said = "import platform, sys\ndef main(): print(platform.machine(), *sys.argv)\n"
    (package / "main.py").write_text(said, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / f"a-{OTHER}.whl").touch()
    heard: list[str] = []

    def run(command: list[str], **_how: Any) -> tuple[int, list[str]]:
        heard.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return 0, []

    monkeypatch.setattr(process, "run", run)
    portable.check_wheel(tmp_path / "b.whl", OTHER, tmp_path)
    assert heard[0].startswith(f"aarch64 auditwheel repair --plat {OTHER} ")


def test_who_waits_for_another_build_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def held(path: Path, *, on_wait: Any) -> Iterator[None]:
        on_wait()
        yield

    monkeypatch.setenv("MOBILE_GGUF_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(engine, "exclusive", held)
    monkeypatch.setattr(engine.build, "cached_wheel", lambda _: tmp_path / "a.whl")
    monkeypatch.setattr(portable, "check_wheel", lambda wheel, *_: wheel)
    said: list[Progress] = []
    assert engine.make_wheel(TARGET, tmp_path / "dist", progress=said.append) == tmp_path / "a.whl"
    assert [progress.stage for progress in said] == ["waiting for another build to finish"]


# --- an installed one


def installed(recipe: Recipe, folder: Path) -> Installed:
    (folder / "lib").mkdir(exist_ok=True)
    (folder / "lib" / "libllama.so").touch()
    return Installed(folder, recipe.pin.engine_version, recipe.manifest())


def test_an_engine_that_was_compiled_elsewhere_is_the_one_of_its_source(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = installed(recipe, tmp_path)
    on_another_machine(monkeypatch)
    here = Recipe.create(recipe.pin, PORTABLE, environ={})
    assert here.key != recipe.key
    assert found.is_made_from(here)
    assert found.options == PORTABLE
    assert not found.is_made_from(replace(here, sources=(("mobile.h", "0" * 64),)))
    assert not found.is_made_from(replace(here, patches=here.patches[:-1]))


@pytest.mark.parametrize(
    ("options", "force", "changed", "built"),
    [
        (None, False, False, None),
        (None, False, True, EngineOptions()),  # of other patches: this machine compiles its own
        (None, True, False, EngineOptions()),
        (EngineOptions(), False, False, EngineOptions()),  # asked for
    ],
)
def test_an_engine_of_a_wheel_is_kept_until_another_is_wanted(
    options: EngineOptions | None,
    force: bool,
    changed: bool,
    built: EngineOptions | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe.create(load_pin(), PORTABLE)
    found = installed(replace(recipe, sources=()) if changed else recipe, tmp_path)
    made: list[EngineOptions] = []

    def make(recipe: Recipe, *_: Any) -> Installed:
        made.append(recipe.options)
        return found

    monkeypatch.setenv("MOBILE_GGUF_ENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engine, "installed_engine", lambda: found)
    monkeypatch.setattr(engine, "missing_dependencies", lambda: [])
    monkeypatch.setattr(engine, "_make", make)
    on_another_machine(monkeypatch)
    assert engine.ensure_engine(options, force=force) is found
    assert made == ([] if built is None else [built])


def test_instruction_sets_are_those_of_the_one_processor_it_is_for(recipe: Recipe, tmp_path: Path) -> None:
    native = replace(recipe, options=EngineOptions(), machine=(("isa", "avx2"),))
    assert engine._compiled_for(installed(native, tmp_path)) == "avx2"
    assert engine._compiled_for(installed(recipe, tmp_path)) == ""
    assert install.Installed(tmp_path, "0", None).is_made_from(recipe) is False


# --- functions of a backend that is a library of its own


class Registry:
    """What of ggml is asked for a backend's function."""

    def __init__(self, **backends: dict[bytes, Any]) -> None:
        text, address = ctypes.c_char_p, ctypes.c_void_p
        self.names = {number: name.encode() for number, name in enumerate(backends, 1)}
        functions = {number: backends[name.decode()] for number, name in self.names.items()}

        def by_name(name: bytes) -> int:
            return next((number for number, known in self.names.items() if known == name), 0)

        def get(registry: int, name: bytes) -> int:
            function = functions[registry].get(name)
            return ctypes.cast(function, address).value or 0 if function else 0

        self.ggml_backend_reg_by_name = ctypes.CFUNCTYPE(address, text)(by_name)
        self.ggml_backend_reg_get_proc_address = ctypes.CFUNCTYPE(address, address, text)(get)


def test_a_backends_function_is_found_where_it_is_and_missed_in_one_line() -> None:
    double = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(lambda number: 2 * number)
    library = Registry(RPC={b"double": double})
    assert bind_backend_function(library, "RPC", "double", ctypes.c_int, [ctypes.c_int])(4) == 8
    for backend, name in (("RPC", "half"), ("CUDA", "double")):
        with pytest.raises(EngineError, match=f"no {name}"):
            bind_backend_function(library, backend, name, ctypes.c_int, [ctypes.c_int])


def test_backends_are_loaded_once_and_in_silence() -> None:
    """A log that was taken over later stays so."""
    calls: list[str] = []

    class Library:
        def __init__(self, **functions: Any) -> None:
            vars(self).update(functions)

    def asks() -> bool:
        calls.append("load")
        return True

    def log_set(callback: Any, _data: Any) -> None:
        calls.append("log")
        assert callback(2, b"loaded CPU backend", None) is None

    apart = Library(llama_supports_rpc=asks, llama_log_set=log_set)
    load_backends(apart)
    load_backends(apart)
    assert calls == ["log", "load", "load"]
    load_backends(Library(llama_supports_rpc=asks, llama_log_set=log_set, ggml_backend_cpu_init=asks))
    assert len(calls) == 3
