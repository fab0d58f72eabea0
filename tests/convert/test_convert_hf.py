"""Hugging Face checkpoints to GGUF, through real processes: the pinned converter, libllama's quantiser."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import convert_checkpoints
import numpy as np
import pytest
from convert_checkpoints import Checkpoints
from convert_runs import STACKED, run_child

from mobile_gguf.convert import plan
from mobile_gguf.convert.gguf.hashes import tensor_hashes
from mobile_gguf.convert.hf import upstream
from mobile_gguf.convert.hf.checkpoint import read_checkpoint
from mobile_gguf.convert.options import ConvertOptions, ConvertResult
from mobile_gguf.convert.pipeline import convert_checkpoint
from mobile_gguf.convert.quantize import ftypes
from mobile_gguf.convert.quantize import run as quantize
from mobile_gguf.errors import MobileError, ModelFormatError, UsageError
from mobile_gguf.gguf.header import read_header

SMALL_TYPES = {number: name for name, number in ftypes.tensor_types().items()}


@pytest.fixture(scope="module")
def f32_gguf(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, stacked, as it is: what the quantiser is given."""
    out = tmp_path_factory.mktemp("f32") / "model.gguf"
    convert_checkpoint(checkpoints["f32"], out, replace(STACKED, outtype="f32"))
    return out


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: SMALL_TYPES[tensor.type_id] for tensor in read_header(path).tensors}


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


@pytest.mark.parametrize("name", [name for name, _ in convert_checkpoints.FAMILIES])
def test_every_family_is_written_as_the_converter_itself_writes_it(
    checkpoints: Checkpoints, name: str
) -> None:
    found = checkpoints.families[name]
    assert found.get("equal") is True, found
    assert found["planned_bytes"] == found["bytes"]


def test_no_experts_are_converted_whole(checkpoints: Checkpoints) -> None:
    whole = {name: found["whole"] for name, found in checkpoints.families.items()}
    assert {name for names in whole.values() for name in names if "_exps" in name} == set()
    # the list is not empty for want of a report: Llama's permutation of heads mixes rows
    assert "blk.0.attn_q.weight" in whole["mixtral"]


def test_shards_of_every_format_give_the_same_file(checkpoints: Checkpoints, tmp_path: Path) -> None:
    hashes = []
    for form in ("bf16", "bin", "legacy-bin"):
        out = tmp_path / f"{form}.gguf"
        result = convert_checkpoint(checkpoints[form], out, STACKED)
        assert result.n_bytes == out.stat().st_size
        hashes.append(tensor_hashes(out))
    assert len(list(checkpoints["bf16"].glob("*.safetensors"))) > 1
    assert hashes[0] == hashes[1] == hashes[2]


def quantise_by_hand(source: Path, out: Path, ftype: str) -> None:
    code = (
        "import ctypes, sys, llama_cpp as c; p = c.llama_model_quantize_default_params();"
        f"p.ftype = c.LLAMA_FTYPE_MOSTLY_{ftype};"
        "sys.exit(c.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.pointer(p)))"
    )
    subprocess.run([sys.executable, "-c", code, str(source), str(out)], check=True, capture_output=True)


WHOLE = replace(STACKED, outtype="q4_k_m", stacked=False, keep_intermediate=True)


@pytest.fixture(scope="module")
def converted(
    checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ConvertResult, list[str]]:
    """The whole way to a quantised per-expert file, and what was told of it."""
    texts: list[str] = []
    out = tmp_path_factory.mktemp("whole") / "small.mobile.gguf"
    result = convert_checkpoint(
        checkpoints["bf16"], out, WHOLE, progress=lambda text, done: texts.append(text)
    )
    return result, texts


def test_the_whole_way_to_a_quantised_per_expert_file(
    checkpoints: Checkpoints, converted: tuple[ConvertResult, list[str]], tmp_path: Path
) -> None:
    result, texts = converted
    out = result.path
    kept = out.with_name("small.bf16.gguf")
    assert sorted(path.name for path in out.parent.iterdir()) == [kept.name, out.name]
    header = read_header(out)
    assert header.metadata["mobile.layout"] == "per-expert"
    assert {"blk.1.ffn_down.3.weight", "blk.0.ffn_up.0.weight"} <= {t.name for t in header.tensors}
    assert result.n_tensors == len(header.tensors)
    n_bytes = read_checkpoint(
        checkpoints["bf16"], upstream.known_architectures(upstream.converter_dir())
    ).n_bytes
    assert result.as_json()["megabytes_per_second"] == round(n_bytes / 1e6 / result.seconds, 1)
    assert any(text.startswith("converting: tensor ") for text in texts)
    assert any(text.startswith("quantising: tensor ") and " of " in text for text in texts)
    # libllama's own quantiser, run by hand on the kept file
    quantise_by_hand(kept, tmp_path / "hand.gguf", "Q4_K_M")
    assert tensor_hashes(out) == tensor_hashes(tmp_path / "hand.gguf")


def test_dry_run_writes_nothing_and_is_right(
    checkpoints: Checkpoints, converted: tuple[ConvertResult, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "x.gguf"
    planned = convert_checkpoint(checkpoints["bf16"], out, replace(WHOLE, dry_run=True))
    assert list(tmp_path.iterdir()) == []
    done = converted[0]
    assert planned.dry_run
    assert planned.n_tensors == done.n_tensors
    assert abs(planned.n_bytes - done.n_bytes) <= 4096  # the metadata that quantising adds is not planned
    assert planned.peak_disk_bytes == done.peak_disk_bytes
    assert dict(planned.rows)["types"] == dict(done.rows)["types"]


def test_the_default_name_tells_source_and_type(checkpoints: Checkpoints) -> None:
    known = upstream.known_architectures(upstream.converter_dir())
    auto = {
        form: plan.resolve_outtype("auto", read_checkpoint(checkpoints[form], known))
        for form in ("f32", "bf16", "bin")
    }
    assert auto == {"f32": "f16", "bf16": "bf16", "bin": "bf16"}
    assert plan.default_output("m", Path("d"), "f16", stacked=False) == Path("d/m-f16.mobile.gguf")
    assert plan.default_output("m", Path("d"), "q4_k_m", stacked=True) == Path("d/m-q4_k_m.gguf")


def run_quantise(source: Path, out: Path, **options: Any) -> dict[str, str]:
    request = quantize.request_from(ConvertOptions(verify=False, **options), threads=2)
    quantize.quantize(source, out, request, progress=lambda text, done: None)
    return types_of(out)


@pytest.mark.parametrize("outtype", ["q4_k_m", "bf16"])
def test_overrides_by_class_and_by_pattern(f32_gguf: Path, tmp_path: Path, outtype: str) -> None:
    types = run_quantise(
        f32_gguf, tmp_path / "out.gguf", outtype=outtype, experts="q5_k", attention="q8_0",
        tensor_types=((r"blk\.1\.ffn_down", "q6_k"),),
    )  # fmt: skip
    assert types["blk.0.ffn_down_exps.weight"] == types["blk.1.ffn_up_exps.weight"] == "q5_k"
    assert types["blk.1.ffn_down_exps.weight"] == "q6_k"
    assert types["blk.0.attn_q.weight"] == types["blk.1.attn_output.weight"] == "q8_0"
    assert types["blk.0.attn_norm.weight"] == types["blk.0.ffn_gate_inp.weight"] == "f32"
    assert types["token_embd.weight"] == ("q4_k" if outtype == "q4_k_m" else "bf16")
    wanted = ftypes.ftypes()[outtype]
    assert read_header(tmp_path / "out.gguf").metadata["general.file_type"] == wanted


def test_pure_has_one_type(f32_gguf: Path, tmp_path: Path) -> None:
    mixed = run_quantise(f32_gguf, tmp_path / "mixed.gguf", outtype="q4_k_m")
    pure = run_quantise(f32_gguf, tmp_path / "pure.gguf", outtype="q4_k_m", pure=True)
    # rows of 128 values are none for blocks of 256
    assert set(pure.values()) == {"f32", "q4_k", "q5_0"}
    assert "q6_k" in mixed.values()


@pytest.mark.parametrize("name", ["q1_0", "tq1_0", "iq3_s", "iq4_nl", "mxfp4_moe"])
def test_types_that_need_no_importance_matrix(f32_gguf: Path, tmp_path: Path, name: str) -> None:
    types = run_quantise(f32_gguf, tmp_path / "out.gguf", outtype=name)
    assert read_header(tmp_path / "out.gguf").metadata["general.file_type"] == ftypes.ftypes()[name]
    assert types["blk.0.ffn_up_exps.weight"] not in ("f32", "f16", "bf16")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"outtype": "q9_z"}, "no type that libllama can make"),
        ({"outtype": "nvfp4"}, "no type that libllama can make"),
        ({"outtype": "iq2_xs"}, "--imatrix"),
        ({"outtype": "q2_k_s"}, "--imatrix"),
        ({"outtype": "q8_0", "experts": "iq1_s"}, "iq1_s cannot be made without an importance matrix"),
        ({"experts": "q4_k_m"}, "the type is q4_k"),
        ({"attention": "q8_k"}, "no such tensor type"),
        ({"tensor_types": (("(", "q8_0"),)}, "no regular expression"),
        ({"pre_tokenizer": "nonsense"}, "llama.cpp knows no such one"),
    ],
)
def test_bad_options_are_told_before_any_work(
    checkpoints: Checkpoints, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError) as error:
        convert_checkpoint(checkpoints["f32"], tmp_path / "x.gguf", replace(STACKED, **options))
    assert said in str(error.value)
    assert list(tmp_path.iterdir()) == []


def edit_weights(folder: Path, change: Callable[[np.ndarray], None], name: str) -> None:
    """Changes one tensor of a one-file checkpoint of float32 in place."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    start, stop = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    values = np.frombuffer(data[8 + length + start : 8 + length + stop], "<f4").copy()
    change(values)
    data[8 + length + start : 8 + length + stop] = values.tobytes()
    path.write_bytes(data)


EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"


@pytest.mark.parametrize(
    ("outtype", "segments", "said"),
    [("q4_k_m", 2, "in blocks of 256"), ("bf16", 3, "cannot be cut into 3 segments")],
)
def test_segments_that_cannot_be_are_told_before_any_work(
    checkpoints: Checkpoints, tmp_path: Path, outtype: str, segments: int, said: str
) -> None:
    options = replace(WHOLE, outtype=outtype, segments=segments, segment_order="natural")
    texts: list[str] = []
    with pytest.raises(UsageError, match=f"^{checkpoints['bf16']} .*{said}"):
        convert_checkpoint(
            checkpoints["bf16"], tmp_path / "x.gguf", options, progress=lambda text, done: texts.append(text)
        )
    assert not any(text.startswith("converting") for text in texts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "outtype", "said"),
    [
        (np.nan, "q4_k_m", "the weights of blk.1.ffn_down_exps.weight in model.safetensors hold NaN"),
        (1e6, "f16", "blk.1.ffn_down_exps.weight: a value does not fit float16"),
    ],
)
def test_weights_that_are_not_finite(
    checkpoints: Checkpoints, tmp_path: Path, value: float, outtype: str, said: str
) -> None:
    folder = copy_of(checkpoints["f32"], tmp_path / "bad")

    def spoil(values: np.ndarray) -> None:
        values[12345] = value

    edit_weights(folder, spoil, EXPERT)
    with pytest.raises(MobileError) as error:
        convert_checkpoint(folder, tmp_path / "x.gguf", replace(STACKED, outtype=outtype))
    assert said in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_tokenizer_that_nobody_knows_is_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(MobileError) as error:
        convert_checkpoint(checkpoints["f32"], tmp_path / "x.gguf", replace(STACKED, pre_tokenizer=None))
    text = str(error.value)
    assert "--pre-tokenizer" in text
    assert len(text.partition("(hash ")[2].partition(")")[0]) == 64
    assert "\n" not in text


def test_code_of_a_checkpoint_does_not_run(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder, marker = copy_of(checkpoints["f32"], tmp_path / "code"), tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Tokenizer: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "EvilTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(model | {"auto_map": {"AutoConfig": "evil.Config"}}))
    out = tmp_path / "x.gguf"
    done = run_child(folder, out, outtype="bf16", stacked=True, verify=False, pre_tokenizer="gpt-2")
    print(done.stdout)
    assert not marker.exists()


def test_quantised_weights_are_not_quantised_again(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = checkpoints["gpt-oss-mxfp4"]
    with pytest.raises(ModelFormatError, match="quantised already"):
        convert_checkpoint(source, tmp_path / "x.gguf", replace(STACKED, outtype="q4_0"))
    assert list(tmp_path.iterdir()) == []


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(upstream.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[convert\]'"):
        convert_checkpoint(tmp_path, tmp_path / "x.gguf")
