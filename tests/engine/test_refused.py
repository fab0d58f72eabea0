"""Uses by drafted tokens that are none of the text are taken back, in memory and in the slots of a device.

Which experts each token wants is a replay's, so that it is known which of them has to leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import engine_libs
import layout_files
import numpy as np
import pytest
import tiny_models
from device_jobs import CPU, FETCH, device_run, rpc_servers, succeeded_on_devices
from engine_jobs import on_engine, run, succeeded
from scripted import MODEL, SPEC, Script

LRU, MOEPIC, DECAY = range(3)
MEMORY, DEVICE = "memory", "device"
# Seven experts of each layer have a slot; of a device's slots four are always zero.
SHARE = {MEMORY: 28 / 64, DEVICE: 32 / 64}
IN_MEMORY = "90%"  # beside a device: with less than all, segments are parts by themselves
OLDER, NEWER = (0, 1, 2, 3), (0, 4, 5, 6)  # what is there before a draft
LATER = (0, 7, 8, 9), OLDER  # of which the first has to displace some, and the second may want them


@pytest.fixture(scope="module")
def rpc() -> Iterator[list[str]]:
    with rpc_servers() as endpoints:
        yield endpoints


def before_draft() -> Script:
    return Script().text(OLDER, OLDER, OLDER, NEWER, NEWER, NEWER)


def outcomes(
    tier: str, rpc: list[str], scripts: dict[str, Script], model: str | Path = MODEL, eviction: int = LRU
) -> dict[str, tuple[list[list[int]], dict[str, int]]]:
    """Of each script which experts of each layer have slots at its end, and counts since a reset."""
    share = SHARE[tier]
    if tier == MEMORY:
        ends = [{"op": "residency", "save": "there"}, {"op": "counters"}]
        runs = [
            run(name, model, [*script.ops, *ends], f"{100 * share}%", mobile={"eviction": eviction})
            for name, script in scripts.items()
        ]
        outcome, counters = succeeded(on_engine(*runs)), "counters"
    else:
        start = {"op": "device_start", "budget": share, "poison": 1, "eviction": eviction, "miss": FETCH}
        ends = [{"op": "device_residency", "save": "there"}, {"op": "device_counters"}]
        runs = [
            device_run(name, model, rpc, [start, *script.ops, *ends], IN_MEMORY)
            for name, script in scripts.items()
        ]
        outcome, counters = succeeded_on_devices(*runs), "device_counters"
    return {name: _found(outcome, name, counters) for name in scripts}


def _found(outcome: engine_libs.Outcome, name: str, counters: str) -> tuple[list[list[int]], dict[str, int]]:
    there = [np.flatnonzero(layer).tolist() for layer in outcome.arrays[f"{name}/there"]]
    counted = outcome.ops(name, counters)[-1]
    kept = ("n_hits", "n_misses", "n_evictions", "bytes_read", "bytes_uploaded", "n_admitted")
    return there, {key: counted[key] for key in kept if key in counted}


def everywhere(*experts: int) -> list[list[int]]:
    return [list(experts)] * SPEC.n_layer_moe


# A token after which nothing is as it was if what else is run counts: each is as the first.
DRAFTS: dict[str, Callable[[bool], Script]] = {
    "never": lambda _: before_draft().text(NEWER),
    "draft": lambda refuses: before_draft().drafted(NEWER, OLDER, OLDER, refuses=refuses),
    "sought": lambda _: before_draft().sought(OLDER, OLDER).text(NEWER),
    "sought draft": lambda refuses: (
        before_draft().sought(OLDER, OLDER).drafted(NEWER, OLDER, refuses=refuses)
    ),
}


@pytest.mark.parametrize("eviction", [LRU, MOEPIC, DECAY])
@pytest.mark.parametrize("tier", [MEMORY, DEVICE])
def test_after_a_refused_draft_all_is_as_without(tier: str, eviction: int, rpc: list[str]) -> None:
    """Drafts that want what is there change nothing that comes later, unless they count."""

    def script(name: str, refuses: bool) -> Script:
        return DRAFTS[name](refuses).and_({"op": "reset_counters"}).text(*LATER)

    scripts = {name: script(name, True) for name in DRAFTS}
    counted = {f"{name}, counted": script(name, False) for name in ("draft", "sought draft")}
    found = outcomes(tier, rpc, scripts | counted, eviction=eviction)
    for name in scripts:
        assert found[name] == found["never"], name
    assert found["never"][1]["n_hits"] > 0 < found["never"][1]["n_evictions"]
    for name in counted:
        assert found[name] != found["never"], f"{name} would not be seen"


@pytest.mark.parametrize("tier", [MEMORY, DEVICE])
def test_a_draft_that_is_right_counts_once(tier: str, rpc: list[str]) -> None:
    """The passes that it was found by do not, whether the engine is told of its end or not."""
    reset = {"op": "reset_counters"}
    found = outcomes(
        tier,
        rpc,
        {
            "never": before_draft().text(NEWER, NEWER).and_(reset).text(*LATER),
            "sought": before_draft()
            .sought(OLDER, OLDER)
            .drafted(NEWER, NEWER, n_right=1)
            .and_(reset)
            .text(*LATER),
        },
        eviction=MOEPIC,
    )
    assert found["sought"] == found["never"]


@pytest.mark.parametrize("tier", [MEMORY, DEVICE])
def test_refused_tokens_take_no_time(tier: str, rpc: list[str]) -> None:
    """What was used often, long ago, is no older after many of them than what is used once then."""
    later = (0, 4, 5, 7), (0, 4, 5, 8)
    scripts = {
        "never": before_draft().text(NEWER, *later),
        "draft": before_draft().drafted(NEWER, *[NEWER] * 8).text(*later),
        "sought draft": before_draft().sought(*[NEWER] * 8).drafted(NEWER, NEWER).text(*later),
        "counted": before_draft().drafted(NEWER, *[NEWER] * 8, refuses=False).text(*later),
    }
    found = {name: there for name, (there, _) in outcomes(tier, rpc, scripts, eviction=DECAY).items()}
    assert found["never"] == found["draft"] == found["sought draft"]
    assert found["counted"] != found["never"], "time that passes would not be seen"


@pytest.mark.parametrize("n_segments", [1, 2])
@pytest.mark.parametrize("tier", [MEMORY, DEVICE])
def test_what_only_refused_tokens_wanted_leaves_first(
    tier: str, n_segments: int, rpc: list[str], tmp_path: Path
) -> None:
    """Before what was used longer ago, and what they share with the text stays."""
    model: str | Path = MODEL
    if n_segments > 1:
        model = layout_files.write_per_expert(tiny_models.path(MODEL), tmp_path / "m.gguf", n_segments)
    draft, later = ((0, 4, 7, 8), (0, 4, 8, 9)), (0, 10, 11, 12)
    found = outcomes(
        tier,
        rpc,
        {
            "at once": before_draft().drafted(NEWER, *draft),
            "refused": before_draft().drafted(NEWER, *draft).text(later),
            "counted": before_draft().drafted(NEWER, *draft, refuses=False).text(later),
        },
        model,
    )
    assert found["at once"][0] == everywhere(0, 4, 5, 6, 7, 8, 9)
    assert found["refused"][0] == everywhere(0, 4, 5, 6, 10, 11, 12)
    assert found["counted"][0] != found["refused"][0], "a draft that counts would not be seen"


@pytest.mark.parametrize("tier", [MEMORY, DEVICE])
def test_what_a_draft_was_found_by_stays_until_it_is_run(tier: str, rpc: list[str]) -> None:
    """What came for it is there for the draft, and leaves first if that did not want it, or in vain."""
    sought, draft, later = ((0, 7, 8, 9), (0, 4, 7, 8)), (0, 4, 7, 8), (0, 11, 12, 13)
    scripts = {
        "sought": before_draft().sought(sought[0], (0, 4, 7, 10)),
        "right": before_draft().sought(*sought).drafted(NEWER, draft, n_right=1).text(later),
        "wrong": before_draft().sought(*sought).drafted(NEWER, draft).text(later),
    }
    found = outcomes(tier, rpc, scripts)
    for layer in found["sought"][0]:
        assert {0, 4, 7, 8, 9, 10} <= set(layer)
    assert found["right"][0] == everywhere(0, 4, 7, 8, 11, 12, 13)
    assert found["wrong"][0] == everywhere(0, 4, 5, 6, 11, 12, 13)


def test_refused_tokens_earn_no_slot(rpc: list[str]) -> None:
    """What the CPU computes goes to a device if it was used often enough, by the text: once is not."""
    needs = (0, 4, 5, 9)

    def script(*, refuses: bool) -> Script:
        once = before_draft().and_({"op": "device_miss", "miss": CPU}, {"op": "reset_counters"}).text(needs)
        return once.drafted(NEWER, needs, needs, refuses=refuses).text(needs)

    found = outcomes(DEVICE, rpc, {"refused": script(refuses=True), "counted": script(refuses=False)})
    assert found["refused"][1]["n_admitted"] == 0
    assert found["counted"][1]["n_admitted"] > 0


@pytest.mark.parametrize("tier", [MEMORY, DEVICE])
def test_it_leaves_before_segments_that_are_not_kept(tier: str, rpc: list[str], tmp_path: Path) -> None:
    """All that came for refused tokens ranks below what a split does not keep of the text's experts."""
    model = layout_files.write_per_expert(tiny_models.path(MODEL), tmp_path / "m.gguf", 2)
    split = {"op": "split", "on_device": tier == DEVICE, "kept": [1] * SPEC.n_layer_moe, "shares": None}
    script = Script().and_(split).text(OLDER, OLDER, NEWER, NEWER)
    script.drafted(NEWER, (0, 4, 5, 7)).and_({"op": "reset_counters"}).text((0, 4, 5, 10), NEWER)
    _, counted = outcomes(tier, rpc, {"r": script}, model)["r"]
    assert counted["n_misses"] == 2 * SPEC.n_layer_moe  # of 10 alone


@pytest.mark.parametrize("tier", [MEMORY, DEVICE])
def test_of_what_a_right_token_wanted_too_its_use_is_left(tier: str, rpc: list[str]) -> None:
    """At its time, which may be before others'."""
    draft, later = (OLDER, NEWER, OLDER), (0, 7, 8, 9)
    found = outcomes(
        tier,
        rpc,
        {
            "refused": before_draft().drafted(NEWER, *draft, n_right=2).text(later),
            "counted": before_draft().drafted(NEWER, *draft, n_right=2, refuses=False).text(later),
        },
    )
    assert found["refused"][0] == everywhere(0, 4, 5, 6, 7, 8, 9)
    assert found["counted"][0] == everywhere(0, 1, 2, 3, 7, 8, 9)
