"""The store without the engine: what it reads first, and all its threads at once.

Reads are held back, so that their order is known and nothing hangs on a clock.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import stress

from mobile_gguf.plan.split_cache import Shape, missing_segments

N_LAYERS, N_EXPERTS, N_PIECES = 4, 8, 2
RESIDENT = 2  # enum mobile_residency
ROOM = 32  # experts; there are as many
WARM = [(layer, expert) for expert in range(4) for layer in range(2, 4)]
ASKED = [1, 4, 6]  # of layer 0, and nothing of the warm set

PATIENCE = 120.0  # seconds, until what never comes is given up

Pair = tuple[int, int]


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < until, f"never: {what}"
        time.sleep(0.001)


class Store:
    """``shim/store_order.cpp`` in Python's words."""

    def __init__(self, library: Path, file: Path) -> None:
        self._lib = ctypes.CDLL(str(library))
        self._file = file
        self.is_stuck = False  # a thread waits in it for ever: it cannot be closed

    def open(
        self, *, n_io_threads: int, budget: int = ROOM - 1, prefault: bool = False, segments: int = 1
    ) -> None:
        path = str(self._file).encode()
        self._lib.order_segments(segments)
        assert self._lib.order_open(path, N_LAYERS, N_EXPERTS, budget, n_io_threads, prefault) == 0

    def close(self) -> None:
        if self.is_stuck:
            return
        self.allow(-1)
        self._lib.order_close()

    def warm(self, pairs: Sequence[Pair]) -> int:
        flat = [number for pair in pairs for number in pair]
        return self._lib.order_warm((ctypes.c_int * len(flat))(*flat), len(pairs))

    def request(self, layer: int, experts: Sequence[int]) -> None:
        self._lib.order_request(layer, (ctypes.c_int * len(experts))(*experts), len(experts))

    def resolve(self, layer: int, experts: Sequence[int]) -> None:
        """Wait for experts, and hold them against the file."""
        for expert in experts:
            assert self._lib.order_resolve(layer, expert) == 1, f"expert {expert} of layer {layer} is wrong"

    def displace(self, layer: int, experts: Sequence[int]) -> None:
        self._lib.order_displace(layer, (ctypes.c_int * len(experts))(*experts), len(experts))

    def hold(self) -> None:
        """Hold reads back from now on, and forget those before."""
        self._lib.order_hold()

    def allow(self, n: int) -> None:
        """Let ``n`` more reads go on; -1: all."""
        self._lib.order_allow(n)

    def wait(self, n: int) -> None:
        """Until ``n`` reads have begun."""
        self._lib.order_wait(n)

    def fail(self, every: int) -> None:
        self._lib.order_fail(every)

    def begin_pass(self) -> None:
        self._lib.order_begin_pass()

    def end_pass(self) -> bool:
        return bool(self._lib.order_end_pass())

    def read_ahead(self, layer: int) -> None:
        self._lib.order_read_ahead(layer)

    def at(self, time: float) -> None:
        """Requests from now on are a token's of that time."""
        self._lib.order_time(ctypes.c_double(time))

    def split(self, kept: Sequence[int], shares: Sequence[float]) -> None:
        n = len(kept)
        self._lib.order_split((ctypes.c_int * n)(*kept), (ctypes.c_double * n)(*shares), n)

    def there(self, layer: int) -> list[int]:
        """Those of a layer that are there, segments where experts have some."""
        return [part for part in range(N_EXPERTS) if self._lib.order_there(layer, part)]

    def residency(self, pair: Pair) -> int:
        return self._lib.order_residency(*pair)

    def log(self) -> list[Pair]:
        """(layer, expert) of each read, in the order in which they began."""
        room = (ctypes.c_int * 4000)()
        return [divmod(one, 1000) for one in room[: self._lib.order_log(room, len(room))]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stress.build(stress.LIBRARY, tmp_path_factory.mktemp("order"))


@pytest.fixture
def store(library: Path, tmp_path: Path) -> Iterator[Store]:
    made = Store(library, tmp_path / "experts")
    yield made
    made.fail(0)
    made.close()


def n_reads(pairs: Sequence[Pair]) -> int:
    return N_PIECES * len(pairs)


def asked_of(layer: int, experts: Sequence[int]) -> set[Pair]:
    return {(layer, expert) for expert in experts}


@pytest.mark.parametrize("n_io_threads", [1, 4])
def test_a_prompt_right_after_the_load_waits_for_no_warm_read(store: Store, n_io_threads: int) -> None:
    """Those under way end; none begins before all that was asked for has begun."""
    store.open(n_io_threads=n_io_threads)
    assert store.warm(WARM) == len(WARM)
    store.wait(n_io_threads)  # each thread has one
    assert set(store.log()) <= set(WARM)
    store.begin_pass()
    store.request(0, ASKED)
    store.allow(1)  # whoever is done first
    store.wait(n_io_threads + 1)
    assert store.log()[-1] in asked_of(0, ASKED)
    store.allow(-1)
    store.resolve(0, ASKED)
    store.request(1, ASKED)
    store.resolve(1, ASKED)
    assert store.end_pass()
    store.wait(n_io_threads + 2 * N_PIECES * len(ASKED))
    log = store.log()
    warm_before = [pair in WARM for pair in log].index(False)
    assert warm_before == n_io_threads
    n = N_PIECES * len(ASKED)
    assert set(log[warm_before : warm_before + n]) == asked_of(0, ASKED)


def test_layers_ahead_come_before_the_warm_set(store: Store) -> None:
    store.open(n_io_threads=1)
    store.warm(WARM)
    store.wait(1)
    store.begin_pass()
    store.request(0, ASKED)
    store.read_ahead(1)
    store.allow(-1)
    store.resolve(0, ASKED)
    layer = list(range(N_EXPERTS))
    store.request(1, layer)
    store.resolve(1, layer)
    assert store.end_pass()
    n = N_PIECES * (len(ASKED) + N_EXPERTS)
    store.wait(1 + n)
    log = store.log()
    assert log[0] == WARM[0]
    # the last of them may still be under way when the layer is asked for
    assert set(log[1 : 1 + n]) == asked_of(0, ASKED) | asked_of(1, layer)


def test_after_the_pass_the_rest_of_it_comes_in_its_order(store: Store) -> None:
    store.open(n_io_threads=1)
    store.warm(WARM)
    store.wait(1)
    store.begin_pass()
    store.request(0, ASKED)
    store.allow(-1)
    store.resolve(0, ASKED)
    assert store.end_pass()
    store.wait(n_reads(WARM) + N_PIECES * len(ASKED))
    assert list(dict.fromkeys(pair for pair in store.log() if pair in WARM)) == WARM


def test_a_warm_read_that_is_asked_for_is_one_read(store: Store) -> None:
    """What is on its way is waited for, and goes first; it is not read twice."""
    store.open(n_io_threads=1)
    store.warm(WARM)
    store.wait(1)
    store.begin_pass()
    wanted = [expert for layer, expert in WARM if layer == 2]
    store.request(2, wanted)
    store.allow(-1)
    store.resolve(2, wanted)
    assert store.end_pass()
    store.wait(n_reads(WARM))
    assert sorted(store.log()) == sorted(N_PIECES * WARM)


def test_a_failed_warm_read_fails_no_pass_that_asks_meanwhile(store: Store) -> None:
    """Its other piece is still queued when a pass asks for the expert: the failed one is read again."""
    store.open(n_io_threads=1)
    store.fail(1)
    store.warm(WARM)
    store.wait(1)
    store.allow(1)
    store.wait(2)  # the first piece has failed, the second has begun
    store.begin_pass()
    store.request(2, [0])
    store.fail(0)
    store.allow(-1)
    store.resolve(2, [0])
    assert store.end_pass()
    assert store.log()[:3] == [WARM[0]] * 3


def test_a_warm_read_that_fails_under_a_pass_is_done_again(store: Store) -> None:
    """It began before the pass asked, and fails after."""
    store.open(n_io_threads=1)
    store.warm(WARM)
    store.wait(1)
    store.begin_pass()
    store.request(2, [0])
    store.fail(1)
    store.allow(1)
    store.wait(2)  # it has failed, and the other piece waits
    store.fail(0)
    store.allow(-1)
    store.resolve(2, [0])
    assert store.end_pass()


def test_what_a_pass_waits_for_a_slot_for_is_not_admitted_meanwhile(store: Store) -> None:
    """Under the smallest budget: one slot is of an expert that is being read while the disk seems idle, and
    the pass waits for it. The next to be admitted is the very expert that it is wanted for."""
    store.open(n_io_threads=1, budget=N_EXPERTS)
    every = list(range(N_EXPERTS))
    store.allow(-1)
    store.begin_pass()
    store.request(0, every)
    store.resolve(0, every)
    assert store.end_pass()
    store.hold()
    store.at(2.0)
    store.displace(1, [0])
    store.displace(2, every[-1:])
    store.wait(1)  # the first of them is being read
    assert store.log() == [(1, 0)]
    store.at(3.0)
    store.begin_pass()
    asking = threading.Thread(target=store.request, args=(2, every), daemon=True)
    asking.start()
    wait_until(lambda: store.there(2) == every[:-1], "the pass waits for the last of its slots")
    store.allow(-1)
    asking.join(PATIENCE)
    store.is_stuck = asking.is_alive()
    assert not store.is_stuck, "the pass waits for a slot that the expert has already"
    store.resolve(2, every)
    assert store.end_pass()
    assert store.there(2) == every


def test_a_warm_set_of_everything_ends_where_the_budget_does(store: Store) -> None:
    store.open(n_io_threads=2, budget=ROOM // 2, prefault=True)
    every = [(layer, expert) for layer in range(N_LAYERS) for expert in range(N_EXPERTS)]
    store.warm(every)
    store.allow(-1)
    store.wait(n_reads(every[: ROOM // 2]))
    store.begin_pass()
    store.request(0, [0])
    store.resolve(0, [0])
    assert store.end_pass()
    assert len(store.log()) == n_reads(every[: ROOM // 2])


SEGMENTS = 4  # of two experts a layer


def run_routes(store: Store, routes: np.ndarray) -> list[list[int]]:
    """Segments that were read for each token and layer."""
    found, n_before = [], 0
    for now, token in enumerate(routes.tolist()):
        store.at(now)
        store.begin_pass()
        read = []
        for layer, experts in enumerate(token):
            parts = [e * SEGMENTS + s for e in experts for s in range(SEGMENTS)]
            store.request(layer, parts)
            store.resolve(layer, parts)
            n = len(store.log())
            read.append((n - n_before) // N_PIECES)
            n_before = n
        assert store.end_pass()
        found.append(read)
    return found


def some_routes(n_tokens: int = 40) -> np.ndarray:
    return np.random.default_rng(5).integers(0, N_EXPERTS // SEGMENTS, (n_tokens, N_LAYERS, 1))


SPLITS = {
    "whole": ([4] * N_LAYERS, [0.0] * N_LAYERS),
    "half": ([2] * N_LAYERS, [0.0] * N_LAYERS),
    "by layer": ([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4]),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("budget", [9, 18])
def test_segments_are_read_as_the_configurator_foresees(store: Store, split: str, budget: int) -> None:
    """To the segment: the store and ``plan/split_cache.py`` are one rule.

    Where a layer has a quota, the store weighs it again for every segment, and the replay once for some.
    """
    routes = some_routes()
    store.open(n_io_threads=1, budget=budget, segments=SEGMENTS)
    store.allow(-1)
    store.split(*SPLITS[split])
    shape = Shape(N_LAYERS, N_EXPERTS // SEGMENTS, SEGMENTS)
    wanted = missing_segments(routes.astype(np.int32), shape, budget, *SPLITS[split])
    found = np.array(run_routes(store, routes))
    if any(SPLITS[split][1]):
        assert found.sum() == pytest.approx(wanted.sum(), rel=0.05)
    else:
        assert found.tolist() == wanted.tolist()
    assert 0 < found[8:].sum() < SEGMENTS * found[8:].size


def test_leading_segments_stay(store: Store) -> None:
    """Room for the first segment of every expert, and for the rest of one."""
    budget = 2 * N_LAYERS + SEGMENTS - 1
    store.open(n_io_threads=1, budget=budget, segments=SEGMENTS)
    store.allow(-1)
    store.split([1] * N_LAYERS, [0.0] * N_LAYERS)
    run_routes(store, np.stack([np.full((N_LAYERS, 1), e) for e in (0, 1, 0, 1)]))
    held = [store.there(layer) for layer in range(N_LAYERS)]
    assert all({0, SEGMENTS} <= set(parts) for parts in held)
    assert sum(map(len, held)) == budget


def test_what_was_used_before_a_split_ranks_as_if_under_it(store: Store) -> None:
    store.open(n_io_threads=1, budget=10, segments=SEGMENTS)
    store.allow(-1)
    run_routes(store, np.zeros((1, 2, 1), int))  # one expert each of two layers
    store.split([2] * N_LAYERS, [0.0] * N_LAYERS)
    store.at(1)
    store.begin_pass()
    store.request(2, [0, 1, 2, 3, 4])
    store.resolve(2, [0, 1, 2, 3, 4])
    assert store.end_pass()
    gone = {(layer, part) for layer in range(2) for part in range(4)} - {
        (layer, part) for layer in range(2) for part in store.there(layer)
    }
    assert len(gone) == 3
    assert {part for _, part in gone} <= {2, 3}


def test_a_store_that_keeps_any_segment_is_seen(library: Path, tmp_path: Path) -> None:
    """The planted fault: every segment ranks as the first."""
    changes = {"mobile-store-split.cpp": ("mobile_segment_of(part, n_segments)", "0")}
    made = stress.build(stress.LIBRARY, tmp_path, changes=changes, compiled=library.parent)
    spoilt = Store(made, tmp_path / "experts")
    try:
        with pytest.raises(AssertionError):
            test_segments_are_read_as_the_configurator_foresees(spoilt, "half", 9)
    finally:
        spoilt.close()


def test_all_its_threads_at_once(library: Path, tmp_path: Path) -> None:
    """Short sessions with slow and failing reads; ``make sanitize`` watches more of them for data races."""
    program = stress.build("store_stress", library.parent)
    done = stress.run(program, 12, 1, stress.PATIENCE, tmp_path / "experts")
    assert done.returncode == 0, done.stderr
    assert "ok, 0 reads" not in done.stdout


def test_a_store_whose_warm_set_gives_no_way_is_seen(library: Path, tmp_path: Path) -> None:
    """The planted fault: with it the first test fails."""
    before = "    if (!demand.empty()) {\n        return &demand;"
    changes = {
        "mobile-store-reads.cpp": (
            before,
            "    if (!demand_only && !warm_reads.empty()) {\n        return &warm_reads;\n    }\n" + before,
        )
    }
    made = stress.build(stress.LIBRARY, tmp_path, changes=changes, compiled=library.parent)
    spoilt = Store(made, tmp_path / "experts")
    try:
        with pytest.raises(AssertionError):
            test_a_prompt_right_after_the_load_waits_for_no_warm_read(spoilt, 1)
    finally:
        spoilt.close()
