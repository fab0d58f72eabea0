"""Makes checkpoints of ``family_table`` as their makers publish them, and converts them as our child does.

Run as a script in the environment of ``tiny_build``: stdin {name: folder}. The folder gets checkpoint/,
model.gguf (F32, stacked) and q8_0.gguf, and appears whole or not at all; folder.error says what went wrong.
Each is made in a fork of this process: torch is loaded once, and the converter's classes keep state.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable
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
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    for pattern, replacement in family.renamed:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    if family.made:
        tensors = FINISHED[family.made](tensors)
    if family.mtp:
        n_embd = config.get_text_config().hidden_size
        blocks = Blocks(tensors, family.n_layer, n_embd)
        tensors |= getattr(blocks, family.mtp)()
    save_file(tensors, weights, metadata={"format": "pt"})


def experts_by_input(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as [n_expert, n_in, n_out], which transformers 5 writes the other way round."""
    return {
        name: tensor.transpose(1, 2).contiguous() if "mlp.experts." in name else tensor
        for name, tensor in tensors.items()
    }


def experts_in_fp4(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts of two values a byte, with a scale for 32 of them (E8M0)."""
    rng, made = torch.Generator().manual_seed(3), {}
    for name, tensor in _tables(tensors).items():
        if not re.search(r"\.ffn\.experts\.\d+\.w[123]\.weight$", name):
            made[name] = tensor
            continue
        rows, columns = tensor.shape
        values = torch.randint(0, 256, (rows, columns // 2), generator=rng, dtype=torch.uint8)
        scales = torch.randint(121, 124, (rows, columns // 32), generator=rng, dtype=torch.uint8)
        made[name] = values.view(torch.int8)
        made[name.replace(".weight", ".scale")] = scales.view(torch.float8_e8m0fnu)
    return made


def _tables(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts by token id, each token's distinct."""
    rng = torch.Generator().manual_seed(5)
    return {
        name: torch.rand(tensor.shape[0], 8, generator=rng).argsort(1)[:, : tensor.shape[1]].contiguous()
        if name.endswith("tid2eid")
        else tensor
        for name, tensor in tensors.items()
    }


def experts_joined(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All experts of a layer in two tensors, by output, as transformers 5 holds them."""
    made, layers = {}, set()
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*experts)\.\d+\.(\w+)\.weight", name)
        if not match:
            made[name] = tensor
            continue
        layers.add((match[1], match[2] in ("w1", "w2", "w3")))
    for stem, numbered in layers:
        parts = ("w1", "w3", "w2") if numbered else ("gate_proj", "up_proj", "down_proj")
        n_expert = sum(
            re.fullmatch(rf"{re.escape(stem)}\.\d+\.{parts[2]}\.weight", n) is not None for n in tensors
        )
        gate, up, down = (
            torch.stack([tensors[f"{stem}.{expert}.{part}.weight"] for expert in range(n_expert)])
            for part in parts
        )
        made[f"{stem}.gate_up_proj"] = torch.cat([gate, up], 1)
        made[f"{stem}.down_proj"] = down
    return made


FINISHED = {function.__name__: function for function in (experts_by_input, experts_in_fp4, experts_joined)}


def convert(folder: Path, out: Path, outtype: str) -> None:
    """As ``mobile-gguf convert --stacked`` does in its child."""
    from mobile_gguf.convert.hf.upstream import known_architectures

    converter = Path(os.environ["PYTHONPATH"].split(os.pathsep)[0])
    seen = looked_at.read_checkpoint(folder, known_architectures(converter))
    use_tiny_tokenizer(folder)
    job = {
        "folder": str(folder), "out": str(out), "outtype": outtype, "threads": 1, "name": None,
        "pre_tokenizer": "gpt-2", "trust_remote_code": False, "no_mtp": seen.lacks_mtp,
    }  # fmt: skip
    channel = Channel()
    with torch.inference_mode():
        writer = upstream_child.prepared(channel, job)  # type: ignore[arg-type]
        upstream_child.write(channel, writer, out)  # type: ignore[arg-type]


def build(name: str, place: Path) -> None:
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        result = Path(scratch) / "result"
        make_checkpoint(family_table.FAMILIES[name], result / "checkpoint")
        for outtype, file in (("f32", "model.gguf"), ("q8_0", "q8_0.gguf")):
            in_fork(lambda o=outtype, f=file: convert(result / "checkpoint", result / f, o))
        os.replace(result, place)


def in_fork(work: Callable[[], None]) -> None:
    """Raises RuntimeError with what ``work`` raised; the converter's classes keep state."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        said = b""
        try:
            work()
        except Exception as error:
            logging.exception("building failed")
            said = f"{type(error).__name__}: {error}".encode()
        os.write(write, said[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    if os.waitpid(child, 0)[1]:
        said = b"it died"
    if said:
        raise RuntimeError(said.decode(errors="replace"))


def main() -> int:
    places = {name: Path(place) for name, place in json.load(sys.stdin).items()}
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    torch.set_num_threads(1)
    # what takes seconds to import is there before the forks
    import conversion  # type: ignore[import-not-found]
    from transformers import AutoConfig, AutoTokenizer, modeling_utils  # noqa: F401

    conversion.load_all_models()
    for name, place in places.items():
        try:
            in_fork(lambda n=name, p=place: build(n, p))
        except RuntimeError as error:  # one family must not hide the others
            place.with_name(f"{place.name}.error").write_text(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
