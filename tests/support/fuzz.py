"""Coverage-guided fuzzing (atheris) of what others' files pass through first, as long as is asked for.

``python tests/support/fuzz.py TARGET CORPUS [libFuzzer options]``. The targets, ``fuzz_target.TARGETS``, are
GGUF headers with conversion plans, safetensors headers, JSON schemas and grammars; those of ``fuzz_server``
are the server's requests, and chat templates. Samples, and what earlier runs found, are put into an empty
corpus. Only MobileError may come out, within 20 s and 2 GiB of address space beyond what the program needs.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found]
from places import DATA

with atheris.instrument_imports(include=["mobile_gguf", "fuzz_target", "fuzz_server", "jinja2"]):  # type: ignore[attr-defined]
    import fuzz_server
    import fuzz_target

FOUND = DATA / "fuzz"  # by target, what reaches most
_EXTRA_MEMORY = 2 << 30


def main() -> None:
    """Runs the fuzzer; libFuzzer ends the process, with 0 if nothing was found."""
    name, corpus = sys.argv[1], Path(sys.argv[2])
    target = (fuzz_target.TARGETS | fuzz_server.TARGETS)[name]
    corpus.mkdir(parents=True, exist_ok=True)
    if not any(corpus.iterdir()):
        with tempfile.TemporaryDirectory() as folder:
            for sample in target.samples(Path(folder)):
                (corpus / sample.stem).write_bytes(sample.read_bytes())
        if (FOUND / name).is_dir():
            for found in (FOUND / name).iterdir():
                (corpus / found.name).write_bytes(found.read_bytes())
    descriptor = os.memfd_create("fuzz")
    path = Path(f"/proc/self/fd/{descriptor}")

    def one(data: bytes) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, data, 0)
        target.check(path)

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + _EXTRA_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    atheris.Setup([sys.argv[0], f"-max_len={1 << 16}", "-timeout=20", *sys.argv[3:], str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
