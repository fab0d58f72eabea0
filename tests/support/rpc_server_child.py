"""An RPC server of llama.cpp on loopback, for tests: a device with real buffers and real transfers.

argv: endpoint, threads, and how many bytes of address space it may take once it has started (0: no limit).
The library is the one in $LLAMA_CPP_LIB_PATH.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import llama_cpp.llama_cpp as lib


def limit_memory(extra: int) -> None:
    """Limits the address space to what is mapped now and ``extra`` bytes."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    endpoint, n_threads, extra = sys.argv[1].encode(), int(sys.argv[2]), int(sys.argv[3])
    lib.llama_backend_init()
    folder = Path(os.environ["LLAMA_CPP_LIB_PATH"])
    base = ctypes.CDLL(str(folder / "libggml.so"))
    rpc = ctypes.CDLL(str(folder / "libggml-rpc.so"))
    base.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    cpu = base.ggml_backend_dev_by_type(0)
    devices = (ctypes.c_void_p * 1)(cpu)
    start = rpc.ggml_backend_rpc_start_server
    start.restype = None
    start.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
    if extra:
        limit_memory(extra)
    start(endpoint, None, n_threads, 1, devices)


if __name__ == "__main__":
    main()
