"""Whether an affine map makes the little pass better at no byte: measured with Transformers, no engine.

    python -m mobile_gguf.bench.little_correction CHECKPOINT --fit a.txt --text b.txt

In every layer a little token's sum of experts is mapped to what all experts would have given, by numbers that
are fitted on one text and judged on another: KL of the next token's distribution against the exact one, with
all tokens behind a block's prompt little, so that memory holds what it would hold. A layer is fitted behind
the corrected ones before it. All maps read the same experts. They stand beside what costs nothing to know:
the mass that kept weights are divided by (``mass``, as in ``generate/passes/rungs.py``). For checkpoints of
Qwen3-MoE, whose top-k has a fixed sum.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mobile_gguf.errors import UsageError
from mobile_gguf.generate.pricing import cut_text
from mobile_gguf.wording import markdown_table

from .record import record_measured

# Of the maps of a layer's output: what multiplies it, and what is added.
Map = tuple[Tensor, Tensor]


@dataclass
class Moments:
    """Of little outputs [n, n_embd] and the big ones of the same inputs, by channel."""

    little: Tensor
    big: Tensor

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        return self.little.mean(0), self.big.mean(0)

    def centred(self) -> tuple[Tensor, Tensor]:
        """Both without their means."""
        of_little, of_big = self.means
        return self.little - of_little, self.big - of_big


def no_map(moments: Moments) -> Map:
    """As it is."""
    return torch.ones(1), torch.zeros(1)


def norm(moments: Moments) -> Map:
    """One scale a layer, so that outputs are as long as the big ones on average."""
    return (moments.big.square().sum() / moments.little.square().sum()).sqrt()[None], torch.zeros(1)


def layer_affine(moments: Moments) -> Map:
    """One scale and one shift a layer, by least squares."""
    little, big = moments.little, moments.big
    scale = ((little - little.mean()) * (big - big.mean())).sum() / (little - little.mean()).square().sum()
    return scale[None], (big.mean() - scale * little.mean())[None]


def shift(moments: Moments) -> Map:
    """A shift for each channel."""
    of_little, of_big = moments.means
    return torch.ones(1), of_big - of_little


def channel_affine(moments: Moments) -> Map:
    """A scale and a shift for each channel, by least squares."""
    little, big = moments.centred()
    scale = (little * big).sum(0) / little.square().sum(0)
    of_little, of_big = moments.means
    return scale, of_big - scale * of_little


def channel_moments(moments: Moments) -> Map:
    """A scale and a shift for each channel, so that mean and deviation are the big output's (LDA)."""
    little, big = moments.centred()
    scale = (big.square().sum(0) / little.square().sum(0)).sqrt()
    of_little, of_big = moments.means
    return scale, of_big - scale * of_little


MAPS: dict[str, Callable[[Moments], Map]] = {
    "none": no_map,
    "norm": norm,
    "scale and shift of a layer": layer_affine,
    "shift of each channel": shift,
    "scale and shift of each channel": channel_affine,
    "mean and deviation of each channel": channel_moments,
}


class Experts(nn.Module):
    """A layer's experts in the place of the model's own block, with little tokens.

    ``little_k`` 0: all tokens are big; else those from ``n_prompt`` on have so many experts, whose weights
    are divided by the mass of the ``mass`` heaviest, and ``map`` is laid over their sum. ``fit`` makes it
    anew of the outputs that pass.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block
        self.little_k = self.mass = self.n_prompt = 0
        self.map: Map = no_map(Moments(torch.empty(0), torch.empty(0)))
        self.fit: Callable[[Moments], Map] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.view(-1, hidden.shape[-1])
        _, weights, ids = self.block.gate(flat)
        if not self.little_k:
            return self.block.experts(flat, ids, weights).view(hidden.shape)
        weights, order = weights.sort(-1, descending=True)
        ids = ids.gather(-1, order)
        k = self.little_k
        kept = (
            weights[:, :k]
            / weights[:, : self.mass or k].sum(-1, keepdim=True)
            * weights.sum(-1, keepdim=True)
        )
        little = self.block.experts(flat, ids[:, :k], kept)
        is_little = torch.arange(hidden.shape[1]).repeat(hidden.shape[0]) >= self.n_prompt
        big = torch.zeros_like(little)
        rows = torch.ones_like(is_little) if self.fit is not None else ~is_little
        big[rows] = self.block.experts(flat[rows], ids[rows], weights[rows])
        if self.fit is not None:
            self.map = self.fit(Moments(little[is_little], big[is_little]))
        scale, added = self.map
        return torch.where(is_little[:, None], little * scale + added, big).view(hidden.shape)


@dataclass(frozen=True)
class Corrected:
    """KL in nats a token, its standard error over blocks, and the same of what it saves over no map."""

    little_k: int
    mass: int
    map: str
    kl: float
    kl_error: float
    saves: float
    saves_error: float
    agreement: float


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All maps at every number of experts and mass. Raises UsageError."""
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    fitted, judged = (
        torch.tensor(cut_text(tokenizer.encode(path.read_text("utf-8")).ids, [], args.block, args.tokens))
        for path in (args.fit, args.text)
    )
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    layers = _watched(model)
    top_k = model.config.num_experts_per_tok
    rows: list[Corrected] = []
    with torch.inference_mode():
        exact = _log_probabilities(model, judged, args.prompt)
        for little_k in args.little_k or [top_k // 2]:
            for mass in dict.fromkeys((0, (little_k + top_k) // 2, top_k)):
                plain: Tensor | None = None
                for name, fit in MAPS.items():
                    with _little(layers, little_k, mass, args.prompt):
                        with _fitting(layers, fit):
                            model.model(fitted)
                        found = _log_probabilities(model, judged, args.prompt)
                    kl = (exact.exp() * (exact - found)).sum(-1).mean(1)  # of blocks
                    plain = kl if plain is None else plain
                    same = (exact.argmax(-1) == found.argmax(-1)).float().mean()
                    saved = (plain - kl) / plain.mean()
                    rows.append(
                        Corrected(
                            little_k, mass, name, float(kl.mean()), _error(kl), float(saved.mean()),
                            _error(saved), float(same),
                        )
                    )  # fmt: skip
                    print(asdict(rows[-1]), file=sys.stderr, flush=True)
    return {
        "checkpoint": args.checkpoint.name, "fitted": fitted.numel(),
        "positions": judged.numel() - judged.shape[0] * args.prompt, "rows": [asdict(row) for row in rows],
    }  # fmt: skip


def _watched(model: Any) -> list[Experts]:
    """Puts an Experts around every block of experts. Raises UsageError where there is none."""
    layers = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp = Experts(layer.mlp)
            layers.append(layer.mlp)
    if not layers or not model.config.norm_topk_prob:
        raise UsageError(f"{model.config.model_type} is no Qwen3-MoE, whose top-k has a fixed sum")
    return layers


@contextmanager
def _little(layers: Sequence[Experts], little_k: int, mass: int, n_prompt: int) -> Iterator[None]:
    for layer in layers:
        layer.little_k, layer.mass, layer.n_prompt = little_k, mass, n_prompt
    try:
        yield
    finally:
        for layer in layers:
            layer.little_k = 0


@contextmanager
def _fitting(layers: Sequence[Experts], fit: Callable[[Moments], Map]) -> Iterator[None]:
    for layer in layers:
        layer.fit = fit
    try:
        yield
    finally:
        for layer in layers:
            layer.fit = None


def _log_probabilities(model: Any, blocks: Tensor, n_prompt: int) -> Tensor:
    """[block, position, n_vocab] behind the prompts."""
    return torch.cat([model(part).logits[:, n_prompt:].log_softmax(-1) for part in blocks.split(8)])


def _error(of_blocks: Tensor) -> float:
    return float(of_blocks.std() / len(of_blocks) ** 0.5)


def page_of(record: dict[str, Any]) -> str:
    """A line for each map."""
    heads = ("experts", "mass of", "map", "KL", "±", "saves", "±", "top-1")
    rows = [
        (
            str(row["little_k"]), str(row["mass"] or row["little_k"]), row["map"], f"{row['kl']:.5f}",
            f"{row['kl_error']:.5f}", f"{100 * row['saves']:.1f}%", f"{100 * row['saves_error']:.1f}%",
            f"{100 * row['agreement']:.1f}%",
        )
        for row in record["rows"]
    ]  # fmt: skip
    about = (
        f"{record['checkpoint']}: fitted on {record['fitted']} tokens, judged on {record['positions']} others"
    )
    return "\n".join([about, "", *markdown_table([heads, *rows], left=(2,)), ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mobile_gguf.bench.little_correction", description=__doc__
    )
    parser.add_argument("checkpoint", type=Path, help="a folder of Transformers")
    parser.add_argument("--fit", type=Path, required=True, help="the text that maps are fitted on")
    parser.add_argument("--text", type=Path, required=True, help="the text that they are judged on")
    parser.add_argument("--tokens", type=int, default=16384, help="of each")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument(
        "--prompt", type=int, default=32, help="tokens of a block that are big and not judged"
    )
    parser.add_argument("--little-k", type=int, nargs="+", help="experts of a little token; default: half")
    parser.add_argument("--out", type=Path, help="folder for little_correction.json and little_correction.md")
    args = parser.parse_args(argv)
    if not 0 < args.prompt < args.block - 1:
        parser.error("a block is longer than its prompt by two tokens at least")
    return record_measured("little_correction", argv, lambda: measure(args), page_of, args.out)


if __name__ == "__main__":
    raise SystemExit(main())
