"""The live view of the experts: rows, watches that take nothing from each other, and its thread rule."""

from __future__ import annotations

import threading

import numpy as np
from expert_source import ScriptedSource

from mobile_gguf.engine.experts import Asked, Experts
from mobile_gguf.engine.structs import LOADING, RESIDENT


def told(asked: Asked) -> list[tuple[int, int, bool]]:
    return list(zip(asked.rows.tolist(), asked.experts.tolist(), asked.missed.tolist(), strict=True))


def test_rows_are_the_layers_that_have_experts():
    source = ScriptedSource(4, 3)
    source.host_codes[1:] = [[RESIDENT, 0, 0], [0, LOADING, 0], [0, 0, RESIDENT]]
    experts = Experts(source, (1, 3))
    assert experts.layers == (1, 3)
    places = experts.places()
    assert places is not None
    assert places.host.tolist() == [[RESIDENT, 0, 0], [0, 0, RESIDENT]]
    assert places.device is None
    source.device_codes = np.full((4, 3), RESIDENT, dtype=np.uint8)
    places = experts.places()
    assert places is not None
    assert places.device is not None
    assert places.device.tolist() == [[RESIDENT] * 3] * 2


def test_layers_behind_the_models_own_are_not_shown():
    """A file counts layers for next-token prediction, the engine does not."""
    experts = Experts(source := ScriptedSource(3, 4), (1, 2, 3))
    assert experts.layers == (1, 2)
    with experts.watch() as watch:
        source.add((0, 1, 0, True), (0, 3, 2, True), (0, 0, 1, True), (0, 2, 3, False))
        assert told(watch.take()) == [(0, 0, True), (1, 3, False)]


def test_a_watch_tells_what_is_asked_from_its_start_on():
    experts = Experts(source := ScriptedSource(2, 4), (0, 1))
    source.add((0, 0, 0, True))
    with experts.watch() as watch:
        source.add((7, 0, 1, True), (7, 1, 2, False), (8, 0, 1, False))
        asked = watch.take()
        assert told(asked) == [(0, 1, True), (1, 2, False), (0, 1, False)]
        # the second layer has not come to the last token yet
        assert told(asked.last()) == [(1, 2, False), (0, 1, False)]
        source.add((8, 1, 3, True))
        assert told((asked.last() + watch.take()).last()) == [(0, 1, False), (1, 3, True)]
        assert not watch.take()
        assert not watch.take().last()
    assert source.switched == [True, False]


def test_watches_take_nothing_from_each_other():
    experts = Experts(source := ScriptedSource(1, 4), (0,))
    with experts.watch() as early:
        source.add((0, 0, 1, True))
        with experts.watch() as late:
            source.add((1, 0, 2, True))
            assert told(late.take()) == [(0, 2, True)]
        source.add((2, 0, 3, True))
        assert told(early.take()) == [(0, 1, True), (0, 2, True), (0, 3, True)]
        late.close()  # once more
        assert source.switched == [True]
    assert source.switched == [True, False]


def test_what_was_not_taken_in_time_is_counted():
    experts = Experts(source := ScriptedSource(1, 16, size=4), (0,))
    with experts.watch() as watch:
        source.add(*((i, 0, i, False) for i in range(10)))
        asked = watch.take()
        assert (told(asked)[0], len(asked), asked.n_lost) == ((0, 6, False), 4, 6)
        source.add((10, 0, 10, False))
        assert (asked := watch.take()).n_lost == 0
        assert asked.experts.tolist() == [10]


def test_without_a_store_there_is_nothing_to_see():
    experts = Experts(None, (1, 2), 8)
    assert (experts.has_store, experts.layers, experts.n_expert) == (False, (1, 2), 8)
    assert experts.places() is None
    with experts.watch() as watch:
        assert not watch.take()
    assert Experts(None, ()).layers == ()


def test_a_closed_view_asks_the_engine_nothing_more():
    experts = Experts(source := ScriptedSource(1, 4), (0,))
    watch = experts.watch()
    source.add((0, 0, 1, True))
    experts.close()

    def asked_again() -> None:
        raise AssertionError("the context is gone")

    source.before_read = asked_again
    assert experts.places() is None
    assert not watch.take()
    watch.close()
    with experts.watch() as late:
        assert not late.take()
    assert source.switched == [True]


def test_closing_waits_for_a_reader_in_another_thread():
    experts = Experts(source := ScriptedSource(1, 4), (0,))
    inside, go_on, closed = threading.Event(), threading.Event(), threading.Event()
    watch = experts.watch()

    def slow() -> None:
        inside.set()
        assert go_on.wait(600)
        assert not closed.is_set()

    def close() -> None:
        experts.close()
        closed.set()

    source.before_read = slow
    failures: list[BaseException] = []

    def take() -> None:
        try:
            watch.take()
        except BaseException as failure:  # for the thread that asserts
            failures.append(failure)

    reader, closer = threading.Thread(target=take), threading.Thread(target=close)
    reader.start()
    assert inside.wait(600)
    closer.start()
    assert not closed.wait(0.1)
    go_on.set()
    reader.join(600)
    closer.join(600)
    assert closed.is_set()
    assert not failures
