"""Which GGUF type each parameter of a Transformers model was stored with.

Transformers and GGUF name and merge tensors differently. What the ``gguf`` package's own name table knows
is looked up there; for the rest (merged experts, architectures newer than the table) the part of the model
that the name belongs to decides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from mobile_gguf.gguf.experts import expert_name

_LAYER = re.compile(r"\.(\d+)\.")
_ROUTED = re.compile(r"(?<!shared_)experts?\b")
_ROUTER = re.compile(r"\brouter\b|\.gate\.(weight|wg)")


def stored_types(
    parameters: Iterable[tuple[str, int]], tensors: Mapping[str, str], architecture: str, n_layer: int
) -> dict[str, str]:
    """The type of every parameter, by its name in Transformers.

    parameters: (name, number of dimensions). tensors: GGUF tensor name -> type name (F32, F16, ...).
    Biases, norms and other vectors that are in no table are F32, as every converter stores them.
    """
    names = _name_table(architecture, n_layer)
    experts = _expert_types(tensors)
    matrices = Counter(kind for name, kind in tensors.items() if _is_matrix(name))
    usual = matrices.most_common(1)[0][0] if matrices else "F32"
    types = {}
    for name, n_dims in parameters:
        base = names(re.sub(r"\.experts\.\d+\.", ".experts.", name))
        suffix = ".bias" if name.endswith("bias") else ".weight"
        layer = _LAYER.search(name)
        if base is not None and base + suffix in tensors:
            types[name] = tensors[base + suffix]
        elif n_dims < 2 or name.endswith("bias") or "conv1d" in name or _ROUTER.search(name):
            types[name] = "F32"
        elif layer is not None and _ROUTED.search(name):
            types[name] = experts.get(int(layer[1]), usual)
        else:
            types[name] = usual
    return types


def _name_table(architecture: str, n_layer: int) -> Callable[[str], str | None]:
    from gguf.constants import MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        return lambda name: None
    table = get_tensor_name_map(known[architecture], n_layer)
    return lambda name: table.get_name(name, try_suffixes=(".weight", ".bias"))


def _expert_types(tensors: Mapping[str, str]) -> dict[int, str]:
    """The type of each layer's routed experts."""
    names = ((expert_name(name), kind) for name, kind in tensors.items())
    return {name.layer: kind for name, kind in names if name is not None}


def _is_matrix(name: str) -> bool:
    return name.endswith(".weight") and "norm" not in name and "_inp" not in name
