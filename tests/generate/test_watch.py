"""What the watch of passes reads of the engine's counters, and when."""

from __future__ import annotations

from mobile_gguf.engine.structs import Counters
from mobile_gguf.generate.speculation.costs import UNION
from mobile_gguf.generate.speculation.tuner import Tuner
from mobile_gguf.generate.speculation.watch import StepWatch, watching


class Engine:
    """Counts 100 experts more with each pass, of which a fifth is missing, and how often it is asked."""

    def __init__(self) -> None:
        self.now = 0.0
        self.n_reads = 0
        self.counters = Counters()

    def run(self, n: int = 1) -> None:
        self.now += 0.02
        self.counters += Counters(n_hits=80 * n, n_misses=20 * n, bytes_read=20 * n, stall_us=5000)

    def read(self) -> Counters:
        self.n_reads += 1
        return self.counters


def watch_of(engine: Engine, tuner: Tuner) -> StepWatch:
    return StepWatch(tuner, engine.read, lambda: None, lambda: engine.now)


def test_counters_are_read_once_a_pass_and_once_more_behind_another() -> None:
    engine, tuner = Engine(), Tuner()
    watch = watch_of(engine, tuner)
    for _ in range(10):
        with watching(watch, [[1]], is_plain=True):
            engine.run()
    assert engine.n_reads == 11
    assert tuner.costs.n_needs.value == 100
    assert tuner.costs.seconds_of(1) > 0.0199
    with watching(watch, [[1] * 30], is_plain=False):  # a prompt's, which is not measured
        engine.run(7)
    assert engine.n_reads == 11
    with watching(watch, [[1]], is_plain=True):
        engine.run()
    assert engine.n_reads == 13
    assert tuner.costs.n_needs.value == 100


def test_what_is_counted_anew_is_read_anew() -> None:
    engine, tuner = Engine(), Tuner()
    watch = watch_of(engine, tuner)
    with watching(watch, [[1]], is_plain=True):
        engine.run()
    engine.counters = Counters()
    watch.forget()
    with watching(watch, [[1]], is_plain=True):
        engine.run()
    assert tuner.costs.n_needs.value == 100


def test_a_pass_that_fails_is_none() -> None:
    engine, tuner = Engine(), Tuner()
    watch = watch_of(engine, tuner)
    for fails in (False, True, False):
        try:
            with watching(watch, [[1]], is_plain=True):
                engine.run()
                if fails:
                    raise RuntimeError
        except RuntimeError:
            pass
    assert tuner.costs.n_needs.value == 100
    assert engine.n_reads == 4


def test_what_no_draft_can_come_of_is_not_watched() -> None:
    engine, tuner = Engine(), Tuner()
    tuner.expect_needs(100)
    tuner.most_needs = 100 * 3**UNION
    watch = watch_of(engine, tuner)
    with watching(watch, [[1], [2]], is_plain=True):  # two answers' drafts would be four tokens at least
        engine.run(2)
    assert engine.n_reads == 0
    with watching(watch, [[1]], is_plain=True):
        engine.run()
    assert engine.n_reads == 2


def test_a_pass_is_told_what_was_before_it() -> None:
    """Tokens of the pass before; behind a prompt's it is not known."""
    engine, tuner, seen = Engine(), Tuner(), []
    observe = tuner.costs.observe
    tuner.costs.observe = lambda step: (seen.append(step.n_before), observe(step))  # type: ignore[method-assign,assign]
    watch = watch_of(engine, tuner)
    for slices, is_plain in (
        ([[1]], True),
        ([[1, 2, 3]], True),
        ([[1]], True),
        ([[1] * 9], False),
        ([[1]], True),
    ):
        with watching(watch, slices, is_plain=is_plain):
            engine.run()
    assert seen == [0, 1, 3, 0]
