"""A file's compute buffers, asked of the engine before it is decided where the file goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mobile_gguf.engine.binding import Engine
from mobile_gguf.engine.buffers import Context, Measured
from mobile_gguf.engine.trial import measure_buffers
from mobile_gguf.gguf.info import GgufInfo

from .demand import context_of
from .fit import Asked


def with_buffers(
    engine: Engine,
    info: GgufInfo,
    asked: Asked,
    keep_on: Callable[[], object] = lambda: None,
    *,
    ubatches: tuple[int, ...] = (),
) -> Asked:
    """``asked`` with what its context's buffers take, measured where it is not known.

    ``ubatches``: for these micro-batches, and shorter contexts, as well. A file that cannot be measured keeps
    what is estimated from its header.
    """
    contexts = [asked.context]
    for n_ubatch in ubatches:
        ends = {context_of(n_ctx, n_ubatch, asked.flash_attn) for n_ctx in (n_ubatch, asked.n_ctx)}
        contexts += sorted(one for one in ends if one.n_ubatch == n_ubatch)
    found = measure_buffers(engine, info.path, info.files, list[Context](dict.fromkeys(contexts)), keep_on)
    return replace(asked, measured=Measured(found)) if found else asked
