"""What a model's GGUF says about its geometry: layers, experts, byte counts, template.

Read before the engine sees the file: budgets are planned from it, and a damaged file is
refused with a reason. Split files (``-00001-of-00003.gguf``) are read whole.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobile_gguf.errors import ModelFormatError, ModelNotFoundError

from . import keys
from .caches import NO_CACHES, Caches, layers_that_run, read_caches, with_blocks
from .checks import check_model
from .experts import STACKED, ExpertLayer, read_experts
from .facts import Facts
from .header import GgufHeader, TensorInfo, read_header

# llama.cpp's input layer
_EMBEDDING = re.compile(r"(per_layer_)?token_embd(_norm)?\.weight")
_BLOCK = re.compile(r"blk\.(\d{1,6})\.")
# Rows are looked up where they lie in the file, beyond this size (llama_model_loader::lazy_read).
_LAZY = "per_layer_token_embd.weight"
_LAZY_ARCHITECTURES = ("gemma4", "qwen4exp")
_LAZY_BYTES = 4 << 30
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GgufInfo:
    """A model's facts; bytes as they stand in the file, heads per layer, expert layers in order.

    Layers are those that run. Blocks behind them predict several tokens at once (MTP): where they are not to
    draft nothing runs them, they take no memory, and what they hold is counted apart. Of a model that
    ``runs_mtp`` they count as what they are made of: experts, dense weights, keys and values.
    """

    path: Path
    files: tuple[Path, ...]
    file_bytes: int
    architecture: str
    name: str
    license: str
    quantization: str
    n_layer: int
    n_ctx_train: int
    n_embd: int
    n_vocab: int
    n_head: tuple[int, ...]
    n_expert: int
    n_expert_used: int
    n_ff_expert: int
    expert_layers: tuple[ExpertLayer, ...]
    tensor_bytes: int  # of the model; tensors named mobile.* are not loaded
    chat_template: str | None
    layout: str = STACKED  # or "per-expert"
    segments: int = 1  # tensors that each expert's matrix is cut into
    embedding_bytes: int = 0  # of the token embedding, which stays on the host with all layers on devices
    output_bytes: int = 0  # of the matrix that logits come of, where that is not the embedding, too
    stock: bool = True  # stock llama.cpp can load it: stacked, and no tensor named mobile.*
    moe_layers: tuple[int, ...] = ()  # which of the model's layers expert_layers are; the others are dense
    n_layer_mtp: int = 0
    mtp_bytes: int = 0  # of the blocks that nothing runs,
    mtp_expert_bytes: int = 0  # and of the routed experts among it
    lazy_bytes: int = 0  # of tables whose rows are read from the file when they are needed
    runs_mtp: bool = False
    caches: Caches = NO_CACHES  # what a context keeps
    metadata: dict[str, Any] = field(repr=False, compare=False, default_factory=dict)

    @property
    def expert_bytes(self) -> int:
        """All routed experts."""
        return sum(layer.file_bytes for layer in self.expert_layers)

    @property
    def dense_bytes(self) -> int:
        """What is always in memory: everything but routed experts, tables in the file and idle blocks."""
        return self.tensor_bytes - self.expert_bytes - self.mtp_bytes - self.lazy_bytes

    @property
    def n_layer_moe(self) -> int:
        return len(self.expert_layers)

    @property
    def is_moe(self) -> bool:
        return self.n_expert > 0 and bool(self.expert_layers)

    @property
    def budget_min_bytes(self) -> int:
        """The smallest budget that is legal everywhere: the largest layer's experts (a prompt needs them)."""
        return max((layer.store_bytes() for layer in self.expert_layers), default=0)

    @property
    def budget_all_bytes(self) -> int:
        """A budget at which every expert stays: a little over ``expert_bytes``, for alignment."""
        return sum(layer.store_bytes() for layer in self.expert_layers)


def read_gguf_info(path: Path, runs_mtp: bool = False) -> GgufInfo:
    """Read a model's facts from its GGUF, or from all files of a split one; ``runs_mtp``: it drafts by its
    blocks.

    Raises ModelNotFoundError (no file, a missing part of a split), ModelFormatError (not a GGUF,
    truncated, damaged, not a model).
    """
    first = read_header(path)
    return make_gguf_info([first, *(read_header(part) for part in other_parts(first))], runs_mtp)


def make_gguf_info(headers: Sequence[GgufHeader], runs_mtp: bool = False) -> GgufInfo:
    """The same of headers that were read already, of all files in order. Raises ModelFormatError."""
    first = headers[0]
    path, metadata = first.path, first.metadata
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelFormatError(f"{path} cannot be used: it names no architecture, so it is not a model")
    tensors = [tensor for header in headers for tensor in header.tensors]
    if not tensors:
        raise ModelFormatError(f"{path} cannot be used: it holds no tensors")
    check_model(path, metadata, first.array_lengths, tensors)
    facts = Facts(path, architecture, metadata)
    n_block = facts.integer("block_count")
    n_layer = layers_that_run(facts, (tensor.name for tensor in tensors))
    n_head = facts.per_layer("attention.head_count", n_block)
    n_ff = max(facts.per_layer("feed_forward_length", n_block)[:n_layer], default=0)
    n_expert = facts.integer("expert_count")
    template = metadata.get("tokenizer.chat_template")
    experts = read_experts(path, metadata, tensors, n_block, n_expert)
    n_running = len(experts.numbers) if runs_mtp else sum(number < n_layer for number in experts.numbers)
    of_model = [tensor for tensor in tensors if not keys.is_ours(tensor.name)]
    idle = [tensor for tensor in of_model if block_number(tensor.name) >= n_layer and not runs_mtp]
    lazy = [tensor for tensor in of_model if _is_lazy(architecture, tensor)]
    return GgufInfo(
        path=path,
        files=tuple(header.path for header in headers),
        file_bytes=sum(header.file_bytes for header in headers),
        architecture=architecture,
        name=str(metadata.get("general.name") or path.stem),
        license=str(metadata.get("general.license") or ""),
        quantization=_quantization(metadata, tensors),
        n_layer=n_layer,
        n_ctx_train=facts.integer("context_length"),
        n_embd=facts.integer("embedding_length"),
        n_vocab=first.array_lengths.get("tokenizer.ggml.tokens", facts.integer("vocab_size")),
        n_head=n_head[:n_layer],
        n_expert=n_expert,
        n_expert_used=max(facts.per_layer("expert_used_count", n_layer), default=0) if n_expert else 0,
        n_ff_expert=facts.integer("expert_feed_forward_length", n_ff),
        expert_layers=experts.layers[:n_running],
        moe_layers=experts.numbers[:n_running],
        tensor_bytes=sum(tensor.n_bytes for tensor in of_model),
        chat_template=template if isinstance(template, str) and template else None,
        layout=experts.layout,
        segments=experts.n_segments,
        embedding_bytes=sum(
            tensor.n_bytes for tensor in of_model if _EMBEDDING.fullmatch(tensor.name) and tensor not in lazy
        ),
        output_bytes=sum(tensor.n_bytes for tensor in of_model if tensor.name == "output.weight"),
        stock=experts.layout == STACKED and len(of_model) == len(tensors),
        n_layer_mtp=n_block - n_layer,
        mtp_bytes=sum(tensor.n_bytes for tensor in idle),
        mtp_expert_bytes=sum(layer.file_bytes for layer in experts.layers[n_running:]),
        lazy_bytes=sum(tensor.n_bytes for tensor in lazy),
        runs_mtp=runs_mtp,
        caches=with_blocks(facts, n_layer) if runs_mtp else read_caches(facts, n_layer),
        metadata=metadata,
    )


def block_number(name: str) -> int:
    """The number in a tensor's name, -1 of what belongs to no block."""
    match = _BLOCK.match(name)
    return int(match[1]) if match else -1


def _is_lazy(architecture: str, tensor: TensorInfo) -> bool:
    is_table = tensor.name == _LAZY and architecture in _LAZY_ARCHITECTURES
    return is_table and tensor.n_bytes > _LAZY_BYTES


def other_parts(first: GgufHeader) -> Iterable[Path]:
    """The other files of a split model, given its first one's header; none of a model in one file."""
    count = first.metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return
    match = _SPLIT.fullmatch(first.path.name)
    if match is None or int(match["count"]) != count:
        raise ModelFormatError(
            f"{first.path} is part of a split of {count}: keep the name it came with, "
            f"...-00001-of-{count:05}.gguf"
        )
    if int(match["number"]) != 1:
        raise ModelFormatError(
            f"{first.path} is part {int(match['number'])} of {count}: give the first part, "
            f"{match['stem']}-00001-of-{match['count']}.gguf"
        )
    for number in range(2, count + 1):
        part = first.path.with_name(f"{match['stem']}-{number:05}-of-{match['count']}.gguf")
        if not part.is_file():
            raise ModelNotFoundError(f"part {number} of {count} of {first.path} is missing: {part}")
        yield part


def _quantization(metadata: dict[str, Any], tensors: Iterable[TensorInfo]) -> str:
    """The file type by name (``Q4_K_M``), or the tensor type that most bytes have."""
    from gguf.constants import GGMLQuantizationType, LlamaFileType

    try:
        return LlamaFileType(metadata["general.file_type"]).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except (KeyError, ValueError):
        pass
    weights = Counter[int]()
    for tensor in tensors:
        weights[tensor.type_id] += tensor.n_bytes
    try:
        return GGMLQuantizationType(weights.most_common(1)[0][0]).name
    except ValueError:
        return "unknown"
