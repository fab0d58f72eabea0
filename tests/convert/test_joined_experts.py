"""Experts of a layer in one tensor become what the converter reads, or are refused by name."""

from __future__ import annotations

import pytest

from mobile_gguf.convert.hf.joined_experts import BY_INPUT, BY_OUTPUT, as_read, direction
from mobile_gguf.convert.hf.upstream_config import ConversionError

torch = pytest.importorskip("torch", reason="pip install 'mobile-gguf[convert]'")

N, EMBD, FF = 3, 8, 4  # gate and up together are as wide as the embedding: one matrix alone tells nothing
STEM = "model.layers.1.mlp.experts"


def experts(turned: bool):
    gate, up = torch.randn(N, FF, EMBD), torch.randn(N, FF, EMBD)
    gate_up, down = torch.cat([gate, up], 1), torch.randn(N, EMBD, FF)
    joined = [each.transpose(1, 2) if turned else each for each in (gate_up, down)]
    tensors = {f"{STEM}.gate_up_proj": joined[0], f"{STEM}.down_proj": joined[1], "lm_head.weight": up[0]}
    return {name: lambda t=tensor: t for name, tensor in tensors.items()}, gate, up, down


@pytest.mark.parametrize(
    ("gate_up", "down", "expected"),
    [
        ((3, 8, 8), (3, 8, 4), BY_OUTPUT),
        ((3, 8, 8), (3, 4, 8), BY_INPUT),
        ((3, 10, 8), (3, 8, 5), BY_OUTPUT),
        ((3, 8, 16), (3, 8, 8), BY_INPUT),  # a square down
    ],
)
def test_both_shapes_of_a_layer_tell_the_direction(gate_up, down, expected):
    assert direction(gate_up, down) == expected


@pytest.mark.parametrize(
    ("gate_up", "down"), [((3, 8, 8), (3, 8, 8)), ((3, 8, 8), (2, 8, 4)), ((8, 8), (8, 4))]
)
def test_other_shapes_tell_nothing(gate_up, down):
    with pytest.raises(ValueError, match="of no form that is known"):
        direction(gate_up, down)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("architecture", "by_input"),
    [("Qwen3VLMoeForConditionalGeneration", True), ("Qwen3MoeForCausalLM", False)],
)
def test_they_are_turned_as_the_converter_reads_them(architecture, by_input, turned):
    tensors, gate, up, down = experts(turned)
    read = as_read(tensors, architecture)
    gate_up, down_read = read[f"{STEM}.gate_up_proj"](), read[f"{STEM}.down_proj"]()
    if by_input:
        gate_up, down_read = gate_up.transpose(1, 2), down_read.transpose(1, 2)
    assert torch.equal(gate_up, torch.cat([gate, up], 1))
    assert torch.equal(down_read, down)
    assert "lm_head.weight" in read


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("Glm4MoeForCausalLM", ("gate_proj", "up_proj", "down_proj")),
        ("MixtralForCausalLM", ("w1", "w3", "w2")),
    ],
)
def test_they_are_parted_where_the_converter_reads_one_by_one(architecture, names, turned):
    tensors, *matrices = experts(turned)
    read = as_read(tensors, architecture)
    assert len(read) == 1 + 3 * N
    for name, matrix in zip(names, matrices, strict=True):
        for expert in range(N):
            assert torch.equal(read[f"{STEM}.{expert}.{name}.weight"](), matrix[expert])


def test_what_is_not_certain_is_refused_by_name():
    tensors, *_ = experts(False)
    alone = {name: tensor for name, tensor in tensors.items() if not name.endswith("down_proj")}
    with pytest.raises(ConversionError, match=r"layers\.1\.mlp\.experts\.gate_up_proj has no other half"):
        as_read(alone, "Glm4MoeForCausalLM")
    down = torch.zeros(N, EMBD, EMBD)
    tensors[f"{STEM}.down_proj"] = lambda t=down: t
    with pytest.raises(ConversionError, match=r"experts\.gate_up_proj: experts of the shapes"):
        as_read(tensors, "Glm4MoeForCausalLM")


def test_shared_experts_are_no_joined_ones():
    tensors, *_ = experts(False)
    shared = {
        f"model.layers.1.mlp.shared_experts.{part}_proj.weight": lambda: None for part in ("gate", "down")
    }
    assert set(as_read(shared | tensors, "Glm4MoeForCausalLM")) >= set(shared)


def test_quantised_ones_are_the_converters():
    tensors, *_ = experts(False)
    scales = {f"{STEM}.{part}_proj_scale_inv": lambda: torch.ones(1) for part in ("gate_up", "down")}
    assert list(as_read(tensors | scales, "Glm4MoeForCausalLM")) == list(tensors | scales)
