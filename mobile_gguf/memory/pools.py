"""Pure arithmetic of device memory: what slots for experts may have of it once the rest is counted.

A pool that is smaller costs misses, one that is too large ends the process when a later allocation fails.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from mobile_gguf.engine.devices import Device
from mobile_gguf.engine.structs import DeviceInfo
from mobile_gguf.errors import BudgetError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.sizes import MIB, OFF, Size, format_bytes

from .demand import Demand

# For what a driver or backend takes later: workspaces, staging, fragments.
_RESERVE_MIN = 512 * MIB
_RESERVE_SHARE = 20
# Of a device whose driver does not know what is free.
_BLIND_RESERVE_SHARE = 4


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


def asked_pool(size: Size, info: GgufInfo, n_devices: int = 1) -> int | None:
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
            f"--vram-budget {OFF}"
        )
    return _engine_budget(asked, info, n_devices)


def lacking(devices: Sequence[Device], demand: Demand, pool_bytes: int) -> str:
    """Why the model's weights and a pool cannot be on the devices; empty if they can.

    Free memory is the drivers'; one that does not know calls all of it free, and is believed.
    """
    free = sum(device.free_bytes for device in devices)
    if demand.total_bytes + pool_bytes <= free:
        return ""
    names = " and ".join(f"{device.name} ({device.description})" for device in devices)
    return (
        f"{names} {'has' if len(devices) == 1 else 'have'} {format_bytes(free)} free, and this model needs "
        f"{format_bytes(demand.total_bytes + pool_bytes)} there: {demand}, experts {format_bytes(pool_bytes)}"
    )


def foreseen(devices: Sequence[Device], info: GgufInfo, demand: Demand) -> list[DeviceInfo]:
    """The devices as they will be once the model is loaded there, each with its layers and its part of
    ``demand``; those that get no layer with experts are left out, as the engine does."""
    layers = _split_layers(devices, info)
    found = []
    for device, own in zip(devices, layers, strict=True):
        if not own:
            continue
        expert_bytes = sum(info.expert_layers[i].file_bytes for i in own)
        taken = int(demand.total_bytes * expert_bytes / info.expert_bytes) if device.says_free else 0
        found.append(
            DeviceInfo(
                name=device.name,
                description=device.description,
                free_bytes=max(0, device.free_bytes - taken),
                total_bytes=device.total_bytes,
                pool_bytes=0,
                expert_bytes=expert_bytes,
                n_layers=len(own),
                n_slots=0,
                is_gpu=1,
                is_async=0,
            )
        )
    return found


def _split_layers(devices: Sequence[Device], info: GgufInfo) -> list[list[int]]:
    """Which layers with experts each device gets: llama.cpp splits all of them, and the output, by free
    memory. Layers without experts are taken to come first."""
    free = list(accumulate(device.free_bytes for device in devices))
    first = max(0, info.n_layer - info.n_layer_moe)
    n_all = max(info.n_layer, info.n_layer_moe) + 1
    layers: list[list[int]] = [[] for _ in devices]
    for i in range(info.n_layer_moe):
        at = bisect_right(free, (first + i) / n_all * free[-1])
        layers[min(at, len(devices) - 1)].append(i)
    return layers


def usable_bytes(device: DeviceInfo, demand: Demand, share: float, shared_bytes: int | None) -> int:
    """What slots may have on a device, the model being loaded: free memory less a reserve.

    ``share`` is the device's part of the model. ``shared_bytes`` bounds a device that shares the host's
    memory. A driver that still reports all memory as free does not know: then the model's own part and a
    quarter are left alone.
    """
    if device.free_bytes < device.total_bytes:
        free = device.free_bytes - max(_RESERVE_MIN, device.total_bytes // _RESERVE_SHARE)
    else:
        taken = int(demand.total_bytes * share) + device.total_bytes // _BLIND_RESERVE_SHARE
        free = device.total_bytes - taken
    return max(0, free if shared_bytes is None else min(free, shared_bytes))


def auto_pool(
    devices: Sequence[DeviceInfo],
    info: GgufInfo,
    demand: Demand,
    shared: Mapping[str, int] | None = None,
) -> int:
    """The ``auto`` budget over all devices; 0 if it would be below the smallest legal one.

    The engine gives each device its layers' share of it, so the fullest one bounds all. ``shared`` are the
    bytes of usable_bytes, by device name.
    """
    total = sum(device.expert_bytes for device in devices)
    if not total:
        return 0
    budgets = []
    for device in devices:
        share = device.expert_bytes / total
        usable = usable_bytes(device, demand, share, (shared or {}).get(device.name))
        if share:
            budgets.append(int(usable / share))
    n = len(budgets)
    budget = _engine_budget(min(budgets), info, n)
    return budget if budget >= pool_min_bytes(info, n) else 0
