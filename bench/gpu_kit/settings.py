"""What the kit is asked for, as all its processes see it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ..rpc_device import rpc_server
from ..synthetic import synthesise_trace
from ..trace import Trace, read_trace
from .results import write_text

GPU, RPC = "gpu", "rpc"


@dataclass(frozen=True)
class Settings:
    """Folders are absolute. ``engine`` and ``stock``: folders of libraries that are there already, empty:
    they are built. ``device``: "gpu", or "rpc" for a server on loopback in its place, to try the kit
    out."""

    root: str
    out: str
    device: str = GPU
    trace: str = ""
    size: str = "4GiB"
    budgets: str = "25%,12%,40%,100%"
    repeats: int = 3
    n_prompt: int = 256
    n_decode: int = 128
    run_limit_s: float = 12.0  # of decoding, in one run
    threads: int = 0  # 0: one per processor, at most 16
    engine: str = ""
    stock: str = ""
    flash_attention: bool = False

    @property
    def engine_lib(self) -> Path:
        """Folder of the patched libraries."""
        return Path(self.engine) if self.engine else Path(self.root) / "build" / "engine" / "bin"

    @property
    def stock_lib(self) -> Path:
        """Folder of the unpatched libraries."""
        return Path(self.stock) if self.stock else Path(self.root) / "build" / "stock" / "bin"

    @property
    def n_threads(self) -> int:
        """Of the processor's part."""
        return self.threads or min(16, len(os.sched_getaffinity(0)))

    def read_trace(self) -> Trace:
        """The routing that the replay model follows: the caller's, or the made-up one."""
        if self.trace:
            return read_trace(Path(self.trace)).first(self.n_prompt + self.n_decode)
        return synthesise_trace(n_prompt=self.n_prompt, n_decode=self.n_decode)

    @contextmanager
    def servers(self) -> Iterator[str]:
        """``--rpc`` of a run: empty with a GPU."""
        if self.device != RPC:
            yield ""
            return
        with rpc_server() as endpoint:
            yield endpoint

    def environment(self, library: Path) -> dict[str, str]:
        """Of a process that loads the libraries of a folder."""
        return {**os.environ, "LLAMA_CPP_LIB_PATH": str(library)}

    def write(self) -> Path:
        """For the phases, which are processes of their own."""
        path = Path(self.out) / "settings.json"
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")
        return path


def read_settings(path: Path) -> Settings:
    """What ``write`` wrote."""
    return Settings(**json.loads(path.read_text(encoding="utf-8")))
