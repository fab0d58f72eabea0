"""Corrections of little tokens: what is fitted, what a file may hold, and which tokens they are for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_backend import FakeBackend, fake_info

from mobile_gguf.convert.calibrate.correction import Maps, channel_moments, fit_maps, ways_of
from mobile_gguf.convert.gguf.data import Kv, TensorPlan
from mobile_gguf.convert.gguf.file import write_gguf
from mobile_gguf.engine.correction import Correction
from mobile_gguf.engine.observe import LittleSums
from mobile_gguf.errors import ModelFormatError, UsageError
from mobile_gguf.generate.passes.corrections import best_correction, correction_of, read_corrections
from mobile_gguf.generate.passes.rungs import parse_rung
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.info import GgufInfo

INFO = fake_info()  # 4 layers of 16 experts, top-8, 64 channels
SHAPE = (INFO.n_layer, INFO.n_embd)


def sums_of(little: np.ndarray, big: np.ndarray, layer: int = 0, way: int = 0) -> LittleSums:
    return LittleSums(layer, way, len(big), big.sum(0), (big**2).sum(0), little.sum(0), (little**2).sum(0))


def outputs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Little and big outputs [n, n_embd] that have to do with each other."""
    rng = np.random.default_rng(seed)
    big = rng.normal(rng.normal(0, 2, INFO.n_embd), rng.uniform(0.1, 3, INFO.n_embd), (200, INFO.n_embd))
    return 0.6 * big + 0.2 * rng.normal(size=big.shape) + 1, big


# --- fitting


def test_a_map_gives_mean_and_deviation_of_all_experts() -> None:
    little, big = outputs(1)
    scale, shift = channel_moments(sums_of(little, big))
    mapped = little * scale + shift
    np.testing.assert_allclose(mapped.mean(0), big.mean(0), atol=1e-5)
    np.testing.assert_allclose(mapped.std(0), big.std(0), rtol=1e-5)


def test_a_channel_that_does_not_vary_is_only_shifted() -> None:
    little, big = np.full((5, INFO.n_embd), 0.1), np.full((5, INFO.n_embd), 3.0)
    big[:, 1] = np.arange(5)
    scale, shift = channel_moments(sums_of(little, big))
    assert (scale == 1).all()
    np.testing.assert_allclose(shift[[0, 1]], [2.9, 1.9], rtol=1e-6)


def all_sums(*ways: float) -> list[LittleSums]:
    """Of every layer; the little output of a way is what it is scaled by times the first's."""
    return [
        sums_of(outputs(layer)[0] * factor, outputs(layer)[1], layer, way)
        for layer in range(INFO.n_layer)
        for way, factor in enumerate(ways)
    ]


def test_maps_are_of_every_layer_and_way() -> None:
    ways = ways_of(8, [4])
    assert ways == [(4, 0), (4, 6)]
    maps = fit_maps(INFO, ways, all_sums(1, 0.9))
    assert maps is not None
    assert maps.ways == ways
    assert maps.n_bytes == 2 * 2 * 4 * INFO.n_layer * INFO.n_embd
    for layer in range(INFO.n_layer):
        little, big = outputs(layer)
        for way, factor in enumerate((1, 0.9)):
            scale, _ = channel_moments(sums_of(little * factor, big))
            np.testing.assert_array_equal(maps.scale[way, layer], scale)
    assert not np.array_equal(maps.scale[0], maps.scale[1])


def test_a_mass_that_changes_nothing_is_left_out() -> None:
    """As where a model gives its top-k no fixed sum."""
    maps = fit_maps(INFO, ways_of(8, [4]), all_sums(1, 1))
    assert maps is not None
    assert maps.ways == [(4, 0)]


def test_of_a_layer_that_was_not_seen_there_are_no_maps() -> None:
    sums = all_sums(1, 0.9)
    assert fit_maps(INFO, ways_of(8, [4]), sums[1:]) is None
    assert fit_maps(INFO, ways_of(8, [4]), []) is None


@pytest.mark.parametrize(
    ("top_k", "little", "ways"),
    [(8, [4, 6, 4], [(4, 0), (4, 6), (6, 0), (6, 7)]), (2, [1], [(1, 0), (1, 1)]), (4, [4], [])],
)
def test_ways(top_k: int, little: list[int], ways: list[tuple[int, int]]) -> None:
    assert ways_of(top_k, little) == ways


# --- the file


def some_maps() -> Maps:
    maps = fit_maps(INFO, ways_of(8, [4]), all_sums(1, 0.9))
    assert maps is not None
    return maps


def write(path: Path, maps: Maps, **changes: Any) -> GgufInfo:
    metadata = {**maps.metadata(), **{k: v for k, v in changes.items() if isinstance(v, str)}}
    tensors = {**maps.tensors(), **{k: v for k, v in changes.items() if not isinstance(v, str)}}
    plans = [TensorPlan.of(name, array) for name, array in tensors.items() if array is not None]
    write_gguf(path, [Kv.of(name, value) for name, value in metadata.items()], plans, 32)
    return fake_info(path=path, files=(path,), metadata=metadata)


def test_corrections_are_read_back(tmp_path: Path) -> None:
    maps = some_maps()
    found = read_corrections(write(tmp_path / "a.gguf", maps))
    assert list(found) == [(4, 0), (4, 6)]
    assert found == maps.corrections(INFO)
    for way, one in enumerate(found.values()):
        np.testing.assert_array_equal(one.scale, maps.scale[way])
        np.testing.assert_array_equal(one.shift, maps.shift[way])
    assert found[4, 0] != found[4, 6]
    assert read_corrections(fake_info()) == {}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({keys.CORRECTION_WAYS: "[[4, 0], [8, 0]]"}, "mobile.correction.ways is"),
        ({keys.CORRECTION_WAYS: "[[4, 0], [4, 9]]"}, "mobile.correction.ways is"),
        ({keys.CORRECTION_WAYS: "[[4, 0], [4, true]]"}, "mobile.correction.ways is"),
        ({keys.CORRECTION_WAYS: "[]"}, "mobile.correction.ways is"),
        ({keys.CORRECTION_WAYS: "{"}, "mobile.correction.ways is"),
        ({keys.CORRECTION_WAYS: json.dumps([[4, 0]])}, "has the shape"),
        ({keys.CORRECTION_SCALE: None}, "mobile.correction.scale is missing"),
        ({keys.CORRECTION_SHIFT: np.zeros((2, *SHAPE), np.int32)}, "has another type"),
        ({keys.CORRECTION_SHIFT: np.full((2, *SHAPE), np.nan, np.float32)}, "is not a number"),
    ],
)
def test_damaged_corrections_are_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    info = write(tmp_path / "a.gguf", some_maps(), **changes)
    with pytest.raises(ModelFormatError, match=reason) as error:
        read_corrections(info)
    assert "calibrate it again" in str(error.value)


# --- which tokens


@pytest.fixture
def corrections() -> dict[tuple[int, int], Correction]:
    return dict(some_maps().corrections(INFO))


def test_a_rung_of_a_file_with_corrections(corrections: dict[tuple[int, int], Correction]) -> None:
    plain = parse_rung("little:4+affine", INFO, None, corrections=corrections).policy
    both = parse_rung("little:4+mass:6+affine", INFO, None, corrections=corrections).policy
    assert (plain.mass, plain.correction) == (0, corrections[4, 0])
    assert (both.mass, both.correction) == (6, corrections[4, 6])
    assert parse_rung("little:4+mass:6", INFO, None).policy.correction is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("affine", "corrects little tokens, and it has none"),
        ("drop:1+affine", "corrects little tokens, and it has none"),
        ("little:5+affine", "for tokens with 4 experts, 4 experts and mass 6, none for 5 experts"),
        ("little:4+mass:8+affine", "none for 4 experts and mass 8"),
    ],
)
def test_a_rung_that_no_correction_fits(text: str, says: str, corrections: Any) -> None:
    with pytest.raises(UsageError, match=says):
        parse_rung(text, INFO, None, corrections=corrections)
    with pytest.raises(
        UsageError, match=r"it has none|has no corrections of little tokens: run `mobile-gguf"
    ):
        parse_rung(text, INFO, None)


def test_the_best_is_of_the_largest_mass(corrections: dict[tuple[int, int], Correction]) -> None:
    assert best_correction(INFO, corrections, 4) is corrections[4, 6]
    assert best_correction(INFO, {(4, 0): corrections[4, 0]}, 4) is corrections[4, 0]
    with pytest.raises(UsageError, match="none for 3 experts"):
        best_correction(INFO, corrections, 3)
    with pytest.raises(UsageError, match="has no corrections"):
        correction_of(INFO, {}, 4, 0)


def test_little_tokens_are_corrected_where_it_is_asked_for(fake_model: Any, corrections: Any) -> None:
    backend = FakeBackend()
    backend.corrections = corrections
    model = fake_model(backend, mode="little")
    plain = model.generate("Once", max_tokens=3).receipt
    assert (backend.correction, backend.mass, plain.little_corrected) == (None, 0, False)
    receipt = model.generate("Once", max_tokens=3, little_correction="on").receipt
    assert (backend.correction, backend.mass) == (corrections[4, 6], 6)
    assert receipt.little_corrected
    assert receipt.summary().startswith("1 big · 2 little, corrected")
    model.generate("Once", max_tokens=3)
    assert (backend.correction, backend.mass) == (None, 0)


def test_what_has_no_little_token_says_so(fake_model: Any, corrections: Any) -> None:
    backend, notices = FakeBackend(), []
    backend.corrections = corrections
    model = fake_model(backend, little_correction="on")
    notices = model.notices
    assert any("no token is little in mode exact" in notice for notice in notices), notices
    model.generate("Once", max_tokens=2)
    assert backend.correction is None


def test_a_file_without_them_says_so_in_one_line(fake_model: Any) -> None:
    with pytest.raises(UsageError, match="has no corrections of little tokens: run") as error:
        fake_model(FakeBackend(), mode="little", little_correction="on")
    assert "\n" not in str(error.value)
    model = fake_model(FakeBackend(), mode="little")
    with pytest.raises(UsageError, match="has no corrections of little tokens"):
        model.generate("Once", max_tokens=2, little_correction="on")
