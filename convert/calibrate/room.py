"""The expert budget of a measurement that needs memory which loading does not know of."""

from __future__ import annotations

from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.fit import asked_of, fit_model
from mobile_gguf.memory.machine import read_memory
from mobile_gguf.options import LoadOptions
from mobile_gguf.sizes import AUTO, Size


def budget_beside(info: GgufInfo, options: LoadOptions, spare_bytes: int) -> Size:
    """What ``auto`` leaves to experts if all of the buffers and ``spare_bytes`` more are taken.

    ``auto`` if all experts fit beside them.
    Raises BudgetError where not even the smallest budget fits.
    """
    fit = fit_model(info, asked_of(info, options), read_memory())
    room = fit.memory.available_bytes - fit.demand.total_bytes
    spare = fit.demand.idle_bytes + spare_bytes
    kept = min(room, fit.ram_budget_bytes)
    if fit.store_bytes or kept + spare > room:
        return Size(n_bytes=max(kept - spare, info.budget_min_bytes))
    return AUTO
