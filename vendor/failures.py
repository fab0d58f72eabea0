"""From the output of a failed tool to one line: what is wrong and what to do."""

import re
from collections.abc import Sequence
from pathlib import Path

_NETWORK = re.compile(
    r"NewConnectionError|Failed to establish a new connection|Connection refused|ConnectTimeout"
    r"|ReadTimeoutError|name resolution|Name or service not known|ProxyError|Cannot connect to proxy"
    r"|SSLError|Could not fetch URL|Network is unreachable|ConnectionResetError|Remote end closed connection"
    r"|HTTP error \d+|\d{3} (?:Client|Server) Error"
)
_NO_MATCH = re.compile(r"No matching distribution found for ([^\s]+)")
_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded|not enough space on the disk")
_KILLED = re.compile(r"Killed signal terminated program|fatal error: Killed|virtual memory exhausted")
# gcc, clang and nvcc; the path may hold a drive letter
_COMPILER_ERROR = re.compile(r"^\s*((?:[A-Za-z]:)?[^:\s][^:]*[:(]\d+[:)].*\b(?:fatal )?error\b.*)$")
_LINKER_ERROR = re.compile(r"^\s*(.*(?:undefined reference to|cannot find -l|ld: error:).*)$")
# what old headers lack, in gcc's and clang's words
_OLD_VULKAN = re.compile(r"ggml-vulkan\S*: .*error: .*(?:\Wvk\W|\bVK_[A-Z]+_)")
_TOOLKITS = {
    re.compile(r"CUDA::cublas"): (
        "cuBLAS was not found by CMake: install it (apt: libcublas-dev of the toolkit's version), or "
        "`pip install nvidia-cublas` of the toolkit's version"
    ),
    re.compile(r"CUDA::cuda_driver"): (
        "libcuda.so was not found by CMake: install NVIDIA's driver or its stub, or build without its "
        "virtual memory (CMAKE_ARGS=-DGGML_CUDA_NO_VMM=ON)"
    ),
    re.compile(r"CUDA Toolkit not found|CMAKE_CUDA_COMPILER could be found|(?:find|found) nvcc"): (
        "the CUDA toolkit was not found by CMake: install it, or set CUDACXX to nvcc"
    ),
    re.compile(r"Could NOT find Vulkan|SPIRV-Headers"): (
        "the Vulkan SDK is incomplete: install it (apt: libvulkan-dev glslc spirv-headers)"
    ),
    re.compile(r'package configuration file provided by "(?:hip|hipblas|rocblas)"'): (
        "ROCm's HIP libraries were not found by CMake: install hip, hipblas and rocblas, or set ROCM_PATH"
    ),
}

NO_INDEX = "no package index could be reached"
_USE_VENV = "make a virtual environment (python3 -m venv .venv) and use that"


def is_network(lines: Sequence[str]) -> bool:
    """Whether the output reads like a package index that could not be reached."""
    return any(_NETWORK.search(line) or _NO_MATCH.search(line) for line in lines)


def explain_network(lines: Sequence[str]) -> str:
    """The advice for an index that cannot be reached, or that lacks a package."""
    missing = [match[1] for line in lines if (match := _NO_MATCH.search(line))]
    if missing and not any(_NETWORK.search(line) for line in lines):
        what = f"no package index that could be reached has {missing[0]}"
    else:
        what = NO_INDEX
    return f"{what}: check the network, the proxy and `pip config list`"


def compiler_errors(lines: Sequence[str], limit: int = 5) -> list[str]:
    """The last compiler and linker errors, as the tools wrote them."""
    matches = (_COMPILER_ERROR.match(line) or _LINKER_ERROR.match(line) for line in lines)
    return list(dict.fromkeys(match[1] for match in matches if match))[-limit:]


def explain_pip(lines: Sequence[str], log: Path) -> str:
    """Why pip failed to fetch or install, as the end of a sentence."""
    text = "\n".join(lines)
    if common := _common(text, log):
        return common
    if "No module named pip" in text:
        return "this Python has no pip: run `python -m ensurepip`, or use a virtual environment"
    if "externally-managed-environment" in text:
        return f"this Python belongs to the system: {_USE_VENV}"
    if "DO NOT MATCH THE HASHES" in text:
        hashes = re.findall(r"(?:Expected|Got)\s+(?:sha256\s+)?([0-9a-f]{64})", text)
        detail = f" (expected sha256 {hashes[0]}, got {hashes[1]})" if len(hashes) >= 2 else ""
        return f"hash mismatch{detail}: the package index serves another file than the pinned one"
    if "Permission denied" in text:
        return f"permission denied: {_USE_VENV}; log: {log}"
    if is_network(lines):
        return explain_network(lines)
    return f"pip failed ({last_words(lines)}); log: {log}"


def explain_build(lines: Sequence[str], log: Path) -> str:
    """Why configuring, compiling or packing failed, as the end of a sentence."""
    text = "\n".join(lines)
    if common := _common(text, log):
        return common
    if errors := compiler_errors(lines):
        if any(map(_OLD_VULKAN.search, errors)):
            return f"the Vulkan headers are too old (1.3.239 will do): install the Vulkan SDK; log: {log}"
        return f"{errors[-1].strip()}; log: {log}"
    for pattern, advice in _TOOLKITS.items():
        if pattern.search(text):
            return f"{advice}; log: {log}"
    if cmake := re.search(r"CMake Error[^\n]*\n(?:\s*\n)*\s*([^\n]+)", text):
        return f"CMake says: {cmake[1].strip()}; log: {log}"
    if is_network(lines):
        return f"{explain_network(lines)} (scikit-build-core, which packs the wheel, comes from there)"
    return f"{last_words(lines)}; log: {log}"


def _common(text: str, log: Path) -> str:
    if _DISK_FULL.search(text):
        return f"{disk_full(log.parent)}; log: {log}"
    if _KILLED.search(text):
        return f"the compiler ran out of memory: run again with --jobs 1; log: {log}"
    return ""


def disk_full(directory: Path) -> str:
    """The advice for a full disk."""
    return f"the disk is full: free 1 GB for {directory}, or point XDG_CACHE_HOME to another disk"


def last_words(lines: Sequence[str]) -> str:
    """The last line that says something, without pip's frame of notes."""
    noise = re.compile(r"^\s*(?:note:|hint:|\[end of output\]|\[notice\]|[^\x00-\x7f]|$)")
    errors = [line.strip() for line in lines if line.strip().lower().startswith("error:")]
    said = errors or [line.strip() for line in lines if not noise.match(line)]
    return said[-1][:300] if said else "no output"
