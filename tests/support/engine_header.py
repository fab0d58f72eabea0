"""The engine's header read as text, and a library that has all its functions."""

import re
import types

from places import C_SOURCES

from mobile_gguf.engine import binding

HEADER = (C_SOURCES / "mobile.h").read_text()


def constant(name: str) -> int:
    found = re.search(rf"{name}\s*=?\s*(-?\d+)", HEADER)
    assert found is not None
    return int(found[1])


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
        default = binding.LoadParamsStruct(n_io_threads=4) if name == "mobile_load_default_params" else 0
        setattr(library, name, FakeFunction(answers.get(name.removeprefix("mobile_"), default)))
    library.mobile_abi_version.answer = answers.get("abi_version", binding.ABI_VERSION)
    return library
