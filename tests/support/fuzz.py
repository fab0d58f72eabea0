"""Coverage-guided fuzzing (atheris) of what others' files pass through first, as long as is asked for.

``python tests/support/fuzz.py TARGET CORPUS [libFuzzer options]``. The targets, ``fuzz_target.TARGETS``, are
GGUF headers with conversion plans, safetensors headers, JSON schemas and grammars. Sample files are put into
an empty corpus. Only MobileError may come out, within 20 s and 2 GiB of address space beyond what the program
itself needs.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["mobile_gguf", "fuzz_target"]):  # type: ignore[attr-defined]
    import fuzz_target

_EXTRA_MEMORY = 2 << 30


def main() -> None:
    """Runs the fuzzer; libFuzzer ends the process, with 0 if nothing was found."""
    target, corpus = fuzz_target.TARGETS[sys.argv[1]], Path(sys.argv[2])
    corpus.mkdir(parents=True, exist_ok=True)
    if not any(corpus.iterdir()):
        with tempfile.TemporaryDirectory() as folder:
            for sample in target.samples(Path(folder)):
                (corpus / sample.stem).write_bytes(sample.read_bytes())
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
