"""Whether a checkpoint's config, tensors and tokenizer mean the same model.

What does not go together would be found after hours, by whoever loads the result, or by nobody: a file
without its head runs with the embedding in its place. All of it is known from headers and small JSON files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mobile_gguf.errors import ModelFormatError, shown

from .safetensors_header import SourceTensor

# config.json of a model with more than a language part has the language's in one of these
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "ffn_config", "thinker_config")
_DEPTH = 3
_TOP_KS = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k",
    "top_k_experts",
)  # fmt: skip
_COUNTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "intermediate_size",
    "moe_intermediate_size", "max_position_embeddings", *_TOP_KS,
)  # fmt: skip
_MAYBE_NONE = ("num_key_value_heads", "rms_norm_eps", "layer_norm_eps", "norm_eps", "rope_theta")
_NUMBERS_MAX = 1 << 40
# of the language model itself: not of a tower for images, nor of a block for predicting further tokens
_OUTSIDE = r"(?:(?:model|language_model|transformer|backbone|thinker|base_model)\.)*"
_EMBEDDING = re.compile(_OUTSIDE + r"(?:embed_tokens|word_embeddings|wte|embeddings?|tok_embeddings)\.weight")
_HEAD = re.compile(_OUTSIDE + r"(?:lm_head|output|embed_out|output_layer|head)\.weight")
_WITH_HEAD = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
_OTHER_WIDTHS = ("embedding_size", "emb_dim", "embedding_dim")
_MAX_TOKENIZER_BYTES = 256 << 20


def check_consistent(
    folder: Path,
    config: dict[str, Any],
    architecture: str,
    n_expert: int,
    tensors: Sequence[SourceTensor],
) -> None:
    """Raise ModelFormatError for what cannot be one model; ``tensors`` is empty where they are not known."""
    _Checks(folder, config, architecture).run(n_expert, tensors)


def text_config(config: dict[str, Any], depth: int = _DEPTH) -> dict[str, Any]:
    """The config of the language model: what is inside goes before what is around it."""
    for key in TEXT_CONFIGS if depth else ():
        part = config.get(key)
        if isinstance(part, dict):
            return config | text_config(part, depth - 1)
    return config


class _Checks:
    def __init__(self, folder: Path, config: dict[str, Any], architecture: str) -> None:
        self.folder = folder
        self.config = config
        self.text = text_config(config)
        self.architecture = architecture

    def fail(self, what: str) -> NoReturn:
        raise ModelFormatError(f"{self.folder} cannot be converted: {what}")

    def run(self, n_expert: int, tensors: Sequence[SourceTensor]) -> None:
        self.check_numbers()
        for key in _TOP_KS:
            for value in _whole_numbers(self.text.get(key)):
                if n_expert and value > n_expert:
                    self.fail(f"{key} in config.json is {value}, and there are {n_expert} experts")
        n_vocab = self.text.get("vocab_size")
        if isinstance(n_vocab, int):
            self.check_tokenizer(n_vocab)
        self.check_ends({tensor.name: tensor for tensor in tensors}, n_vocab)

    def check_numbers(self) -> None:
        for path, number in _numbers(self.config):
            if math.isnan(number):
                self.fail(f"{path} in config.json is NaN")
        for key in (*_COUNTS, *_MAYBE_NONE):
            value = self.text.get(key)
            least = 1 if key in _COUNTS else 0
            for number in value if isinstance(value, list) else [value]:
                if number is None or isinstance(number, dict):
                    continue
                is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
                if not is_number or not least <= number < _NUMBERS_MAX:
                    self.fail(f"{key} in config.json is {shown(value)}")

    # what stands at both ends of the model

    def check_ends(self, tensors: Mapping[str, SourceTensor], n_vocab: Any) -> None:
        embedding = _only(tensors, _EMBEDDING)
        head = _only(tensors, _HEAD)
        for tensor in (embedding, head):
            if tensor is not None:
                self.check_end(tensor, n_vocab)
        has_own = self.architecture.endswith(_WITH_HEAD) and self.text.get("tie_word_embeddings") is False
        if tensors and has_own and embedding is not None and head is None:
            self.fail(
                "it has no head (lm_head.weight), and tie_word_embeddings in config.json is false: it may not"
                " be taken from the embedding; copy the missing tensor there, or say true if they are one"
            )

    def check_end(self, tensor: SourceTensor, n_vocab: Any) -> None:
        n_rows, n_columns = tensor.shape
        if isinstance(n_vocab, int) and n_rows != n_vocab:
            self.fail(f"{tensor.name} has {n_rows} rows, and vocab_size in config.json is {n_vocab}")
        width = self.text.get("hidden_size")
        if any(key in self.text for key in _OTHER_WIDTHS) or not isinstance(width, int):
            return
        if n_columns != width:
            self.fail(f"{tensor.name} has {n_columns} columns, and hidden_size in config.json is {width}")

    def check_tokenizer(self, n_vocab: int) -> None:
        """No token beyond the vocabulary; the converter drops those of a SentencePiece model itself."""
        if (self.folder / "tokenizer.model").is_file():
            return
        for name in ("tokenizer.json", "added_tokens.json"):
            found = max(_token_ids(_read(self.folder / name)), default=(-1, ""))
            if found[0] >= n_vocab:
                self.fail(
                    f"{name} has token {found[0]} ({shown(found[1])}), and vocab_size in config.json is"
                    f" {n_vocab}: resize the embedding with the tokenizer, or copy the model's own tokenizer"
                )


def _only(tensors: Mapping[str, SourceTensor], pattern: re.Pattern[str]) -> SourceTensor | None:
    """The one matrix of such a name; None if there is none, or more than one to choose from."""
    found = [t for name, t in tensors.items() if pattern.fullmatch(name) and len(t.shape) == 2]
    return found[0] if len(found) == 1 else None


def _whole_numbers(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [number for number in values if isinstance(number, int) and not isinstance(number, bool)]


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """All floats of a JSON value, with where they stand."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, path)
    elif isinstance(value, float):
        yield path, value


def _read(path: Path) -> Any:
    """A tokenizer's file; None if there is none, or the converter has to say what is wrong with it."""
    try:
        if path.stat().st_size > _MAX_TOKENIZER_BYTES:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _token_ids(value: Any) -> Iterator[tuple[int, str]]:
    """Ids and texts of a tokenizer.json, or of a mapping from text to id."""
    if not isinstance(value, dict):
        return
    model, added = value.get("model"), value.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None if "added_tokens" in value else value
    if isinstance(vocabulary, dict):
        yield from ((number, text) for text, number in vocabulary.items() if type(number) is int)
    elif isinstance(vocabulary, list):
        yield len(vocabulary) - 1, str(vocabulary[-1])[:40] if vocabulary else ""
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and type(token.get("id")) is int:
            yield token["id"], str(token.get("content"))
