"""A file's compute buffers, asked of the engine before it is decided where the file goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mobile_gguf.engine.binding import Engine
from mobile_gguf.engine.buffers import Context, Measured
from mobile_gguf.engine.trial import measure_buffers
from mobile_gguf.gguf.info import GgufInfo

from .fit import Asked


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
