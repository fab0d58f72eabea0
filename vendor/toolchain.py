"""The build tools of this machine: found, checked before minutes are spent, and named in the key."""

import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mobile_gguf.errors import EngineBuildError

from . import process

CMAKE_MINIMUM = (3, 21)  # of llama-cpp-python's CMakeLists.txt

# in the order in which CMake itself looks for them
C_COMPILERS = ("cc", "gcc", "clang")
CXX_COMPILERS = ("c++", "g++", "clang++")

# the flags that -march=native turns on: a library built with one crashes on a machine without it.
# the kernel's flag list holds many others (mitigations, power management) that change with the kernel
_X86_ISA = re.compile(
    r"^(sse|ssse|avx|amx|fma|f16c|bmi|popcnt|aes|vaes|pclmul|vpclmul|gfni|sha|adx|movbe|lzcnt|abm|cx16|xop|xsave)"
)


@dataclass(frozen=True)
class Toolchain:
    """Absolute paths of the tools that a build calls; "" where CMake finds the tool by other means."""

    cmake: str
    make: str  # ninja or make
    generator: str  # CMake's name for it
    c_compiler: str
    cxx_compiler: str
    compiler_version: str


def search_path(environ: Mapping[str, str] = os.environ) -> str:
    """PATH with this Python's script directory behind it, where ``pip install cmake ninja`` puts them."""
    return os.pathsep.join([environ.get("PATH", ""), sysconfig.get_path("scripts")])


def find_toolchain(environ: Mapping[str, str] = os.environ) -> Toolchain:
    """The tools for a build.

    Raises:
        EngineBuildError: a tool is missing or too old; the text names it and how to get it.
    """
    path = search_path(environ)
    if shutil.which("git", path=path) is None:
        raise EngineBuildError(f"git was not found (it applies the patches): {_how_to_install('git')}")
    c_compiler, cxx_compiler = find_compilers(environ)
    if sys.platform != "win32" and not (c_compiler and cxx_compiler):
        wanted = "C compiler" if not c_compiler else "C++17 compiler"
        package = {"linux": "build-essential", "darwin": "xcode"}.get(sys.platform, "gcc")
        raise EngineBuildError(f"no {wanted} was found: {_how_to_install(package)}, or set CC and CXX")
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise EngineBuildError(f"cmake was not found: {_how_to_install('cmake')}, or `pip install cmake`")
    _check_cmake(cmake)
    make, generator = _find_make(path)
    return Toolchain(cmake, make, generator, c_compiler, cxx_compiler, compiler_version(environ))


def find_compilers(environ: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """The C and C++ compiler that CMake will take: ``CC`` and ``CXX`` first; "" for one that is missing."""
    path = search_path(environ)

    def find(variable: str, names: tuple[str, ...]) -> str:
        chosen = environ.get(variable, "").split()
        candidates = tuple(chosen[:1]) or names
        return next((found for name in candidates if (found := shutil.which(name, path=path))), "")

    return find("CC", C_COMPILERS), find("CXX", CXX_COMPILERS)


def compiler_version(environ: Mapping[str, str] = os.environ) -> str:
    """First line of what each compiler says about itself; part of the key."""
    found = [compiler for compiler in find_compilers(environ) if compiler]
    said = [process.capture([compiler, "--version"]).partition("\n")[0] for compiler in found]
    return "; ".join(said) or "none"


def _check_cmake(cmake: str) -> None:
    found = re.search(r"version (\d+)\.(\d+)", process.capture([cmake, "--version"]))
    if not found:
        raise EngineBuildError(f"`{cmake} --version` fails: repair it, or `pip install cmake` and remove it")
    if (int(found[1]), int(found[2])) < CMAKE_MINIMUM:
        wanted = ".".join(map(str, CMAKE_MINIMUM))
        raise EngineBuildError(
            f"{cmake} is version {found[1]}.{found[2]} and {wanted} is needed: "
            f"`pip install cmake` brings one that comes first if you put its directory first in PATH"
        )


def _find_make(path: str) -> tuple[str, str]:
    for names, generator in ((("ninja", "ninja-build"), "Ninja"), (("make", "gmake"), "Unix Makefiles")):
        for name in names:
            if found := shutil.which(name, path=path):
                return found, generator
    raise EngineBuildError(
        f"neither ninja nor make was found: {_how_to_install('ninja-build')}, or `pip install ninja`"
    )


def _how_to_install(package: str) -> str:
    if sys.platform == "darwin":
        brew = {"xcode": "`xcode-select --install`", "ninja-build": "`brew install ninja`"}
        return "install it with " + brew.get(package, f"`brew install {package}`")
    if shutil.which("apt-get"):
        return f"install it with `apt-get install {package}`"
    if shutil.which("dnf"):
        return f"install it with `dnf install {'gcc-c++' if package == 'build-essential' else package}`"
    return f"install {package} with your system's package manager"


def cuda_compiler(environ: Mapping[str, str] = os.environ) -> str:
    """nvcc, also where it is not on PATH but where NVIDIA's installer puts it; "" if there is none."""
    chosen = environ.get("CUDACXX", "")
    home = environ.get("CUDA_PATH") or environ.get("CUDA_HOME") or "/usr/local/cuda"
    beside = str(Path(home) / "bin" / "nvcc")
    return shutil.which(chosen or "nvcc", path=search_path(environ)) or shutil.which(beside) or ""


def find_cublas(environ: Mapping[str, str] = os.environ) -> tuple[Path | None, Path | None]:
    """(cuBLAS of the CUDA toolkit or the system, cuBLAS of pip's package in this environment); Linux only.

    A toolkit may come without it; then the wheel ``nvidia-cublas`` of the same major version serves, whose
    library has no name that CMake would find.
    """
    nvcc = cuda_compiler(environ)
    if not nvcc:
        return None, None
    root = Path(nvcc).resolve().parents[1]
    folders = [
        root / "lib64",
        root / "lib",
        *root.glob("targets/*/lib"),
        *Path("/usr/lib").glob("*-linux-gnu"),
    ]
    own = next((path for folder in folders for path in folder.glob("libcublas.so*")), None)
    release = re.search(r"release (\d+)\.", process.capture([nvcc, "--version"]))
    major = release[1] if release else ""
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia"
    names = (f"{name}/lib/libcublas.so.{major}" for name in (f"cu{major}", "cublas"))
    return own, next((wheels / name for name in names if (wheels / name).is_file()), None)


def cuda_arguments(environ: Mapping[str, str] = os.environ) -> list[str]:
    """CMake arguments that point to pip's cuBLAS where the CUDA toolkit has none; else nothing."""
    if sys.platform != "linux" or _names_cublas(environ):
        return []
    own, wheel = find_cublas(environ)
    if own or not wheel:
        return []
    folder, major = wheel.parent, wheel.name.rpartition(".")[2]
    flags = f"{environ.get('CUDAFLAGS', '')} -I{folder.parent / 'include'}".strip()
    return [
        f"-DCUDA_cublas_LIBRARY={wheel}",
        f"-DCUDA_cublasLt_LIBRARY={folder / f'libcublasLt.so.{major}'}",
        f"-DCMAKE_CUDA_FLAGS={flags}",
        f"-DCMAKE_SHARED_LINKER_FLAGS=-Wl,-rpath,{folder}",
    ]


def _names_cublas(environ: Mapping[str, str]) -> bool:
    return "CUDA_cublas_LIBRARY" in environ.get("CMAKE_ARGS", "")


def check_backend(backend: str, environ: Mapping[str, str] = os.environ) -> None:
    """Look for the toolkit of a backend before the minutes that a build takes.

    Raises:
        EngineBuildError: the toolkit is missing.
    """
    path = search_path(environ)
    if backend == "cuda" and not cuda_compiler(environ):
        raise EngineBuildError(
            "no CUDA compiler (nvcc) was found: install the CUDA toolkit, or set CUDACXX to its nvcc"
        )
    if backend == "cuda" and sys.platform == "linux" and not _names_cublas(environ):
        if not any(find_cublas(environ)):
            raise EngineBuildError(
                "the CUDA toolkit has no cuBLAS: install it (apt: libcublas-dev of the toolkit's version), "
                "or `pip install nvidia-cublas` of the toolkit's version into this Python environment"
            )
    if backend == "vulkan" and shutil.which("glslc", path=path) is None:
        raise EngineBuildError(
            "no shader compiler (glslc) was found: install the Vulkan SDK "
            "(apt: libvulkan-dev glslc spirv-headers)"
        )
    if backend == "hip" and shutil.which("hipcc", path=path + os.pathsep + "/opt/rocm/bin") is None:
        raise EngineBuildError(
            "no HIP compiler (hipcc) was found: install ROCm, or put its bin directory on PATH"
        )
    if backend == "metal" and sys.platform != "darwin":
        raise EngineBuildError(
            f"the metal backend exists on macOS only, not on {platform.system()}: choose another --backend"
        )


def machine_id() -> dict[str, str]:
    """What -march=native depends on: system, architecture and instruction sets."""
    return {"system": sys.platform, "machine": platform.machine(), "isa": _instruction_sets()}


def _instruction_sets(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if sys.platform == "darwin":
        # sysctl lists the features of both Apple and Intel processors below these names
        said = process.capture(["sysctl", "-n", "machdep.cpu.brand_string"])
        return said.strip() or platform.processor()
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    return parse_instruction_sets(text)


def parse_instruction_sets(cpuinfo: str) -> str:
    """Instruction sets of the first processor of a ``/proc/cpuinfo``, sorted."""
    x86 = re.search(r"^flags\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    if x86:
        return " ".join(sorted(flag for flag in x86[1].split() if _X86_ISA.match(flag)))
    arm = re.search(r"^(?:Features|isa)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    return " ".join(sorted(arm[1].split())) if arm else ""
