"""Transformers' side of a verification, in a process of its own: tokens, chat template and logits.

``children.run_child`` starts it with {"jobs": [...], "memory_bytes", "threads", "stall_seconds"}; see
``run_job`` for a job. It answers {"phase", "done"} on the way and {"result"} once for each job. Nothing is
downloaded and no code of a checkpoint is run.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..child_side import ChildChannel


class NotVerifiable(Exception):
    """Transformers cannot be the reference for this checkpoint; the text says why."""


class Reporter:
    """Says how far the work is; ends the process when it has said nothing for ``stall_seconds``."""

    def __init__(self, channel: ChildChannel, stall_seconds: float) -> None:
        self._channel = channel
        self._stall_seconds = stall_seconds
        self._timer: threading.Timer | None = None

    def __call__(self, phase: str, done: float) -> None:
        self.rest()
        self._timer = threading.Timer(self._stall_seconds, self._give_up, (phase,))
        self._timer.daemon = True
        self._timer.start()
        self._channel.send(phase=phase, done=done)

    def rest(self) -> None:
        """Stop the clock."""
        if self._timer is not None:
            self._timer.cancel()

    def _give_up(self, phase: str) -> None:
        self._channel.send(result={"not_verifiable": f"no progress for {self._stall_seconds:g} s: {phase}"})
        os._exit(0)


def limit_memory(n_bytes: int) -> None:
    """Make an allocation beyond ``n_bytes`` of the process's own memory fail; 0: no limit."""
    try:
        import resource
    except ImportError:  # Windows
        return
    if n_bytes > 0:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))


def load_tokenizer(folder: str) -> tuple[Any, str]:
    """The checkpoint's tokenizer, or None and why there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True), ""
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        return None, first_line(error)


def encode(tokenizer: Any, prompts: list[str]) -> dict[str, Any]:
    """Token ids of the prompts, without and with what the tokenizer adds; its chat template."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return {
        "plain": [tokenizer.encode(text, add_special_tokens=False) for text in prompts],
        "full": [tokenizer.encode(text, add_special_tokens=True) for text in prompts],
        "added": tokenizer.encode("", add_special_tokens=True),
        "template": template,
    }


def load_model(folder: str, own_dtype: bool) -> Any:
    """The checkpoint as Transformers has it, in float32 or in its own type; raises NotVerifiable."""
    import torch
    import transformers

    local: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **local)
    except (ValueError, KeyError, OSError) as error:
        version = transformers.__version__
        raise NotVerifiable(f"transformers {version} does not know it: {first_line(error)}") from None
    options = local | {
        "attn_implementation": "eager",
        "dtype": "auto" if own_dtype else torch.float32,
        "output_loading_info": True,
    }
    # not the kernels for all experts at once: they round activations to the weights' type
    config._experts_implementation = "eager"
    options["config"] = config
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        options["quantization_config"] = dequantizing(quantization)
    named = [getattr(transformers, name, None) for name in (config.architectures or [])]
    classes = [each for each in named if each is not None and predicts_tokens(each)]
    try:
        model, found = (classes or [transformers.AutoModelForCausalLM])[0].from_pretrained(folder, **options)
    except (MemoryError, RuntimeError, ValueError, KeyError, OSError, ImportError, TypeError) as error:
        if is_memory(error):
            raise NotVerifiable("there is not enough memory to load it") from None
        raise NotVerifiable(f"Transformers cannot load it: {first_line(error)}") from None
    missing = sorted(found["missing_keys"])
    if missing:
        raise NotVerifiable(f"Transformers finds no weights for {len(missing)} tensors, e.g. {missing[0]}")
    return model.eval()


def predicts_tokens(model_class: Any) -> bool:
    """Whether a model class of Transformers has logits of the next token."""
    return model_class.__name__.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel"))


def dequantizing(quantization: Any) -> Any:
    """A checkpoint's quantisation, set to give plain weights; raises NotVerifiable."""
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    method = quantization["quant_method"] if isinstance(quantization, dict) else quantization.quant_method
    known: dict[str, Any] = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
    name = str(getattr(method, "value", method))
    if name not in known:
        raise NotVerifiable(f"its weights are quantised ({name}), which Transformers cannot undo here")
    return known[name](dequantize=True)


def is_memory(error: BaseException) -> bool:
    """Whether Python or torch ran out of memory."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error).lower()


def first_line(error: BaseException) -> str:
    """An error's text in one line, without the advice that libraries append."""
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split("\n\n")[0].split())[:300]


def run_job(job: dict[str, Any], report: Reporter) -> dict[str, Any]:
    """Run one job: {checkpoint, prompts, ids, max_tokens, out, own_dtype, tensors, architecture, n_layer,
    n_expert_used}.

    ids: token ids to use in place of the prompts', or null. out: a folder for the logits of prompt i as
    i.npy, float32 [n_tokens, n_vocab], or null for none. tensors: GGUF tensor name -> type name.
    """
    import numpy as np

    report("loading the checkpoint's tokenizer", 0.0)
    tokenizer, why = load_tokenizer(job["checkpoint"])
    encoded = encode(tokenizer, job["prompts"]) if tokenizer is not None else None
    result: dict[str, Any] = {"tokenizer": encoded, "tokenizer_error": why, "ids": job["ids"]}
    if job["ids"] is None:
        if encoded is None:
            raise NotVerifiable(f"the checkpoint's tokenizer cannot be loaded: {why}")
        result["ids"] = [each[: job["max_tokens"]] for each in encoded["full"]]
    if job["out"] is None:
        return result
    report("loading the checkpoint into Transformers", 0.1)
    model = load_model(job["checkpoint"], job["own_dtype"])
    reached: set[tuple[int, int]] = set()
    result["margins"] = []
    prompts = result["ids"]
    for index, (logits, routing) in enumerate(compute(model, job, prompts)):
        np.save(Path(job["out"]) / f"{index}.npy", logits)
        result["margins"].append(routing.smallest_margins(len(prompts[index])))
        reached |= routing.experts(job["n_expert_used"])
        share = 0.3 + 0.7 * (index + 1) / len(prompts)
        report(f"Transformers: prompt {index + 1} of {len(prompts)}", share)
    result["experts_reached"] = len(reached)
    return result


def compute(model: Any, job: dict[str, Any], prompts: list[list[int]]) -> Iterator[tuple[Any, Any]]:
    """Logits of every position of each prompt, teacher-forced, and how its tokens were routed."""
    import torch

    from .stored_precision import Routing, StoredPrecision
    from .stored_types import stored_types

    parameters = [(name, each.ndim) for name, each in model.named_parameters()]
    types = stored_types(parameters, job["tensors"], job["architecture"], job["n_layer"])
    mode = StoredPrecision(model, types)
    n_vocab = model.get_input_embeddings().weight.shape[0]
    for prompt in prompts:
        if not prompt or min(prompt) < 0 or max(prompt) >= n_vocab:
            raise NotVerifiable(
                f"a prompt is empty or has tokens outside the model's vocabulary of {n_vocab}"
            )
        mode.routing = Routing()
        with torch.no_grad(), mode:
            output = model(torch.tensor([prompt]), use_cache=False)
        yield output.logits[0].float().numpy(), mode.routing


def main() -> int:
    """Run the jobs; each has one result, whatever happens to it."""
    channel = ChildChannel()
    request = channel.job
    limit_memory(request["memory_bytes"])
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    report = Reporter(channel, request["stall_seconds"])
    report("starting Transformers", 0.0)
    import torch
    import transformers

    from .stored_precision import NarrowedError

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(request["threads"])
    for job in request["jobs"]:
        try:
            result = run_job(job, report)
        except (NotVerifiable, NarrowedError) as error:
            result = {"not_verifiable": str(error)}
        except Exception as error:  # a model's code raises what it likes, and other jobs have other models
            why = "ran out of memory" if is_memory(error) else f"cannot run it: {first_line(error)}"
            result = {"not_verifiable": f"Transformers {why}"}
        report.rest()
        channel.send(result=result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
