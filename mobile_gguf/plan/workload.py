"""What one token makes the machine read and multiply, from the tensor table alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from mobile_gguf.gguf import keys
from mobile_gguf.gguf.experts import expert_name
from mobile_gguf.gguf.header import TensorInfo, read_header
from mobile_gguf.gguf.info import GgufInfo


@dataclass(frozen=True)
class Product:
    """Matrices of one type and shape that a token is multiplied with: ``count`` of them, bytes of each."""

    type_id: int
    n_in: int
    n_out: int
    count: float
    n_bytes: int


@dataclass(frozen=True)
class Workload:
    """A token's work: dense products of the whole model, and the products of one expert in an average layer.

    ``experts``: an expert's matrices, ``count`` how many of that shape one layer's expert has; with segments,
    of one segment.
    """

    dense: tuple[Product, ...]
    experts: tuple[Product, ...]

    @property
    def dense_bytes(self) -> float:
        return sum(product.count * product.n_bytes for product in self.dense)

    @property
    def expert_bytes(self) -> float:
        return sum(product.count * product.n_bytes for product in self.experts)


def read_workload(info: GgufInfo) -> Workload:
    """The workload of a model whose header is good (GgufInfo was read from it)."""
    tensors = [tensor for path in info.files for tensor in read_header(path).tensors]
    names = {tensor.name for tensor in tensors}
    dense: Counter[tuple[int, int, int, int]] = Counter()
    experts: Counter[tuple[int, int, int, int]] = Counter()
    for tensor in tensors:
        if len(tensor.shape) < 2 or keys.is_ours(tensor.name):
            continue
        name = expert_name(tensor.name)
        if name is None:
            if not _is_table(tensor.name, names):
                dense[_key(tensor, 1)] += 1
        elif name.number is None:
            experts[_key(tensor, tensor.shape[2] if len(tensor.shape) > 2 else 1)] += 1
        else:
            experts[_key(tensor, 1)] += name.number == 0
    n_layer = max(1, info.n_layer_moe)
    return Workload(
        tuple(Product(*key[:3], count=n, n_bytes=key[3]) for key, n in sorted(dense.items())),
        tuple(
            Product(*key[:3], count=n / n_layer, n_bytes=key[3]) for key, n in sorted(experts.items()) if n
        ),
    )


def count_weights(info: GgufInfo) -> int:
    """Weights of the model, by its tensors' shapes."""
    n = 0
    for path in info.files:
        for tensor in read_header(path).tensors:
            if not keys.is_ours(tensor.name):
                n += math.prod(tensor.shape)
    return n


def _is_table(name: str, names: set[str]) -> bool:
    """Whether rows are only looked up: the embedding, unless it is the output matrix as well."""
    if name.startswith(("token_embd", "per_layer_token_embd", "position_embd")):
        return name != "token_embd.weight" or "output.weight" in names
    return "norm" in name or name.startswith("rope_")


def _key(tensor: TensorInfo, n_matrices: int) -> tuple[int, int, int, int]:
    n_in, n_out, *more = tensor.shape
    if n_matrices == 1:
        for n in more:
            n_out *= n
    return tensor.type_id, n_in, n_out, tensor.n_bytes // max(1, n_matrices)
