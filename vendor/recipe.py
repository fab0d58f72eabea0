"""What is built: backends and CMake options, and the key that names the result."""

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import patchset, portable, toolchain
from .pin import Pin

BACKENDS = {"cpu": "", "cuda": "GGML_CUDA", "vulkan": "GGML_VULKAN", "hip": "GGML_HIP", "metal": "GGML_METAL"}

# compilers and linkers read these, so they are part of the key
_COMPILER_VARIABLES = (
    "CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "HIPCXX", "HIPFLAGS"
)  # fmt: skip

_COMMON = ("-DGGML_RPC=ON", "-DGGML_NATIVE=ON", "-DLLAMA_BUILD_COMMON=OFF", "-DLLAMA_OPENSSL=OFF")

# the wheel is built from llama-cpp-python's CMakeLists.txt, which adds mtmd by an option of its own
_WHEEL_ONLY = ("-DLLAVA_BUILD=OFF",)

# the stock library is built from llama.cpp's, where everything is on by default
_STOCK_ONLY = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    f"-DCMAKE_INSTALL_RPATH={'@loader_path' if sys.platform == 'darwin' else '$ORIGIN'}",
)


@dataclass(frozen=True)
class EngineOptions:
    """Backends beside cpu and rpc, which are always in, and CMake arguments of the user's own."""

    backends: tuple[str, ...] = ()
    cmake_args: tuple[str, ...] = ()
    target: str = ""  # one of portable.TARGETS: for any processor of it; "": for this machine's

    @classmethod
    def create(
        cls,
        backends: Sequence[str] = (),
        *,
        cuda_architectures: str | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> "EngineOptions":
        """Options from a command line and the environment (``CMAKE_ARGS``)."""
        extra = shlex.split(environ.get("CMAKE_ARGS", ""))
        if cuda_architectures:
            extra.append(f"-DCMAKE_CUDA_ARCHITECTURES={cuda_architectures}")
        if "cuda" in backends:
            extra += toolchain.cuda_arguments(environ)
        return cls(tuple(sorted(set(backends) - {"cpu"})), tuple(extra))

    @property
    def all_backends(self) -> list[str]:
        """For people: every backend of the build, cpu first."""
        built = {*self.backends, *(["metal"] if sys.platform == "darwin" else [])}
        return ["cpu", *sorted(built), "rpc"]

    def wheel_arguments(self) -> list[str]:
        """CMake arguments of the patched wheel; the user's come last, where they win."""
        portably = portable.cmake_arguments(self.target, self.backends) if self.target else []
        return [*_COMMON, *_WHEEL_ONLY, *portably, *self._backend_arguments(), *self.cmake_args]

    def stock_arguments(self) -> list[str]:
        """CMake arguments of the unpatched library: the same compile options."""
        return [*_COMMON, *_STOCK_ONLY, *self._backend_arguments(), *self.cmake_args]

    def _backend_arguments(self) -> list[str]:
        return [f"-D{BACKENDS[name]}=ON" for name in self.backends]


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the built library is. Independent of the Python version."""

    pin: Pin
    options: EngineOptions
    patches: tuple[tuple[str, str], ...]  # (name, sha256) in series order
    sources: tuple[tuple[str, str], ...]  # (name, sha256)
    compiler: str
    machine: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...]
    fixes: tuple[tuple[str, str], ...] = ()  # those of `patches` that the stock library gets too

    @classmethod
    def create(
        cls,
        pin: Pin,
        options: EngineOptions,
        *,
        patches: Path | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> "Recipe":
        """The recipe for this machine, from the patch set in ``patches`` (default: the package's own)."""
        directory = patches or patchset.patches_dir()
        series = patchset.read_series(directory)
        target = options.target
        return cls(
            pin=pin,
            options=options,
            patches=tuple((patch.name, patch.sha256) for patch in series),
            sources=tuple(
                (name, _file_digest(path)) for name, path in patchset.read_sources(directory).items()
            ),
            compiler=portable.compiler_version() if target else toolchain.compiler_version(environ),
            machine=(("target", target),) if target else tuple(sorted(toolchain.machine_id().items())),
            environment=tuple(
                (name, environ[name])
                for name in _COMPILER_VARIABLES
                if environ.get(name) and not (target and name in portable.SET_VARIABLES)
            ),
            fixes=tuple((patch.name, patch.sha256) for patch in series if patch.is_fix),
        )

    @property
    def build_key(self) -> str:
        """Names a build directory: what a compiled object depends on, but for the patched source."""
        return _digest({**self._platform(), "arguments": self.options.wheel_arguments()})

    @property
    def key(self) -> str:
        """Names the patched engine: a hash of pin, patches, sources, options, machine and compiler."""
        return _digest(
            {
                **self._platform(),
                "arguments": self.options.wheel_arguments(),
                "patches": self.patches,
                "sources": self.sources,
            }
        )

    @property
    def stock_key(self) -> str:
        """Names the stock library for the same options, machine and compiler."""
        pin = {**asdict(self.pin), "local": ""}  # the label of our wheel says nothing about upstream
        arguments = self.options.stock_arguments()
        return _digest({**self._platform(), "pin": pin, "arguments": arguments, "fixes": self.fixes})

    def _platform(self) -> dict[str, Any]:
        return {
            "pin": asdict(self.pin),
            "compiler": self.compiler,
            "machine": self.machine,
            "environment": self.environment,
        }

    def manifest(self) -> dict[str, Any]:
        """The recipe as JSON: ``engine.json`` in the cache and ``_mobile_engine.json`` in the wheel."""
        return {
            "key": self.key,
            "stock_key": self.stock_key,
            "version": self.pin.engine_version,
            "pin": asdict(self.pin),
            "backends": self.options.all_backends,
            "options": {
                "backends": list(self.options.backends),
                "cmake_args": list(self.options.cmake_args),
                "target": self.options.target,
            },
            "patches": [{"name": name, "sha256": digest} for name, digest in self.patches],
            "sources": [{"name": name, "sha256": digest} for name, digest in self.sources],
            "compiler": self.compiler,
            "machine": dict(self.machine),
        }
