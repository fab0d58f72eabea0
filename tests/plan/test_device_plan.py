"""Device memory: what is counted, what slots may have, what is refused and with which numbers."""

import pytest
from fake_backend import MIB, fake_info

from mobile_gguf.engine.devices import Device
from mobile_gguf.engine.structs import DeviceInfo
from mobile_gguf.errors import BudgetError, UsageError
from mobile_gguf.gguf.info import ExpertLayer
from mobile_gguf.memory.demand import Demand, estimate_device_demand, host_share
from mobile_gguf.memory.pools import (
    asked_pool,
    auto_pool,
    lacking,
    pool_all_bytes,
    pool_min_bytes,
)
from mobile_gguf.sizes import parse_size, parse_size_or_off

GIB = 1 << 30
# 8 used of 16 experts of 64 MiB, in 4 layers: 4 GiB
INFO = fake_info(expert_layers=(ExpertLayer(16, (32 * MIB, 32 * MIB)),) * 4, tensor_bytes=5 * GIB)
SLOT = 64 * MIB
DEMAND = Demand(dense_bytes=GIB, kv_bytes=256 * MIB, compute_bytes=256 * MIB)


def device(free, total=24 * GIB, expert_bytes=4 * GIB, name="GPU0"):
    return DeviceInfo(name, "a GPU", free, total, 0, expert_bytes, 4, 0, 1, 1)


def listed(free, total=24 * GIB, **changes):
    return Device(1, "GPU0", "a GPU", free, total, **changes)


def test_the_smallest_and_the_largest_pool():
    assert pool_min_bytes(INFO) == 16 * SLOT
    assert pool_all_bytes(INFO) == (64 + 8) * SLOT
    assert pool_min_bytes(INFO, 2) == 32 * SLOT


def test_every_shape_of_expert_has_a_pool():
    layers = (ExpertLayer(16, (MIB, MIB)), ExpertLayer(16, (2 * MIB, MIB)), ExpertLayer(16, (MIB, MIB)))
    # a third of the layers, 3 of 7 MiB: its share of the budget must hold 16 slots of 3 MiB
    assert pool_min_bytes(fake_info(expert_layers=layers)) == 16 * 7 * MIB


def test_a_segment_has_a_slot():
    whole, cut = (fake_info(expert_layers=(ExpertLayer(16, (4 * MIB, 4 * MIB), n),)) for n in (1, 4))
    assert pool_min_bytes(whole) == pool_min_bytes(cut)


def test_asked_sizes():
    assert asked_pool(parse_size("auto"), INFO) is None
    assert asked_pool(parse_size("2GiB"), INFO) == 2 * GIB
    assert asked_pool(parse_size("50%"), INFO) == 2 * GIB
    assert asked_pool(parse_size("100%"), INFO) == asked_pool(parse_size("1TiB"), INFO) == 72 * SLOT


def test_the_slots_that_stay_empty_are_within_the_budget():
    # the engine adds them to a budget of all experts' bytes
    assert asked_pool(parse_size("4GiB"), INFO) == 4 * GIB - SLOT


def test_less_than_a_tokens_experts_is_refused_and_the_named_budgets_are_legal():
    with pytest.raises(BudgetError) as caught:
        asked_pool(parse_size("1023MiB"), INFO)
    assert str(16 * SLOT) in str(caught.value)
    assert "25%" in str(caught.value)
    assert asked_pool(parse_size("25%"), INFO) == asked_pool(parse_size(16 * SLOT), INFO) == 16 * SLOT


def test_off_is_no_size():
    assert parse_size_or_off(" OFF ") == "off"
    assert parse_size_or_off("40%") == parse_size("40%")
    with pytest.raises(UsageError, match="40% or auto, or off"):
        parse_size_or_off("none")


def test_a_model_that_fits_is_not_complained_about():
    assert lacking([listed(3 * GIB)], DEMAND, GIB) == ""


def test_a_model_that_does_not_fit_is_told_with_all_numbers():
    text = lacking([listed(2 * GIB)], DEMAND, GIB)
    for part in (
        "GPU0 (a GPU) has 2.00 GiB",
        "needs 2.50 GiB",
        "weights 1.00 GiB",
        "KV 256.0",
        "experts 1.00",
    ):
        assert part in text


def test_several_devices_hold_a_model_together():
    assert lacking([listed(2 * GIB), listed(GIB)], DEMAND, GIB) == ""


def test_auto_is_free_memory_less_a_reserve():
    # a twentieth of 24 GiB
    reserve = 24 * GIB // 20
    assert auto_pool([device(3 * GIB)], INFO, DEMAND) == 3 * GIB - reserve
    # 512 MiB at least
    assert auto_pool([device(3 * GIB, 8 * GIB)], INFO, DEMAND) == 3 * GIB - 512 * MIB


def test_auto_is_never_more_than_all_experts_and_nothing_below_the_smallest():
    assert auto_pool([device(23 * GIB)], INFO, DEMAND) == pool_all_bytes(INFO)
    assert auto_pool([device(1500 * MIB, 8 * GIB)], INFO, DEMAND) == 0
    assert auto_pool([], INFO, DEMAND) == 0


def test_a_driver_that_calls_all_memory_free_is_not_believed():
    # the model's own 1.5 GiB and a quarter stay free
    assert auto_pool([device(6 * GIB, 6 * GIB)], INFO, DEMAND) == int(6 * GIB - 1.5 * GIB - 1.5 * GIB)


def test_memory_that_is_the_hosts_is_bounded_by_what_the_host_has():
    assert auto_pool([device(20 * GIB)], INFO, DEMAND, {"GPU0": 2 * GIB}) == 2 * GIB
    assert auto_pool([device(20 * GIB)], INFO, DEMAND, {"other": 0}) == pool_all_bytes(INFO)


def test_of_two_devices_the_fuller_bounds_both():
    both = [device(20 * GIB, expert_bytes=2 * GIB), device(1536 * MIB, 8 * GIB, 2 * GIB, "GPU1")]
    assert auto_pool(both, INFO, DEMAND) == 2 * GIB


def test_the_demand_of_a_device_has_logits_of_a_whole_batch():
    one, many = (
        estimate_device_demand(fake_info(n_vocab=1000), n_ctx=512, n_ubatch=n, flash_attn=True)
        for n in (1, 512)
    )
    assert many.compute_bytes - one.compute_bytes > 511 * 1000 * 4
    assert one.dense_bytes == fake_info().dense_bytes


def test_on_the_host_remain_the_embedding_and_buffers():
    info = fake_info(embedding_bytes=MIB)
    left = host_share(Demand(dense_bytes=3 * MIB, kv_bytes=5, compute_bytes=7), info)
    assert (left.dense_bytes, left.kv_bytes, left.compute_bytes) == (MIB, 0, 7)


@pytest.mark.parametrize(
    ("description", "changes", "expected"),
    [
        ("127.0.0.1:50052", {"is_rpc": True}, True),
        ("localhost:1", {"is_rpc": True}, True),
        ("[::1]:1", {"is_rpc": True}, True),
        ("10.0.0.7:50052", {"is_rpc": True}, False),
        ("a GPU", {"type": "igpu"}, True),
        ("a GPU", {}, False),
    ],
)
def test_devices_that_share_the_hosts_memory(description, changes, expected):
    assert Device(1, "X", description, 1, 2, **changes).shares_host_memory is expected
