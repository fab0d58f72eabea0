"""Experts of a layer in one tensor, as tools save them: as the converter reads them for each family.

Checkpoints come with one tensor for each expert and matrix, or with all experts of a layer joined: gate and
up in ``experts.gate_up_proj``, and ``experts.down_proj``; a matrix's rows are its outputs, or its inputs.
transformers 5 keeps them joined by output, whatever was published, and some tools save that. How a family's
converter reads them is known; what a checkpoint has is in the shapes, and both matrices of a layer tell it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .upstream_config import ConversionError

BY_OUTPUT, BY_INPUT = "by output", "by input"
# how the pinned converter reads joined experts; it reads those of other families one by one
READS_JOINED = {
    **dict.fromkeys(("GptOssForCausalLM", "Llama4ForCausalLM", "Llama4ForConditionalGeneration"), BY_INPUT),
    **dict.fromkeys(
        ("Qwen3VLMoeForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration"), BY_INPUT
    ),
    **dict.fromkeys(
        (
            "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "Qwen3_5MoeForCausalLM",
            "Qwen3_5MoeForConditionalGeneration", "Qwen4ExpForCausalLM", "Qwen4ExpForConditionalGeneration",
            "Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration",
            "GraniteMoeSWAForCausalLM", "HYV4ForCausalLM", "Mistral3ForConditionalGeneration",
        ),
        BY_OUTPUT,
    ),
}  # fmt: skip
# of the others, those whose experts' matrices are numbered: gate, up, down
_NUMBERED = ("w1", "w3", "w2")
_NAMED = ("gate_proj", "up_proj", "down_proj")
NUMBERED = frozenset(
    {
        "MixtralForCausalLM", "PhiMoEForCausalLM", "MiniMaxM2ForCausalLM", "KimiLinearForCausalLM",
        "Lfm2MoeForCausalLM", "MiniMaxM3SparseForConditionalGeneration", "MiniMaxM3SparseForCausalLM",
    }
)  # fmt: skip
_JOINED = re.compile(r"^(?P<stem>(?:.*\.)?experts)\.(?P<part>gate_up_proj|down_proj)(?:\.weight)?$")

_SCALES = ("_scale_inv", "_scale", "_scales", "_blocks")

Tensors = dict[str, Callable[[], Any]]


def direction(gate_up: tuple[int, ...], down: tuple[int, ...]) -> str:
    """Which way the matrices of a layer's joined experts [n_expert, rows, columns] stand.

    By output they are [2 n_ff, n_embd] and [n_embd, n_ff], by input the other way round: no pair of shapes is
    both. Raises ValueError for one that is neither.
    """
    if len(gate_up) == len(down) == 3 and gate_up[0] == down[0]:
        if gate_up[1] == 2 * down[2] and gate_up[2] == down[1]:
            return BY_OUTPUT
        if gate_up[2] == 2 * down[1] and gate_up[1] == down[2]:
            return BY_INPUT
    raise ValueError(f"experts of the shapes {list(gate_up)} and {list(down)} are of no form that is known")


def as_read(tensors: Mapping[str, Callable[[], Any]], architecture: str) -> Tensors:
    """The checkpoint's tensors, its joined experts as the converter reads them for ``architecture``.

    Raises ConversionError, with the tensor's name, where what they mean is not certain.
    """
    layers: dict[str, dict[str, str]] = {}
    for name in tensors:
        is_scaled = any(name + suffix in tensors for suffix in _SCALES)  # the converter's to undo
        if not is_scaled and (match := _JOINED.match(name)):
            layers.setdefault(match["stem"], {})[match["part"]] = name
    made: Tensors = {}
    for name, generate in tensors.items():
        match = _JOINED.match(name)
        if match is None or name not in layers.get(match["stem"], {}).values():
            made[name] = generate
        elif len(parts := layers[match["stem"]]) == 2:
            read = _layer(tensors, match["stem"], parts, architecture)
            if name in read:  # in its own place: the converter writes tensors in the order in which they come
                made[name] = read[name]
            elif match["part"] == "down_proj":
                made |= read
        elif architecture in READS_JOINED:
            made[name] = generate  # the converter says what it lacks
        else:
            raise ConversionError(f"{name} has no other half: gate_up_proj and down_proj go together")
    return made


def _layer(
    tensors: Mapping[str, Callable[[], Any]], stem: str, parts: dict[str, str], architecture: str
) -> Tensors:
    gate_up, down = tensors[parts["gate_up_proj"]], tensors[parts["down_proj"]]
    shapes = [tuple(int(size) for size in part().shape) for part in (gate_up, down)]
    try:
        found = direction(*shapes)
    except ValueError as error:
        raise ConversionError(f"{parts['gate_up_proj']}: {error}") from None
    wanted = READS_JOINED.get(architecture)
    if wanted == found:
        return {parts["gate_up_proj"]: gate_up, parts["down_proj"]: down}
    if wanted is not None:
        return {parts["gate_up_proj"]: _turned(gate_up), parts["down_proj"]: _turned(down)}
    names = _NUMBERED if architecture in NUMBERED else _NAMED
    return dict(_one_by_one(gate_up, down, shapes[0][0], found == BY_INPUT, stem, names))


def _turned(generate: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: generate().transpose(-1, -2)


def _one_by_one(
    gate_up: Callable[[], Any],
    down: Callable[[], Any],
    n_expert: int,
    turned: bool,
    stem: str,
    names: tuple[str, ...],
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every expert's gate, up and down, outputs first."""

    def matrix(expert: int, part: str) -> Any:
        whole = (down if part == names[2] else gate_up)()[expert]
        whole = whole.transpose(-1, -2) if turned else whole
        if part == names[2]:
            return whole
        half = whole.shape[0] // 2
        return whole[:half] if part == names[0] else whole[half:]

    for expert in range(n_expert):
        for part in names:
            yield f"{stem}.{expert}.{part}.weight", lambda e=expert, p=part: matrix(e, p)
