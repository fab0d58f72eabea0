"""Transformers' side of a verification, in a process of its own: tokens, chat template and logits.

`python -m mobile_gguf.convert.verify_child` reads one JSON object from stdin, {"jobs": [...]}; see
`Child.run` for a job. stdout: one JSON line for each step of progress, {"phase", "done"}, and one for each
job, {"result": ...}. Nothing is downloaded and no code of a checkpoint is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class NotVerifiable(Exception):
    """Transformers cannot be the reference for this checkpoint; the text says why."""


def say(**message: Any) -> None:
    """Write one line to the parent."""
    print(json.dumps(message), file=_PARENT, flush=True)


def limit_memory(n_bytes: int) -> None:
    """Make an allocation beyond ``n_bytes`` of the process's own memory fail instead of exhausting the machine."""
    if n_bytes <= 0:
        return
    try:
        import resource
    except ImportError:  # Windows
        return
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))


def encode(tokenizer: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Token ids of the job's prompts, with and without what the tokenizer adds; its chat template."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return {
        "plain": [tokenizer.encode(text, add_special_tokens=False) for text in job["prompts"]],
        "full": [tokenizer.encode(text, add_special_tokens=True) for text in job["prompts"]],
        "template": template,
    }


def load_tokenizer(folder: str) -> tuple[Any, str]:
    """The checkpoint's tokenizer, or None and why it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True), ""
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        return None, first_line(error)


def load_model(folder: str, own_dtype: bool) -> Any:
    """The checkpoint as Transformers has it, in float32 or in its own type; raises NotVerifiable."""
    import torch
    import transformers

    options: dict[str, Any] = {
        "trust_remote_code": False,
        "local_files_only": True,
        "attn_implementation": "eager",
        "dtype": "auto" if own_dtype else torch.float32,
        "output_loading_info": True,
    }
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (ValueError, KeyError, OSError) as error:
        raise NotVerifiable(
            f"transformers {transformers.__version__} does not know it: {first_line(error)}"
        ) from None
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        options["quantization_config"] = dequantizing(quantization)
    named = [getattr(transformers, name, None) for name in (config.architectures or [])]
    classes = [each for each in named if each is not None and name_is_causal(each)]
    try:
        model, loading = (classes or [transformers.AutoModelForCausalLM])[0].from_pretrained(
            folder, **options
        )
    except (MemoryError, RuntimeError) as error:
        if is_memory(error):
            raise NotVerifiable("not enough memory to load it") from None
        raise NotVerifiable(f"Transformers cannot load it: {first_line(error)}") from None
    except (ValueError, KeyError, OSError, ImportError, TypeError, AttributeError) as error:
        raise NotVerifiable(f"Transformers cannot load it: {first_line(error)}") from None
    missing = sorted(loading["missing_keys"])
    if missing:
        raise NotVerifiable(
            f"Transformers finds no weights for {len(missing)} of its tensors, e.g. {missing[0]}"
        )
    return model.eval()


def name_is_causal(each: Any) -> bool:
    """Whether a model class of Transformers predicts the next token."""
    return each.__name__.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel"))


def dequantizing(quantization: Any) -> Any:
    """A checkpoint's quantisation, set to give plain weights."""
    from transformers import FineGrainedFP8Config, Mxfp4Config

    method = quantization["quant_method"] if isinstance(quantization, dict) else quantization.quant_method
    known = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
    if str(method) not in known:
        raise NotVerifiable(f"its weights are quantised ({method}), which cannot be undone here")
    return known[str(method)](dequantize=True)


def is_memory(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory."""
    return isinstance(error, MemoryError) or "alloc" in str(error).lower()


def first_line(error: BaseException) -> str:
    """An error's text in one line, without the advice that libraries append."""
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split("\n\n")[0].split())[:300]


class Child:
    """Runs one job: {checkpoint, prompts, ids, max_tokens, tensors, architecture, n_layer, own_dtype, out}."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job

    def run(self) -> dict[str, Any]:
        """Write logits of prompt i to out/i.npy, float32 [n_tokens, n_vocab]; return what is not an array."""
        say(phase="loading the checkpoint's tokenizer", done=0.0)
        job = self.job
        tokenizer, why = load_tokenizer(job["checkpoint"])
        result: dict[str, Any] = {"tokenizer": None, "tokenizer_error": why}
        if tokenizer is not None:
            result["tokenizer"] = encode(tokenizer, job)
        ids = job["ids"]
        if ids is None:
            if tokenizer is None:
                raise NotVerifiable(f"the checkpoint's tokenizer cannot be loaded: {why}")
            ids = [each[: job["max_tokens"]] for each in result["tokenizer"]["full"]]
        result["ids"] = ids
        if job["out"] is None:
            return result
        say(phase="loading the checkpoint into Transformers", done=0.1)
        model = load_model(job["checkpoint"], job["own_dtype"])
        for index, logits in enumerate(self.logits(model, ids)):
            import numpy as np

            np.save(Path(job["out"]) / f"{index}.npy", logits)
            say(
                phase=f"Transformers, prompt {index + 1} of {len(ids)}",
                done=0.3 + 0.7 * (index + 1) / len(ids),
            )
        return result

    def logits(self, model: Any, ids: list[list[int]]) -> Iterator[Any]:
        """Logits of every position of each prompt, teacher-forced."""
        import torch

        from mobile_gguf.convert.stored_precision import StoredPrecision
        from mobile_gguf.convert.stored_types import stored_types

        job = self.job
        parameters = [(name, each.ndim) for name, each in model.named_parameters()]
        types = stored_types(parameters, job["tensors"], job["architecture"], job["n_layer"])
        vocabulary = model.get_input_embeddings().weight.shape[0]
        mode = StoredPrecision(model, types, activations=job.get("activations", True))
        for prompt in ids:
            if max(prompt) >= vocabulary:
                raise NotVerifiable(f"token {max(prompt)} is outside the model's vocabulary of {vocabulary}")
            with torch.no_grad(), mode:
                output = model(torch.tensor([prompt]), use_cache=False)
            yield output.logits[0].float().numpy()


def main() -> int:
    """Run the jobs; each ends in one line, whatever happens to it."""
    request = json.load(sys.stdin)
    limit_memory(request["memory_bytes"])
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    say(phase="starting Transformers", done=0.0)
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(request["threads"])
    for job in request["jobs"]:
        try:
            say(result=Child(job).run())
        except NotVerifiable as error:
            say(result={"not_verifiable": str(error)})
        except (MemoryError, RuntimeError) as error:
            if not is_memory(error):
                raise
            say(result={"not_verifiable": "Transformers ran out of memory"})
    return 0


if __name__ == "__main__":
    # what libraries print must not mix with the messages
    _PARENT = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    raise SystemExit(main())
