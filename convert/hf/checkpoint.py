"""Looking at a Hugging Face checkpoint before anything is done with it.

Everything here reads headers and small JSON files: it takes no time, little memory, and finds what would
otherwise end a conversion after minutes.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile_gguf.errors import ModelFormatError, ModelNotFoundError
from mobile_gguf.wording import why

from .consistency import TEXT_CONFIGS, check_consistent
from .safetensors_header import MAX_NAME, SourceTensor, read_safetensors_header

_MAX_JSON_BYTES = 64 << 20
_EXPERT_COUNTS = (
    "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts",
    "n_experts", "num_routed_experts", "moe_num_primary_experts",
)  # fmt: skip
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "*.tiktoken", "vocab.txt")
_EXPERT = re.compile(r"^(?P<stem>.*?\.(?P<layer>\d{1,9})\..*?experts)\.(?P<expert>\d{1,9})\.(?P<part>.+)$")
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d{1,9})\.")
_MTP = re.compile(r"(^|[._])(mtp|nextn|eh_proj)([._]|$)")
_VISION = re.compile(r"vis(ion|ual)|vit|image|audio")
_ROUTERS = ("gate.weight", "router.weight", "router.layer.weight", "gate.wg.weight", "router.proj.weight")
_PART_OF = re.compile(r"^(.*)-(\d{5})-of-(\d{5})(\.\w+)$")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that looks complete.

    ``tensors`` is empty for ``.bin`` shards, whose names only torch can read. ``n_bytes`` is the weights'
    size on disk; ``dtype`` is the one that most bytes of matrices have ("BF16", "F32", ...), "" for ``.bin``
    shards. ``lacks_mtp``: there are no weights for multi-token prediction, whatever config.json says.
    """

    folder: Path
    config: dict[str, Any]
    architecture: str
    n_expert: int
    shards: tuple[Path, ...]
    tensors: tuple[SourceTensor, ...]
    n_bytes: int
    dtype: str
    lacks_mtp: bool = False


def read_checkpoint(folder: Path, known_architectures: Collection[str]) -> Checkpoint:
    """Check the checkpoint in ``folder``; known_architectures are the converter's.

    Raises ModelNotFoundError (nothing there) or ModelFormatError, one line that says what is wrong.
    """
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} is no directory with a Hugging Face checkpoint")
    config = _read_config(folder)
    architecture = _architecture(folder, config, known_architectures)
    counts = expert_counts(config)
    n_expert = max(counts, default=0)
    shards, index = _shards(folder)
    if shards[0].suffix == ".bin":
        tensors: tuple[SourceTensor, ...] = ()
        names: Iterable[str] = index or ()
    else:
        tensors = _read_shards(folder, shards, index)
        names = [tensor.name for tensor in tensors]
    if not n_expert and not any("expert" in name for name in names):
        raise ModelFormatError(
            f"{folder} is a dense model ({architecture}), not a Mixture-of-Experts one: convert it with "
            "llama.cpp's convert_hf_to_gguf.py; there are no experts here to manage"
        )
    check_experts(folder, list(names), n_expert if len(counts) == 1 else 0, _layer_count(config))
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        raise ModelFormatError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer.model, ...): copy the model's tokenizer"
            " files there"
        )
    check_consistent(folder, config, architecture, n_expert, tensors)
    matrices = Counter[str]()
    for tensor in tensors:
        if len(tensor.shape) > 1:
            matrices[tensor.dtype] += tensor.n_bytes
    dtype = matrices.most_common(1)[0][0] if matrices else ""
    n_bytes = sum(path.stat().st_size for path in shards)
    names, n_layers = list(names), _layer_count(config)
    lacks_mtp = bool(names) and not any(_is_mtp(name, n_layers) for name in names)
    return Checkpoint(folder, config, architecture, n_expert, shards, tensors, n_bytes, dtype, lacks_mtp)


def _is_mtp(name: str, n_layers: int) -> bool:
    """Whether a tensor is of a block behind the model's layers, by the names that families give those."""
    if _MTP.search(name):
        return True
    layer = _LAYER.search(name)
    return layer is not None and 0 < n_layers <= int(layer[1]) and not _VISION.search(name)


def expert_counts(config: dict[str, Any], depth: int = 3) -> set[int]:
    """The numbers of experts per layer that a config names; empty or {0} for a dense model."""
    found = set()
    for key in _EXPERT_COUNTS:
        value = config.get(key)
        values = value if isinstance(value, list) else [value]
        found |= {v for v in values if isinstance(v, int) and not isinstance(v, bool)}
    for key in TEXT_CONFIGS if depth else ():
        part = config.get(key)
        if isinstance(part, dict):
            found |= expert_counts(part, depth - 1)
    return found


def check_experts(folder: Path, names: list[str], n_expert: int, n_layers: int) -> None:
    """Check that no layer lacks an expert, or a part of one; n_expert is 0 where layers may differ.

    Raises ModelFormatError.
    """
    stems: dict[str, dict[str, set[int]]] = {}
    layers = set()
    for name in names:
        if len(name) > MAX_NAME:
            raise _incomplete(folder, f"a tensor is called {name:.40}... in its index")
        if match := _LAYER.search(name):
            layers.add(int(match[1]))
        if match := _EXPERT.match(name):
            # a matrix may be stored as several tensors, and in some layers otherwise than in others
            part = match["part"].partition(".")[0]
            stems.setdefault(match["stem"], {}).setdefault(part, set()).add(int(match["expert"]))
    missing_layers = sorted(set(range(n_layers)) - layers) if layers else []
    if missing_layers:
        raise _incomplete(folder, f"layer {_some(missing_layers)} of {n_layers} has no tensors")
    parts = {part for found in stems.values() for part in found}
    for stem, found in sorted(stems.items()):
        count = n_expert or 1 + max(max(ids) for ids in found.values())
        for part in sorted(parts):
            ids = found.get(part, set())
            if extra := sorted(n for n in ids if n >= count):
                raise _incomplete(folder, f"{stem} has expert {_some(extra)}, but config.json says {count}")
            if len(ids) < count:
                missing = [n for n in range(min(count, 2 * len(ids) + 2)) if n not in ids]
                raise _incomplete(folder, f"{stem} has no {part} for expert {missing[0]} of {count}")
    _check_routed_layers(folder, names, set(stems))


def _check_routed_layers(folder: Path, names: list[str], stems: set[str]) -> None:
    """A layer that has a router has experts too."""
    with_experts = {name[: name.index("experts")] for name in names if "experts" in name} | {
        stem.removesuffix("experts") for stem in stems
    }
    relative = {prefix.split(".", 3)[-1] for prefix in with_experts if prefix.count(".") >= 3}
    for name in names:
        for router in _ROUTERS:
            parent = name.removesuffix(router)
            if parent != name and parent.split(".", 3)[-1] in relative and parent not in with_experts:
                raise _incomplete(folder, f"{parent.rstrip('.')} has a router and no experts")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of reasonable size. Raises ModelFormatError."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelFormatError(f"{path} has more than {_MAX_JSON_BYTES} bytes, too many for this file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {why(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path} is not JSON: download or copy it again") from error
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path} is no JSON object: download or copy it again")
    return value


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelFormatError(
            f"{folder} has no config.json: give the directory of a Hugging Face checkpoint, or a GGUF file"
        )
    return read_json(path)


def _architecture(folder: Path, config: dict[str, Any], known: Collection[str]) -> str:
    text_config = config.get("text_config")
    found = [
        part["architectures"][0]
        for part in (config, text_config)
        if isinstance(part, dict) and isinstance(part.get("architectures"), list) and part["architectures"]
    ]
    if not found or not isinstance(found[0], str):
        raise ModelFormatError(f'{folder / "config.json"} names no architecture ("architectures")')
    names = [name for name in found if isinstance(name, str)]
    for name in names:
        if name in known:
            return name
    close = difflib.get_close_matches(names[0], sorted(known), n=3)
    hint = f"; it knows {', '.join(close)}" if close else ""
    raise ModelFormatError(
        f"{folder}: the pinned llama.cpp cannot convert the architecture {names[0]!r:.100}"
        f" ({len(known)} are known{hint})"
    )


def _layer_count(config: dict[str, Any]) -> int:
    for part in (config, *(config.get(key) for key in TEXT_CONFIGS)):
        if not isinstance(part, dict):
            continue
        for key in ("num_hidden_layers", "n_layers"):
            value = part.get(key)
            if isinstance(value, int) and 0 < value < 10_000:
                return value
    return 0


def _shards(folder: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """The files with weights, and the index (tensor name -> file name), as the converter finds them."""
    found = sorted(folder.glob("model*.safetensors"))
    index_path = folder / "model.safetensors.index.json"
    if not found and not index_path.is_file():
        found = sorted(folder.glob("pytorch_model*.bin"))
        index_path = folder / "pytorch_model.bin.index.json"
    if index_path.is_file():
        index = read_json(index_path).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ModelFormatError(f"{index_path} has no weight_map: download or copy it again")
        names = set()
        for value in index.values():
            if not isinstance(value, str) or Path(value).name != value or value in ("", ".", ".."):
                raise ModelFormatError(f"{index_path} names {value!r:.100}, which is no file beside it")
            names.add(value)
        shards = tuple(folder / name for name in sorted(names))
        missing = [path.name for path in shards if not path.is_file()]
        if missing:
            raise _incomplete(folder, f"{_some(missing)} of {len(shards)} files is missing")
        return shards, index
    if not found:
        raise ModelNotFoundError(
            f"{folder} has no weights: expected model*.safetensors or pytorch_model*.bin"
        )
    for path in found:
        if match := _PART_OF.match(path.name):
            wanted = [f"{match[1]}-{i + 1:05d}-of-{match[3]}{match[4]}" for i in range(int(match[3]))]
            missing = [name for name in wanted if not (folder / name).is_file()]
            if missing:
                raise _incomplete(folder, f"{_some(missing)} of {len(wanted)} files is missing")
    return tuple(found), {}


def _read_shards(folder: Path, shards: tuple[Path, ...], index: dict[str, str]) -> tuple[SourceTensor, ...]:
    tensors: dict[str, SourceTensor] = {}
    for path in shards:
        for tensor in read_safetensors_header(path):
            if tensor.name in tensors:
                other = tensors[tensor.name].path.name
                raise ModelFormatError(
                    f"{folder}: tensor {tensor.name:.100} is in {other} and in {path.name}"
                )
            tensors[tensor.name] = tensor
    if index:
        missing = [name for name in index if name not in tensors]
        if missing:
            raise _incomplete(folder, f"{index[missing[0]]} does not hold {_some(missing)}")
        extra = [name for name in tensors if name not in index]
        if extra:
            raise ModelFormatError(
                f"{folder}: {_some(extra)} is in {tensors[extra[0]].path.name} and not in the index:"
                " the index belongs to other files"
            )
    if not tensors:
        raise ModelFormatError(f"{folder}: {shards[0].name} holds no tensors")
    return tuple(tensors.values())


def _some(items: list[Any]) -> str:
    more = f" and {len(items) - 1} more" if len(items) > 1 else ""
    return f"{items[0]!s:.120}{more}"


def _incomplete(folder: Path, what: str) -> ModelFormatError:
    return ModelFormatError(f"{folder} is incomplete: {what}; download or copy it again")
