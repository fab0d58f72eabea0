"""What a machine remembers of itself and of its runs: measurements, and what predictions learnt."""

import json
import math
from pathlib import Path

import pytest
from fake_backend import fake_info
from hypothesis import given
from hypothesis import strategies as st

from mobile_gguf.plan.machine import (
    Lesson,
    Measurements,
    Rate,
    correct,
    improved,
    learn,
    lesson_for,
    lesson_name,
    measurements_path,
    read_lesson,
    read_measurements,
    write_measurements,
)
from mobile_gguf.plan.speed import Prediction


def test_measurements_are_kept_merged_and_read_back():
    known = read_measurements()
    known.put("a", Rate(1.0, 0.5, 2.0))
    write_measurements(known)
    other = Measurements(known.identity)
    other.put("b", Rate(3.0, 3.0, 3.0))
    write_measurements(other)
    found = read_measurements()
    assert found.get("a") == Rate(1.0, 0.5, 2.0)
    assert found.get("b") == Rate(3.0, 3.0, 3.0)
    assert found.date() == max(entry["date"] for entry in found.entries.values())
    assert list(measurements_path(known.identity).parent.glob("*.partial")) == []


@pytest.mark.parametrize("part", ["processor", "engine", "driver", "memory_gib", "system"])
def test_another_machine_engine_or_driver_knows_nothing(monkeypatch, part):
    from mobile_gguf.plan import machine

    known = read_measurements()
    known.put("a", Rate(1.0, 1.0, 1.0))
    write_measurements(known)
    changed = known.identity | {part: "another"}
    monkeypatch.setattr(machine, "identify_machine", lambda: changed)
    assert read_measurements().entries == {}
    # nor does a file that was put in the other's place
    path = measurements_path(changed)
    path.write_text(measurements_path(known.identity).read_text())
    assert read_measurements().entries == {}


@pytest.mark.parametrize(
    "entry",
    [
        {"value": 1, "low": 1, "high": 1, "date": "2001-01-01T00:00:00+00:00"},
        {"value": 1, "low": 1, "high": 1},
        {"value": "1", "low": 1, "high": 1, "date": "2999-01-01T00:00:00+00:00"},
        {"value": -1, "low": 1, "high": 1, "date": "2999-01-01T00:00:00+00:00"},
        {"value": math.nan, "low": 1, "high": 1, "date": "2999-01-01T00:00:00+00:00"},
    ],
)
def test_an_old_or_damaged_entry_counts_as_none(entry):
    assert Measurements({}, {"a": entry}).get("a") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"identity": 3}', "\udcff"])
def test_a_damaged_file_counts_as_none(text):
    path = measurements_path(read_measurements().identity)
    path.parent.mkdir(parents=True)
    path.write_text(text, errors="surrogateescape")
    assert read_measurements().entries == {}


# what runs teach


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=20))
def test_a_correction_is_bounded(residuals):
    lesson = Lesson()
    for residual in residuals:
        lesson = improved(lesson, residual)
    assert 0.5 - 1e-9 <= lesson.correction <= 2 + 1e-9
    assert lesson.n_runs == len(residuals)


def test_runs_that_are_all_slower_teach_so_and_narrow_the_band():
    known, before = Measurements({"machine": "test"}), Prediction("exact", 10.0, 7.0, 14.0)
    assert correct(before, read_lesson(known, "m")) == before
    for _ in range(4):
        learn(known, "m", 10.0, 8.0)
    after = correct(before, read_lesson(known, "m"))
    assert after.predicted_tps == pytest.approx(8.0)
    assert after.low < 8.0 < after.high
    assert after.high / after.low < before.high / before.low
    assert correct(before, read_lesson(known, "other")) == before


def test_the_share_of_big_tokens_is_learnt():
    lesson = improved(improved(Lesson(), 0.0, 0.9), 0.0, 0.7)
    assert lesson.big_share == pytest.approx(0.8)


@pytest.mark.parametrize(
    "lesson", [{"log_correction": 99}, {"log_correction": "x"}, 3, {"big_share": math.inf}]
)
def test_a_damaged_lesson_is_none(lesson, own_directories):
    known = Measurements({"machine": "test"})
    path = Path(own_directories) / "cache" / "mobile-gguf" / "plan" / f"lessons-{known.key}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"m": lesson}))
    assert read_lesson(known, "m") == Lesson()


def test_what_one_mode_has_learnt_corrects_the_others_that_have_not():
    known, info = Measurements({"machine": "test"}), fake_info()
    for _ in range(3):
        learn(known, lesson_name(info, "exact", "", 1.0), 10.0, 20.0)
    learn(known, lesson_name(info, "big-little", "", 1.0), 10.0, 8.0, 0.25)
    exact, of_exact = lesson_for(known, info, "exact", "", 1.0)
    little, of_little = lesson_for(known, info, "little", "", 1.0)
    assert (of_exact, of_little) == ("exact", "exact")
    assert little.correction == exact.correction == pytest.approx(2.0)
    own, teacher = lesson_for(known, info, "big-little", "", 1.0)
    assert (own.n_runs, own.big_share, teacher) == (1, 0.25, "big-little")
    # what is read from the disk is another matter
    assert lesson_for(known, info, "little", "", 0.5)[0].n_runs == 0
