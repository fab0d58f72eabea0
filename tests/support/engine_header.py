"""The engine's header read as text, and a library that has all its functions."""

import ctypes
import re
import types
from typing import Any

from places import C_SOURCES

from mobile_gguf.engine import structs

HEADER = "".join((C_SOURCES / name).read_text() for name in ("mobile.h", "mobile-mtp.h"))


def constant(name: str) -> int:
    found = re.search(rf"{name}\s*=?\s*(-?\d+)", HEADER)
    assert found is not None
    return int(found[1])


def header_structs(header: str = HEADER) -> dict[str, list[tuple[str, type]]]:
    """Every struct that the header defines, its fields as ctypes has them."""
    return {
        name: _fields(body)
        for name, body in re.findall(r"^struct (\w+) \{(.*?)^\};", header, re.DOTALL | re.M)
    }


def header_enums(header: str = HEADER) -> dict[str, dict[str, int]]:
    """Every enum that the header defines, its names in lower case without what all of them begin with."""
    found = {}
    for enum, body in re.findall(r"^enum (\w+) \{(.*?)^\};", header, re.DOTALL | re.M):
        names = re.findall(r"^\s*(MOBILE_\w+)\s*=\s*(-?\d+)", body, re.M)
        found[enum] = {name.lower().removeprefix(f"{enum}_"): int(number) for name, number in names}
    return found


def _fields(body: str) -> list[tuple[str, Any]]:
    fields = []
    for line in re.sub(r"//.*", "", body).split(";"):
        if not line.strip():
            continue
        match = re.fullmatch(r"\s*(?:const\s+)?(\w+)\s*(\*?)\s*(\w+)(?:\[(\d+)\])?\s*", line)
        assert match is not None, f"a field that the parser does not know: {line.strip()}"
        kind, star, name, n = match.groups()
        ctype: Any = _POINTERS[kind] if star else C_TYPES[kind]
        fields.append((name, ctype * int(n) if n else ctype))
    return fields


C_TYPES: dict[str, type] = {
    "uint64_t": ctypes.c_uint64, "int64_t": ctypes.c_int64, "uint32_t": ctypes.c_uint32,
    "int32_t": ctypes.c_int32, "uint8_t": ctypes.c_uint8, "float": ctypes.c_float,
    "double": ctypes.c_double, "char": ctypes.c_char,
}  # fmt: skip
_POINTERS = {kind: ctypes.POINTER(ctype) for kind, ctype in C_TYPES.items()} | {"char": ctypes.c_char_p}


class FakeFunction:
    """A C function: records calls; the answer is a value or what ``answer`` makes of the arguments."""

    def __init__(self, answer):
        self.answer = answer
        self.calls = []
        self.restype = self.argtypes = None

    def __call__(self, *arguments):
        self.calls.append(arguments)
        return self.answer(*arguments) if callable(self.answer) else self.answer


def fake_library(**answers):
    """A library with every function of the header; the rest succeed."""
    library = types.SimpleNamespace(_name="libfake.so")
    for name in re.findall(r"\b(mobile_\w+)\s*\(", HEADER):
        default = structs.LoadParamsStruct(n_io_threads=4) if name == "mobile_load_default_params" else 0
        setattr(library, name, FakeFunction(answers.get(name.removeprefix("mobile_"), default)))
    library.mobile_abi_version.answer = answers.get("abi_version", structs.ABI_VERSION)
    return library
