"""Building the demo's GGUF, once, under a name that changes with everything it is made from."""

import hashlib
from pathlib import Path

from mobile_gguf.files.atomic import complete_or_absent, disk_errors
from mobile_gguf.files.lock import exclusive
from mobile_gguf.files.paths import models_dir
from mobile_gguf.progress import Progress, no_progress, scaled

from . import source

# counts what the code alone decides (types, metadata): a new number is a new file
BUILD_VERSION = 1


def demo_path() -> Path:
    """Return where this version's demo model lies or will lie."""
    made_from = hashlib.sha256(source.RECIPE.read_bytes())
    made_from.update(f"{source.MEMBER_SHA256} {BUILD_VERSION}".encode())
    return models_dir() / "demo" / f"smollm2-moe-demo-{made_from.hexdigest()[:12]}.gguf"


def ensure_demo(*, progress: Progress | None = None) -> Path:
    """Return the demo's GGUF, building it if it is not there; see the package for the contract."""
    report = progress or no_progress
    path = demo_path()
    if path.exists():
        return path

    def on_wait() -> None:
        report("waiting for another process that builds the demo model", 0.0)

    with disk_errors(path), exclusive(path.with_name("build.lock"), on_wait=on_wait):
        if not path.exists():
            _write(path, float32=False, report=report)
    return path


def write_f32_gguf(path: Path, *, progress: Progress | None = None) -> None:
    """Write the demo with every tensor in F32 to ``path``; see the package for the contract."""
    _write(path, float32=True, report=progress or no_progress)


def _write(path: Path, *, float32: bool, report: Progress) -> None:
    dense = source.ensure_source(progress=scaled(report, 0.0, 0.5))
    with complete_or_absent(path) as partial:
        from .gguf_file import write_gguf

        write_gguf(dense, source.RECIPE, partial, float32=float32, progress=scaled(report, 0.5, 1.0))
