"""The plan's arithmetic: misses, time per token, what fits, what is refused, what runs teach."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_backend import fake_caches, fake_info
from hypothesis import given
from hypothesis import strategies as st

from mobile_gguf.bench.simulate import Accesses, LeastRecent, simulate
from mobile_gguf.engine.devices import Device
from mobile_gguf.gguf.info import ExpertLayer
from mobile_gguf.memory.demand import estimate_demand
from mobile_gguf.memory.fit import Asked
from mobile_gguf.memory.machine import Memory
from mobile_gguf.plan.machine import Measurements, Rate
from mobile_gguf.plan.measure import product_name
from mobile_gguf.plan.misses import (
    POLICY,
    SHARES,
    STEADY,
    independent_rate,
    miss_distribution,
    miss_rate,
    steady_rate,
)
from mobile_gguf.plan.predict import predict
from mobile_gguf.plan.refusal import FitError, largest_context, plan_fit
from mobile_gguf.plan.speed import (
    DeviceTier,
    Pass,
    Prediction,
    Reads,
    device_layer_seconds,
    mixed_seconds,
    pass_seconds,
    resident_seconds,
)
from mobile_gguf.plan.workload import Product, Settings, Workload
from mobile_gguf.sizes import GIB, MIB, mebibytes, parse_size

shares = st.floats(0, 1)
experts = st.integers(2, 512)

# misses


@given(shares, shares, experts, st.integers(1, 64), st.sampled_from(sorted(POLICY)))
def test_more_budget_never_misses_more(a, b, n_expert, k, policy):
    low, high = sorted((a, b))
    # the other policies' factors were measured and need not fall
    found = [steady_rate(share, n_expert, min(k, n_expert)) for share in (low, high)]
    assert 0 <= found[1] <= found[0] + 1e-9 <= 1 + 1e-9
    rate = miss_rate(low, n_expert, k, policy=policy)
    assert 0 <= rate.rate <= 1


def test_the_tables_are_met_where_they_were_made():
    for n_expert, k, rates in STEADY:
        for share, rate in zip(SHARES, rates, strict=True):
            assert steady_rate(share, n_expert, k) == pytest.approx(rate, abs=1e-6)


def test_all_in_memory_misses_nothing():
    assert miss_rate(1.0, 128, 8).rate == 0
    assert miss_rate(1.0, 128, 8).source == "none"


def test_a_short_answer_misses_more():
    assert miss_rate(0.25, 128, 6, n_tokens=16).rate > miss_rate(0.25, 128, 6, n_tokens=512).rate


def test_hotness_decides_where_the_file_has_some():
    flat = [[6 / 128] * 128] * 4
    peaked = [[1.0] * 6 + [0.0] * 122] * 4
    found = {name: miss_rate(0.25, 128, 6, hotness=rows) for name, rows in (("f", flat), ("p", peaked))}
    assert found["p"].rate < found["f"].rate
    assert found["f"].source == "calibration"


def test_independent_routing_misses_what_a_simulated_cache_does():
    rng = np.random.default_rng(0)
    popularity = np.exp(-np.arange(32) / 8)
    popularity = 0.9 * popularity / popularity.max()
    needs, steps = [], 4000
    for _ in range(steps):
        needs.append(np.flatnonzero(rng.random(32) < popularity))
    asked = Accesses(needs, list(range(steps)), [0] * steps, [step >= 500 for step in range(steps)], 1, 32)
    missed = simulate(asked, 16, LeastRecent(1, 32)) / sum(len(need) for need in needs[500:])
    assert independent_rate(0.5, [popularity.tolist()]) == pytest.approx(missed, rel=0.1)


@given(st.integers(0, 16), shares)
def test_the_misses_of_a_layer_are_a_distribution(k, rate):
    found = miss_distribution(k, rate)
    assert sum(found) == pytest.approx(1)
    assert sum(m * p for m, p in enumerate(found)) == pytest.approx(k * rate, abs=1e-9)


# time per token

ONE = Pass(k=8, n_layer=48, rest_s=0.005, expert_s=0.0003)


def reads(scale: float = 1.0) -> Reads:
    return Reads(n_reads=3, alone_s=0.0002 * scale, together_s=0.0006 * scale, n_threads=4)


@given(st.floats(0.001, 1), st.floats(1, 50))
def test_a_slower_disk_is_never_faster_and_misses_always_cost(rate, factor):
    fast, slow = pass_seconds(ONE, rate, reads()), pass_seconds(ONE, rate, reads(factor))
    assert resident_seconds(ONE) <= fast <= slow


@given(shares, shares)
def test_more_misses_take_longer(a, b):
    low, high = sorted((a, b))
    assert pass_seconds(ONE, low, reads()) <= pass_seconds(ONE, high, reads()) + 1e-12


def test_with_an_endless_disk_only_the_processor_counts():
    infinite = Reads(3, 0.0, 0.0, 4)
    waiting = ONE.n_layer * 60e-6
    assert pass_seconds(ONE, 0.5, infinite) <= resident_seconds(ONE) + waiting + 1e-9


def test_big_little_lies_between_its_passes():
    assert mixed_seconds(1.0, 2.0, 1.5, 0.0, by_head=False) == 1.0
    assert mixed_seconds(1.0, 2.0, 1.5, 1.0, by_head=False) == 2.5
    assert mixed_seconds(1.0, 2.0, 1.5, 0.25, by_head=True) == 1.25


@given(shares, st.floats(1e-6, 1e-2), st.floats(1e-6, 1e-2))
def test_the_better_side_is_taken_for_misses(rate, upload, on_device):
    tier = DeviceTier(expert_s=on_device, upload_s=upload)
    auto, fetch, cpu = (device_layer_seconds(tier, ONE, rate, miss) for miss in ("auto", "fetch", "cpu"))
    assert auto <= min(fetch, cpu) + 1e-12


# a whole prediction

WORK = Workload((Product(8, 64, 512, 40, 34816),), (Product(8, 64, 32, 2, 2176), Product(8, 32, 64, 1, 2176)))


def measured(scale: float = 1.0, disk: float = 1.0) -> Measurements:
    known = Measurements({"machine": "test"})
    for k in (4, 8):
        for product in WORK.experts:
            for usual in (False, True):
                name = product_name(product, 2, n_expert=16, k=k, usual=usual)
                known.put(name, Rate(1e9 * scale, 0.9e9 * scale, 1.1e9 * scale))
        known.put(f"overhead.2.{k}of16.layer", Rate(4e-5, 3e-5, 5e-5))
    known.put(product_name(WORK.dense[0], 2, usual=True), Rate(1e10 * scale, 0.9e10 * scale, 1.1e10 * scale))
    for n_threads in (1, 4):
        known.put(f"disk.1.read.6656.{n_threads}", Rate(1e-4 * disk, 0.9e-4 * disk, 1.1e-4 * disk))
    return known


def foresee(known: Measurements, **changes) -> Prediction:
    settings = Settings(k=8, little_k=4, ram_share=0.25, threads=2, n_ctx=512)
    found = predict(fake_info(), WORK, known, replace(settings, **changes), "disk.1")
    assert found is not None
    return found


@pytest.mark.parametrize("mode", ["exact", "little", "big-little"])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_prediction_lies_in_its_band_and_grows_with_the_machine(mode, share):
    one = foresee(measured(), mode=mode, ram_share=share)
    assert 0 < one.low < one.predicted_tps < one.high
    faster = foresee(measured(2.0, 0.5), mode=mode, ram_share=share)
    assert faster.predicted_tps > one.predicted_tps


def test_prediction_grows_with_the_budget():
    speeds = [foresee(measured(), ram_share=share).predicted_tps for share in (0.1, 0.25, 0.5, 0.9, 1.0)]
    assert speeds == sorted(speeds)


def test_little_is_faster_than_exact_and_confidence_is_in_between_at_worst_slower():
    exact, little = (foresee(measured(), mode=mode).predicted_tps for mode in ("exact", "little"))
    assert little > exact
    never = foresee(measured(), mode="big-little", big_share=(0.0, 0.0, 0.0)).predicted_tps
    assert never == pytest.approx(little)


def test_what_was_never_measured_is_not_predicted():
    assert predict(fake_info(), WORK, Measurements({}), Settings(k=8, little_k=4), "disk.1") is None
    known = measured()
    known.entries = {name: entry for name, entry in known.entries.items() if "read" not in name}
    assert (
        predict(fake_info(), WORK, known, Settings(k=8, little_k=4, ram_share=0.5, threads=2), "disk.1")
        is None
    )


# devices

DEVICE = "device.RPC0:far"


def with_device(cache_layer: float, layers_layer: float, experts: float = 1e11) -> Measurements:
    """Layers cost so many seconds each beside their weights; ``experts``: bytes a second of theirs."""
    known = measured()
    for product in (*WORK.dense, *WORK.experts):
        which, speed = ("8of16", experts) if product in WORK.experts else ("1of1", 1e11)
        known.put(
            f"{DEVICE}.{product.type_id}.{product.n_in}x{product.n_out}.{which}", Rate(speed, speed, speed)
        )
    known.put(f"{DEVICE}.upload", Rate(1e9, 1e9, 1e9))
    for placement, layer in (("cache", cache_layer), ("layers", layers_layer)):
        known.put(f"{DEVICE}.{placement}.overhead.2.8of16.token", Rate(1e-3, 1e-3, 1e-3))
        known.put(f"{DEVICE}.{placement}.overhead.2.8of16.layer", Rate(layer, layer, layer))
    return known


def seconds_on(known: Measurements, placement: str, **changes) -> float:
    asked = {"device": DEVICE, "vram_share": 0.5, "ram_share": 1.0, "placement": placement} | changes
    return 1 / foresee(known, **asked).predicted_tps


def test_what_a_layer_costs_on_the_way_to_a_device_counts_for_every_layer():
    near, far = with_device(1e-4, 1e-4), with_device(2.1e-3, 2.1e-3)
    n_layer = fake_info().n_layer_moe
    for placement in ("cache", "layers"):
        # of layers half have slots, as they had when it was measured
        slower = seconds_on(far, placement) - seconds_on(near, placement)
        assert slower == pytest.approx(n_layer * 2e-3)


def test_layers_that_are_on_the_device_do_not_go_to_and_fro():
    known = with_device(1e-3, 1e-3)
    seconds = [seconds_on(known, "layers", vram_share=share) for share in (0.25, 0.5, 0.75, 1.0)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] < seconds[0] - fake_info().n_layer_moe * 1.4e-3


@pytest.mark.parametrize(("cache_layer", "layers_layer"), [(1e-4, 5e-3), (5e-3, 1e-4)])
def test_auto_is_the_faster_placement(cache_layer, layers_layer):
    known = with_device(cache_layer, layers_layer)
    auto, *both = (seconds_on(known, placement) for placement in ("auto", "cache", "layers"))
    assert auto == min(both)


def test_auto_is_the_host_where_the_device_computes_experts_slowly():
    known = with_device(1e-4, 1e-4, experts=1e6)
    auto, cache, layers, host = (
        seconds_on(known, placement) for placement in ("auto", "cache", "layers", "host")
    )
    assert auto == host < min(cache, layers)
    # there they are computed as fast as ever
    assert host == seconds_on(with_device(1e-4, 1e-4), "host")


def test_what_a_layer_costs_there_counts_also_where_all_layers_are_there():
    known = with_device(1e-4, 1e-4)
    before = seconds_on(known, "layers", vram_share=1.0)
    known.put(f"{DEVICE}.whole.overhead.2.8of16.token", Rate(0.0, 0.0, 0.0))
    known.put(f"{DEVICE}.whole.overhead.2.8of16.layer", Rate(3e-3, 3e-3, 3e-3))
    assert seconds_on(known, "layers", vram_share=1.0) == pytest.approx(
        before + fake_info().n_layer_moe * 3e-3, rel=0.05
    )


def test_a_device_whose_way_was_not_measured_is_guessed_from_its_latency():
    known = with_device(1.0, 1.0)
    known.entries = {name: one for name, one in known.entries.items() if f"{DEVICE}.cache" not in name}
    assert seconds_on(known, "cache") < 0.1


def test_another_shape_is_guessed_from_the_same_type_with_a_wider_band():
    known = measured()
    other = Workload(WORK.dense, (Product(8, 128, 32, 3, 4352),))
    settings = Settings(k=8, little_k=4, ram_share=1.0, threads=2)
    guess, sure = (predict(fake_info(), work, known, settings, "disk.1") for work in (other, WORK))
    assert guess is not None
    assert sure is not None
    assert guess.high / guess.low > 1.5 * sure.high / sure.low


# what fits

INFO = fake_info(
    n_embd=2048,
    n_vocab=150_000,
    n_head=(32,) * 48,
    caches=fake_caches((4,) * 48, 128, 128),
    n_layer=48,
    n_expert=128,
    n_ctx_train=32768,
    n_ff_expert=768,
    expert_layers=(ExpertLayer(128, (884736, 884736, 884736)),) * 48,
    tensor_bytes=int(17.3e9),
    path=Path("qwen.gguf"),
)
BITS = 8 * 17.3 / 30.5


def memory(n_bytes: float) -> Memory:
    return Memory(int(n_bytes), 16 * GIB, "the machine")


def test_what_has_room_fits_and_all_is_counted():
    fit = plan_fit(INFO, Asked(4096, 512), memory(8 * GIB), n_bits=BITS)
    assert 0.2 < fit.ram_share < 0.5
    assert fit.ram_budget_bytes + fit.demand.total_bytes <= 8 * GIB


def test_more_memory_holds_more():
    found = [plan_fit(INFO, Asked(4096, 512), memory(n * GIB)).ram_share for n in (5, 8, 12, 40)]
    assert found == sorted(found)
    assert found[-1] == 1.0


def test_a_refusal_names_a_context_that_does_fit():
    asked = Asked(32768, 512)
    with pytest.raises(FitError) as refused:
        plan_fit(INFO, asked, memory(4.5 * GIB), n_bits=BITS)
    text = str(refused.value)
    assert text.startswith("qwen.gguf does not fit: the machine has 4.50 GiB available; dense weights ")
    assert "\n" not in text
    words = text.split("what would fit: ")[1].split(";")[0].split()
    n_ctx = int(words[words.index("-c") + 1])
    n_ubatch = int(words[words.index("-ub") + 1]) if "-ub" in words else 512
    assert plan_fit(INFO, Asked(n_ctx, n_ubatch), memory(4.5 * GIB)).asked.n_ctx == n_ctx
    assert refused.value.exit_code == 1


def test_a_refusal_keeps_the_context_where_a_smaller_micro_batch_does() -> None:
    asked = Asked(4096, 512)
    smallest = next(
        n_bytes
        for n_bytes in range(2 * GIB, 8 * GIB, 16 * MIB)
        if largest_context(INFO, asked, memory(n_bytes)) == (4096, 128)
    )
    with pytest.raises(FitError, match=r"what would fit: -c 4096 -ub 128; or -c 4096 --flash-attn; "):
        plan_fit(INFO, asked, memory(smallest), n_bits=BITS)
    assert plan_fit(INFO, replace(asked, n_ubatch=128), memory(smallest)).asked.n_ctx == 4096
    assert plan_fit(INFO, replace(asked, flash_attn=True), memory(smallest)).asked.n_ctx == 4096


def test_a_refusal_names_bits_and_memory_where_no_context_fits():
    with pytest.raises(
        FitError, match=r"at most \d\.\d bits a weight instead of 4\.5; or \d\.\d\d GiB of free memory"
    ):
        plan_fit(INFO, Asked(4096, 512), memory(1.5 * GIB), n_bits=BITS)


def test_a_budget_beyond_memory_is_refused_with_one_that_is_not():
    with pytest.raises(
        FitError, match=r"--ram-budget 10\.00 GiB does not fit: .*; --ram-budget (\d+)MiB does"
    ) as refused:
        plan_fit(INFO, Asked(4096, 512, ram=parse_size("10G")), memory(8 * GIB))
    size = str(refused.value).split("--ram-budget ")[2].split()[0]
    assert plan_fit(INFO, Asked(4096, 512, ram=parse_size(size)), memory(8 * GIB)).ram_share < 1


def test_a_budget_below_a_layer_is_refused():
    with pytest.raises(FitError, match="too small: the smallest legal budget"):
        plan_fit(INFO, Asked(4096, 512, ram=parse_size("100MiB")), memory(8 * GIB))


GPU = Device(0, "CUDA0", "a GPU", 8 * GIB, 8 * GIB)


def test_slots_take_what_a_device_has_left():
    fit = plan_fit(INFO, Asked(4096, 512, vram=parse_size("auto")), memory(16 * GIB), [GPU])
    assert 0 < fit.vram_budget_bytes + fit.demand.total_bytes < GPU.free_bytes
    assert fit.vram_share == pytest.approx(fit.vram_budget_bytes / INFO.expert_bytes, rel=0.01)


@pytest.mark.parametrize(
    ("asked", "free", "words"),
    [
        ({"vram": parse_size("20G")}, 8, "CUDA0 (a GPU) has 8.00 GiB free, and this model needs "),
        ({"vram": parse_size("1MiB")}, 8, "--vram-budget 1.0 MiB is too small: the smallest legal one"),
        ({"servers": True, "n_ctx": 32768}, 3, "CUDA0 (a GPU) has 3.00 GiB free"),
    ],
)
def test_a_device_budget_that_cannot_be_is_refused_with_what_can(asked, free, words):
    gpu = Device(0, "CUDA0", "a GPU", free * GIB, 9 * GIB)
    wanted = replace(Asked(4096, 512), **asked)
    with pytest.raises(FitError) as refused:
        plan_fit(INFO, wanted, memory(16 * GIB), [gpu])
    text = str(refused.value)
    assert text.startswith(words)
    assert text.endswith(" does")
    flag, value, *more = text.split("; ")[-1].split()[:-1]
    if flag == "-c":
        smaller = replace(wanted, n_ctx=int(value), n_ubatch=int(more[1]) if more else 512)
    else:
        smaller = replace(wanted, vram=parse_size(value))
    assert plan_fit(INFO, smaller, memory(16 * GIB), [gpu]).devices == (gpu,)


def test_a_device_that_nobody_asked_for_is_left_out_as_a_load_does():
    gpu = Device(0, "CUDA0", "a GPU", GIB, 8 * GIB)
    fit = plan_fit(INFO, Asked(4096, 512), memory(16 * GIB), [gpu])
    assert (fit.devices, fit.vram_budget_bytes) == ((), 0)
    assert fit.notes[0].startswith("the model stays on the host: CUDA0 (a GPU) has 1.00 GiB free")
    assert plan_fit(INFO, Asked(4096, 512), memory(16 * GIB)).ram_budget_bytes == fit.ram_budget_bytes


def test_a_dense_model_that_does_not_fit_is_refused_too():
    info = replace(INFO, n_expert=0, n_expert_used=0, expert_layers=())
    with pytest.raises(FitError, match="does not fit"):
        plan_fit(info, Asked(4096, 512), memory(4 * GIB), n_bits=BITS)
    demand = estimate_demand(info, n_ctx=4096, n_ubatch=512)
    assert plan_fit(info, Asked(4096, 512), memory(demand.total_bytes)).ram_share == 1


def test_sizes_for_flags_are_read_back_as_sizes():
    pick = random.Random(0)
    for _ in range(50):
        n = pick.randrange(1 << 10, 1 << 40)
        down, up = (parse_size(mebibytes(n, up=up)).n_bytes for up in (False, True))
        assert down is not None
        assert up is not None
        assert n - MIB < down <= n <= up < n + MIB
