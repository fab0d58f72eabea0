"""Builds both libraries from the kit's sources, and writes the replay model beside it.

CMake builds llama.cpp alone: what llama-cpp-python adds to it is Python, which the kit brings. Both builds
share their CUDA objects (``compile_once.py``). Where the GPU is one that the kit's objects were compiled
for, those are used and nothing of CUDA is compiled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mobile_gguf.errors import EngineBuildError
from mobile_gguf.vendor import toolchain
from mobile_gguf.vendor.recipe import EngineOptions

from ..hardware import n_cpus
from .results import Save
from .settings import GPU, Settings

_OUTPUT_LINES = 40
# a toolkit without the driver's library cannot link what asks for it; the pool is cudaMalloc's then
_CUDA = ("-DGGML_CUDA_NO_VMM=ON", "-DGGML_CUDA_NCCL=OFF", "-DGGML_CUDA_COMPRESSION_MODE=size")
_PLAIN = ("-DGGML_CCACHE=OFF", "-DGGML_ALL_WARNINGS=OFF")


def run(settings: Settings, result: dict[str, Any], save: Save) -> None:
    """Ours first: the tests need nothing else."""
    writer = _start_model(settings)
    try:
        result["steps"] = []
        for name in ("engine", "stock"):
            if getattr(settings, name):
                result["steps"].append({"name": name, "seconds": 0, "said": "given"})
                continue
            for step, command in build_commands(settings, name):
                if step == "configure":
                    _lay_sources(Path(settings.root), name)
                _do(f"{step} {name}", command, settings, result, save)
        result["objects"] = _objects(Path(settings.root))
        save()
    finally:
        status = writer.wait()
    if status != 0:
        raise EngineBuildError(f"the replay model was not written (exit code {status}): see the output above")


def build_commands(settings: Settings, name: str) -> list[tuple[str, list[str]]]:
    """What CMake is called with."""
    root = Path(settings.root)
    target = root / "build" / name
    options = EngineOptions(("cuda",) if settings.device == GPU else ())
    arguments = [*options.stock_arguments(), *_PLAIN]
    if settings.device == GPU:
        arguments += [*_CUDA, *toolchain.cuda_arguments(), *_architectures(root)]
        arguments.append(f"-DGGML_CUDA_FA={'ON' if settings.flash_attention else 'OFF'}")
        launcher = Path(__file__).with_name("compile_once.py")
        arguments.append(f"-DCMAKE_CUDA_COMPILER_LAUNCHER={sys.executable};{launcher};{root / 'objects'}")
    tools = toolchain.search_path()
    cmake = shutil.which("cmake", path=tools)
    if cmake is None:
        raise EngineBuildError("cmake was not found: install it")
    ninja = shutil.which("ninja", path=tools)
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
    sources = root / "sources" / name / "vendor" / "llama.cpp"
    return [
        ("configure", [cmake, "-S", str(sources), "-B", str(target), *generator, *arguments]),
        ("compile", [cmake, "--build", str(target), "--target", "llama", "--parallel", str(n_cpus())]),
    ]


def _architectures(root: Path) -> list[str]:
    """The GPU's own. Objects that were compiled for others are put away."""
    said = subprocess.run(
        ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    found = re.search(r"(\d+)\.(\d+)", said)
    if not found:
        raise EngineBuildError(f"nvidia-smi names no GPU: {said.strip() or 'no output'}")
    own = found[1] + found[2]
    made = root / "objects" / "architectures"
    if made.is_file() and own not in made.read_text(encoding="utf-8").split():
        shutil.move(root / "objects", root / "objects-of-others")
    return [f"-DCMAKE_CUDA_ARCHITECTURES={own}-real"]


def _lay_sources(root: Path, name: str) -> None:
    """The stock tree is ours with the files that differ, as the packer saw them."""
    if name != "stock" or (root / "sources" / "stock").exists():
        return
    partial = root / "sources" / "stock.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(root / "sources" / "engine", partial)
    for gone in json.loads((root / "sources" / "only-ours.json").read_text(encoding="utf-8")):
        (partial / gone).unlink()
    shutil.copytree(root / "sources" / "upstream", partial, dirs_exist_ok=True)
    os.replace(partial, root / "sources" / "stock")


def _start_model(settings: Settings) -> subprocess.Popen[bytes]:
    """The replay model is written by one processor while the others compile."""
    path = Path(settings.out) / "settings.json"
    code = (
        "import sys, pathlib; from mobile_gguf.bench.gpu_kit import replay, settings; "
        "replay.model_of(settings.read_settings(pathlib.Path(sys.argv[1])))"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(path)])


def _do(name: str, command: list[str], settings: Settings, result: dict[str, Any], save: Save) -> None:
    environment = os.environ | {"PATH": toolchain.search_path()}
    if settings.device == GPU:
        environment["CUDACXX"] = toolchain.cuda_compiler()
    step: dict[str, Any] = {"name": name, "command": command}
    result["steps"].append(step)
    save()
    started = time.monotonic()
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    step["seconds"] = round(time.monotonic() - started, 1)
    step["said"] = "\n".join(done.stdout.splitlines()[-_OUTPUT_LINES:])
    save()
    if done.returncode != 0:
        errors = [line for line in done.stdout.splitlines() if "error" in line.lower()]
        raise EngineBuildError(f"{name} failed: {' / '.join(errors[:3]) or step['said']}")


def _objects(root: Path) -> dict[str, float]:
    """Seconds of processor time that each CUDA object took here."""
    spent = {
        path.stem: path.read_text(encoding="utf-8").split() for path in (root / "objects").glob("*.seconds")
    }
    return {name: float(words[0]) for name, words in sorted(spent.items())}


def page(result: dict[str, Any]) -> list[str]:
    """As Markdown."""
    lines = [
        f"- {step['name']}: {step.get('seconds', 'not finished, ')} s" for step in result.get("steps", [])
    ]
    objects = result.get("objects", {})
    if objects:
        lines.append(f"- {len(objects)} CUDA objects: {sum(objects.values()):.0f} s of one processor")
    return lines
