"""From the dense model to a Mixture of Experts: the named weights of the demo, in numpy alone.

``recipe.npz`` holds, layer first: ``neuron_expert`` [30, 1536] (0 the shared expert, e the routed expert
e-1), the int8 ``router`` [30, 16, 576], and low-rank corrections ``{gate,up,down}_{a,b}``, each with a
``_scale``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from numpy.typing import NDArray

N_LAYER = 30
N_EMBD = 576
N_HEAD = 9
N_HEAD_KV = 3
HEAD_DIM = 64
N_FF = 1536
N_FF_SHARED = 1024
N_EXPERT = 16
N_FF_EXPERT = 32
N_EXPERT_USED = 8
RMS_NORM_EPS = 1e-5

# a softmax over 16 experts gives each about 1/16, and the sigmoid of a gate near zero gives 1/2
ROUTED_DOWN_FACTOR = N_EXPERT
SHARED_DOWN_FACTOR = 2
# llama.cpp takes the sigmoid as silu(x)/x, which is not a number at x = 0
SHARED_GATE_NOISE = 1e-4
SHARED_GATE_SEED = 1

Floats = NDArray[np.float32]


class Weight(NamedTuple):
    """One tensor: F32 values, or rows of quantised blocks ([rows, bytes per row]) taken over unchanged."""

    data: NDArray[Any]
    type: GGMLQuantizationType = GGMLQuantizationType.F32

    def values(self) -> Floats:
        """Return the values in float32."""
        if self.type == GGMLQuantizationType.F32:
            return self.data
        return dequantize(self.data, self.type).astype(np.float32, copy=False)


def demo_weights(source: GGUFReader, recipe: Path) -> Iterator[tuple[str, Weight]]:
    """Yield the demo model's tensors under their GGUF names, in file order, one layer's worth at a time.

    Shapes are numpy's (rows first): experts are stacked, [16, 32, 576] for gate and up, [16, 576, 32] for
    down. Attention and embedding keep the source's quantised blocks; what the recipe changes is float32.
    """
    dense = {tensor.name: Weight(tensor.data, tensor.tensor_type) for tensor in source.tensors}
    with np.load(recipe) as arrays:
        stacks = {name: arrays[name] for name in arrays.files}
    shared_gates = shared_gate_noise()

    yield "token_embd.weight", dense["token_embd.weight"]
    for layer in range(N_LAYER):
        prefix = f"blk.{layer}."
        ours = {name: stack[layer] for name, stack in stacks.items()}
        for name, weight in _attention(dense, prefix):
            yield prefix + name, weight
        yield prefix + "ffn_norm.weight", dense[prefix + "ffn_norm.weight"]
        for name, values in _feed_forward(dense, prefix, ours):
            yield prefix + name, Weight(np.ascontiguousarray(values))
        yield prefix + "ffn_gate_inp_shexp.weight", Weight(shared_gates[layer])
    yield "output_norm.weight", dense["output_norm.weight"]
    yield "output.weight", dense["token_embd.weight"]


def shared_gate_noise() -> Floats:
    """Return the shared experts' gates, [30, 1, 576]: normal noise of 1e-4 that leaves their sigmoid at 1/2.

    Routing is nearly flat, so that even this noise decides between experts now and then. It is therefore
    the noise the expected outputs were made with: per layer, what ``torch.randn(1, 576)`` gives on a CPU
    after ``torch.manual_seed(1)``, the Box-Muller transform of 24 bits a word of the Mersenne Twister, 16 at
    a time.
    """
    words = np.random.RandomState(SHARED_GATE_SEED).randint(1 << 32, size=N_LAYER * N_EMBD, dtype=np.uint32)
    uniform = (words & 0xFFFFFF).astype(np.float32) / np.float32(1 << 24)
    radius_part, angle_part = uniform.reshape(-1, 2, 8).swapaxes(0, 1)
    radius = np.sqrt(-2 * np.log(1 - radius_part))
    angle = np.float32(2 * np.pi) * angle_part
    normal = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1)
    return normal.reshape(N_LAYER, 1, N_EMBD) * np.float32(SHARED_GATE_NOISE)


def _attention(dense: dict[str, Weight], prefix: str) -> Iterator[tuple[str, Weight]]:
    yield "attn_norm.weight", dense[prefix + "attn_norm.weight"]
    for name, heads in (("attn_q", N_HEAD), ("attn_k", N_HEAD_KV), ("attn_v", None)):
        weight = dense[prefix + name + ".weight"]
        if heads is not None:
            weight = Weight(_half_split_rows(weight.data, heads), weight.type)
        yield name + ".weight", weight
        yield name + ".bias", Weight(np.zeros(weight.data.shape[0], dtype=np.float32))
    yield "attn_output.weight", dense[prefix + "attn_output.weight"]


def _half_split_rows(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorder the rows of each head from adjacent rotary pairs (llama) to half-split ones (qwen2moe).

    Half-split is Hugging Face's layout: this inverts the permutation of llama.cpp's converter for
    LlamaForCausalLM. Rows are moved whole, so they may be quantised.
    """
    pairs = rows.reshape(heads, HEAD_DIM // 2, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _feed_forward(
    dense: dict[str, Weight], prefix: str, recipe: dict[str, NDArray[Any]]
) -> Iterator[tuple[str, Floats]]:
    order = np.argsort(recipe["neuron_expert"], kind="stable")
    gate = dense[prefix + "ffn_gate.weight"].values()[order] + _low_rank(recipe, "gate")
    up = dense[prefix + "ffn_up.weight"].values()[order] + _low_rank(recipe, "up")
    down = dense[prefix + "ffn_down.weight"].values()[:, order] + _low_rank(recipe, "down")

    def stacked(rows: Floats) -> Floats:  # [512, 576] -> [16, 32, 576]
        return rows.reshape(N_EXPERT, N_FF_EXPERT, N_EMBD)

    yield "ffn_gate_inp.weight", _scaled(recipe, "router")
    yield "ffn_gate_exps.weight", stacked(gate[N_FF_SHARED:])
    yield "ffn_up_exps.weight", stacked(up[N_FF_SHARED:])
    yield "ffn_down_exps.weight", stacked(down[:, N_FF_SHARED:].T).swapaxes(1, 2) * ROUTED_DOWN_FACTOR
    yield "ffn_gate_shexp.weight", gate[:N_FF_SHARED]
    yield "ffn_up_shexp.weight", up[:N_FF_SHARED]
    yield "ffn_down_shexp.weight", down[:, :N_FF_SHARED] * SHARED_DOWN_FACTOR


def _low_rank(recipe: dict[str, NDArray[Any]], name: str) -> Floats:
    return _scaled(recipe, name + "_a") @ _scaled(recipe, name + "_b")


def _scaled(recipe: dict[str, NDArray[Any]], name: str) -> Floats:
    return recipe[name].astype(np.float32) * recipe[name + "_scale"].astype(np.float32)
