"""What the tokens of a draft asked for when they came last stays in memory until a layer is reached."""

from __future__ import annotations

from engine_jobs import on_engine, run, succeeded
from scripted import MODEL, SPEC, Script

BUDGET = f"{100 * 28 / 64}%"  # seven experts of each of four layers
LRU = 0
KNOWN, NEW = 50, 51  # tokens
OLDER, NEWER = (0, 1, 2, 3), (0, 4, 5, 6)


def misses(drafted: int) -> int:
    """Of a pass over a token that wants what is missing, and a draft that wants what was used longest ago."""
    script = Script().text(OLDER, ids=[KNOWN]).text(NEWER).and_({"op": "reset_counters"})
    script.drafted((0, 7, 8, 9), OLDER, n_right=1, ids=[NEW + 1, drafted]).and_({"op": "counters"})
    outcome = succeeded(on_engine(run("r", MODEL, script.ops, BUDGET, mobile={"eviction": LRU})))
    return outcome.ops("r", "counters")[-1]["n_misses"]


def test_what_a_drafted_token_wanted_before_is_not_evicted_for_others() -> None:
    """What a layer misses takes the place of what nobody expects, not of what the next layers want."""
    n_missing = 3 * SPEC.n_layer_moe
    assert misses(KNOWN) == n_missing
    assert misses(NEW) > n_missing


def test_where_there_is_no_room_beside_it_it_goes() -> None:
    """A wrong guess never fails a pass, nor does a right one that leaves nothing to evict."""
    script = Script()
    for first in range(0, SPEC.n_expert, 4):
        script.text(range(first, first + 4), ids=[KNOWN + first])
    draft = [range(first, first + 4) for first in range(0, SPEC.n_expert, 4)]
    script.drafted(*reversed(draft), ids=[KNOWN + first for first in range(0, SPEC.n_expert, 4)])
    succeeded(on_engine(run("r", MODEL, script.ops, "min", mobile={"eviction": LRU})))
