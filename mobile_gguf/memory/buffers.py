"""A file's compute buffers, asked of the engine before it is decided where the file goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mobile_gguf.engine.binding import Engine
from mobile_gguf.engine.buffers import Context, Measured
from mobile_gguf.engine.devices import Device
from mobile_gguf.engine.trial import measure_buffers
from mobile_gguf.errors import BudgetError
from mobile_gguf.gguf.info import GgufInfo

from .fit import Asked, fit_model
from .machine import Memory


def with_buffers(
    engine: Engine,
    info: GgufInfo,
    asked: Asked,
    keep_on: Callable[[], object] = lambda: None,
    *,
    others: Sequence[Context] = (),
) -> Asked:
    """``asked`` with what its contexts' buffers take, measured where it is not known.

    ``others``: contexts that it will be compared with. A file that cannot be measured keeps what is estimated
    from its header.
    """
    contexts = list(dict.fromkeys([*asked.contexts, *others]))
    found = measure_buffers(engine, info.path, info.files, contexts, keep_on)
    return replace(asked, measured=Measured(found)) if found else asked


def with_settled_context(
    info: GgufInfo,
    asked: Asked,
    memory: Memory,
    devices: Sequence[Device],
    measured: Callable[[Asked], Asked],
) -> Asked:
    """``asked`` with the context that is chosen where nobody said one, and what its buffers take.

    ``measured`` says that of an Asked, as ``with_buffers`` does. The context is chosen by what is estimated
    of those that were never measured, which is more than they take; should it be less, the usual one stays.
    So it does where none fits, for somebody else to say.
    """
    usual = replace(asked, other_contexts=())
    try:
        n_ctx = fit_model(info, asked, memory, devices).asked.n_ctx
    except BudgetError:
        return usual
    if n_ctx == asked.n_ctx:
        return usual
    larger = tuple(n for n in asked.larger if n <= n_ctx)
    chosen = measured(replace(usual, n_ctx=n_ctx, larger=larger))
    try:
        fits = not fit_model(info, chosen, memory, devices).warning
    except BudgetError:
        fits = False
    return chosen if fits or n_ctx < asked.n_ctx else usual
