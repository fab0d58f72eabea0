"""The engine for Windows, cross-compiled by mingw-w64, and one for this Linux that it can be held against.

Both CPU backends are compiled for one instruction set, so that they choose the same kernels, and with the
same mathematics (shim/same_math.h): they can be compared bit by bit. What else Linux needs is taken from the
installed engine. They lie in build/windows of the checkout, and only what changed is compiled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine_libs import engine_lib
from places import C_SOURCES, ROOT, SHIM

from mobile_gguf.vendor import patchset, source
from mobile_gguf.vendor.pin import load_pin

HOME = ROOT / "build" / "windows"
_TREE = HOME / "tree"
_LLAMA = _TREE / source.LLAMA_CPP
_OURS = _TREE / source.SOURCES_IN_TREE
_CROSS = "x86_64-w64-mingw32"
# of the compiler: what its programs load
_RUNTIME = ("libstdc++-6.dll", "libgcc_s_seh-1.dll", "libwinpthread-1.dll")

# processors of 2013. ggml's own threads, so that its barrier is ours
_OPTIONS = [
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_RPC=ON", "-DGGML_CCACHE=OFF",
    "-DGGML_NATIVE=OFF", "-DGGML_SSE42=ON", "-DGGML_AVX=ON", "-DGGML_AVX2=ON", "-DGGML_FMA=ON",
    "-DGGML_F16C=ON", "-DGGML_BMI2=ON", "-DGGML_OPENMP=OFF",
    f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={SHIM / 'same_math.cmake'}",
    "-DLLAMA_BUILD_COMMON=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_TOOLS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_APP=OFF",
]  # fmt: skip
_CROSS_OPTIONS = [
    "-DCMAKE_SYSTEM_NAME=Windows", "-DCMAKE_SYSTEM_PROCESSOR=x86_64",
    f"-DCMAKE_C_COMPILER={_CROSS}-gcc-posix", f"-DCMAKE_CXX_COMPILER={_CROSS}-g++-posix",
    f"-DCMAKE_RC_COMPILER={_CROSS}-windres", f"-DCMAKE_FIND_ROOT_PATH=/usr/{_CROSS}",
    "-DCMAKE_FIND_ROOT_PATH_MODE_PROGRAM=NEVER", "-DCMAKE_FIND_ROOT_PATH_MODE_LIBRARY=ONLY",
    "-DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY",
    # ggml-cpu.c names a structure that headers of mingw-w64 10 lack, but for a Windows of 2009
    "-DCMAKE_C_FLAGS=-D_WIN32_WINNT=0x0601",
]  # fmt: skip

_LINUX_OPTIONS = ["-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DCMAKE_INSTALL_RPATH=$ORIGIN"]


@dataclass(frozen=True)
class Engine:
    """One of the two: the runner lies beside the libraries."""

    windows: bool

    @property
    def folder(self) -> Path:
        return HOME / ("windows" if self.windows else "linux")

    @property
    def libraries(self) -> Path:
        return self.folder / ("bin" if self.windows else "run")

    @property
    def runner(self) -> Path:
        return self.libraries / ("engine_job.exe" if self.windows else "engine_job")

    def build(self, jobs: int) -> None:
        """Compile what has changed. Raises CalledProcessError; the output is in log.txt of the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "log.txt").unlink(missing_ok=True)
        if not (self.folder / "build.ninja").exists():
            system = _CROSS_OPTIONS if self.windows else _LINUX_OPTIONS
            self._run("cmake", "-S", _LLAMA, "-B", self.folder, "-G", "Ninja", *_OPTIONS, *system, *_cache())
        targets = ["llama", "ggml-rpc"] if self.windows else ["ggml-cpu"]
        self._run("cmake", "--build", self.folder, "--parallel", str(jobs), "--target", *targets)
        (self._build_for_windows if self.windows else self._build_for_linux)()

    def _build_for_windows(self) -> None:
        compiler = f"{_CROSS}-g++-posix"
        for name in _RUNTIME:
            command = [compiler, f"-print-file-name={name}"]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            shutil.copyfile(found, self.libraries / name)
        self._link(
            compiler, *(self.libraries / name for name in ("libllama.dll", "ggml.dll", "ggml-base.dll"))
        )

    def _build_for_linux(self) -> None:
        shutil.rmtree(self.libraries, ignore_errors=True)
        self.libraries.mkdir()
        for path in engine_lib().glob("lib*.so"):
            shutil.copyfile(path, self.libraries / path.name)
        shutil.copyfile(self.folder / "bin" / "libggml-cpu.so", self.libraries / "libggml-cpu.so")
        # upstream's numbered name leads to the engine's: ggml's registry must be there once
        (self.libraries / "libggml-base.so.0").symlink_to("libggml-base.so")
        taken = [self.libraries / f"lib{name}.so" for name in ("llama", "ggml", "ggml-base", "ggml-cpu")]
        self._link("c++", *taken, "-Wl,-rpath,$ORIGIN")

    def _link(self, compiler: str, *words: str | Path) -> None:
        folders = (C_SOURCES, _LLAMA / "include", _LLAMA / "ggml" / "include")
        includes = [f"-I{folder}" for folder in folders]
        runner = SHIM / "engine_job.cpp"
        self._run(compiler, "-std=c++17", "-O1", "-Wall", runner, *includes, *words, "-o", self.runner)

    def _run(self, *command: str | Path) -> None:
        # git would find the checkout around it, and each commit of ours would be another version of ggml
        environment = source.git_environment(_TREE) | {"CCACHE_NOHASHDIR": "1"}
        with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=True)

    def run(self, job: str, out: Path) -> subprocess.CompletedProcess[str]:
        """Run a job (shim/engine_job.cpp), which saves in ``out``; paths in it are Linux's."""
        out.mkdir(parents=True, exist_ok=True)
        text = out / "job.txt"
        text.write_text(job, encoding="utf-8")
        command = [*(["wine"] if self.windows else []), self.runner, text, out]
        quiet = os.environ | {"WINEDEBUG": "-all"}
        return subprocess.run(command, env=quiet, capture_output=True, encoding="utf-8", check=False)


def _cache() -> list[str]:
    return [f"-DCMAKE_{x}_COMPILER_LAUNCHER=ccache" for x in ("C", "CXX")] if shutil.which("ccache") else []


def update_sources() -> None:
    """The patched source of both, as the checkout has it now: nothing that was planted is left."""
    HOME.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=HOME) as scratch:
        fresh = Path(scratch, "tree")
        source.copy_source(source.unpacked_source(load_pin()), fresh)
        source.patch_tree(fresh, patchset.patches_dir())
        source.sync_tree(fresh, _TREE)


@contextmanager
def planted(engine: Engine, jobs: int, changes: Mapping[str, tuple[str, str]]) -> Iterator[None]:
    """The engine with parts of our sources replaced, by their names below patches/src; then as it was."""
    kept = {name: (_OURS / name).read_text(encoding="utf-8") for name in changes}
    try:
        for name, (old, new) in changes.items():
            assert kept[name].count(old) == 1, f"{name} has {kept[name].count(old)} times {old!r}"
            (_OURS / name).write_text(kept[name].replace(old, new), encoding="utf-8")
        engine.build(jobs)
        yield
    finally:
        for name, text in kept.items():
            (_OURS / name).write_text(text, encoding="utf-8")
        engine.build(jobs)
