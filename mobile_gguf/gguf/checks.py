"""What llama.cpp takes for granted of a model's header, checked before it sees the file.

Where a header says otherwise llama.cpp ends the process (``GGML_ASSERT``), divides by zero or computes
nonsense; for what else does not fit it has errors of its own. The rules are those of
``llama_model_base::load_hparams``, ``llama_vocab`` and the graphs of the pinned source, as far as they hold
for every architecture: what one of them demands is found by a trial (``mobile_gguf/engine/trial.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mobile_gguf.errors import ModelFormatError, shown

from .experts import expert_name
from .header import TensorInfo

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
_MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_MAX_POOLING, _MAX_GATING = 4, 4  # LLAMA_POOLING_TYPE_RANK, LLAMA_EXPERT_GATING_FUNC_TYPE_SQRT_SOFTPLUS
_EPSILONS = ("layer_norm_epsilon", "layer_norm_rms_epsilon", "group_norm_epsilon")
# what may be 0 only by leaving it out: a divisor, or a size of nothing
_POSITIVE = (
    "block_count",
    "context_length",
    "embedding_length",
    "vocab_size",
    "attention.key_length",
    "attention.value_length",
    "full_attention_interval",
)
# as many as there are tokens, at least
_PER_TOKEN = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")
_TOKENS = "tokenizer.ggml.tokens"
# one expert is none for these: llama.cpp runs them as dense
_ONE_IS_NONE = ("hunyuan_vl", "hunyuan-dense")
# no models that run on their own, with keys and shapes of another meaning
_OTHERS = ("clip", "eagle3", "dflash", "wavtokenizer-dec")


def check_model(
    path: Path, metadata: Mapping[str, Any], array_lengths: Mapping[str, int], tensors: Iterable[TensorInfo]
) -> None:
    """Raise ModelFormatError for the first number of a header that llama.cpp would not survive.

    ``path`` is the model's (first) file, ``tensors`` those of all its files.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in _OTHERS:
        _Checks(path, str(architecture), metadata, array_lengths, {t.name: t for t in tensors}).run()


class _Checks:
    def __init__(
        self,
        path: Path,
        architecture: str,
        metadata: Mapping[str, Any],
        array_lengths: Mapping[str, int],
        tensors: dict[str, TensorInfo],
    ) -> None:
        self.path = path
        self.architecture = architecture
        self.metadata = metadata
        self.array_lengths = array_lengths
        self.tensors = tensors
        self.n_layer = self.integer("block_count")

    def run(self) -> None:
        self.check_numbers()
        for name in _POSITIVE:
            if self.has(name) and self.integer(name) < 1:
                self.wrong(name, "at least 1")
        self.at_most("block_count", MAX_LAYERS)
        self.at_most("nextn_predict_layers", self.n_layer)
        self.check_experts()
        self.check_attention()
        self.check_rope()
        self.check_vocabulary()

    # values

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def has(self, name: str) -> bool:
        return self.key(name) in self.metadata

    def wrong(self, name: str, wanted: str) -> NoReturn:
        self.fail(self.key(name), wanted)

    def fail(self, key: str, wanted: str) -> NoReturn:
        value = self.metadata.get(key)
        raise ModelFormatError(f"{self.path} cannot be used: metadata {key} is {shown(value)}, not {wanted}")

    def integer(self, name: str, default: int = 0) -> int:
        """A number that stands once for all layers; of an array the largest."""
        return max(self.integers(name, default), default=default)

    def integers(self, name: str, default: int = 0) -> Sequence[int]:
        value = self.metadata.get(self.key(name), default)
        values = value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in values):
            self.wrong(name, "a whole number")
        if not all(0 <= item < 1 << 31 for item in values):
            self.wrong(name, "a number from 0 to 2147483647")
        return values

    def at_most(self, name: str, most: int) -> None:
        if self.integer(name) > most:
            self.wrong(name, f"at most {most}")

    def check_numbers(self) -> None:
        """No number is infinite or none at all, and no epsilon negative."""
        for key, value in self.metadata.items():
            if key.startswith(f"{self.architecture}."):
                numbers = value if isinstance(value, list) else [value]
                if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                    self.fail(key, "a finite number")
        for name in _EPSILONS:
            epsilon = self.metadata.get(self.key(f"attention.{name}"), 0.0)
            if isinstance(epsilon, float) and epsilon < 0:
                self.wrong(f"attention.{name}", "0 or more")

    # what belongs together

    def check_experts(self) -> None:
        n_expert = self.integer("expert_count")
        if self.architecture in _ONE_IS_NONE and n_expert <= 1:
            return
        self.at_most("expert_count", _MAX_EXPERTS)
        n_used = self.integer("expert_used_count")
        n_groups = self.integer("expert_group_count")
        if n_used > n_expert or (n_expert and not n_used):
            self.wrong(
                "expert_used_count",
                f"1 to {n_expert} (expert_count)" if n_expert else "0, as expert_count is",
            )
        if n_groups >= max(n_expert, 1) or (n_groups > 1 and n_expert % n_groups):
            self.wrong("expert_group_count", f"a divisor of {n_expert} (expert_count) that is smaller")
        if n_groups > 1 and not 0 < self.integer("expert_group_used_count") < n_groups:
            self.wrong("expert_group_used_count", f"1 to {n_groups - 1} (expert_group_count is {n_groups})")
        self.at_most("expert_gating_func", _MAX_GATING)
        for tensor in self.tensors.values():
            name = expert_name(tensor.name)
            if name is not None and name.number is None:
                n_there = tensor.shape[2] if len(tensor.shape) > 2 else 1
                if n_there != n_expert:
                    self.wrong("expert_count", f"{n_there}, the experts of tensor {tensor.name}")

    def check_attention(self) -> None:
        heads = self.per_layer("attention.head_count")
        of_keys = self.per_layer("attention.head_count_kv") if self.has("attention.head_count_kv") else heads
        for n_head, n_head_kv in zip(heads, of_keys, strict=False):
            if n_head and n_head_kv and n_head % n_head_kv:
                self.wrong("attention.head_count_kv", f"a divisor of {n_head} (attention.head_count)")
        n_embd = self.integer("embedding_length")
        if heads and heads[0] and n_embd and heads[0] > n_embd and not self.has("attention.key_length"):
            self.wrong("attention.head_count", f"at most {n_embd} (embedding_length)")
        self.at_most("pooling_type", _MAX_POOLING)

    def per_layer(self, name: str) -> Sequence[int]:
        values = self.integers(name)
        if not isinstance(self.metadata.get(self.key(name)), list):
            return (values[0],) * self.n_layer
        if len(values) != self.n_layer:
            self.fail(self.key(name), f"one number, or {self.n_layer} (block_count)")
        return values

    def check_rope(self) -> None:
        scaling = self.metadata.get(self.key("rope.scaling.type"), "none")
        if scaling not in _ROPE_SCALINGS:
            self.wrong("rope.scaling.type", ", ".join(_ROPE_SCALINGS[:-1]) + f" or {_ROPE_SCALINGS[-1]}")
        base = self.metadata.get(self.key("rope.freq_base"), 1.0)
        if isinstance(base, float) and base <= 0:
            self.wrong("rope.freq_base", "more than 0")
        heads = self.per_layer("attention.head_count")
        if not heads or not heads[0]:
            return
        of_head = self.integer("attention.key_length", self.integer("embedding_length") // heads[0])
        for ending in ("", "_swa"):
            length = self.integer(f"attention.key_length{ending}", of_head)
            name = f"rope.dimension_count{ending}"
            if self.has(name) and (self.integer(name) % 2 or self.integer(name) > length > 0):
                self.wrong(name, f"an even number up to {length}, the size of a head")

    def check_vocabulary(self) -> None:
        n_tokens = self.array_lengths.get(_TOKENS)
        embedding = self.tensors.get("token_embd.weight")
        if n_tokens is not None:
            for key in _PER_TOKEN:
                n_there = self.array_lengths.get(key, n_tokens)
                if n_there < n_tokens:
                    raise ModelFormatError(
                        f"{self.path} cannot be used: metadata {key} has {n_there} entries, not {n_tokens},"
                        f" as many as {_TOKENS}"
                    )
        if embedding is None or len(embedding.shape) != 2:
            return
        n_embd, n_rows = embedding.shape
        if self.has("embedding_length") and n_embd != self.integer("embedding_length"):
            self.wrong("embedding_length", f"{n_embd}, the columns of tensor token_embd.weight")
        if n_tokens is not None and n_rows != n_tokens:
            raise ModelFormatError(
                f"{self.path} cannot be used: metadata {_TOKENS} has {n_tokens} entries, not {n_rows}, the"
                " rows of tensor token_embd.weight"
            )
