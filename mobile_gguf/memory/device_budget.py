"""Pure arithmetic of device memory: what a model takes beside experts, what slots may have of the rest.

Estimates err on the high side: a pool that is smaller costs misses, one that is too large ends the
process when a later allocation fails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mobile_gguf.engine.devices import Device
from mobile_gguf.engine.structs import DeviceInfo
from mobile_gguf.errors import BudgetError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.sizes import MIB, Size, format_bytes

from .budget import CONTEXT_MULTIPLE, Demand, kv_cache_bytes

_F32 = 4
# For what a driver or backend takes later: workspaces, staging, fragments.
_RESERVE_MIN = 512 * MIB
_RESERVE_SHARE = 20
# Of a device whose driver does not know what is free.
_BLIND_RESERVE_SHARE = 4


@dataclass(frozen=True)
class DeviceDemand:
    """What goes to the devices beside slots: weights that are no routed experts, KV cache, buffers; bytes."""

    dense_bytes: int
    kv_bytes: int
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.dense_bytes + self.kv_bytes + self.compute_bytes

    def __str__(self) -> str:
        return (
            f"dense weights {format_bytes(self.dense_bytes)}, KV {format_bytes(self.kv_bytes)}, "
            f"buffers {format_bytes(self.compute_bytes)}"
        )


def estimate_device_demand(info: GgufInfo, *, n_ctx: int, n_ubatch: int, flash_attn: bool) -> DeviceDemand:
    """The demand with all layers on devices; unlike on the host, logits of a whole batch have real memory."""
    n_ctx = -(-n_ctx // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
    n_ubatch = min(n_ubatch, n_ctx)
    scores = 0 if flash_attn else max(info.n_head, default=0) * n_ctx * n_ubatch * _F32
    routed = max(1, info.n_expert_used)
    outputs = (info.segments + 1) * info.n_embd
    activations = n_ubatch * (8 * info.n_embd + routed * (3 * info.n_ff_expert + outputs)) * _F32
    mask = n_ctx * n_ubatch * _F32
    return DeviceDemand(
        # With experts: a dense model's weights are all dense.
        dense_bytes=info.dense_bytes if info.is_moe else info.tensor_bytes,
        kv_bytes=kv_cache_bytes(info, n_ctx),
        compute_bytes=scores + activations + mask + n_ubatch * info.n_vocab * _F32,
    )


def host_share(demand: Demand, info: GgufInfo) -> Demand:
    """What stays in host memory when all layers are on devices: the token embedding, and buffers."""
    return Demand(
        dense_bytes=min(info.embedding_bytes, demand.dense_bytes),
        kv_bytes=0,
        compute_bytes=demand.compute_bytes,
    )


def pool_min_bytes(info: GgufInfo, n_devices: int = 1) -> int:
    """The smallest legal pool: one token's experts of a layer, for every shape of expert and device.

    The engine gives each shape its share of the budget by expert bytes, and as many slots as a token uses
    stay empty. With several devices an estimate.
    """
    shapes = _shapes(info)
    least = (2 * shape.n_used * shape.slot_bytes * info.expert_bytes / shape.total_bytes for shape in shapes)
    return n_devices * math.ceil(max(least, default=0))


def pool_all_bytes(info: GgufInfo, n_devices: int = 1) -> int:
    """A pool in which every expert has a slot."""
    return info.expert_bytes + n_devices * sum(shape.n_used * shape.slot_bytes for shape in _shapes(info))


@dataclass
class _Shape:
    """Experts that share a pool: bytes of a slot, slots that a token uses at once, bytes of all of them."""

    slot_bytes: int
    n_used: int
    total_bytes: int = 0


def _shapes(info: GgufInfo) -> list[_Shape]:
    shapes: dict[tuple[object, ...], _Shape] = {}
    for layer in info.expert_layers:
        slot = sum(n // layer.n_segments for n in layer.matrix_bytes)
        key = (layer.matrix_bytes, layer.n_segments)
        shape = shapes.setdefault(key, _Shape(slot, info.n_expert_used * layer.n_segments))
        shape.total_bytes += layer.file_bytes
    return list(shapes.values())


def _engine_budget(budget: int, info: GgufInfo, n_devices: int) -> int:
    """A budget that is kept: asked for all experts' bytes, the engine adds the empty slots on top."""
    if info.expert_bytes <= budget < pool_all_bytes(info, n_devices):
        return info.expert_bytes - max(shape.slot_bytes for shape in _shapes(info))
    return min(budget, pool_all_bytes(info, n_devices))


def check_budget(size: Size, info: GgufInfo, n_devices: int = 1) -> int | None:
    """The bytes that an explicit size asks for, None for ``auto``; raises BudgetError below the smallest."""
    if size.is_auto:
        return None
    if size.n_bytes is not None:
        asked = size.n_bytes
    else:
        fraction = size.fraction or 0
        asked = pool_all_bytes(info, n_devices) if fraction >= 1 else int(info.expert_bytes * fraction)
    least = pool_min_bytes(info, n_devices)
    if asked < least:
        share = -int(-least / info.expert_bytes * 1000 // 1) / 10
        raise BudgetError(
            f"--vram-budget {size} is too small: the smallest legal one for this model is {least} bytes "
            f"({format_bytes(least)}, {share:g}% of its experts), one token's experts of a layer; or use "
            "--vram-budget off"
        )
    return _engine_budget(asked, info, n_devices)


def check_fit(devices: Sequence[Device], demand: DeviceDemand, pool_bytes: int) -> str:
    """Why the model's weights and a pool cannot be on the devices, with what would help; empty if they can.

    Free memory is the drivers'; one that does not know is believed, up to its total.
    """
    free = sum(device.free_bytes if device.says_free else device.total_bytes for device in devices)
    if demand.total_bytes + pool_bytes <= free:
        return ""
    names = " and ".join(f"{device.name} ({device.description})" for device in devices)
    return (
        f"{names} {'has' if len(devices) == 1 else 'have'} {format_bytes(free)} free, and this model needs "
        f"{format_bytes(demand.total_bytes + pool_bytes)} there: {demand}, experts {format_bytes(pool_bytes)}"
    )


def usable_bytes(device: DeviceInfo, demand: DeviceDemand, share: float, host_bytes: int | None) -> int:
    """What slots may have on a device, the model being loaded: free memory less a reserve.

    ``share`` is the device's part of the model. ``host_bytes`` bounds a device that shares the host's memory.
    A driver that still reports all memory as free does not know: then the model's own part and a quarter are
    left alone.
    """
    if device.free_bytes < device.total_bytes:
        free = device.free_bytes - max(_RESERVE_MIN, device.total_bytes // _RESERVE_SHARE)
    else:
        taken = int(demand.total_bytes * share) + device.total_bytes // _BLIND_RESERVE_SHARE
        free = device.total_bytes - taken
    return max(0, free if host_bytes is None else min(free, host_bytes))


def auto_budget(
    devices: Sequence[DeviceInfo],
    info: GgufInfo,
    demand: DeviceDemand,
    host_bytes: dict[str, int] | None = None,
) -> int:
    """The ``auto`` budget over all devices; 0 if it would be below the smallest legal one.

    The engine gives each device its layers' share of it, so the fullest one bounds all. ``host_bytes`` are
    those of usable_bytes, by device name.
    """
    total = sum(device.expert_bytes for device in devices)
    if not total:
        return 0
    budgets = []
    for device in devices:
        share = device.expert_bytes / total
        usable = usable_bytes(device, demand, share, (host_bytes or {}).get(device.name))
        if share:
            budgets.append(int(usable / share))
    n = len(budgets)
    budget = _engine_budget(min(budgets), info, n)
    return budget if budget >= pool_min_bytes(info, n) else 0
