"""Where a model goes in the memory there is, host and devices: the one decision, for ``plan`` and ``load``.

Pure arithmetic of a header, options, and the memory as it was before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mobile_gguf.engine.buffers import NOT_MEASURED, Context, Measured
from mobile_gguf.engine.devices import Device
from mobile_gguf.engine.structs import DeviceInfo
from mobile_gguf.engine.tried import known_buffers
from mobile_gguf.errors import BudgetError, UsageError
from mobile_gguf.gguf.caches import F16_KV, KvTypes
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.options import LoadOptions
from mobile_gguf.options.words import F16
from mobile_gguf.sizes import AUTO, OFF, Size

from .budget import plan_budget, reserve_bytes, stored_share
from .context import other_contexts, with_context
from .demand import (
    Demand,
    context_of,
    context_size,
    estimate_demand,
    estimate_device_demand,
    host_share,
)
from .machine import Memory
from .microbatch import DEFAULT_UBATCH, growth_pays, larger_ubatches, reads_are_hidden
from .pools import asked_pool, auto_pool, foreseen, lacking, pool_all_bytes, pool_min_bytes
from .sequences import ONE, Sequences, sequences_of


@dataclass(frozen=True)
class Asked:
    """What a model is to be loaded with. ``ram`` and ``vram``: a size, a share of the experts, or auto.

    ``n_ubatch`` is the micro-batch, ``larger`` what may be taken instead where experts are streamed: none if
    the user gave one; ``other_contexts`` likewise of the context. ``kv``: the types of keys and values.
    ``sequences`` are in the context at once. ``vram`` None: no device. ``servers``: RPC servers were named as
    devices. ``measured``: what the engine said of the file's compute buffers, with f16 for keys and values.
    """

    n_ctx: int
    n_ubatch: int
    larger: tuple[int, ...] = ()
    flash_attn: bool = False
    kv: KvTypes = F16_KV
    other_contexts: tuple[int, ...] = ()
    ram: Size = AUTO
    vram: Size | None = AUTO
    servers: bool = False
    sequences: Sequences = ONE
    measured: Measured = field(default=NOT_MEASURED, repr=False, compare=False)

    @property
    def context(self) -> Context:
        """As the engine makes it."""
        return context_of(self.n_ctx, self.n_ubatch, self.flash_attn)

    @property
    def contexts(self) -> list[Context]:
        """All that it may become at this length."""
        return [context_of(self.n_ctx, n, self.flash_attn) for n in (self.n_ubatch, *self.larger)]

    @property
    def insists(self) -> bool:
        """Whether devices were asked for, so that what cannot be done there is an error and not a notice."""
        return self.servers or (self.vram is not None and not self.vram.is_auto)


@dataclass(frozen=True)
class Fit:
    """Where everything goes, in bytes. Budgets are for routed experts; shares are parts of all of them.

    ``asked`` with the micro-batch that was chosen.
    ``ram_budget_bytes`` is ``GgufInfo.budget_all_bytes`` if all stay in memory, 0 of a model without experts.
    ``vram_budget_bytes`` is what slots will have on ``devices``; ``pool_bytes`` what was asked for, None for
    ``auto``: then the free memory is looked at again once the model is loaded. ``demand`` is what goes to the
    devices beside slots, or to the host if there are none; ``host_demand`` what is missing in host memory.
    ``warning``: why it may not fit after
    all.
    """

    asked: Asked
    demand: Demand
    host_demand: Demand
    memory: Memory
    ram_budget_bytes: int = 0
    ram_share: float = 1.0
    devices: tuple[Device, ...] = ()
    n_pools: int = 0  # devices that get layers with experts
    pool_bytes: int | None = None
    vram_budget_bytes: int = 0
    vram_share: float = 0.0
    shared: dict[str, int] = field(default_factory=dict)  # bounds of devices that share the host's memory
    warning: str = ""
    notes: tuple[str, ...] = ()

    @property
    def store_bytes(self) -> int:
        """The host budget as the engine takes it: 0 if every expert stays."""
        return 0 if self.ram_share >= 1 else self.ram_budget_bytes

    def auto_pool(self, devices: Sequence[DeviceInfo], info: GgufInfo) -> int:
        """What slots may have on devices that hold the model."""
        return auto_pool(devices, info, self.demand, self.shared)


def asked_of(info: GgufInfo, options: LoadOptions) -> Asked:
    """What options ask of memory, with what is known of the file's buffers.

    Raises UsageError for servers without the use of a device, and for keys and values that cannot be so.
    """
    vram = options.vram_budget
    if vram == OFF and options.rpc:
        raise UsageError(f"--rpc names devices, and --vram-budget {OFF} uses none: leave one of them out")
    n_ctx = context_size(info, options.n_ctx)
    kv = KvTypes(options.cache_type_k, options.cache_type_v)
    _check_types(info, options, kv)
    flash_attn = options.uses_flash_attention
    is_auto = isinstance(options.n_ubatch, str)
    wanted = options.n_ubatch if isinstance(options.n_ubatch, int) else DEFAULT_UBATCH
    return Asked(
        n_ctx=n_ctx,
        n_ubatch=min(wanted, options.n_batch or wanted),
        larger=larger_ubatches(info, n_ctx, options.n_batch, flash_attn) if is_auto else (),
        flash_attn=flash_attn,
        kv=kv,
        other_contexts=other_contexts(info, n_ctx) if options.n_ctx is None else (),
        ram=options.ram_budget,
        vram=None if vram == OFF else vram,
        servers=bool(options.rpc),
        sequences=sequences_of(info, options)[0],
        measured=Measured(known_buffers(info.path, info.files)),
    )


def _check_types(info: GgufInfo, options: LoadOptions, kv: KvTypes) -> None:
    """Raise UsageError if keys and values cannot be kept so."""
    if problem := info.caches.problem_of(kv):
        given = f"-ctk {kv.keys} -ctv {kv.values}"
        raise UsageError(f"{given} does not go with {info.path.name}: {problem}; leave them out")
    if options.flash_attn is False and kv.values != F16:
        raise UsageError(f"-ctv {kv.values} needs flash attention: leave out --flash-attn off")


def fit_model(info: GgufInfo, asked: Asked, memory: Memory, devices: Sequence[Device] = ()) -> Fit:
    """Decide what of a model goes where.

    Devices that nobody insists on are left out, with a note, where the model does not fit there. A budget
    beyond the memory available is kept, or cut under a cgroup's limit, with a warning. Raises BudgetError for
    what cannot be loaded.
    """
    if asked.other_contexts:
        asked = with_context(asked, lambda one: fit_model(info, replace(one, larger=()), memory, devices))
        asked = replace(asked, larger=tuple(n for n in asked.larger if n <= asked.n_ctx))
    if asked.vram is None or not devices:
        return _fit_host(info, asked, memory)
    try:
        return _fit_devices(info, asked, memory, tuple(devices), asked.vram)
    except BudgetError as error:
        if asked.insists and info.is_moe:
            raise
        return _fit_host(info, asked, memory, f"the model stays on the host: {error}")


def _fit_host(info: GgufInfo, asked: Asked, memory: Memory, *notes: str) -> Fit:
    """On the host alone, with the largest micro-batch that reads of streamed experts are worth."""
    usual = chosen = _fit_ubatch(info, asked, asked.n_ubatch, memory, notes)
    for n_ubatch in asked.larger:
        if usual.warning or reads_are_hidden(info, chosen.ram_share, chosen.asked.n_ubatch):
            break
        try:
            more = _fit_ubatch(info, asked, n_ubatch, memory, notes)
        except BudgetError:
            break
        if not _has_room(more) or not growth_pays(usual.ram_budget_bytes, more.ram_budget_bytes):
            break
        chosen = more
    return chosen


def _has_room(fit: Fit) -> bool:
    """Whether as much is left as an automatic budget leaves; one that was asked for may leave less."""
    available = fit.memory.available_bytes
    return fit.demand.total_bytes + fit.ram_budget_bytes + reserve_bytes(available) <= available


def _fit_ubatch(info: GgufInfo, asked: Asked, n_ubatch: int, memory: Memory, notes: tuple[str, ...]) -> Fit:
    asked = replace(asked, n_ubatch=n_ubatch, larger=())
    demand = host_demand(info, asked)
    if not info.is_moe:
        return Fit(asked, demand, demand, memory, notes=notes)
    plan = plan_budget(asked.ram, info, demand, memory)
    budget = plan.budget_bytes or info.budget_all_bytes
    return Fit(
        asked, demand, demand, memory,
        ram_budget_bytes=budget, ram_share=stored_share(info, budget), warning=plan.warning, notes=notes,
    )  # fmt: skip


def host_demand(info: GgufInfo, asked: Asked) -> Demand:
    """The demand with all of the model on the host."""
    n_ctx, n_ubatch, flash_attn = asked.context
    return estimate_demand(
        info, n_ctx=n_ctx, n_ubatch=n_ubatch, flash_attn=flash_attn, kv=asked.kv, measured=asked.measured,
        sequences=asked.sequences,
    )  # fmt: skip


def _fit_devices(
    info: GgufInfo, asked: Asked, memory: Memory, devices: tuple[Device, ...], vram: Size
) -> Fit:
    # a device's memory is for slots: what a prompt needs of them is uploaded, whatever the micro-batch
    asked = replace(asked, larger=())
    n_ctx, n_ubatch, flash_attn = asked.context
    demand = estimate_device_demand(
        info, n_ctx=n_ctx, n_ubatch=n_ubatch, flash_attn=flash_attn, kv=asked.kv, measured=asked.measured,
        sequences=asked.sequences,
    )  # fmt: skip
    holding = foreseen(devices, info, demand)
    n = max(1, len(holding))
    pool = asked_pool(vram, info, n) if info.is_moe else None
    smallest = pool_min_bytes(info, n) if info.is_moe else 0
    problem = lacking(devices, demand, pool or smallest)
    if problem:
        less = pool is not None and not lacking(devices, demand, smallest)
        remedy = "a smaller --vram-budget" if less else "a smaller --ctx-size or --ubatch-size"
        advice = f"; try {remedy}, or --vram-budget {OFF}" if asked.insists else ""
        raise BudgetError(f"{problem}{advice}")
    sharing = [device.name for device in devices if device.shares_host_memory]
    host = host_share(host_demand(info, asked), info)
    if not info.is_moe:
        notes = () if vram.is_auto else ("--vram-budget has no effect",)
        return Fit(asked, demand, host, memory, devices=devices, notes=notes)
    taken = host
    if sharing:
        # What goes to the device is missing on the host.
        taken = host + demand + Demand(0, 0, pool or 0)
    # of slots on several devices not all need be on those that share it
    plan = plan_budget(asked.ram, info, taken, memory, is_bound=bool(sharing))
    budget = plan.budget_bytes or info.budget_all_bytes
    # Half of what is left: the host's own needs grow as well, and a page too many ends a process.
    left = max(0, memory.available_bytes - taken.total_bytes - budget) // 2
    shared = dict.fromkeys(sharing, left)
    slots = pool if pool is not None else auto_pool(holding, info, demand, shared)
    return Fit(
        asked, demand, taken, memory,
        ram_budget_bytes=budget, ram_share=stored_share(info, budget),
        devices=devices, n_pools=n, pool_bytes=pool, vram_budget_bytes=slots,
        vram_share=pool_share(info, slots, n), shared=shared, warning=plan.warning,
    )  # fmt: skip


def pool_share(info: GgufInfo, pool_bytes: int, n_devices: int) -> float:
    """The part of all experts that has a slot."""
    return min(1.0, pool_bytes / max(1, pool_all_bytes(info, max(1, n_devices))))
