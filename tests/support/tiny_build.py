"""Makes one set of tiny random MoE checkpoints, converts them to GGUF and records reference logits.

Run as a script by ``tiny_models``, one process for all the models that are missing: it imports torch,
Transformers and the converter of the pinned llama.cpp, none of which belongs into the pytest process.
stdin: one JSON object, see ``main``. The converter and its ``gguf`` must lead PYTHONPATH.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# E2M1, the 4-bit float of MXFP4: OCP Microscaling Formats specification 1.0, table 5
FP4_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
N_REFERENCE_TOKENS = 24


def reference_tokens(vocab_size: int) -> np.ndarray:
    """The token ids that reference logits are computed for; int32 [N_REFERENCE_TOKENS]."""
    return np.random.default_rng(7).integers(0, vocab_size, N_REFERENCE_TOKENS).astype(np.int32)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes a byte-level BPE of ``vocab_size`` tokens: bytes, merges of two letters, three special ones."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = itertools.product("etaoinsh", "etaoinsh")
    merges = list(itertools.islice(letters, vocab_size - len(tokens) - 3))
    vocab = {token: i for i, token in enumerate([*tokens, *("".join(merge) for merge in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )
    fast.save_pretrained(folder)


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Fills weights so that activations stay near unit size and routers choose with clear margins."""
    rng = torch.Generator().manual_seed(seed)
    tensors = dict(model.named_parameters())
    tensors |= {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    with torch.no_grad():
        for name, tensor in sorted(tensors.items()):
            noise = torch.randn(tensor.shape, generator=rng)
            if "A_log" in name or "dt_bias" in name:
                continue  # state-space parameters: their own initialisation keeps the recurrence stable
            if "e_score_correction_bias" in name:
                value = 0.05 * noise
            elif "norm" in name or name.endswith(".D"):
                value = 1 + 0.1 * noise
            elif name.endswith("bias") or tensor.ndim == 1:
                value = 0.1 * noise
            elif "embed_tokens" in name or ".embeddings" in name:
                value = noise
            elif tensor.shape[-1] and ("router" in name or "mlp.gate." in name or "mixer.gate." in name):
                value = 2 * noise / tensor.shape[-1] ** 0.5
            else:
                value = noise / tensor.shape[-1] ** 0.5
            tensor.copy_(value)


def random_mxfp4(shape: tuple[int, ...], rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks uint8 [*shape[:-1], n/32, 16] and scales uint8 [*shape[:-1], n/32] of a random MXFP4 tensor."""
    lead, n = shape[:-1], shape[-1]
    blocks = torch.randint(0, 256, (*lead, n // 32, 16), generator=rng, dtype=torch.uint8)
    # 2^-6 .. 2^-4 keeps a row of some hundred values near unit norm
    scales = torch.randint(121, 124, (*lead, n // 32), generator=rng, dtype=torch.uint8)
    return blocks, scales


def pack_experts_mxfp4(folder: Path, seed: int) -> None:
    """Replaces the experts of a saved gpt-oss checkpoint by random ones in the published MXFP4 layout."""
    from safetensors.torch import load_file, save_file

    rng = torch.Generator().manual_seed(seed)
    path = folder / "model.safetensors"
    packed = {}
    for name, tensor in load_file(path).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            n_expert, n_in, n_out = tensor.shape
            blocks, scales = random_mxfp4((n_expert, n_out, n_in), rng)
            packed[f"{name}_blocks"], packed[f"{name}_scales"] = blocks, scales
        else:
            packed[name] = tensor
    save_file(packed, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))


def make_checkpoint(spec: dict[str, Any], folder: Path) -> torch.nn.Module:
    """Saves the model of ``spec`` as a Hugging Face checkpoint in ``folder`` and returns it."""
    config = getattr(transformers, spec["config_class"])(**spec["config"])
    config._attn_implementation = "eager"
    model = getattr(transformers, spec["model_class"])(config).float().eval()
    randomize(model, spec["seed"])
    model.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    if spec["mxfp4"]:
        pack_experts_mxfp4(folder, spec["seed"])
    return model


def convert(spec: dict[str, Any], folder: Path, out: Path) -> None:
    """Converts the checkpoint in ``folder`` with the pinned converter's own classes."""
    import conversion  # type: ignore[import-not-found]
    import gguf

    ftypes = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    hparams = conversion.ModelBase.load_hparams(folder, False)
    architecture = spec["architecture"] or conversion.get_model_architecture(
        hparams, conversion.ModelType.TEXT
    )

    # a class of its own, so that the next model of the same architecture is converted as it is
    base = conversion.get_model_class(architecture)

    class Tiny(base):
        model_arch = base.model_arch

        def set_vocab(self) -> None:
            self._set_vocab_gpt2()

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            return "gpt-2"  # ours is in no list of known tokenizers

        def modify_tensors(
            self, data_torch: torch.Tensor, name: str, bid: int | None
        ) -> Iterator[tuple[str, torch.Tensor]]:
            for new_name, data in super().modify_tensors(data_torch, name, bid):
                if spec["expert_scales"] and new_name.endswith("_exps.weight"):
                    # powers of two: dividing by them and multiplying again in the graph is exact
                    scale = 2.0 ** ((torch.arange(data.shape[0]) + (bid or 0)) % 4 - 2).float()
                    yield new_name.replace(".weight", ".scale"), scale
                    data = data / scale[:, None, None]
                yield new_name, data

    Tiny(
        folder, ftypes[spec["outtype"]], out, eager=True, split_max_tensors=spec["split_max_tensors"]
    ).write()


def quantize(source: Path, out: Path, ftype: str) -> None:
    """Quantises a GGUF with libllama; ``ftype`` is the tail of a LLAMA_FTYPE_MOSTLY_ name."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}")
    params.nthread = 2
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.pointer(params)) != 0:
        raise RuntimeError(f"quantising {source} to {ftype} failed")


def reference_logits(spec: dict[str, Any], model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Transformers' logits, float32 [n_tokens, n_vocab], with each of ``spec["reference_k"]`` experts."""
    tokens = reference_tokens(spec["config"]["vocab_size"])
    logits = {"tokens": tokens}
    for k in spec["reference_k"]:
        # the same weights under a config that differs in nothing but the number of experts per token
        config = getattr(transformers, spec["config_class"])(**{**spec["config"], spec["top_k_field"]: k})
        config._attn_implementation = "eager"
        fewer = getattr(transformers, spec["model_class"])(config).float().eval()
        fewer.load_state_dict(model.state_dict())
        with torch.no_grad():
            out = fewer(torch.from_numpy(tokens)[None].long(), use_cache=False)
        logits[f"k{k}"] = out.logits[0].float().numpy()
    return logits


def build(spec: dict[str, Any], target: Path) -> None:
    """Makes the folder ``target``: model.gguf (or its parts), maybe reference.npz (tokens, k<K> logits)."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        checkpoint, result = Path(scratch) / "checkpoint", Path(scratch) / "result"
        result.mkdir()
        model = make_checkpoint(spec, checkpoint)
        if spec["quantize"]:
            convert(spec, checkpoint, Path(scratch) / "model.gguf")
            quantize(Path(scratch) / "model.gguf", result / "model.gguf", spec["quantize"])
        else:
            convert(spec, checkpoint, result / "model.gguf")
        if spec["reference_k"]:
            np.savez(result / "reference.npz", **reference_logits(spec, model))  # type: ignore[arg-type]
        os.replace(result, target)  # it appears whole or not at all


def main() -> int:
    """Builds {"models": [{"spec": ..., "folder": path, "error": path}]}; failures go to the error files."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    torch.set_num_threads(1)  # these tensors are too small to share
    failed = 0
    for entry in json.load(sys.stdin)["models"]:
        started = time.monotonic()
        try:
            build(entry["spec"], Path(entry["folder"]))
        except Exception as error:  # one family must not hide the others
            logging.exception("building %s failed", entry["spec"]["name"])
            Path(entry["error"]).write_text(f"{type(error).__name__}: {error}")
            failed += 1
        print(f"{entry['spec']['name']}: {time.monotonic() - started:.1f} s", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
