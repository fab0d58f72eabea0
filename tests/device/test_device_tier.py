"""Which devices a model is loaded on, and what happens when they refuse: scripted devices."""

from typing import Any

import pytest
from fake_backend import MIB, FakeBackend, fake_info, scripted

from mobile_gguf.device import tier as device_tier
from mobile_gguf.device.tier import devices_for, start_tier
from mobile_gguf.engine.devices import Device
from mobile_gguf.engine.structs import DeviceCounters, DeviceInfo
from mobile_gguf.errors import BudgetError, EngineError, EngineMemoryError, UsageError
from mobile_gguf.gguf.info import ExpertLayer
from mobile_gguf.memory.fit import Fit, asked_of, fit_model
from mobile_gguf.memory.machine import Memory
from mobile_gguf.memory.pools import pool_all_bytes, pool_min_bytes
from mobile_gguf.options import LoadOptions
from mobile_gguf.options.words import CACHE, HOST, LAYERS

GIB = 1 << 30
MOE = fake_info(expert_layers=(ExpertLayer(16, (MIB, MIB)),) * 4, tensor_bytes=130 * MIB)
DENSE = fake_info(n_expert=0, n_expert_used=0, expert_layers=())
ENGINE: Any = object()


class FakeCalls:
    """A device with room for ``room`` bytes of slots; records what is started."""

    def __init__(self, room=1 << 60, free=8 * GIB, expert_bytes=128 * MIB):
        self.room = room
        self.info = DeviceInfo("GPU0", "a GPU", free, 16 * GIB, 0, expert_bytes, 4, 0, 1, 1)
        self.started = []
        self.placements = []

    def devices(self):
        return [self.info]

    def start(self, budget_bytes, **params):
        if budget_bytes > self.room:
            raise EngineMemoryError(f"GPU0 refused {budget_bytes} bytes")
        self.started.append((budget_bytes, params))

    def set_placement(self, placement):
        self.placements.append(placement)

    def counters(self):
        return DeviceCounters(n_hits=5)


@pytest.fixture
def devices(monkeypatch):
    """The devices of this machine: ``devices(Device, ...)``; servers are recorded in ``devices.asked``."""
    return Installed(monkeypatch)


class Installed:
    """Makes its arguments the devices there are; ``asked`` are the servers that were named."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.asked = []

    def __call__(self, *found):
        def find(servers):
            self.asked.append(servers)
            return list(found)

        self.monkeypatch.setattr(device_tier, "find_devices", find)


GPU = Device(1, "GPU0", "a GPU", 8 * GIB, 16 * GIB)


HOST_MEMORY = Memory(2 * GIB, 4 * GIB, "the machine")


def request(info=MOE, engine=ENGINE, **options) -> tuple[Fit, list[str]]:
    """As ``load`` does it: the devices there are, and where the model goes."""
    load = LoadOptions(n_ctx=512, **options)
    asked = asked_of(info, load)
    found, notices = devices_for(load, asked, engine)
    fit = fit_model(info, asked, HOST_MEMORY, found)
    return fit, [*notices, *fit.notes]


# what is asked of which devices


def test_a_device_is_used_where_there_is_one(devices):
    devices(GPU)
    made, notices = request()
    assert (made.devices, made.pool_bytes, made.asked.insists, notices) == ((GPU,), None, False, [])
    made, _ = request(vram_budget="64MiB", rpc="host:1")
    assert (made.pool_bytes, made.asked.insists) == (64 * MIB, True)
    assert devices.asked == ["", "host:1"]


def test_without_a_device_auto_is_the_host_alone(devices):
    devices()
    made, notices = request()
    assert (made.devices, notices) == ((), [])


@pytest.mark.parametrize("options", [{"vram_budget": "64MiB"}, {"rpc": "host:1"}])
def test_without_a_device_what_was_asked_for_is_an_error(devices, options):
    devices()
    with pytest.raises(UsageError, match=r"no device here.*engine build --backend.*--rpc HOST:PORT"):
        request(**options)


def test_off_asks_no_device(devices):
    devices(GPU)
    made, notices = request(vram_budget="off")
    assert (made.devices, notices) == ((), [])
    assert devices.asked == []
    with pytest.raises(UsageError, match="--vram-budget off"):
        request(vram_budget="off", rpc="host:1")


@pytest.mark.parametrize(
    ("options", "names"), [({"vram_budget": "1G"}, "--vram-budget"), ({"rpc": "h:1"}, "--rpc")]
)
def test_a_stock_library_has_no_device_tier(devices, options, names):
    devices(GPU)
    with pytest.raises(EngineError, match=f"{names} needs the mobile-gguf engine"):
        request(engine=None, **options)
    made, notices = request(engine=None)
    assert (made.devices, notices) == ((), [])


@pytest.mark.parametrize("changes", [{"vram_budget": "off"}, {"engine": None}, {}])
def test_options_that_have_no_effect_are_told(devices, changes):
    devices()
    made, notices = request(miss="cpu", placement="layers", **changes)
    assert made.devices == ()
    assert [notice.split(" has no effect ")[0] for notice in notices] == ["--miss", "--placement"]


def test_a_dense_model_goes_to_the_device_and_has_no_budget(devices):
    devices(GPU)
    made, notices = request(DENSE)
    assert (made.devices, notices) == ((GPU,), [])
    made, notices = request(DENSE, vram_budget="1G")
    assert (made.pool_bytes, notices) == (None, ["--vram-budget has no effect"])


def test_a_model_that_does_not_fit_stays_on_the_host_unless_it_was_asked_for(devices):
    small = Device(1, "GPU0", "a GPU", 4 * MIB, 16 * GIB)
    devices(small)
    made, notices = request()
    assert made.devices == ()
    assert notices[0].startswith("the model stays on the host: GPU0 (a GPU) has 4.0 MiB free")
    with pytest.raises(
        BudgetError, match=r"4\.0 MiB free.*smaller --ctx-size or --ubatch-size, or --vram-budget off"
    ):
        request(vram_budget="64MiB")


def test_a_budget_that_does_not_fit_is_told_from_a_model_that_does_not(devices):
    devices(Device(1, "GPU0", "a GPU", 90 * MIB, 16 * GIB))
    with pytest.raises(BudgetError, match="try a smaller --vram-budget"):
        request(vram_budget="100MiB")


def test_a_budget_below_one_tokens_experts(devices):
    devices(GPU)
    with pytest.raises(BudgetError, match=str(pool_min_bytes(MOE))):
        request(vram_budget="1MiB")


# pools


def start(devices, calls, **options):
    devices(GPU)
    made, _ = request(**options)
    return start_tier(calls, MOE, LoadOptions(**options), made)


def test_an_asked_budget_is_the_pools(devices):
    calls = FakeCalls()
    tier, notices = start(devices, calls, vram_budget="64MiB", miss="cpu", eviction="lru")
    assert calls.started == [(64 * MIB, {"miss": "cpu", "placement": CACHE, "eviction": "lru"})]
    assert (tier.budget_bytes, tier.counters().n_hits, notices) == (64 * MIB, 5, [])


def test_auto_takes_all_experts_where_there_is_room_and_places_layers(devices):
    calls = FakeCalls()
    tier, _ = start(devices, calls)
    assert calls.started[0][0] == pool_all_bytes(MOE)
    assert calls.started[0][1]["placement"] == LAYERS
    facts = tier.facts(DeviceCounters())
    assert (facts["placement"]["chosen"], facts["placement"]["reason"]) == (LAYERS, "all experts fit")


def test_a_placement_that_was_asked_for_is_kept(devices):
    for placement in (CACHE, LAYERS):
        calls = FakeCalls()
        tier, _ = start(devices, calls, placement=placement, vram_budget="64MiB")
        assert calls.started[0][1]["placement"] == placement
        for _ in range(300):
            tier.controller.before_step("exact")
            tier.controller.after_step(1.0)
        assert calls.placements == []


def test_auto_shrinks_until_the_device_accepts_and_says_so(devices):
    calls = FakeCalls(room=100 * MIB)
    tier, notices = start(devices, calls)
    assert pool_min_bytes(MOE) <= tier.budget_bytes <= 100 * MIB
    assert "less room for experts than its driver says" in notices[0]


def test_auto_without_any_room_computes_on_the_host_and_says_so(devices):
    for calls in (FakeCalls(room=0), FakeCalls(free=100 * MIB)):
        tier, notices = start(devices, calls)
        assert (tier.budget_bytes, tier.counters(), calls.started) == (0, DeviceCounters(), [])
        assert notices[0].startswith("no room for experts on the device (GPU0")
        assert tier.facts(DeviceCounters())["placement"]["chosen"] == HOST


def test_an_asked_budget_that_is_refused_names_device_bytes_and_what_fits(devices):
    calls = FakeCalls(room=0, free=900 * MIB)
    with pytest.raises(BudgetError) as caught:
        start(devices, calls, vram_budget="100%")
    for part in ("GPU0", str(pool_all_bytes(MOE)), "900.0 MiB free", "largest that fits is about", "off"):
        assert part in str(caught.value)


def test_a_model_without_layers_on_the_device(devices):
    calls = FakeCalls()
    calls.devices = lambda: []  # type: ignore[method-assign]
    tier, notices = start(devices, calls)
    assert (tier.budget_bytes, notices) == (
        0,
        ["no layer with experts is on a device: experts are computed on the host"],
    )


# receipts and stats


def test_receipts_and_stats_have_the_tier(devices, fake_model):
    backend = FakeBackend(scripted("abc"))
    backend.device, _ = start(devices, FakeCalls(), vram_budget="64MiB")
    model = fake_model(backend)
    receipt = model.generate("x").receipt
    assert (receipt.device_hits, receipt.device_misses, receipt.vram_budget_bytes) == (20, 5, 64 * MIB)
    assert (receipt.bytes_uploaded, receipt.upload_stall_ms) == (4 * 2048, 6.0)
    assert "device 80% hits, 8.0 KiB uploaded, 6 ms stalled" in receipt.summary()
    second = model.generate("x").receipt
    facts = model.stats()["device"]
    assert facts["counters"]["n_hits"] == 20 + second.device_hits
    assert facts["devices"][0]["name"] == "GPU0"


def test_without_a_tier_there_is_nothing_to_tell(fake_model):
    model = fake_model(FakeBackend(scripted("abc")))
    assert model.stats()["device"] is None
    assert model.generate("x").receipt.vram_budget_bytes == 0
