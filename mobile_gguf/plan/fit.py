"""What of a model fits where: context, buffers, dense weights and experts in device memory, RAM and the file.

Pure arithmetic on the header and on what memory there is; a model that does not fit is refused with what
would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mobile_gguf.engine.devices import Device
from mobile_gguf.errors import BudgetError, MobileError, UsageError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.budget import CONTEXT_MULTIPLE, Demand, estimate_demand, plan_budget
from mobile_gguf.memory.device_budget import (
    estimate_device_demand,
    host_share,
    pool_all_bytes,
    pool_min_bytes,
)
from mobile_gguf.memory.machine import Memory
from mobile_gguf.sizes import AUTO, KIB, MIB, Size, format_bytes

from .ggml import device_key

# as the device tier has it (device/budget.py)
_DEVICE_RESERVE_MIN, _DEVICE_RESERVE_SHARE, _BLIND_RESERVE_SHARE = 512 * MIB, 20, 4
_SMALL_UBATCH = 128
_SECTOR = 512


_DemandOf = Callable[["GgufInfo", "Asked", int, int], Demand]


class FitError(MobileError):
    """A model, or the budgets asked for, do not fit on this machine."""


@dataclass(frozen=True)
class DeviceMemory:
    """A device's name and memory in bytes; ``key`` is what its measurements are called.

    ``says_free``: its driver knows what is free; ``shares_host``: what it takes is missing in RAM.
    """

    name: str
    free_bytes: int
    total_bytes: int
    key: str = ""
    says_free: bool = True
    shares_host: bool = False

    @classmethod
    def of(cls, device: Device) -> DeviceMemory:
        """A device as it was listed."""
        return cls(
            name=device.name,
            free_bytes=device.free_bytes,
            total_bytes=device.total_bytes,
            key=device_key(device.name, device.description),
            says_free=device.says_free,
            shares_host=device.shares_host_memory,
        )


@dataclass(frozen=True)
class Fit:
    """Where everything goes, in bytes. ``ram_budget_bytes`` and ``vram_budget_bytes`` are for routed experts.

    ``ram_share`` and ``vram_share`` are parts of all experts, 1 at most. With a device tier ``demand`` is the
    device's. ``n_bits`` are bits per weight of the file.
    """

    n_ctx: int
    n_ubatch: int
    demand: Demand
    memory: Memory
    ram_budget_bytes: int
    ram_share: float
    devices: tuple[DeviceMemory, ...] = ()
    vram_budget_bytes: int = 0
    vram_share: float = 0.0
    n_bits: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def has_device(self) -> bool:
        return bool(self.devices)


@dataclass(frozen=True)
class Asked:
    """What a plan is made for. ``ram`` and ``vram``: a size, a share of the experts, or auto; vram None:
    off."""

    n_ctx: int
    n_ubatch: int
    flash_attn: bool = False
    ram: Size = AUTO
    vram: Size | None = None


def plan_fit(
    info: GgufInfo, asked: Asked, memory: Memory, devices: Sequence[DeviceMemory] = (), n_weights: int = 0
) -> Fit:
    """Decide what goes where. ``n_weights``: the model's, to speak of bits per weight.

    Raises FitError, saying what would fit instead.
    """
    n_bits = 8 * info.tensor_bytes / n_weights if n_weights else 0.0
    demand = _demand(info, asked, asked.n_ctx, asked.n_ubatch)
    on_device = tuple(devices) if asked.vram is not None else ()
    vram, host = 0, demand
    if on_device:
        host = host_share(demand, info)
        demand = _device_demand(info, asked, asked.n_ctx, asked.n_ubatch)
        vram = _plan_device(info, asked, demand, on_device)
        if any(device.shares_host for device in on_device):
            taken = vram + demand.total_bytes
            memory = Memory(max(0, memory.available_bytes - taken), memory.total_bytes, memory.source)
    if not info.is_moe:
        free = memory.available_bytes
        if not on_device and demand.total_bytes > free:
            raise FitError(_refusal(info, asked, demand, memory.source, free, n_bits))
        return Fit(asked.n_ctx, asked.n_ubatch, demand, memory, 0, 1.0, on_device, n_bits=n_bits)
    budget = _plan_host(info, asked, host, memory, n_bits)
    return Fit(
        n_ctx=asked.n_ctx,
        n_ubatch=asked.n_ubatch,
        demand=demand,
        memory=memory,
        ram_budget_bytes=budget,
        ram_share=stored_share(info, budget),
        devices=on_device,
        vram_budget_bytes=vram,
        vram_share=min(1.0, vram / max(1, pool_all_bytes(info, max(1, len(on_device))))),
        n_bits=n_bits,
    )


def stored_share(info: GgufInfo, budget_bytes: int) -> float:
    """The part of all experts that the store holds in a budget: 1 where all stay.

    Pieces start anywhere in a sector, and disks' sectors are smaller than what the budget allows for.
    """
    if budget_bytes <= 0 or budget_bytes >= info.budget_all_bytes:
        return 1.0
    return min(0.999, budget_bytes / sum(layer.store_bytes(_SECTOR) for layer in info.expert_layers))


def _demand(info: GgufInfo, asked: Asked, n_ctx: int, n_ubatch: int) -> Demand:
    return estimate_demand(info, n_ctx=n_ctx, n_ubatch=n_ubatch, flash_attn=asked.flash_attn)


def _device_demand(info: GgufInfo, asked: Asked, n_ctx: int, n_ubatch: int) -> Demand:
    """What goes to devices beside slots."""
    found = estimate_device_demand(info, n_ctx=n_ctx, n_ubatch=n_ubatch, flash_attn=asked.flash_attn)
    return Demand(found.dense_bytes, found.kv_bytes, found.compute_bytes)


def _device_reserve(devices: Sequence[DeviceMemory]) -> int:
    return sum(
        max(_DEVICE_RESERVE_MIN, device.free_bytes // _DEVICE_RESERVE_SHARE)
        if device.says_free
        else device.free_bytes // _BLIND_RESERVE_SHARE
        for device in devices
    )


def _plan_host(info: GgufInfo, asked: Asked, demand: Demand, memory: Memory, n_bits: float) -> int:
    """The host budget in bytes; ``budget_all_bytes`` if every expert stays."""
    free = memory.available_bytes
    try:
        plan = plan_budget(asked.ram, info, demand, memory)
    except UsageError as error:
        if not asked.ram.is_auto:
            raise FitError(str(error)) from None
        raise FitError(_refusal(info, asked, demand, memory.source, free, n_bits)) from None
    budget = plan.budget_bytes or info.budget_all_bytes
    if not asked.ram.is_auto and budget + demand.total_bytes > free:
        raise FitError(
            f"--ram-budget {asked.ram} does not fit: {format_bytes(budget)} of experts and "
            f"{format_bytes(demand.total_bytes)} for the rest, but {memory.source} has {format_bytes(free)} "
            f"available; {_largest_budget(info, demand, memory)}"
        )
    return budget


def _largest_budget(info: GgufInfo, demand: Demand, memory: Memory) -> str:
    try:
        plan = plan_budget(AUTO, info, demand, memory)
    except BudgetError:
        return "no budget does: use a smaller --ctx-size or --ubatch-size"
    return f"--ram-budget {mebibytes(plan.budget_bytes or info.budget_all_bytes)} does"


def _plan_device(info: GgufInfo, asked: Asked, demand: Demand, devices: Sequence[DeviceMemory]) -> int:
    """The devices' budget for expert slots together."""
    vram = asked.vram or AUTO
    free = sum(device.free_bytes for device in devices)
    names = ", ".join(device.name for device in devices)
    reserve = _device_reserve(devices)
    room = free - demand.total_bytes - reserve
    need = pool_min_bytes(info, len(devices)) if info.is_moe else 0
    most = pool_all_bytes(info, len(devices))
    if room < need:
        would = _smaller_context(info, asked, free - reserve - need, "--vram-budget off", _device_demand)
        raise FitError(
            f"{names} has {format_bytes(free)} free; dense weights {format_bytes(demand.dense_bytes)}, KV "
            f"{format_bytes(demand.kv_bytes)}, buffers {format_bytes(demand.compute_bytes)}, a reserve of "
            f"{format_bytes(reserve)} and one token's experts of a layer ({format_bytes(need)}) must fit; "
            f"what would: {would}"
        )
    if vram.is_auto:
        return min(room, most)
    wanted = vram.n_bytes if vram.n_bytes is not None else int(info.expert_bytes * (vram.fraction or 0))
    if wanted > room:
        raise FitError(
            f"--vram-budget {vram} does not fit: {names} has {format_bytes(free)} free, of which "
            f"{format_bytes(demand.total_bytes)} go to dense weights, KV and buffers; --vram-budget "
            f"{mebibytes(room)} does"
        )
    if wanted < need:
        raise FitError(
            f"--vram-budget {vram} is too small: one token needs {format_bytes(need)} of experts in a layer; "
            f"--vram-budget {mebibytes(need, up=True)} does"
        )
    return min(wanted, most)


def _refusal(info: GgufInfo, asked: Asked, demand: Demand, source: str, free: int, n_bits: float) -> str:
    """Why a model does not fit, and what would."""
    smallest = info.budget_min_bytes
    reserve = max(64 * MIB, free // 20)
    least = f", one layer's experts {format_bytes(smallest)}" if info.is_moe else ""
    ways = [_smaller_context(info, asked, free - reserve - smallest, "")]
    fixed = demand.kv_bytes + demand.compute_bytes + reserve
    if n_bits and free > fixed:
        bits = n_bits * (free - fixed) / (demand.dense_bytes + smallest)
        if bits >= 1:
            ways.append(f"a quantisation of at most {bits:.1f} bits a weight instead of {n_bits:.1f}")
    needed = demand.total_bytes + smallest + reserve
    ways.append(f"{format_bytes(needed)} of free memory")
    return (
        f"{info.path.name} does not fit: {source} has {format_bytes(free)} available; dense weights "
        f"{format_bytes(demand.dense_bytes)}, KV {format_bytes(demand.kv_bytes)}, buffers "
        f"{format_bytes(demand.compute_bytes)}{least}, a reserve of {format_bytes(reserve)}; what would fit: "
        + "; or ".join(way for way in ways if way)
    )


def _smaller_context(
    info: GgufInfo, asked: Asked, room: int, otherwise: str, demand: _DemandOf | None = None
) -> str:
    """The flags with which everything but the experts takes at most ``room`` bytes; ``otherwise`` if none
    do."""
    found = largest_context(info, asked, room, demand)
    if found is None:
        return otherwise
    n_ctx, n_ubatch = found
    ubatch = f" -ub {n_ubatch}" if n_ubatch != asked.n_ubatch else ""
    return f"-c {n_ctx}{ubatch}"


def largest_context(
    info: GgufInfo, asked: Asked, room: int, demand: _DemandOf | None = None
) -> tuple[int, int] | None:
    """The largest context up to what was asked, and the micro-batch with it, that take at most ``room``."""
    for n_ubatch in dict.fromkeys((asked.n_ubatch, min(asked.n_ubatch, _SMALL_UBATCH))):
        low, high = 0, -(-asked.n_ctx // CONTEXT_MULTIPLE)
        while low < high:
            middle = (low + high + 1) // 2
            if (demand or _demand)(info, asked, middle * CONTEXT_MULTIPLE, n_ubatch).total_bytes <= room:
                low = middle
            else:
                high = middle - 1
        if low > 0:
            return min(low * CONTEXT_MULTIPLE, asked.n_ctx), n_ubatch
    return None


def mebibytes(n_bytes: int, *, up: bool = False) -> str:
    """A size as a flag takes it, in whole MiB, or KiB where these are few; rounded down unless ``up``."""
    unit, name = (MIB, "MiB") if n_bytes >= 64 * MIB else (KIB, "KiB")
    return f"{-(-n_bytes // unit) if up else n_bytes // unit}{name}"
