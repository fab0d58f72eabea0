"""One truth of memory: what a plan says and what a load does are the same bytes, on any machine."""

import argparse
import random
import shlex
from collections import Counter
from dataclasses import dataclass, replace
from itertools import accumulate
from types import SimpleNamespace

import pytest
from fake_backend import FakeBackend, fake_caches, fake_info
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mobile_gguf.api import loading
from mobile_gguf.device import tier as device_tier
from mobile_gguf.engine.devices import GPU, IGPU, Device
from mobile_gguf.engine.structs import DeviceInfo
from mobile_gguf.errors import BudgetError
from mobile_gguf.flags import add_arguments
from mobile_gguf.flags import given as given_by
from mobile_gguf.gguf.info import ExpertLayer
from mobile_gguf.memory.fit import Asked, asked_of, fit_model
from mobile_gguf.memory.machine import Memory
from mobile_gguf.memory.microbatch import DEFAULT_UBATCH
from mobile_gguf.memory.pools import pool_all_bytes
from mobile_gguf.options import LoadOptions, make_options
from mobile_gguf.plan.planner import Plan, plan_facts, plan_lines, suggest
from mobile_gguf.plan.refusal import FitError, plan_fit
from mobile_gguf.sizes import GIB, MIB, Size


@dataclass(frozen=True)
class Machine:
    """Host memory within a cgroup's limit, and devices."""

    memory: Memory
    devices: tuple[Device, ...]


def a_model(pick):
    """A model with leading dense layers, experts of one or two shapes, whole or in segments; or without."""
    n_layer = pick.randint(1, 48)
    n_moe = pick.randint(1, n_layer)
    n_expert = pick.choice([0, 16, 64, 128, 128, 256])
    segments = pick.choice([1, 1, 2])
    sizes = [pick.randint(64, 4096) * 512 for _ in range(pick.choice([1, 2]))]
    layers = [ExpertLayer(n_expert, (sizes[i % len(sizes)],) * 3, segments) for i in range(n_moe) if n_expert]
    dense = pick.randint(16 * MIB, 4 * GIB)
    n_head = pick.randint(1, 64)
    return fake_info(
        n_layer=n_layer,
        n_embd=pick.choice([64, 2048, 8192]),
        n_vocab=pick.randint(256, 200_000),
        n_head=(n_head,) * n_layer,
        caches=fake_caches((max(1, n_head // 8),) * n_layer, 128, 128),
        n_ctx_train=pick.choice([512, 32768, 262144]),
        n_expert=n_expert,
        n_expert_used=min(8, n_expert),
        n_ff_expert=1024,
        segments=segments,
        expert_layers=tuple(layers),
        tensor_bytes=dense + sum(layer.file_bytes for layer in layers),
        embedding_bytes=dense // 3,
    )


def a_machine(pick, info):
    """Host memory within a cgroup's limit, and devices: too small for the model, too large, and between."""
    need = info.tensor_bytes + GIB

    def some(least=0.05):
        return int(need * pick.choice([pick.uniform(least, 1), pick.uniform(0.5, 3)]))

    devices = []
    for i in range(pick.choice([0, 1, 1, 1, 2, 3])):
        total = GIB + some()
        kind = pick.choice(["discrete", "discrete", "integrated", "loopback", "remote"])
        devices.append(
            Device(
                handle=i + 1,
                name=f"GPU{i}",
                description="127.0.0.1:1" if kind == "loopback" else "10.0.0.1:1",
                # a driver that does not know calls all of it free
                free_bytes=int(total * pick.uniform(0.3, 0.99)) if pick.random() < 0.7 else total,
                total_bytes=total,
                is_rpc=kind in ("loopback", "remote"),
                type=IGPU if kind == "integrated" else GPU,
            )
        )
    total, limit = some(), pick.choice([None, some()])
    free = int(total * pick.uniform(0.5, 1))
    if limit is not None and limit < free:
        return Machine(Memory(limit, min(limit, total), "cgroup /x"), tuple(devices))
    return Machine(Memory(free, total, "the machine"), tuple(devices))


def some_options(pick):
    budgets = ["auto"] * 6 + ["100%", "50%", "20%", "2GiB", "1MiB"]
    return LoadOptions(
        ram_budget=pick.choice(budgets),
        vram_budget=pick.choice([*budgets, "off"]),
        n_ctx=pick.choice([None, None, pick.randint(1, 65536)]),
        n_ubatch=pick.choice([32, 512, "auto", "auto"]),
        flash_attn=pick.random() < 0.5,
    )


def a_case(seed):
    """A machine, a model, and options; every seed another."""
    pick = random.Random(seed)
    info = a_model(pick)
    machine, load = a_machine(pick, info), some_options(pick)
    if not machine.devices and load.vram_budget != "off":
        load = replace(load, vram_budget="auto")  # a budget without a device is refused before any memory
    return machine, info, load


seeds = st.integers(0, 1 << 32)


class Engine:
    """The engine as far as a load's memory goes."""

    def __init__(self):
        self.store = None

    def set_load_params(self, *, budget_bytes, **_others):
        self.store = budget_bytes

    def clear_load_params(self):
        pass


class Loaded:
    """Devices that hold a model: llama.cpp has split its layers by free memory, and each driver that knows
    what is free has given its part away."""

    def __init__(self, machine, info, fit):
        self.pool = 0
        free = list(accumulate(device.free_bytes for device in machine.devices))
        whole = info.n_layer + 1
        own = [0] * len(machine.devices)
        for i, layer in enumerate(info.expert_layers):
            at = (info.n_layer - info.n_layer_moe + i) / whole
            device = next(n for n, end in enumerate(free) if end / free[-1] > at)
            own[device] += layer.file_bytes
        self.found = []
        for device, n_bytes in zip(machine.devices, own, strict=True):
            left = device.free_bytes
            if device.says_free:
                left = max(0, left - int(fit.demand.total_bytes * n_bytes / info.expert_bytes))
            if n_bytes:
                self.found.append(
                    DeviceInfo(device.name, "", left, device.total_bytes, 0, n_bytes, 1, 0, 1, 1)
                )

    def devices(self):
        return self.found

    def start(self, budget_bytes, **_others):
        self.pool = budget_bytes

    def set_placement(self, placement):
        pass


def loaded(monkeypatch, machine, info, load):
    """(store's bytes, slots' bytes, whether on devices, warned) of a real ``open_backend``; None: refused."""
    engine, calls = Engine(), []

    def make_calls(_engine, _ctx):
        fit = fit_model(info, asked_of(info, load), machine.memory, machine.devices)
        calls.append(Loaded(machine, info, fit))
        return calls[0]

    on_device = []

    def construct(*_arguments, devices, **_more):
        on_device.append(bool(devices))
        return FakeBackend()

    with monkeypatch.context() as patch:
        patch.setattr(loading, "find_engine", lambda: engine)
        patch.setattr(loading, "capture_log", lambda _verbose: None)
        patch.setattr(loading, "try_file", lambda *_arguments: None)
        patch.setattr(loading, "with_buffers", lambda _engine, _info, asked, _keep_on: asked)
        patch.setattr(loading, "_construct", construct)
        patch.setattr(loading, "read_memory", lambda: machine.memory)
        patch.setattr(loading, "DeviceCalls", make_calls)
        patch.setattr(loading, "set_prefetch", lambda *_arguments: None)
        patch.setattr(loading, "holder", lambda *_arguments: None)
        patch.setattr(device_tier, "find_devices", lambda _servers: list(machine.devices))
        patch.setattr(device_tier, "placement_key", lambda *_arguments: "")
        try:
            _, notices = loading.open_backend(info, load)
        except BudgetError:
            return None
    warned = any("may not fit" in notice for notice in notices)
    pool = calls[0].pool if calls and on_device[-1] else 0
    return SimpleNamespace(store=engine.store, pool=pool, on_device=on_device[-1], warned=warned)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=seeds)
def test_a_plan_and_a_load_give_the_same_bytes(monkeypatch, seed):
    machine, info, load = a_case(seed)
    came = loaded(monkeypatch, machine, info, load)
    asked = asked_of(info, load)
    try:
        plan = plan_fit(info, asked, machine.memory, machine.devices)
    except FitError:
        # stricter than a load only where that warns, or maps a dense model
        assert came is None or came.warned or not info.is_moe
        return
    assert came is not None
    assert bool(plan.devices) == came.on_device
    if not info.is_moe:
        return
    assert plan.store_bytes == came.store
    assert plan.vram_budget_bytes == came.pool


@settings(max_examples=100, deadline=None)
@given(seed=seeds)
def test_the_command_of_a_plan_does_what_the_plan_says(seed):
    machine, info, load = a_case(seed)
    try:
        plan = plan_fit(info, asked_of(info, load), machine.memory, machine.devices)
    except FitError:
        assume(False)
        return
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser, LoadOptions)
    words = shlex.split(suggest(info, load, plan, ()))[3:]
    again = make_options(LoadOptions, given_by(parser.parse_args(words), LoadOptions))
    fit = fit_model(info, asked_of(info, again), machine.memory, machine.devices)
    assert (fit.devices, fit.ram_share >= 1) == (plan.devices, plan.ram_share >= 1)
    # rounded down to what a flag can say in a few digits
    assert 0 <= plan.ram_budget_bytes - fit.ram_budget_bytes < MIB
    if plan.vram_budget_bytes:
        assert 0 <= plan.vram_budget_bytes - fit.vram_budget_bytes < MIB


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_whatever_is_chosen_fits_where_the_usual_one_does(seed):
    """A larger one is never the reason for a refusal or a warning."""
    machine, info, load = a_case(seed)
    pick = random.Random(seed)
    # where larger ones have a chance: buffers are small beside the experts
    load = replace(load, n_ctx=pick.choice([1024, 2048]), flash_attn=pick.random() < 0.2)
    auto = LoadOptions(**{**vars(load), "n_ubatch": "auto", "n_batch": pick.choice([None, 2048])})
    usual = LoadOptions(**{**vars(load), "n_ubatch": DEFAULT_UBATCH, "n_batch": None})
    try:
        expected = fit_model(info, asked_of(info, usual), machine.memory, machine.devices)
    except BudgetError:
        with pytest.raises(BudgetError):
            fit_model(info, asked_of(info, auto), machine.memory, machine.devices)
        return
    fit = fit_model(info, asked_of(info, auto), machine.memory, machine.devices)
    assert fit.warning == expected.warning
    assert fit.devices == expected.devices
    assert fit.ram_budget_bytes >= expected.ram_budget_bytes - expected.ram_budget_bytes // 16
    assert fit.asked.larger == ()


def test_the_cases_are_of_every_kind():
    found = Counter()
    for seed in range(300):
        machine, info, load = a_case(seed)
        try:
            fit = fit_model(info, asked_of(info, load), machine.memory, machine.devices)
        except BudgetError:
            found["refused"] += 1
            continue
        found["some in memory" if fit.ram_share < 1 else "all in memory"] += 1
        if fit.devices and info.is_moe:
            slots = "all" if fit.vram_share >= 1 else "some" if fit.vram_budget_bytes else "no"
            found[f"{'auto' if fit.pool_bytes is None else 'asked'}, {slots} slots"] += 1
            found["shared"] += bool(fit.shared)
            found["several"] += fit.n_pools > 1
    assert min(found.values()) >= 5
    assert len(found) == 10


# by hand: what once were two answers

INFO = fake_info(expert_layers=(ExpertLayer(16, (32 * MIB, 32 * MIB)),) * 4, tensor_bytes=5 * GIB)
PLENTY = Memory(64 * GIB, 64 * GIB, "the machine")


def fit_of(device, **load):
    return fit_model(INFO, asked_of(INFO, LoadOptions(**load)), PLENTY, [device])


def test_the_reserve_is_of_all_of_a_devices_memory():
    device = Device(1, "GPU0", "a GPU", 5 * GIB, 40 * GIB)
    fit = fit_of(device)
    assert fit.vram_budget_bytes == 5 * GIB - fit.demand.total_bytes - 2 * GIB


def test_all_of_the_experts_is_every_expert_in_a_slot():
    device = Device(1, "GPU0", "a GPU", 30 * GIB, 40 * GIB)
    assert fit_of(device, vram_budget="100%").vram_budget_bytes == pool_all_bytes(INFO)
    assert fit_of(device).vram_budget_bytes == pool_all_bytes(INFO)


def test_what_a_device_takes_of_shared_memory_is_missing_on_the_host():
    device = Device(1, "GPU0", "a GPU", 30 * GIB, 40 * GIB, type=IGPU)
    memory = Memory(6 * GIB, 64 * GIB, "the machine")

    def fit(**load):
        return fit_model(INFO, asked_of(INFO, LoadOptions(**load)), memory, [device])

    auto, less = fit(), fit(vram_budget="2GiB")
    assert less.host_demand.total_bytes - auto.host_demand.total_bytes == 2 * GIB
    assert less.ram_budget_bytes < auto.ram_budget_bytes - GIB
    for one in (auto, less):
        assert one.ram_budget_bytes + one.host_demand.total_bytes <= memory.available_bytes
    assert auto.vram_budget_bytes <= memory.available_bytes - auto.ram_budget_bytes


def test_a_budget_beyond_memory_is_kept_by_a_load_and_refused_by_a_plan():
    asked = asked_of(INFO, LoadOptions(ram_budget=Size(n_bytes=4 * GIB)))
    memory = Memory(4 * GIB, 64 * GIB, "the machine")
    fit = fit_model(INFO, asked, memory)
    assert fit.store_bytes == 4 * GIB
    assert "may not fit" in fit.warning
    with pytest.raises(FitError):
        plan_fit(INFO, asked, memory)


def test_tables_on_disk_take_no_memory_and_a_plan_says_where_they_are():
    table = 40 * GIB
    info = replace(INFO, tensor_bytes=INFO.tensor_bytes + table, lazy_bytes=table)
    fit = fit_model(info, Asked(n_ctx=512, n_ubatch=64), Memory(20 * GIB, 20 * GIB, "the machine"))
    assert fit.demand.dense_bytes == INFO.dense_bytes
    plan = Plan(info, fit, (), None, "run", "", {})
    assert "tables on disk    40.00 GiB read row by row, in memory only as page cache" in plan_lines(plan)
    assert plan_facts(plan)["mapped_bytes"] == table
