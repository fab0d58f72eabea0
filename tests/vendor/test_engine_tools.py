"""The tools of a build: found or named, run and interrupted, and their failures in one line."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from engine_source import write_tool

from mobile_gguf.errors import EngineBuildError
from mobile_gguf.vendor import failures, process, toolchain

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH that holds a complete set of build tools and nothing else."""
    directory = tmp_path / "bin"
    says = {"git": "git 2", "cc": "cc 1", "c++": "c++ 1", "cmake": "cmake version 3.25.1", "ninja": "1"}
    for name, words in says.items():
        write_tool(directory, name, words)
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path / "scripts"))
    for name in ("CC", "CXX", "CUDACXX", "CUDA_PATH", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return directory


# --- tools


@posix_only
def test_complete_toolchain(tools: Path) -> None:
    found = toolchain.find_toolchain()
    assert found.cmake == str(tools / "cmake")
    assert (found.make, found.generator) == (str(tools / "ninja"), "Ninja")
    assert found.compiler_version == "cc 1; c++ 1"
    (tools / "ninja").rename(tools / "make")
    assert toolchain.find_toolchain().generator == "Unix Makefiles"


@posix_only
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("git", "git was not found .*: install"),
        ("cc", "no C compiler was found: install"),
        ("c++", r"no C\+\+17 compiler was found: install"),
        ("cmake", "cmake was not found: install .*pip install cmake"),
        ("ninja", "neither ninja nor make was found: install"),
    ],
)
def test_missing_tool_is_named(tools: Path, missing: str, message: str) -> None:
    (tools / missing).unlink()
    with pytest.raises(EngineBuildError, match=message) as caught:
        toolchain.find_toolchain()
    assert "\n" not in str(caught.value)


@posix_only
def test_unusable_tools_are_named(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(EngineBuildError, match=r"no C\+\+17 compiler"):
        toolchain.find_toolchain()
    monkeypatch.delenv("CXX")
    write_tool(tools, "cmake", "cmake version 3.16.3")
    with pytest.raises(EngineBuildError, match=r"is version 3\.16 and 3\.21 is needed"):
        toolchain.find_toolchain()
    write_tool(tools, "cmake", "")
    with pytest.raises(EngineBuildError, match="cmake --version` fails"):
        toolchain.find_toolchain()


@posix_only
@pytest.mark.parametrize(
    ("backend", "message"), [("vulkan", "glslc"), ("hip", "hipcc"), ("metal", "macOS only")]
)
def test_missing_toolkit_is_named(tools: Path, backend: str, message: str) -> None:
    if (backend == "metal" and sys.platform == "darwin") or (backend == "hip" and Path("/opt/rocm").exists()):
        pytest.skip("this machine has it")
    with pytest.raises(EngineBuildError, match=message):
        toolchain.check_backend(backend)


@posix_only
def test_cuda_compiler_is_found_where_nvidia_puts_it(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_PATH", str(tools.parent / "cuda"))
    with pytest.raises(EngineBuildError, match="nvcc"):
        toolchain.check_backend("cuda")
    write_tool(tools.parent / "cuda" / "bin", "nvcc", "Cuda compilation tools, release 13.0, V13.0.88")
    (tools.parent / "cuda" / "lib64").mkdir()
    (tools.parent / "cuda" / "lib64" / "libcublas.so").touch()
    toolchain.check_backend("cuda")
    assert toolchain.cuda_arguments() == []
    assert toolchain.cuda_compiler() == str(tools.parent / "cuda" / "bin" / "nvcc")


@posix_only
def test_cublas_may_come_from_the_package_index(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux" or list(Path("/usr/lib").glob("*-linux-gnu/libcublas.so*")):
        pytest.skip("not where cuBLAS is looked for, or this machine has it")
    monkeypatch.setenv("CUDA_PATH", str(tools.parent / "cuda"))
    write_tool(tools.parent / "cuda" / "bin", "nvcc", "Cuda compilation tools, release 13.0, V13.0.88")
    with pytest.raises(EngineBuildError, match=r"no cuBLAS.*pip install nvidia-cublas"):
        toolchain.check_backend("cuda")
    folder = tools.parent / "scripts" / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    (folder / "libcublas.so.13").touch()
    toolchain.check_backend("cuda")
    assert toolchain.cuda_arguments() == [
        f"-DCUDA_cublas_LIBRARY={folder}/libcublas.so.13",
        f"-DCUDA_cublasLt_LIBRARY={folder}/libcublasLt.so.13",
        f"-DCMAKE_CUDA_FLAGS=-I{folder.parent}/include",
        f"-DCMAKE_SHARED_LINKER_FLAGS=-Wl,-rpath,{folder}",
    ]
    assert toolchain.cuda_arguments({"CMAKE_ARGS": "-DCUDA_cublas_LIBRARY=/own"}) == []


# --- explaining what the tools said


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (
            "[3/82] Building\nFAILED: a.o\n  /t/mobile-store.cpp:12:5: error: 'x' was not declared\nstop",
            "/t/mobile-store.cpp:12:5: error: 'x' was not declared",
        ),
        ("k.cu(12): error: identifier is undefined", "k.cu(12): error: identifier is undefined"),
        ("a.cpp:1:10: fatal error: b.h: No such file or directory", "fatal error: b.h"),
        (
            "ld: a.o: in f:\na.cpp:(.text+0x1): undefined reference to `mobile_x'",
            "undefined reference to `mobile_x'",
        ),
        (
            "c++: fatal error: Killed signal terminated program cc1plus",
            "out of memory: run again with --jobs 1",
        ),
        ("a.s: Fatal error: can't write 12 bytes: No space left on device", "disk is full"),
        (
            "CMake Error at CMakeLists.txt:3 (message):\n\n  LLAMA_X is gone\n\nCall Stack",
            "CMake says: LLAMA_X is gone",
        ),
        (
            "/t/ggml-vulkan.cpp:5214:21: error: 'LayerSettingEXT' is not a member of 'vk'",
            "the Vulkan headers are too old",
        ),
        (
            "/t/ggml-vulkan.cpp:9:7: error: no type named 'LayerSettingEXT' in namespace 'vk'",
            "the Vulkan headers are too old",
        ),
        (
            "/t/ggml-vulkan.cpp:5218:17: error: 'vk::LayerSettingTypeEXT' has not been declared",
            "the Vulkan headers are too old",
        ),
        ("CMake Error at x:\n  CUDA Toolkit not found", "the CUDA toolkit was not found"),
        (
            "ERROR: No matching distribution found for scikit-build-core>=0.9.2",
            "has scikit-build-core>=0.9.2",
        ),
        ("something else\nnote: This is an issue with the package", "something else; log: "),
    ],
)
def test_build_failure_is_explained(output: str, expected: str) -> None:
    said = failures.explain_build(output.splitlines(), Path("/l/engine.log"))
    assert expected in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("/v/bin/python: No module named pip", "ensurepip"),
        (
            "error: externally-managed-environment\n\nx This environment is externally managed",
            "virtual environment",
        ),
        (
            "WARNING: NewConnectionError: refused\nERROR: No matching distribution found for x",
            failures.NO_INDEX,
        ),
        ("ERROR: No matching distribution found for x==1", "has x==1"),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: '/usr'",
            "permission denied",
        ),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "disk is full",
        ),
        (
            "ERROR: a thing\n\n[notice] A new release of pip",
            "pip failed (ERROR: a thing); log: /l/install.log",
        ),
    ],
)
def test_pip_failure_is_explained(output: str, expected: str) -> None:
    assert expected in failures.explain_pip(output.splitlines(), Path("/l/install.log"))


def test_compiler_errors_are_the_last_and_each_once() -> None:
    lines = [f"a.cpp:{number}:1: error: e{number}" for number in (1, 2, 3, 3, 4, 5, 6)]
    assert failures.compiler_errors(["a.cpp:9:1: warning: error prone", *lines]) == [
        f"a.cpp:{number}:1: error: e{number}" for number in (2, 3, 4, 5, 6)
    ]


def test_warnings_are_not_errors() -> None:
    assert failures.compiler_errors(["a.cpp:9:1: warning: unused", "note: in x:1: something"]) == []


# --- running tools


@posix_only
def test_output_goes_to_the_log_and_the_callback(tmp_path: Path) -> None:
    seen: list[str] = []
    command = ["sh", "-c", "echo out; echo err >&2; exit 3"]
    status, lines = process.run(command, log=tmp_path / "a.log", on_line=seen.append)
    assert (status, lines) == (3, ["out", "err"])
    assert seen == lines
    assert (tmp_path / "a.log").read_text(encoding="utf-8").splitlines()[1:] == lines


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_interrupt_ends_what_the_tool_started(tmp_path: Path) -> None:
    started: list[int] = []

    def interrupt(line: str) -> None:
        started.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        process.run(["sh", "-c", "sleep 600 & echo $!; wait"], log=tmp_path / "a.log", on_line=interrupt)
    stat = Path(f"/proc/{started[0]}/stat")
    ended = threading.Event()
    for _ in range(6000):  # the signal is sent, its delivery may take a moment
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        ended.wait(0.05)
    else:
        os.kill(started[0], signal.SIGKILL)
        pytest.fail("the tool's child outlived the interrupt")
