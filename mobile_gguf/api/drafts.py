"""A model that is loaded with a smaller one beside it, which drafts for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mobile_gguf.gguf.info import GgufInfo, read_gguf_info
from mobile_gguf.hub.resolve import resolve_model
from mobile_gguf.options import LoadOptions
from mobile_gguf.options.source import draft_model
from mobile_gguf.options.words import OFF
from mobile_gguf.progress import Progress
from mobile_gguf.sizes import AUTO, Size

from . import loading

if TYPE_CHECKING:
    from mobile_gguf.generate.llama import MobileLlama

# Its context, where none was asked for.
_N_CTX = 4096


def open_both(
    info: GgufInfo, options: LoadOptions, progress: Progress | None = None
) -> tuple[MobileLlama, list[str]]:
    """``open_backend``, with the model that ``speculate`` names, if any, loaded before.

    So what that one takes is no longer free when the large one is given its memory. Raises UsageError where
    the two have not the same vocabulary, and what ``load`` raises.
    """
    name = draft_model(options.speculate)
    if name is None:
        return loading.open_backend(info, options, progress)
    from mobile_gguf.generate.speculation.draft_model import DraftModel

    own = read_gguf_info(resolve_model(name, progress))
    small, notices = loading.open_backend(own, _options_of(own, options), progress)
    try:
        draft = DraftModel(name, small)
        draft.take_memory()
        llama, others = loading.open_backend(info, options, progress)
        try:
            draft.check(llama)
        except BaseException:
            llama.close()
            raise
    except BaseException:
        small.close()
        raise
    llama.draft = draft
    llama.speculation.state(info, own)
    about_itself = [notice for notice in notices if not notice.startswith(own.path.name)]
    return llama, [*(f"{own.path.name}: {notice}" for notice in about_itself), *others]


def _options_of(info: GgufInfo, options: LoadOptions) -> LoadOptions:
    """How the smaller one is loaded: whole, and with no conversations of its own."""
    n_ctx = options.n_ctx or _N_CTX
    return LoadOptions(
        ram_budget=Size(fraction=1.0) if info.is_moe else AUTO,
        vram_budget=OFF if info.is_moe else options.vram_budget,
        rpc="" if info.is_moe else options.rpc,
        n_ctx=min(n_ctx, info.n_ctx_train or n_ctx),
        threads=options.threads,
        threads_batch=options.threads_batch,
        threads_auto=OFF,
        flash_attn=options.flash_attn,
        warm=OFF,
        prefetch=OFF,
        prefix_cache=OFF,
        session_cache=OFF,
        parallel=options.parallel,
        deterministic=True,  # a part of the context for each text
        verbose=options.verbose,
    )
