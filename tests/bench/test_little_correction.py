"""Maps of the little pass: what each makes of outputs, and which tokens it is laid over."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'mobile-gguf[convert]'")
from transformers import Qwen3MoeConfig  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock  # noqa: E402

from mobile_gguf.bench import little_correction  # noqa: E402
from mobile_gguf.bench.little_correction import MAPS, Experts, Moments  # noqa: E402

N_EXPERT, TOP_K, N_EMBD = 6, 4, 8


def outputs(seed: int = 1) -> Moments:
    rng = torch.Generator().manual_seed(seed)
    big = torch.randn(400, N_EMBD, generator=rng) * torch.arange(1, N_EMBD + 1) + 3
    return Moments(0.5 * big + 0.2 * torch.randn(400, N_EMBD, generator=rng) - 1, big)


def mapped(name: str, moments: Moments) -> Any:
    scale, added = MAPS[name](moments)
    return moments.little * scale + added


def test_no_map_is_better_by_squares_than_the_fitted_one_of_its_kind() -> None:
    moments = outputs()
    errors = {name: float((mapped(name, moments) - moments.big).square().mean()) for name in MAPS}
    assert min(errors, key=errors.__getitem__) == "scale and shift of each channel"
    assert errors["scale and shift of a layer"] < errors["none"]
    assert errors["shift of each channel"] < errors["none"]
    assert torch.equal(mapped("none", moments), moments.little)


def test_means_deviations_and_lengths_are_the_big_ones() -> None:
    moments = outputs()
    found = mapped("mean and deviation of each channel", moments)
    torch.testing.assert_close(found.mean(0), moments.big.mean(0))
    torch.testing.assert_close(found.std(0), moments.big.std(0))
    torch.testing.assert_close(mapped("norm", moments).norm(), moments.big.norm())
    torch.testing.assert_close(mapped("shift of each channel", moments).mean(0), moments.big.mean(0))


def block() -> Any:
    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        hidden_size=N_EMBD, moe_intermediate_size=5, num_experts=N_EXPERT, num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
    )  # fmt: skip
    made = Qwen3MoeSparseMoeBlock(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def by_hand(block: Any, x: np.ndarray, k: int, mass: int) -> np.ndarray:
    """A token's sum of its ``k`` heaviest experts, whose weights are parts of the mass of ``mass``."""
    gate = block.gate.weight.detach().numpy() @ x
    probabilities = np.exp(gate - gate.max()) / np.exp(gate - gate.max()).sum()
    order = np.argsort(-probabilities)
    total = np.zeros(N_EMBD)
    for expert in order[:k]:
        both = block.experts.gate_up_proj[expert].detach().numpy() @ x
        opened, up = np.split(both, 2)
        hidden = opened / (1 + np.exp(-opened)) * up
        share = probabilities[expert] / probabilities[order[:mass]].sum()
        total += share * (block.experts.down_proj[expert].detach().numpy() @ hidden)
    return total


@pytest.mark.parametrize("mass", [0, 3, TOP_K])
def test_a_map_is_laid_over_little_tokens_alone(mass: int) -> None:
    layer = Experts(block())
    layer.little_k, layer.mass, layer.n_prompt = 2, mass, 2
    layer.map = torch.full((1,), 2.0), torch.linspace(0, 1, N_EMBD)
    hidden = torch.randn(2, 5, N_EMBD, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        found = layer(hidden).numpy()
    for text in range(2):
        for i in range(5):
            x = hidden[text, i].numpy().astype(np.float64)
            if i < 2:
                expected = by_hand(layer.block, x, TOP_K, TOP_K)
            else:
                expected = 2 * by_hand(layer.block, x, 2, mass or 2) + np.linspace(0, 1, N_EMBD)
            np.testing.assert_allclose(found[text, i], expected, rtol=1e-4, atol=1e-4)


def test_a_map_is_fitted_to_what_all_experts_give() -> None:
    layer = Experts(block())
    layer.little_k, layer.n_prompt, layer.fit = 2, 1, little_correction.channel_moments
    hidden = torch.randn(3, 50, N_EMBD, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = layer(hidden)
        layer.little_k = 0
        exact = layer(hidden)
    torch.testing.assert_close(found[:, 0], exact[:, 0])
    torch.testing.assert_close(found[:, 1:].mean((0, 1)), exact[:, 1:].mean((0, 1)))
    assert not torch.allclose(found, exact)


def test_what_cannot_be_measured_is_one_line(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        little_correction.main(
            [str(tmp_path), "--fit", "a", "--text", "b", "--block", "32", "--prompt", "31"]
        )
    assert "longer than its prompt" in capsys.readouterr().err
