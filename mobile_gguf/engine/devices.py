"""Every device that ggml lists: what `engine info` shows and what an RPC server can offer."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass
from typing import Any

from .binding import load_library

# enum ggml_backend_dev_type
_TYPES = ("cpu", "gpu", "igpu", "accel", "meta")


@dataclass(frozen=True)
class GgmlDevice:
    """One device; bytes by its driver, now. ``handle`` is its ``ggml_backend_dev_t``."""

    handle: int
    name: str
    description: str
    type: str  # cpu, gpu, igpu (memory shared with the host), accel or meta
    memory_free: int
    memory_total: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON: everything but the handle."""
        return {name: value for name, value in asdict(self).items() if name != "handle"}


def ggml_devices() -> list[GgmlDevice]:
    """The devices of the backends that are built in, in ggml's order; none without ggml's registry.

    Raises EngineError if llama-cpp-python is missing or does not load.
    """
    library, _path = load_library()
    if not hasattr(library, "ggml_backend_dev_count"):
        return []
    address, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    count = ggml_function(library, "ggml_backend_dev_count", size, [])
    get = ggml_function(library, "ggml_backend_dev_get", address, [size])
    name = ggml_function(library, "ggml_backend_dev_name", text, [address])
    description = ggml_function(library, "ggml_backend_dev_description", text, [address])
    kind = ggml_function(library, "ggml_backend_dev_type", ctypes.c_int, [address])
    pointer = ctypes.POINTER(size)
    memory = ggml_function(library, "ggml_backend_dev_memory", None, [address, pointer, pointer])
    devices = []
    for handle in (get(index) for index in range(count())):
        free, total = size(), size()
        memory(handle, ctypes.byref(free), ctypes.byref(total))
        number = kind(handle)
        devices.append(
            GgmlDevice(
                handle=handle,
                name=name(handle).decode(errors="replace"),
                description=description(handle).decode(errors="replace").strip(),
                type=_TYPES[number] if number < len(_TYPES) else str(number),
                memory_free=free.value,
                memory_total=total.value,
            )
        )
    return devices


def ggml_function(library: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """A function of ggml with its types; AttributeError if the library has none of that name."""
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function
