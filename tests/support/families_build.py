"""Makes checkpoints of ``family_table`` as their makers publish them, and converts them as our child does.

Run as a script in the environment of ``tiny_build``: stdin {"names": [...], "cache": folder}. cache/NAME gets
checkpoint/ and model.gguf (F32, stacked), and appears whole or not at all; cache/NAME.error says what went
wrong. Each is made in a fork of this process: torch is loaded once, and the converter's classes keep state.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import family_table
import tiny_build
import torch
import transformers
from convert_family_child import Channel, use_tiny_tokenizer
from safetensors.torch import load_file, save_file

from mobile_gguf.convert.hf import checkpoint as looked_at
from mobile_gguf.convert.hf import upstream_child

_N_VOCAB = family_table.VOCAB


class Blocks:
    """Blocks for multi-token prediction: copies of the last block, with norms and a projection."""

    def __init__(self, tensors: dict[str, torch.Tensor], n_layer: int, n_embd: int) -> None:
        self.tensors, self.n_layer, self.n_embd = tensors, n_layer, n_embd
        self.rng = torch.Generator().manual_seed(7)
        mark = f"layers.{n_layer - 1}."
        self.root = next(name for name in tensors if mark in name).split("layers.")[0]

    def block(self, number: int) -> dict[str, torch.Tensor]:
        prefix = f"{self.root}layers.{number}."
        return {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}

    def matrix(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.rng) / shape[-1] ** 0.5

    def norm(self) -> torch.Tensor:
        return 1 + 0.1 * torch.randn(self.n_embd, generator=self.rng)

    def joined(self, prefix: str, **own: torch.Tensor) -> dict[str, torch.Tensor]:
        """The last block behind the model's, and what joins it to a token and a hidden state."""
        eh = {
            "eh_proj": self.matrix(self.n_embd, 2 * self.n_embd),
            "enorm": self.norm(),
            "hnorm": self.norm(),
        }
        last = self.block(self.n_layer - 1)
        return {prefix + name: t.clone() for name, t in last.items()} | {
            f"{prefix}{name}.weight": t for name, t in (eh | own).items()
        }

    def deepseek(self) -> dict[str, torch.Tensor]:
        head = {"shared_head.norm": self.norm(), "shared_head.head": self.matrix(_N_VOCAB, self.n_embd)}
        prefix = f"{self.root}layers.{self.n_layer}."
        return self.joined(prefix, **head, embed_tokens=self.matrix(_N_VOCAB, self.n_embd))

    def step(self) -> dict[str, torch.Tensor]:
        head = {
            "transformer.shared_head.norm": self.norm(),
            "transformer.shared_head.output": self.matrix(_N_VOCAB, self.n_embd),
        }
        return self.joined(f"{self.root}layers.{self.n_layer}.", **head)

    def qwen(self) -> dict[str, torch.Tensor]:
        last = self.block(self.n_layer - 1)
        return {f"mtp.layers.0.{name}": t.clone() for name, t in last.items()} | {
            "mtp.fc.weight": self.matrix(self.n_embd, 2 * self.n_embd),
            "mtp.norm.weight": self.norm(),
            "mtp.pre_fc_norm_embedding.weight": self.norm(),
            "mtp.pre_fc_norm_hidden.weight": self.norm(),
        }

    def nemotron(self) -> dict[str, torch.Tensor]:
        """Two of its layers, which attend and have experts, make one block."""
        attends = next(i for i in range(self.n_layer) if "mixer.q_proj.weight" in self.block(i))
        made = {}
        for number, layer in enumerate((attends, self.n_layer - 1)):
            made |= {f"mtp.layers.{number}.{name}": t.clone() for name, t in self.block(layer).items()}
        return made | {
            "mtp.layers.0.enorm.weight": self.norm(),
            "mtp.layers.0.hnorm.weight": self.norm(),
            "mtp.layers.0.eh_proj.weight": self.matrix(self.n_embd, 2 * self.n_embd),
            "mtp.layers.1.final_layernorm.weight": self.norm(),
        }


def make_checkpoint(family: family_table.Family, folder: Path) -> None:
    config = getattr(transformers, family.config_class)(**family.config)
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    model = getattr(transformers, family.model_class)(config).float().eval()
    tiny_build.randomize(model, 1)
    with torch.no_grad():
        for tensor in model.parameters():  # what transformers leaves to a checkpoint
            if not torch.isfinite(tensor).all():
                tensor.zero_()
    model.save_pretrained(folder)
    tiny_build.write_tokenizer(folder, family_table.N_TOKENS)
    tokenizer = folder / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"add_bos_token": True}))
    path = folder / "config.json"
    values: dict[str, Any] = json.loads(path.read_text()) | family.published
    if family.text:
        values["text_config"] |= family.text
    path.write_text(json.dumps(values))
    if family.mtp:
        weights = folder / "model.safetensors"
        tensors = load_file(weights)
        n_embd = config.get_text_config().hidden_size
        blocks = Blocks(tensors, family.n_layer, n_embd)
        save_file(tensors | getattr(blocks, family.mtp)(), weights, metadata={"format": "pt"})


def convert(folder: Path, out: Path) -> None:
    """As ``mobile-gguf convert --outtype f32 --stacked`` does in its child."""
    from mobile_gguf.convert.hf.upstream import known_architectures

    converter = Path(os.environ["PYTHONPATH"].split(os.pathsep)[0])
    seen = looked_at.read_checkpoint(folder, known_architectures(converter))
    use_tiny_tokenizer(folder)
    job = {
        "folder": str(folder), "out": str(out), "outtype": "f32", "threads": 1, "name": None,
        "pre_tokenizer": "gpt-2", "trust_remote_code": False, "no_mtp": seen.lacks_mtp,
    }  # fmt: skip
    channel = Channel()
    with torch.inference_mode():
        writer = upstream_child.prepared(channel, job)  # type: ignore[arg-type]
        upstream_child.write(channel, writer, out)  # type: ignore[arg-type]


def build(name: str, cache: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        result = Path(scratch) / "result"
        make_checkpoint(family_table.FAMILIES[name], result / "checkpoint")
        convert(result / "checkpoint", result / "model.gguf")
        os.replace(result, cache / name)


def main() -> int:
    request = json.load(sys.stdin)
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    torch.set_num_threads(1)
    import conversion  # type: ignore[import-not-found]

    conversion.load_all_models()
    cache = Path(request["cache"])
    for name in request["names"]:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            build(name, cache)
        except Exception as error:  # one family must not hide the others
            logging.exception("building %s failed", name)
            (cache / f"{name}.error").write_text(f"{type(error).__name__}: {error}")
        os._exit(0)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
