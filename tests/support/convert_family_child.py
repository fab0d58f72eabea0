"""Makes tiny checkpoints, and converts some twice: with the pinned converter's eager code, and with ours.

stdin: {"checkpoints": [[form, folder], ...], "families": [[name, outtype], ...], "scratch": folder}.
stdout: for each family one object that says whether both files are equal. The pinned converter and its gguf
must lead PYTHONPATH.
"""

from __future__ import annotations

import filecmp
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tiny_build
import tiny_models
import torch
import transformers
from safetensors.torch import load_file

from mobile_gguf.convert.hf import upstream_child

# blocks of 256 values fit its rows: every quantisation can be made of it
SMALL = {
    **tiny_models.MODELS["qwen3moe-q4_k"].config, "num_hidden_layers": 2, "num_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip


def make_form(form: str, folder: Path) -> None:
    """The same small Qwen3-MoE in one of the forms that checkpoints come in."""
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SMALL)).float().eval()
    tiny_build.randomize(model, 1)
    if form == "f32":
        model.save_pretrained(folder)
    else:
        model.bfloat16().save_pretrained(folder, max_shard_size="1MB")
    tiny_build.write_tokenizer(folder, SMALL["vocab_size"])
    if form in ("bin", "legacy-bin"):
        to_bin(folder, zipped=form == "bin")


def to_bin(folder: Path, *, zipped: bool) -> None:
    """Rewrites safetensors shards as what torch.save makes, in its present or its old format."""
    index = {}
    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        tensors = load_file(path)
        name = f"pytorch_model-{number + 1:05d}.bin"
        torch.save(tensors, folder / name, _use_new_zipfile_serialization=zipped)
        index |= dict.fromkeys(tensors, name)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


class Channel:
    """Stands in for the pipes to a parent that always says go."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def send(self, **event: Any) -> None:
        self.events.append(event)

    def wait_for_go(self) -> None:
        return


def make_checkpoint(name: str, folder: Path) -> None:
    """The tiny checkpoint ``name``, under the architecture's name that the converter knows."""
    model = tiny_models.MODELS[name]
    tiny_build.make_checkpoint(asdict(model), folder)
    if model.architecture:
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = [model.architecture]
        (folder / "config.json").write_text(json.dumps(config))


def convert_stock(job: dict[str, Any], out: Path) -> None:
    """The converter as its own script runs it with --no-lazy."""
    import conversion  # type: ignore[import-not-found]
    import gguf

    folder = Path(job["folder"])
    ftypes = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    architecture = conversion.get_model_architecture(
        conversion.ModelBase.load_hparams(folder, False), conversion.ModelType.TEXT
    )
    model_class = conversion.get_model_class(architecture)
    model_class(folder, gguf.LlamaFileType[ftypes[job["outtype"]]], out, eager=True).write()


def use_tiny_tokenizer(folder: Path) -> None:
    """Some families look for tokens of their own, which the tiny tokenizer has not."""
    import conversion  # type: ignore[import-not-found]

    architecture = conversion.get_model_architecture(
        conversion.ModelBase.load_hparams(folder, False), conversion.ModelType.TEXT
    )
    model_class = conversion.get_model_class(architecture)
    model_class.set_vocab = lambda self: self._set_vocab_gpt2()


def compare(name: str, outtype: str, scratch: Path) -> dict[str, Any]:
    folder = scratch / name
    make_checkpoint(name, folder)
    use_tiny_tokenizer(folder)
    ours, stock = scratch / f"{name}.gguf", scratch / f"{name}-stock.gguf"
    job = {
        "folder": str(folder), "out": str(ours), "outtype": outtype, "threads": 1, "name": None,
        "pre_tokenizer": "gpt-2", "trust_remote_code": False,
    }  # fmt: skip
    channel = Channel()
    with torch.inference_mode():
        writer = upstream_child.prepared(channel, job)  # type: ignore[arg-type]
        upstream_child.write(channel, writer, ours)  # type: ignore[arg-type]
        convert_stock(job, stock)
    (plan,) = [event["plan"] for event in channel.events if "plan" in event]
    return {
        "equal": filecmp.cmp(ours, stock, shallow=False),
        "planned_bytes": plan["n_bytes"],
        "bytes": stock.stat().st_size,
        "whole": channel.events[-1]["whole"],
    }


def main() -> int:
    request = json.load(sys.stdin)
    for form, folder in request["checkpoints"]:
        make_form(form, Path(folder))
    results = {}
    for name, outtype in request["families"]:
        try:
            results[name] = compare(name, outtype, Path(request["scratch"]))
        except Exception as error:  # one family must not hide the others
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
