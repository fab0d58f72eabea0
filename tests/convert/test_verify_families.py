"""Every MoE family's logits are Transformers' logits: tiny random checkpoints, converted and verified."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import verify_models
from places import SUPPORT

from mobile_gguf.convert.verify import reference
from mobile_gguf.convert.verify.check import Pair, verify, verify_each
from mobile_gguf.convert.verify.result import FAILED, PASSED, VerifyResult

# llama.cpp and Transformers compute these differently: see the classes below
DIFFERENT = ("phimoe-f16", "nemotron-h")
EACH_FILE = [
    (name, outtype)
    for name, outtypes in verify_models.OUTTYPES.items()
    for outtype in outtypes
    if outtype != "q8_0" and name not in DIFFERENT
]
# what float32 arithmetic in another order leaves; the tolerance of a user's file is a thousand times larger
ERRORS = {"gemma4": 2e-4}  # ggml rounds GELU's argument to half precision
USUAL_ERROR = 1e-5


def pair(name: str, outtype: str) -> Pair:
    folder = verify_models.folder(name)
    return Pair(folder / f"model-{outtype}.gguf", folder / "checkpoint")


@cache
def results() -> dict[tuple[str, str], VerifyResult]:
    """All files at once: Transformers takes seconds to start."""
    found = verify_each([pair(name, outtype) for name, outtype in EACH_FILE], threads=1)
    return dict(zip(EACH_FILE, found, strict=True))


@pytest.mark.parametrize(("name", "outtype"), EACH_FILE)
def test_logits_are_those_of_transformers(name: str, outtype: str) -> None:
    result = results()[name, outtype]
    assert result.status == PASSED, result.table()
    assert not result.notes
    assert {row.run for row in result.rows} == {"at once", "step by step"}
    assert sum(row.n_tokens for row in result.rows) >= 2 * 8 * 20
    assert all(row.n_same_top == row.n_tokens for row in result.rows)
    assert result.worst()["relative error against Transformers"] < ERRORS.get(name, USUAL_ERROR)
    # every expert had a say
    layers = result.facts["experts_reached"]
    assert layers == sum(layer.n_expert for layer in _experts(name, outtype))


def _experts(name: str, outtype: str):
    from mobile_gguf.gguf.info import read_gguf_info

    return read_gguf_info(pair(name, outtype).gguf).expert_layers


def test_a_quantised_file_is_held_against_its_own_16_bit_file() -> None:
    folder = verify_models.folder("qwen3moe")
    result = verify(
        folder / "model-q8_0.gguf",
        folder / "checkpoint",
        reference_gguf=folder / "model-bf16.gguf",
        threads=1,
    )
    assert result.status == PASSED, result.table()
    strict = [row for row in result.rows if row.against == "Transformers"]
    loose = [row for row in result.rows if row.against == "16-bit file"]
    assert max(row.worst_error for row in strict) < USUAL_ERROR
    assert len(strict) == len(loose)
    assert 1e-6 < result.facts["mean_kl"] < 0.05
    assert all(row.mean_kl > 0 for row in loose)


class TestPhiMoE:
    """llama.cpp computes something else than Transformers, and that is told.

    It has no sparse mixer (arXiv 2409.12136) but takes the top two of one softmax, and norms by the root mean
    square where the model has LayerNorm.
    """

    def test_the_difference_is_found(self) -> None:
        result = verify(*_paths("phimoe-f16"), threads=1)
        assert result.status == FAILED
        assert "runs differ" in result.reasons[0]
        assert min(row.worst_error for row in result.rows) > 0.05

    def test_all_else_is_equal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reference, "CHILD_MODULE", "phimoe_child")
        monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
        result = verify(*_paths("phimoe-f16"), threads=1)
        assert result.status == PASSED, result.table()
        assert result.worst()["relative error against Transformers"] < USUAL_ERROR


def test_nemotron_h_but_for_the_smallest_time_step(tmp_path: Path) -> None:
    """Transformers keeps the recurrence's time steps above ``time_step_min``, llama.cpp has no such limit."""
    path, checkpoint = _paths("nemotron-h")
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    config = tmp_path / "checkpoint" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"time_step_min": 0.0}))
    result = verify(path, config.parent, threads=1)
    assert result.status == PASSED, result.table()
    assert result.worst()["relative error against Transformers"] < USUAL_ERROR


def _paths(name: str) -> tuple[Path, Path]:
    found = pair(name, "f32")
    return found.gguf, found.checkpoint
