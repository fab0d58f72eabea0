"""A compiler launcher for CMake that compiles each CUDA source once: ``compile_once.py STORE NVCC ...``.

The engine and the stock library have the same CUDA sources, which take most of a build; the second build,
and a kit that was packed with a filled STORE, take the objects from there. An object is named by what it
depends on: the source, the headers of ggml, the options (without paths, and without the architectures: a
STORE is made for one list of them) and the compiler's release. A file of its own, without the package: the
compiler starts it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

_HEADERS = ("include/*.h", "src/*.h", "src/ggml-cuda/**/*.cuh", "src/ggml-cuda/**/*.h")
_IN_KEY = ("-D", "-std", "--std", "-O", "-use_fast_math", "-extended-lambda", "-compress-mode")


def source_of(command: list[str]) -> Path | None:
    """The one CUDA source that a command compiles; None if it does something else."""
    if "-o" not in command or "-c" not in command:
        return None
    found = [Path(word) for word in command if word.endswith(".cu")]
    return found[0] if len(found) == 1 else None


def key(command: list[str], source: Path) -> str:
    """Names the object of a command."""
    digest = hashlib.sha256()
    ggml = next(parent for parent in source.resolve().parents if parent.name == "ggml")
    for path in sorted({source.resolve(), *(path for pattern in _HEADERS for path in ggml.glob(pattern))}):
        digest.update(path.relative_to(ggml).as_posix().encode() + b"\0" + path.read_bytes())
    options = [word for word in command[1:] if word.startswith(_IN_KEY)]
    said = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=False).stdout
    release = next((line for line in said.splitlines() if "release" in line), "")
    digest.update("\0".join([*sorted(options), release]).encode())
    return f"{source.stem}-{digest.hexdigest()[:16]}"


def main(arguments: list[str]) -> int:
    """Compile, or copy what was compiled before; the compiler's exit status."""
    store, command = Path(arguments[0]), arguments[1:]
    source = source_of(command)
    if source is None:
        return subprocess.run(command, check=False).returncode
    name = key(command, source)
    kept, wanted = store / f"{name}.o", Path(command[command.index("-o") + 1])
    if kept.is_file():
        shutil.copyfile(kept, wanted)
        if "-MF" in command:  # nothing to follow: these trees are built once
            Path(command[command.index("-MF") + 1]).write_text(f"{wanted}:\n", encoding="utf-8")
        return 0
    started = time.monotonic()
    before = os.times()
    status = subprocess.run(command, check=False).returncode
    if status == 0:
        store.mkdir(parents=True, exist_ok=True)
        spent = os.times()
        cpu_s = spent.children_user + spent.children_system - before.children_user - before.children_system
        partial = store / f"{name}.{os.getpid()}"
        shutil.copyfile(wanted, partial)
        os.replace(partial, kept)
        (store / f"{name}.seconds").write_text(
            f"{cpu_s:.1f} {time.monotonic() - started:.1f}\n", encoding="utf-8"
        )
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
