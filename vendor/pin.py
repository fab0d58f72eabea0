"""The one pin: which llama-cpp-python source distribution the engine is built from."""

import json
from dataclasses import dataclass
from pathlib import Path

PIN_FILE = Path(__file__).with_name("pin.json")


@dataclass(frozen=True)
class Pin:
    """A source distribution on the package index, by version and hash."""

    package: str
    version: str
    local: str  # PEP 440 local version label of our wheel
    sdist: str  # file name
    size: int  # bytes
    sha256: str
    llama_cpp_commit: str

    @property
    def engine_version(self) -> str:
        """Version of the patched wheel; it satisfies ``==version``, whatever the local label."""
        return f"{self.version}+{self.local}"

    @property
    def directory(self) -> str:
        """The one directory at the root of the archive."""
        return self.sdist.removesuffix(".tar.gz")


def load_pin(path: Path = PIN_FILE) -> Pin:
    """The pin recorded in ``pin.json``."""
    return Pin(**json.loads(path.read_text(encoding="utf-8")))
