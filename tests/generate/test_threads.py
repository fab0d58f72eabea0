"""The number of threads follows the machine: the rule on simulated ones, the readings on a tree of files."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from threading import get_native_id
from typing import Any

import pytest

from mobile_gguf.generate.context import threads as rules
from mobile_gguf.generate.context.threads import FollowingThreads, ThreadRule
from mobile_gguf.memory.competition import Competition, Processors


class Machine:
    """So many processors and busy loops; ``run`` decodes tokens on it.

    Every thread and loop gets an equal share of the processors. A barrier holds all threads up until
    the slowest has come, the more of them wait, the longer: what was measured on two cores.
    """

    def __init__(self, processors: int, loops: int = 0, *, puts_decoder_off: bool = True) -> None:
        self.processors, self.loops, self.puts_decoder_off = processors, loops, puts_decoder_off

    def token(self, threads: int) -> tuple[float, float, float, float]:
        share = min(1.0, self.processors / (threads + self.loops))
        alone = 0.04 / threads
        seconds = alone / share * (1 + 3 * (1 - share) * (threads - 1))
        idle = max(0.0, self.processors - threads - self.loops) * seconds
        waited = seconds * (1 - share) if self.puts_decoder_off else 0.0
        return seconds, waited, idle, self.loops * share * seconds

    def run(self, rule: ThreadRule, n_tokens: int) -> list[int]:
        return [rule.observe(*self.token(rule.threads)) for _ in range(n_tokens)]


@pytest.mark.parametrize("processors", [1, 2, 4, 16])
def test_alone_all_threads_stay(processors: int) -> None:
    rule = ThreadRule(processors)
    assert set(Machine(processors).run(rule, 2000)) == {processors}
    assert rule.n_changes == 0


@pytest.mark.parametrize(("processors", "loops"), [(2, 1), (2, 2), (4, 1), (4, 4), (8, 2)])
def test_beside_others_the_fastest_number_is_found(processors: int, loops: int) -> None:
    machine = Machine(processors, loops)
    best = min(range(1, processors + 1), key=lambda n: machine.token(n)[0])
    assert best < processors, "a machine on which fewer are better"
    rule = ThreadRule(processors)
    machine.run(rule, 300)
    used = machine.run(rule, 1000)
    time_of = [machine.token(n)[0] for n in used]
    assert sum(time_of) / len(time_of) < 1.1 * machine.token(best)[0]
    assert rule.n_changes >= 1


def test_it_is_seen_when_another_than_the_decoding_thread_is_put_off() -> None:
    rule = ThreadRule(2)
    assert Machine(2, loops=1, puts_decoder_off=False).run(rule, 100)[-1] == 1
    assert rule.n_changes == 1


def test_what_others_take_of_processors_that_are_left_over_changes_nothing() -> None:
    rule = ThreadRule(4)
    assert set(Machine(8, loops=2).run(rule, 500)) == {4}


def test_when_the_others_leave_all_threads_come_back() -> None:
    rule = ThreadRule(4)
    Machine(4, loops=4).run(rule, 400)
    assert rule.threads < 4
    assert Machine(4).run(rule, 200)[-1] == 4


def test_fewer_threads_that_do_not_help_are_left_and_tried_ever_less_often() -> None:
    def slower_with_fewer(n: int) -> tuple[float, float, float, float]:
        return 0.08 / n, 0.5 * 0.08 / n, 0.0, 0.0

    rule = ThreadRule(2)
    used = [rule.observe(*slower_with_fewer(rule.threads)) for _ in range(2000)]
    tried = [at for at in range(1, 2000) if used[at] == 1 and used[at - 1] == 2]
    assert used[-1] == 2
    assert rule.n_changes == 0
    gaps = [after - before for before, after in pairwise(tried)]
    assert len(gaps) >= 2
    assert gaps == sorted(gaps)
    assert used.count(1) < 100


@pytest.mark.parametrize("gets_faster", [0.97, 0.965])
def test_a_cache_that_fills_is_no_win_of_fewer_threads(gets_faster: float) -> None:
    """Every token is faster than the one before, and with one thread a fifth slower than with two."""
    rule, seconds, used = ThreadRule(2), 0.1, []
    for _ in range(120):
        of_token = seconds * (1.2 if rule.threads == 1 else 1.0)
        used.append(rule.observe(of_token, 0.5 * of_token, 0.0, 0.0))
        seconds *= gets_faster
    assert rule.n_changes == 0
    assert used.count(1) < 40


@pytest.mark.parametrize("gain", [0.1, 0.2, 0.5])
def test_what_one_thread_wins_on_a_steady_machine_is_taken(gain: float) -> None:
    rule = ThreadRule(2)
    for _ in range(6 * rules.WINDOW):
        of_token = 0.1 * (1 - gain if rule.threads == 1 else 1.0)
        rule.observe(of_token, 0.5 * of_token, 0.0, 0.0)
    assert (rule.threads, rule.n_changes) == (1, 1)


def test_the_limit_is_never_passed() -> None:
    rule = ThreadRule(3)
    for at in range(3000):
        machine = Machine(8, loops=(0, 9, 3)[at // 100 % 3])
        assert 1 <= rule.observe(*machine.token(rule.threads)) <= 3


class Readings(Competition):
    """What a machine says, token after token."""

    def __init__(self, machine: Machine, threads: list[int], n_tokens: float = 1.0) -> None:
        self._machine, self._threads, self._n_tokens = machine, threads, n_tokens
        self._at = Processors(0.0, 0.0, 0.0, 0.0)
        self._begun = False

    def read(self) -> Processors | None:
        self._begun = not self._begun
        if not self._begun:
            seconds, *more = (self._n_tokens * one for one in self._machine.token(self._threads[-1]))
            at = self._at
            waited, idle, others = more
            self._at = Processors(
                at.waited_s + waited, at.idle_s + idle, at.others_s + others, at.at + seconds
            )
        return self._at


@pytest.mark.parametrize("n_tokens", [1.0, 3.4])
def test_the_context_gets_the_number(n_tokens: float) -> None:
    """A pass over a draft counts as the single tokens that it takes as long as."""
    given = [2]
    following = FollowingThreads(2, given.append, Readings(Machine(2, loops=1), given, n_tokens))
    for _ in range(40):
        following.before()
        following.after(n_tokens)
    assert given == [2, 1]
    assert following.threads == 1
    assert following.n_changes == 1


class Silent(Competition):
    def read(self) -> None:
        return None


def test_where_the_system_says_nothing_the_number_is_fixed() -> None:
    given: list[Any] = []
    following = FollowingThreads(2, given.append, Silent())
    for _ in range(5 * rules.WINDOW):
        following.before()
        following.after()
    assert (given, following.threads) == ([], 2)


def _tree(root: Path, schedstat: str, stat: str) -> Path:
    from os import getpid

    folder = root / f"proc/{getpid()}/task/{get_native_id()}"
    folder.mkdir(parents=True)
    (folder / "schedstat").write_text(schedstat)
    (root / "proc/stat").write_text(stat)
    return root


def test_readings(tmp_path: Path) -> None:
    root = _tree(tmp_path, "5000000000 1500000000 77\n", "cpu  10 20 30 400 50 6 7 900 0 0\ncpu0 1 2\n")
    found = Competition(root).read()
    assert found is not None
    assert found.waited_s == 1.5
    assert found.idle_s == 4.5
    assert found.others_s == pytest.approx(9.73 - time.process_time(), abs=0.5)


@pytest.mark.parametrize(
    ("schedstat", "stat"),
    [
        ("0 0 0\n", "cpu 1 2 3 4 5 6 7 8\n"),
        ("", "cpu 1 2 3 4 5 6 7 8\n"),
        ("1 2 3\n", ""),
        ("1 2 3\n", "cpu 1 2 3 4 5 6 7\n"),
        ("1 2 3\n", "intr 1 2 3 4 5 6 7 8\n"),
    ],
)
def test_no_readings(tmp_path: Path, schedstat: str, stat: str) -> None:
    assert Competition(_tree(tmp_path, schedstat, stat)).read() is None
