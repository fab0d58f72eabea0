"""Verification can fail: wrong weights, metadata and tokens are found, the file stays and says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import verify_models

import mobile_gguf
from mobile_gguf.cli import main
from mobile_gguf.convert import engine_task
from mobile_gguf.convert.verify import reference
from mobile_gguf.convert.verify.check import Pair, mark, verify, verify_each
from mobile_gguf.convert.verify.result import (
    FAILED,
    NOT_VERIFIED,
    PASSED,
    VerifyResult,
)
from mobile_gguf.errors import UsageError
from mobile_gguf.gguf.header import read_header
from mobile_gguf.gguf.keys import VERIFY_JSON, VERIFY_STATUS

MODEL = "qwen3moe"


def tensor(reader: gguf.GGUFReader, name: str) -> np.ndarray:
    """A tensor's values, written through to the file."""
    return next(each.data for each in reader.tensors if each.name == name)


def perturb_one_expert(reader: gguf.GGUFReader) -> None:
    tensor(reader, "blk.1.ffn_up_exps.weight")[3] *= np.float32(1.05)


def swap_two_experts(reader: gguf.GGUFReader) -> None:
    stack = tensor(reader, "blk.2.ffn_down_exps.weight")
    stack[[4, 9]] = stack[[9, 4]]


def swap_gate_and_up_of_an_expert(reader: gguf.GGUFReader) -> None:
    gate, up = (tensor(reader, f"blk.0.ffn_{kind}_exps.weight") for kind in ("gate", "up"))
    gate[5], up[5] = up[5].copy(), gate[5].copy()


def swap_two_router_rows(reader: gguf.GGUFReader) -> None:
    router = tensor(reader, "blk.3.ffn_gate_inp.weight")
    router[[0, 1]] = router[[1, 0]]


def change_rope(reader: gguf.GGUFReader) -> None:
    reader.fields["qwen3moe.rope.freq_base"].parts[-1][0] *= 1.5


def change_eps(reader: gguf.GGUFReader) -> None:
    reader.fields["qwen3moe.attention.layer_norm_rms_epsilon"].parts[-1][0] = 1e-2


def put_nan(reader: gguf.GGUFReader) -> None:
    tensor(reader, "blk.1.ffn_down_exps.weight")[7, 0, 0] = np.nan


def swap_two_tokens(reader: gguf.GGUFReader) -> None:
    field = reader.fields["tokenizer.ggml.tokens"]
    one, other = (field.parts[field.data[ord(letter) - ord("!")]] for letter in "ab")
    one[:], other[:] = other.copy(), one.copy()


CHANGES: dict[str, tuple[Callable[[gguf.GGUFReader], None] | None, str]] = {
    "none": (None, ""),
    "an expert's weights": (perturb_one_expert, "runs differ"),
    "two experts swapped": (swap_two_experts, "runs differ"),
    "an expert's gate and up swapped": (swap_gate_and_up_of_an_expert, "runs differ"),
    "two router rows swapped": (swap_two_router_rows, "runs differ"),
    "rope base": (change_rope, "runs differ"),
    "norm epsilon": (change_eps, "runs differ"),
    "a NaN": (put_nan, "not numbers"),
    "two tokens swapped": (swap_two_tokens, "other tokens"),
}


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, VerifyResult]]:
    """A copy of the model with each change, and what verification says; Transformers is started once."""
    folder = verify_models.folder(MODEL)
    scratch = tmp_path_factory.mktemp("changed")
    pairs = []
    for number, (change, _) in enumerate(CHANGES.values()):
        path = scratch / f"{number}.gguf"
        shutil.copyfile(folder / "model-f32.gguf", path)
        if change is not None:
            reader = gguf.GGUFReader(path, "r+")
            change(reader)
            reader.data.flush()
        pairs.append(Pair(path, folder / "checkpoint"))
    results = verify_each(pairs, threads=1)
    return {name: (pair.gguf, found) for name, pair, found in zip(CHANGES, pairs, results, strict=True)}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_wrong_is_found(name: str, changed: dict[str, tuple[Path, VerifyResult]]) -> None:
    result = changed[name][1]
    expected = CHANGES[name][1]
    assert result.status == (FAILED if expected else PASSED), result.table()
    assert any(expected in reason for reason in result.reasons) or not expected
    # what is written into the file is JSON by the book, NaN or not
    stored = json.loads(result.metadata()[VERIFY_JSON], parse_constant=lambda word: pytest.fail(word))
    assert stored["status"] == result.status
    assert len(stored["rows"]) == 16


def test_the_file_is_marked_and_otherwise_kept(changed: dict[str, tuple[Path, VerifyResult]]) -> None:
    path, result = changed["two experts swapped"]
    before = {each.name: bytes(each.data) for each in gguf.GGUFReader(path).tensors}
    mark(path, result)
    assert read_header(path).metadata[VERIFY_STATUS] == FAILED
    after = {each.name: bytes(each.data) for each in gguf.GGUFReader(path).tensors}
    assert after == before
    # a later verdict takes its place, and none takes it away
    mark(path, changed["none"][1])
    metadata = read_header(path).metadata
    assert metadata[VERIFY_STATUS] == PASSED
    assert json.loads(metadata[VERIFY_JSON])["worst"]["relative error against Transformers"] < 1e-5
    mark(path, VerifyResult(NOT_VERIFIED, ("no reference",)))
    assert not {VERIFY_STATUS, VERIFY_JSON} & read_header(path).metadata.keys()


class TestCommand:
    def test_failure(
        self, changed: dict[str, tuple[Path, VerifyResult]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = changed["two router rows swapped"][0]
        checkpoint = verify_models.folder(MODEL) / "checkpoint"
        code = main(["verify", str(path), "--reference", str(checkpoint), "-t", "1"])
        out = capsys.readouterr().out
        assert code == 1
        assert out.splitlines()[-1].startswith("verification failed: ")
        assert sum("Transformers" in line for line in out.splitlines()) == 16
        assert path.exists()
        assert read_header(path).metadata[VERIFY_STATUS] == FAILED

    def test_a_family_that_transformers_does_not_know(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = verify_models.folder(MODEL)
        shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
        config = tmp_path / "checkpoint" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "never-heard-of"}))
        gguf_path = tmp_path / "model.gguf"
        shutil.copyfile(folder / "model-f32.gguf", gguf_path)
        before = gguf_path.read_bytes()
        code = main(["verify", str(gguf_path), "--reference", str(config.parent), "--json"])
        answer = json.loads(capsys.readouterr().out)
        assert code == 1
        assert answer["status"] == NOT_VERIFIED
        assert "does not know it" in answer["reasons"][0]
        assert "never-heard-of" in answer["reasons"][0]
        assert gguf_path.read_bytes() == before

    def test_a_folder_without_a_checkpoint(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = verify_models.folder(MODEL) / "model-f32.gguf"
        assert main(["verify", str(path), "--reference", str(tmp_path)]) == 2
        assert "it has no config.json" in capsys.readouterr().err


class TestWhatKeepsTransformersFromIt:
    """Each is a result that says why, never a pass and never a traceback."""

    def ask(self, **options: float) -> VerifyResult:
        folder = verify_models.folder(MODEL)
        return verify(folder / "model-f32.gguf", folder / "checkpoint", threads=1, **options)  # type: ignore[arg-type]

    def test_torch_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reference, "can_verify", lambda: False)
        result = self.ask()
        assert result.status == NOT_VERIFIED
        assert "pip install" in result.reasons[0]
        assert result.metadata() == {}

    def test_time_out(self) -> None:
        result = self.ask(stall_seconds=0.05)
        assert result.status == NOT_VERIFIED
        assert "no progress for 0.05 s" in result.reasons[0]

    def test_the_process_dies(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "dies.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
        monkeypatch.setattr(reference, "CHILD_MODULE", "dies")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        result = self.ask()
        assert result.status == NOT_VERIFIED
        assert "was killed, most likely because the memory ran out" in result.reasons[0]

    def test_weights_are_missing(self, tmp_path: Path) -> None:
        from safetensors.numpy import load_file, save_file

        folder = verify_models.folder(MODEL)
        shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
        weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
        del weights["model.layers.1.self_attn.q_proj.weight"]
        save_file(weights, tmp_path / "checkpoint" / "model.safetensors", metadata={"format": "pt"})
        result = verify(folder / "model-f32.gguf", tmp_path / "checkpoint", threads=1)
        assert result.status == NOT_VERIFIED
        assert "model.layers.1.self_attn.q_proj.weight" in result.reasons[0]

    @pytest.mark.parametrize(("gib", "own"), [(8.0, False), (5.0, True)])
    def test_the_type_follows_the_memory(self, gib: float, own: bool) -> None:
        assert reference.keeps_own_dtype(1 << 30, int(gib * (1 << 30))) is own

    def test_too_little_memory(self) -> None:
        with pytest.raises(reference.NotVerifiedError, match=r"4\.00 GiB of memory"):
            reference.keeps_own_dtype(1 << 30, 3 << 30)


_ABORTS = """
import ctypes, pathlib, sys
from llama_cpp import llama_cpp
from mobile_gguf.convert import engine_task

base = ctypes.CDLL(str(pathlib.Path(llama_cpp._lib._name).with_name("libggml-base.so")))
llama_cpp.llama_decode = lambda *_: base.ggml_abort(b"/built/here/llama-graph.cpp", 2079, b"planted")
sys.exit(engine_task.main())
"""


def test_an_abort_of_ggml_in_the_verification_of_a_conversion(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file took long to make: it is kept, says what was found, and the command ends with 4."""
    (tmp_path / "aborts.py").write_text(_ABORTS)
    monkeypatch.setattr(engine_task, "CHILD_MODULE", "aborts")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "out" / "made.gguf"
    source = verify_models.folder(MODEL) / "checkpoint"
    options = ["--pre-tokenizer", "gpt-2", "--outtype", "f32", "-t", "1", "-o", str(out)]
    assert main(["convert", str(source), *options]) == 4
    said = capsys.readouterr().out
    assert "the engine died: llama-graph.cpp:2079: planted" in said
    assert [path.name for path in out.parent.iterdir()] == ["made.gguf"]
    stored = read_header(out).metadata[VERIFY_STATUS]
    assert stored == FAILED
    with mobile_gguf.load(out, n_ctx=64) as model:
        assert len(model.generate([1, 2], max_tokens=2).tokens) == 2


def test_the_reference_of_a_quantised_file_must_be_exact() -> None:
    folder = verify_models.folder(MODEL)
    quantised = folder / "model-q8_0.gguf"
    with pytest.raises(UsageError, match="not an F32, F16 or BF16 file"):
        verify(quantised, folder / "checkpoint", reference_gguf=quantised)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper half of each float32, rounded to nearest even: uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def save_bfloat16(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file of bfloat16 tensors; numpy has no such type."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        rounded = to_bfloat16(values).tobytes()
        where = [len(data), len(data) + len(rounded)]
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": where}
        data += rounded
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_weights_kept_in_their_own_type_are_computed_with_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import load_file

    folder = verify_models.folder(MODEL)
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(folder / "checkpoint", checkpoint)
    save_bfloat16(checkpoint / "model.safetensors", load_file(checkpoint / "model.safetensors"))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    path = tmp_path / "model.gguf"
    shutil.copyfile(folder / "model-f32.gguf", path)
    reader = gguf.GGUFReader(path, "r+")
    for each in reader.tensors:
        each.data[:] = (to_bfloat16(each.data).astype(np.uint32) << 16).view(np.float32)
    reader.data.flush()
    monkeypatch.setattr(reference, "keeps_own_dtype", lambda *_: True)
    result = verify(path, checkpoint, threads=1)
    assert result.status == PASSED, result.table()
    assert result.facts["reference_precision"] == "16-bit weights, float32 products"
    assert result.worst()["relative error against Transformers"] < 1e-5


def test_float32_activations_are_switched_off_again() -> None:
    from mobile_gguf.convert.verify.engine import EngineReference

    path = verify_models.folder("mixtral") / "model-f16.gguf"

    def logits(precise: bool) -> np.ndarray:
        with EngineReference(path, n_ctx=32, threads=1, precise=precise) as engine:
            assert engine.is_precise is precise
            return engine.at_once(range(20))

    before, precise, after = logits(False), logits(True), logits(False)
    assert np.array_equal(before, after)
    assert 1e-5 < np.abs(precise - before).max() < 0.1


@pytest.mark.parametrize("segments", [1, 2])
def test_a_file_of_our_layout(segments: int, tmp_path: Path) -> None:
    from mobile_gguf.convert.gguf.layout import to_mobile

    folder = verify_models.folder("olmoe")
    to_mobile(folder / "model-f32.gguf", tmp_path / "out.gguf", segments=segments, segment_order="natural")
    result = verify(tmp_path / "out.gguf", folder / "checkpoint", threads=1)
    assert result.status == PASSED, result.table()
    assert not result.notes
    assert result.worst()["relative error against Transformers"] < 1e-5
