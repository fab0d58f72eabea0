"""The names of what libllama's quantiser offers, as llama-quantize shows them, and what each one needs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from mobile_gguf.errors import UsageError

# written by the converter itself; it could write q8_0 too, but libllama does that with all cores, and then
# there is a file of full precision to verify against
FLOAT_TYPES = ("f32", "f16", "bf16")

_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m", "mxfp4": "mxfp4_moe"}
# in libllama's enum and not in its quantiser
_NOT_OFFERED = frozenset({"nvfp4"})
# libllama: tensor_requires_imatrix; and the mixtures that are made of those types
_NEED_IMATRIX = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"})
_FTYPES_NEED_IMATRIX = _NEED_IMATRIX | {"iq2_m", "q2_k_s"}
_NOT_WEIGHTS = re.compile(r"i\d+|f64|q8_1|q8_k|nvfp4")

ATTENTION_PATTERN = r"^blk\.\d+\.attn_.*\.weight$"


@cache
def ftypes() -> dict[str, int]:
    """Names and numbers of the file types that libllama can make (its enum llama_ftype)."""
    from llama_cpp import llama_cpp

    prefixes = ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_")
    found = {}
    for constant in dir(llama_cpp):
        for prefix in prefixes:
            if constant.startswith(prefix):
                found[constant.removeprefix(prefix).lower()] = int(getattr(llama_cpp, constant))
    return {name: number for name, number in found.items() if name not in _NOT_OFFERED}


@cache
def tensor_types() -> dict[str, int]:
    """Names and numbers of the tensor types that weights can have (enum ggml_type)."""
    from gguf import GGMLQuantizationType

    types = {kind.name.lower(): int(kind) for kind in GGMLQuantizationType}
    return {name: number for name, number in types.items() if not _NOT_WEIGHTS.fullmatch(name)}


def read_outtype(text: str) -> str:
    """The canonical name of a file type. Raises UsageError."""
    name = _ALIASES.get(text.lower(), text.lower())
    if name == "auto" or name in ftypes():
        return name
    offered = ", ".join(["auto", *sorted(ftypes())])
    raise UsageError(f"{text!r} is no type that libllama can make: choose one of {offered}")


def read_tensor_type(text: str, what: str) -> int:
    """The number of a tensor type; ``what`` names the option. Raises UsageError."""
    name = text.lower()
    if name in tensor_types():
        return tensor_types()[name]
    hint = ""
    if name in ftypes() and (base := re.sub(r"_[sml]$|_moe$", "", name)) in tensor_types():
        hint = f" ({name} is a mixture for a whole file; the type is {base})"
    raise UsageError(
        f"{what} {text!r}: no such tensor type{hint}; choose one of {', '.join(sorted(tensor_types()))}"
    )


def needs_imatrix(outtype: str, overrides: Iterable[int]) -> str | None:
    """The first of the types asked for that nobody can make without an importance matrix; None if all can."""
    if outtype in _FTYPES_NEED_IMATRIX:
        return outtype
    names = {number: name for name, number in tensor_types().items()}
    return next((names[t] for t in overrides if names.get(t) in _NEED_IMATRIX), None)
