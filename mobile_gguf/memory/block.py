"""Whether a model's own block for multi-token prediction (MTP) is loaded with it, to draft: for ``plan`` and
``load``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mobile_gguf.engine.binding import Engine, needs_engine
from mobile_gguf.engine.devices import Device
from mobile_gguf.engine.trial import try_block
from mobile_gguf.errors import BudgetError
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info
from mobile_gguf.options import LoadOptions
from mobile_gguf.options.words import AUTO, MTP

from .fit import Asked, fit_model
from .machine import Memory


def block_to_load(
    info: GgufInfo,
    options: LoadOptions,
    engine: Engine | None,
    devices: Sequence[Device],
    asked: Asked,
    memory: Memory,
    keep_on: Callable[[], object] = lambda: None,
) -> tuple[GgufInfo, str]:
    """``info`` as the model is loaded, which ``runs_mtp`` or not; and why not, where it was asked for.

    ``auto`` has the block only where all experts stay in memory beside it: from a disk drafts mostly do not
    pay, and what it takes would be missed; and not with flash attention, where ``auto`` drafts nothing.
    ``keep_on`` is called while a child tries it.
    """
    if options.speculate not in (AUTO, MTP) or not info.n_layer_mtp:
        return info, ""
    if engine is None:
        return info, str(needs_engine("an MTP block that drafts"))
    if devices:
        return info, "with a device a model's MTP block does not draft"
    whole = read_gguf_info(info.path, runs_mtp=True)
    if options.speculate == AUTO and (options.uses_flash_attention or not _stays(whole, asked, memory)):
        return info, "auto has no MTP block here, which is loaded by --speculate mtp"
    problem = try_block(engine, info.path, info.files, keep_on)
    if problem:
        return info, f"the MTP block of {info.path.name} cannot be run: {problem}"
    return whole, ""


def _stays(info: GgufInfo, asked: Asked, memory: Memory) -> bool:
    try:
        found = fit_model(info, asked, memory)
    except BudgetError:
        return False
    return found.ram_share >= 1 and not found.warning
