"""The devices that ggml offers, and how much memory their drivers say is free.

ggml's own registry through llama-cpp-python's library: backends are compiled in, RPC servers are
devices once they have been added (``rpc.py``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_GPU, _IGPU = 1, 2  # enum ggml_backend_dev_type


@dataclass(frozen=True)
class Device:
    """A device of ggml; bytes by its driver when it was listed. ``handle`` is its ``ggml_backend_dev_t``."""

    handle: int
    name: str
    description: str
    free_bytes: int
    total_bytes: int
    is_rpc: bool = False
    is_integrated: bool = False  # its memory is the host's

    @property
    def says_free(self) -> bool:
        """Whether its driver knows what is free: a CPU behind an RPC server reports all of its memory."""
        return self.free_bytes < self.total_bytes

    @property
    def shares_host_memory(self) -> bool:
        """Whether what it takes is missing in this machine's memory: integrated GPUs, servers on loopback."""
        host = self.description.rpartition(":")[0].strip("[]")
        on_loopback = host in ("localhost", "::1") or host.startswith("127.")
        return self.is_integrated or (self.is_rpc and on_loopback)


def list_devices(library: Any, servers: Iterable[int] = ()) -> list[Device]:
    """The devices to use, in llama.cpp's order: RPC servers, GPUs, without those integrated ones.

    ``library`` is llama-cpp-python's; a build without ggml's registry has no devices. ``servers`` are handles
    of RPC servers; others that this process once added are not asked, for they may be gone.
    """
    ggml = _bind(library)
    if ggml is None:
        return []
    handles = [ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count())]
    local = [_device(ggml, handle) for handle in handles if not _is_rpc(ggml, handle)]
    gpus = [device for device in local if device is not None]
    discrete = [device for device in gpus if not device.is_integrated]
    remote = [_device(ggml, handle) for handle in servers]
    return [*(device for device in remote if device is not None), *(discrete or gpus)]


def device_array(devices: Iterable[Device]) -> Any:
    """``llama_model_params.devices``: the handles and a null; none: the host alone. Keep it while loading."""
    handles = [device.handle for device in devices]
    return (ctypes.c_void_p * (len(handles) + 1))(*handles, None)


def _is_rpc(ggml: Any, handle: int) -> bool:
    # The registry of an added server is named "RPC[host:port]".
    name = ggml.ggml_backend_reg_name(ggml.ggml_backend_dev_backend_reg(handle))
    return _text(name).startswith("RPC")


def _device(ggml: Any, handle: int) -> Device | None:
    kind = ggml.ggml_backend_dev_type(handle)
    if kind not in (_GPU, _IGPU):
        return None
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ggml.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
    return Device(
        handle=handle,
        name=_text(ggml.ggml_backend_dev_name(handle)),
        description=_text(ggml.ggml_backend_dev_description(handle)),
        free_bytes=free.value,
        total_bytes=total.value,
        is_rpc=_is_rpc(ggml, handle),
        is_integrated=kind == _IGPU,
    )


def _bind(library: Any) -> Any:
    address, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "dev_count": (size, []),
        "dev_get": (address, [size]),
        "dev_type": (ctypes.c_int, [address]),
        "dev_name": (text, [address]),
        "dev_description": (text, [address]),
        "dev_memory": (None, [address, ctypes.POINTER(size), ctypes.POINTER(size)]),
        "dev_backend_reg": (address, [address]),
        "reg_name": (text, [address]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"ggml_backend_{name}", None)
        if function is None:
            return None
        function.restype, function.argtypes = result, arguments
    return library


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", errors="replace")
