"""What a draft's tokens asked for last stays until a layer is reached, in memory and in a device's slots."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from device_jobs import FETCH, device_run, rpc_servers, succeeded_on_devices
from engine_jobs import assert_same_bits, on_engine, run, succeeded
from scripted import MODEL, SPEC, Script

# Seven experts of each of four layers have a slot; of a device's slots four are always zero.
IN_MEMORY, ON_DEVICE = f"{100 * 28 / 64}%", 32 / 64
LRU = 0
OFF, ON = 0, 1  # uploads ahead
KNOWN, NEW = 50, 51  # tokens
OLDER, NEWER = (0, 1, 2, 3), (0, 4, 5, 6)
N_LAYERS = SPEC.n_layer_moe


@pytest.fixture(scope="module")
def rpc() -> Iterator[list[str]]:
    with rpc_servers() as endpoints:
        yield endpoints


def draft_of(drafted: int) -> Script:
    """A pass over a token that wants what is missing, and a draft that wants what was used longest ago."""
    script = Script().text(OLDER, ids=[KNOWN]).text(NEWER).and_({"op": "reset_counters"})
    return script.drafted((0, 7, 8, 9), OLDER, n_right=1, ids=[NEW + 1, drafted])


def misses(drafted: int) -> int:
    ops = [*draft_of(drafted).ops, {"op": "counters"}]
    outcome = succeeded(on_engine(run("r", MODEL, ops, IN_MEMORY, mobile={"eviction": LRU})))
    return outcome.ops("r", "counters")[-1]["n_misses"]


def test_what_a_drafted_token_wanted_before_is_not_evicted_for_others() -> None:
    """What a layer misses takes the place of what nobody expects, not of what the next layers want."""
    n_missing = 3 * N_LAYERS
    assert misses(KNOWN) == n_missing
    assert misses(NEW) > n_missing


def test_where_there_is_no_room_beside_it_it_goes() -> None:
    """A wrong guess never fails a pass, nor does a right one that leaves nothing to evict."""
    succeeded(on_engine(run("r", MODEL, _all_at_once().ops, "min", mobile={"eviction": LRU})))


def _all_at_once() -> Script:
    """Tokens that want every expert together, one by one and then in a draft."""
    script = Script()
    parts = [range(first, first + 4) for first in range(0, SPEC.n_expert, 4)]
    for part in parts:
        script.text(part, ids=[KNOWN + part.start])
    return script.drafted(*reversed(parts), ids=[KNOWN + part.start for part in parts])


# In a device's slots


def run_on_device(name: str, rpc: list[str], budget: float, ops: list[dict[str, Any]]) -> dict[str, Any]:
    start = {"op": "device_start", "budget": budget, "poison": 1, "eviction": LRU, "miss": FETCH}
    ends = [{"op": "device_residency", "save": "there"}, {"op": "device_counters"}]
    return device_run(name, MODEL, rpc, [start, *ops, *ends])


def saved(script: Script) -> list[dict[str, Any]]:
    """The script's ops, which keep the logits of its drafts."""
    n = iter(range(len(script.ops)))
    return [{**op, "save": f"draft-{next(n)}"} if op["op"] == "decode" else op for op in script.ops]


def test_nor_does_it_leave_the_slots_of_a_device(rpc: list[str]) -> None:
    """Of sixteen that are expected none is evicted; of a token that was not seen before some are."""
    tokens = {"known": KNOWN, "new": NEW}
    runs = [run_on_device(name, rpc, ON_DEVICE, draft_of(token).ops) for name, token in tokens.items()]
    outcome = succeeded_on_devices(*runs)
    known, new = (outcome.ops(name, "device_counters")[-1] for name in tokens)
    assert known["n_misses"] == known["n_evictions"] == 3 * N_LAYERS
    assert new["n_evictions"] > 3 * N_LAYERS


def test_as_many_slots_as_a_layer_may_need_are_left_to_it(rpc: list[str]) -> None:
    """Whatever is expected: where misses are uploaded the CPU computes none."""
    outcome = succeeded_on_devices(
        *(run_on_device(str(budget), rpc, budget, _all_at_once().ops) for budget in (0.4, ON_DEVICE, 0.8))
    )
    for budget in (0.4, ON_DEVICE, 0.8):
        counted = outcome.ops(str(budget), "device_counters")[-1]
        assert counted["n_cpu"] == 0 < counted["n_fetched"], budget


@pytest.mark.parametrize("ahead", [OFF, ON])
def test_what_is_expected_changes_no_bits(ahead: int, rpc: list[str]) -> None:
    """Texts of few tokens that want what they will, with uploads ahead and without; with slots for all
    nothing is expected."""
    chance = random.Random(5)
    script = Script()
    for _ in range(12):
        some = [chance.randrange(100) for _ in range(6)]
        needs = [tuple(chance.sample(range(SPEC.n_expert), 4)) for _ in some]
        script.text(*needs[:2], ids=some[:2])
        script.drafted(*needs[2:], n_right=chance.randrange(3), ids=some[2:])
    ops = [{"op": "set_prefetch", "mode": ahead, "predictor": 0}, *saved(script)]
    budgets = (0.45, 0.6, 1.0)
    outcome = succeeded_on_devices(*(run_on_device(str(budget), rpc, budget, ops) for budget in budgets))
    names = [op["save"] for op in ops if "save" in op]
    assert len(names) == 12
    for budget in budgets[:2]:
        counted = outcome.ops(str(budget), "device_counters")[-1]
        assert counted["n_evictions"] > 0 == counted["n_cpu"]
        assert (counted["n_ahead"] > 0) == (ahead == ON)
        for name in names:
            assert_same_bits(
                outcome.arrays[f"{budget}/{name}"], outcome.arrays[f"1.0/{name}"], f"{budget} {name}"
            )
