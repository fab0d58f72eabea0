"""The converter of the pinned llama.cpp: where it is, what it knows, and running it as a child process."""

from __future__ import annotations

import ast
import errno
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError, UsageError, install_hint
from mobile_gguf.progress import Progress, no_progress
from mobile_gguf.vendor.pin import load_pin
from mobile_gguf.vendor.source import LLAMA_CPP, unpacked_source

from ..children import ChildError, child_environment, run_child
from ..meter import Meter

MODULE = "mobile_gguf.convert.hf.upstream_child"
_NEEDED = ("torch", "transformers", "safetensors")


@dataclass(frozen=True)
class StackedPlan:
    """What the converter is about to write; ``header`` is the file, whole but for the tensors' data."""

    header: Path
    n_tensors: int
    n_bytes: int


@dataclass(frozen=True)
class StackedReport:
    """What it wrote. ``whole`` names the tensors that could not go row by row (they cost memory)."""

    n_bytes: int
    seconds: float
    whole: tuple[str, ...]


class _StoppedError(Exception):
    """The caller saw the plan and wants no more."""


def require_packages() -> None:
    """Raise UsageError if what the converter imports is not installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"converting a checkpoint needs {', '.join(missing)}: {install_hint('convert')}")


def converter_dir(progress: Progress = no_progress) -> Path:
    """The pinned llama.cpp, stock, fetched if it is not in the cache. Raises EngineBuildError."""
    return unpacked_source(load_pin(), narrate=lambda text: progress(text, 0.0)) / LLAMA_CPP


def known_architectures(converter: Path) -> frozenset[str]:
    """The names in config.json's "architectures" that the converter has a text model for."""
    tree = ast.parse((converter / "conversion" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if not isinstance(node, ast.AnnAssign) or node.value is None:
            continue
        if isinstance(node.target, ast.Name) and node.target.id == "TEXT_MODEL_MAP":
            return frozenset(ast.literal_eval(node.value))
    raise MobileError(f"{converter} holds no converter that this version understands")


def check_pre_tokenizer(converter: Path, name: str) -> None:
    """Raise UsageError unless llama.cpp knows a pre-tokenizer of that name."""
    text = (converter / "conversion" / "base.py").read_text(encoding="utf-8")
    known = {"default", *re.findall(r'^\s+res = "([^"]+)"$', text, flags=re.MULTILINE)}
    if name not in known:
        raise UsageError(
            f"--pre-tokenizer {name!r}: llama.cpp knows no such one; it knows {', '.join(sorted(known))}"
        )


def write_stacked(
    folder: Path,
    out: Path,
    outtype: str,
    *,
    converter: Path,
    threads: int,
    name: str | None = None,
    pre_tokenizer: str | None = None,
    trust_remote_code: bool = False,
    no_mtp: bool = False,
    on_plan: Callable[[StackedPlan], bool] = lambda plan: True,
    progress: Progress = no_progress,
) -> StackedReport | None:
    """Convert the checkpoint in ``folder`` to the stacked GGUF ``out``, of the type f32, f16, bf16, q8_0 or
    auto.

    on_plan is called when all but the data is known; None is returned if it says no.
    Raises MobileError with the converter's reason, NaN weights and a full disk among them.
    """
    job = {
        "folder": str(folder.resolve()), "out": str(out), "outtype": outtype, "threads": threads,
        "name": name, "pre_tokenizer": pre_tokenizer, "trust_remote_code": trust_remote_code,
        "no_mtp": no_mtp,
    }  # fmt: skip
    environment = child_environment(str(converter), str(converter / "gguf-py"))
    # the checkpoint is a folder: nothing here may ask the Hub for anything
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    meter = Meter(progress, "converting", 1)
    n_tensors, last = 0, {}

    def on_event(event: dict[str, Any]) -> bool:
        nonlocal meter, n_tensors, last
        if "plan" in event:
            n_tensors = event["plan"]["n_tensors"]
            if not on_plan(StackedPlan(out, **event["plan"])):
                raise _StoppedError
            meter = Meter(progress, "converting", event["plan"]["n_bytes"])
            return True
        if "tensor" in event:
            meter.update(event["tensor"], n_tensors, event["done"])
        elif "phase" in event:
            progress(event["phase"], 0.0)
        last = event
        return False

    try:
        run_child(MODULE, job, what="the converter", environment=environment, on_event=on_event)
    except _StoppedError:
        return None
    except ChildError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MobileError(f"cannot write {out}: the disk is full: free some space there") from error
        raise MobileError(str(error)) from error
    return StackedReport(out.stat().st_size, meter.seconds, tuple(last.get("whole", ())))
