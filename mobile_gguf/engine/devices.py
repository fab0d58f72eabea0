"""The devices that ggml offers, and how much memory their drivers say is free.

ggml's own registry through llama-cpp-python's library: backends are compiled in or were loaded with it, RPC
servers are devices once they have been added (``rpc.py``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .binding import load_library

# enum ggml_backend_dev_type
TYPES = (CPU, GPU, IGPU, ACCEL, META) = ("cpu", "gpu", "igpu", "accel", "meta")

_ADDRESS, _SIZE, _TEXT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_backend_dev_count": (_SIZE, ()),
    "ggml_backend_dev_get": (_ADDRESS, (_SIZE,)),
    "ggml_backend_dev_type": (ctypes.c_int, (_ADDRESS,)),
    "ggml_backend_dev_name": (_TEXT, (_ADDRESS,)),
    "ggml_backend_dev_description": (_TEXT, (_ADDRESS,)),
    "ggml_backend_dev_memory": (None, (_ADDRESS, ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE))),
    "ggml_backend_dev_backend_reg": (_ADDRESS, (_ADDRESS,)),
    "ggml_backend_reg_name": (_TEXT, (_ADDRESS,)),
}


@dataclass(frozen=True)
class Device:
    """A device of ggml; bytes by its driver when it was listed. ``handle`` is its ``ggml_backend_dev_t``.

    Once a model is loaded, ``structs.DeviceInfo`` says what the engine keeps on one.
    """

    handle: int
    name: str
    description: str
    free_bytes: int
    total_bytes: int
    type: str = GPU  # one of TYPES
    is_rpc: bool = False

    @property
    def says_free(self) -> bool:
        """Whether its driver knows what is free: a CPU behind an RPC server reports all of its memory."""
        return self.free_bytes < self.total_bytes

    @property
    def shares_host_memory(self) -> bool:
        """Whether what it takes is missing in this machine's memory: integrated GPUs, servers on loopback."""
        host = self.description.rpartition(":")[0].strip("[]")
        on_loopback = host in ("localhost", "::1") or host.startswith("127.")
        return self.type == IGPU or (self.is_rpc and on_loopback)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what ``engine info`` shows."""
        return {
            "name": self.name,
            "description": self.description,
            "type": self.type,
            "memory_free": self.free_bytes,
            "memory_total": self.total_bytes,
        }


def all_devices(types: Iterable[str] = TYPES) -> list[Device]:
    """Every device of the given types, in ggml's order; none without ggml's registry.

    Raises EngineError if llama-cpp-python is missing or does not load.
    """
    ggml = _bind(load_library()[0])
    if ggml is None:
        return []
    return [_device(ggml, handle) for handle in _handles(ggml) if _type(ggml, handle) in types]


def list_devices(library: Any, servers: Iterable[int] = ()) -> list[Device]:
    """The devices to use, in llama.cpp's order: RPC servers, GPUs, without those integrated ones.

    ``library`` is llama-cpp-python's; a build without ggml's registry has no devices. ``servers`` are handles
    of RPC servers; others that this process once added are not asked, for they may be gone.
    """
    ggml = _bind(library)
    if ggml is None:
        return []
    handles = [*servers, *(handle for handle in _handles(ggml) if not _is_rpc(ggml, handle))]
    found = [_device(ggml, handle) for handle in handles if _type(ggml, handle) in (GPU, IGPU)]
    local = [device for device in found if not device.is_rpc]
    discrete = [device for device in local if device.type == GPU]
    return [*(device for device in found if device.is_rpc), *(discrete or local)]


def device_array(devices: Iterable[Device]) -> Any:
    """``llama_model_params.devices``: the handles and a null; none: the host alone. Keep it while loading."""
    handles = [device.handle for device in devices]
    return (ctypes.c_void_p * (len(handles) + 1))(*handles, None)


def _handles(ggml: Any) -> list[int]:
    return [ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count())]


def _type(ggml: Any, handle: int) -> str:
    number = ggml.ggml_backend_dev_type(handle)
    return TYPES[number] if 0 <= number < len(TYPES) else str(number)


def _is_rpc(ggml: Any, handle: int) -> bool:
    # The registry of an added server is named "RPC[host:port]".
    name = ggml.ggml_backend_reg_name(ggml.ggml_backend_dev_backend_reg(handle))
    return _decode(name).startswith("RPC")


def _device(ggml: Any, handle: int) -> Device:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ggml.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
    return Device(
        handle=handle,
        name=_decode(ggml.ggml_backend_dev_name(handle)),
        description=_decode(ggml.ggml_backend_dev_description(handle)).strip(),
        free_bytes=free.value,
        total_bytes=total.value,
        type=_type(ggml, handle),
        is_rpc=_is_rpc(ggml, handle),
    )


def _bind(library: Any) -> Any:
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:
            return None
        function.restype, function.argtypes = result, arguments
    return library


def _decode(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", errors="replace")
