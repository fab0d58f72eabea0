"""What this machine is and has, read without changing it: what ``health`` judges.

The engine is asked by a child process: a library that was compiled for another processor ends whoever loads
it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobile_gguf import vendor
from mobile_gguf.config import VERBS, config_path, preset_names, read_defaults, read_preset
from mobile_gguf.device.ask import LIBRARY_VARIABLE
from mobile_gguf.errors import MobileError
from mobile_gguf.files.paths import cache_dir, models_dir
from mobile_gguf.memory.cgroup import read_text
from mobile_gguf.memory.machine import Memory, read_memory
from mobile_gguf.memory.threads import cpu_quota
from mobile_gguf.options.words import DEFAULT_IO_THREADS
from mobile_gguf.processes import how_it_ended
from mobile_gguf.wording import why

from .disk import CHUNK_BYTES, measure_reads
from .machine import identify_machine

CACHE, MODELS = "cache", "models"
_READ_S = 0.6
_ENGINE_S = 120.0
_NEVER_OVERCOMMIT = "2"  # vm.overcommit_memory
_ENGINE_CHILD = """\
import json
from mobile_gguf.vendor import engine_info
info = engine_info()
if info["library"]:
    from mobile_gguf.engine.binding import find_engine, load_library
    from mobile_gguf.engine.devices import all_devices
    from mobile_gguf.engine.log import capture_log
    from mobile_gguf.errors import EngineError
    try:
        capture_log()
        if not find_engine():
            info["problem"] = f"{load_library()[1]} is a stock llama.cpp's"
        info["devices"] = [device.to_dict() for device in all_devices()]
    except EngineError as error:
        info["problem"] = info["problem"] or str(error)
print(json.dumps(info))
"""


@dataclass(frozen=True)
class Folder:
    """A folder of ours, which need not exist yet; ``problem``: why nothing can be written there."""

    name: str  # CACHE or MODELS
    path: Path
    free_bytes: int
    problem: str = ""


@dataclass(frozen=True)
class Reads:
    """How fast a file is read as the expert store reads; ``problem``: why that is not known."""

    path: Path | None = None
    bytes_per_second: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class Settings:
    """The configuration file, which need not exist; what is wrong with it or a variable; broken presets."""

    path: Path
    exists: bool = False
    problem: str = ""
    presets: tuple[str, ...] = ()


@dataclass(frozen=True)
class LocalModel:
    """A model of this machine: what is wrong with its file, or why there is not enough memory for it."""

    name: str
    problem: str = ""
    refusal: str = ""


@dataclass(frozen=True)
class Facts:
    """Of this machine, this Python environment and this process."""

    system: str
    machine: str  # x86_64, aarch64, ...
    processor: str
    processors: int
    cpu_quota: float | None
    instruction_sets: frozenset[str]  # empty: not known
    memory: Memory
    address_space: int | None  # RLIMIT_AS in bytes
    never_overcommits: bool
    engine: dict[str, Any] | None  # of vendor.engine_info(), and "devices"; None: see engine_problem
    engine_problem: str
    build_problem: str  # why an engine could not be compiled here; empty if it could
    folders: tuple[Folder, ...]
    settings: Settings
    other_library: str = ""  # a folder whose library the environment has loaded in place of the installed one
    models: tuple[LocalModel, ...] = ()
    reads: Reads = field(default_factory=Reads)


def gather(files: Iterable[Path], models: Iterable[LocalModel] = ()) -> Facts:
    """Look at this machine; takes seconds. ``files`` are models whose disk may be measured."""
    identity = identify_machine()
    engine, problem = _ask_engine()
    return Facts(
        system=identity["system"],
        machine=platform.machine().lower(),
        processor=identity["processor"],
        processors=int(identity["processors"]),
        cpu_quota=cpu_quota(),
        instruction_sets=frozenset(vendor.machine_id()["isa"].split()),
        memory=read_memory(),
        address_space=_address_space(),
        never_overcommits=read_text(Path("/proc/sys/vm/overcommit_memory")).strip() == _NEVER_OVERCOMMIT,
        engine=engine,
        engine_problem=problem,
        build_problem=vendor.build_problem(),
        folders=(_folder(CACHE, cache_dir()), _folder(MODELS, models_dir())),
        settings=_settings(),
        other_library=os.environ.get(LIBRARY_VARIABLE, ""),
        models=tuple(models),
        reads=_reads(files),
    )


def _address_space() -> int | None:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def _ask_engine() -> tuple[dict[str, Any] | None, str]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ENGINE_CHILD], stdin=subprocess.DEVNULL, capture_output=True,
            encoding="utf-8", errors="replace", timeout=_ENGINE_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"it cannot be asked ({error})"
    with contextlib.suppress(ValueError):
        return json.loads(done.stdout.strip().rpartition("\n")[2]), ""
    said = [line for line in done.stderr.splitlines() if line.strip()]
    reason = f": {said[-1].strip()}" if said else ""
    return None, f"the process that loaded it {how_it_ended(done.returncode)}{reason}"


def _folder(name: str, path: Path) -> Folder:
    """A file is made and removed in the folder, or where it would be made: permissions do not say it all."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    problem = ""
    try:
        free = shutil.disk_usage(existing).free
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        free, problem = 0, f"{existing}: {why(error).lower()}"
    return Folder(name, path, free, problem)


def _settings() -> Settings:
    path = config_path()
    broken = [said for name in preset_names() if (said := _complaint(read_preset, name, "", VERBS))]
    return Settings(path, path.exists(), _complaint(read_defaults, "", VERBS), tuple(broken))


def _complaint(read: Callable[..., Any], *arguments: Any) -> str:
    try:
        read(*arguments)
    except MobileError as error:
        return str(error)
    return ""


def _reads(files: Iterable[Path]) -> Reads:
    sizes = []
    for path in files:
        with contextlib.suppress(OSError):
            sizes.append((path.stat().st_size, path))
    if not sizes:
        return Reads(problem="no model is here yet whose disk could be measured")
    path = max(sizes)[1]
    try:
        rate = measure_reads(path, CHUNK_BYTES, DEFAULT_IO_THREADS, _READ_S)
    except (MobileError, OSError) as error:
        return Reads(path, problem=str(error))
    # of one thread's reads, which are on their way beside those of the others
    return Reads(path, DEFAULT_IO_THREADS * CHUNK_BYTES / max(rate.value, 1e-9))
