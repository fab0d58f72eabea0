"""Where an answer's drafts come from: what options ask for and a model allows."""

from __future__ import annotations

from collections.abc import Callable

from mobile_gguf.errors import UsageError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.options import LoadOptions
from mobile_gguf.options.source import draft_model
from mobile_gguf.options.words import AUTO, DRAFT, LITTLE, MTP, OFF
from mobile_gguf.sizes import format_bytes

from ..backend import Backend
from ..passes.decode import Policy
from ..speculation.needs import has_room


def choose_speculation(
    options: LoadOptions, info: GgufInfo, backend: Backend, policy: Policy, notify: Callable[[str], object]
) -> str:
    """The ``speculate`` of a policy; off where it can have no effect, with a notice that says why.

    ``auto`` is where nothing is to be thought of: it drafts only where no bit changes, and says nothing else.
    Raises UsageError for a smaller model, or a block, that was not loaded.
    """
    if options.speculate == OFF:
        return OFF
    name = draft_model(options.speculate)
    source = options.speculate if name is None else DRAFT
    if source == DRAFT and (backend.draft is None or name not in (None, backend.draft.name)):
        raise UsageError("a model that drafts is loaded with the other: give --speculate draft=MODEL then")
    reason = _why_no_block(info, backend) if source == MTP and backend.mtp is None else None
    reason = reason or _why_not(options, info, backend, policy)
    if reason is None:
        store = backend.store
        if source != AUTO and store is not None and not has_room(store, policy):
            notify(
                f"--speculate {options.speculate} drafts nothing with {format_bytes(store.budget_bytes)}: "
                "the experts of two tokens are more than half of what a layer may keep"
            )
        return source
    if source == AUTO:
        return OFF
    notify(f"{reason}: --speculate {options.speculate} has no effect")
    return OFF


def _why_no_block(info: GgufInfo, backend: Backend) -> str:
    if not info.n_layer_mtp:
        return f"{info.path.name} has no block for multi-token prediction (MTP)"
    if not backend.why_no_mtp:
        raise UsageError("a model's MTP block is loaded with it: give --speculate mtp or auto then")
    return backend.why_no_mtp


def _why_not(options: LoadOptions, info: GgufInfo, backend: Backend, policy: Policy) -> str | None:
    if not backend.can_step_back and options.prefix_cache == OFF:
        return (
            f"the memory of a {info.architecture} model cannot be rolled back behind a wrong guess, and "
            "without a prefix cache there is no room for what it was before"
        )
    is_exact = options.deterministic or options.speculate == AUTO
    if is_exact and (reason := _why_not_exactly(options, backend)) is not None:
        return reason
    if not policy.is_the_same_for_all:
        what = f"mode {policy.mode}" if policy.loss is None else "what becomes of missing experts"
        return f"{what} is decided token by token"
    if options.speculate != LITTLE:
        return None
    if policy.mode == LITTLE:
        return "mode little answers with few experts already"
    if backend.store is None or not backend.has_engine or not 0 < policy.little_k < info.n_expert_used:
        return f"{info.path.name} has no experts to leave out"
    return None


def _why_not_exactly(options: LoadOptions, backend: Backend) -> str | None:
    """Why several tokens of a pass would not have the bits that each has alone."""
    if not backend.has_engine:
        return "with --deterministic it needs the mobile-gguf engine, and this is a stock llama.cpp"
    if backend.devices:
        return "with --deterministic a device computes several tokens otherwise than one"
    if options.uses_flash_attention:
        return "with --deterministic flash attention adds up several tokens otherwise than one"
    return None
