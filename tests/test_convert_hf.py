"""Hugging Face checkpoints to GGUF, through real processes: the pinned converter, libllama's quantiser."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import convert_checkpoints
import numpy as np
import pytest
from convert_checkpoints import Checkpoints

from mobile_gguf.convert import ftypes, plan, quantize, upstream
from mobile_gguf.convert.hashes import tensor_hashes
from mobile_gguf.convert.options import ConvertOptions, ConvertResult
from mobile_gguf.convert.pipeline import convert_checkpoint
from mobile_gguf.convert.quantize import QuantizeRequest
from mobile_gguf.convert.workdir import work_directory, work_path
from mobile_gguf.errors import MobileError, ModelFormatError, UsageError
from mobile_gguf.gguf_header import read_header
from mobile_gguf.vendor import lock

CHILD = Path(__file__).with_name("convert_child.py")
STACKED = ConvertOptions(outtype="bf16", stacked=True, verify=False, pre_tokenizer="gpt-2", threads=2)
SMALL_TYPES = {number: name for name, number in ftypes.tensor_types().items()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return convert_checkpoints.make(tmp_path_factory.mktemp("checkpoints"))


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
    converted: tuple[ConvertResult, list[str]], tmp_path: Path
) -> None:
    result, texts = converted
    out = result.path
    kept = out.with_name("small.bf16.gguf")
    assert sorted(path.name for path in out.parent.iterdir()) == [kept.name, out.name]
    header = read_header(out)
    assert header.metadata["mobile.layout"] == "per-expert"
    assert {"blk.1.ffn_down.3.weight", "blk.0.ffn_up.0.weight"} <= {t.name for t in header.tensors}
    assert result.n_tensors == len(header.tensors)
    assert result.as_json()["megabytes_per_second"] > 0
    assert any(text.startswith("converting: tensor ") for text in texts)
    assert any(text.startswith("quantising: tensor ") and " MiB of " in text for text in texts)
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
    assert abs(planned.n_bytes - done.n_bytes) < 0.05 * done.n_bytes  # of the padding only a bound is known
    assert planned.peak_disk_bytes == done.peak_disk_bytes
    assert dict(planned.rows)["types"] == dict(done.rows)["types"]


def test_the_default_name_tells_source_and_type(checkpoints: Checkpoints) -> None:
    result = convert_checkpoint(
        checkpoints["f32"], None, replace(STACKED, outtype="auto", stacked=False, dry_run=True)
    )
    assert result.path == checkpoints.folder / "f32-f16.mobile.gguf"
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


def run_child(
    source: Path, out: Path, action: str = "", *, file_limit: int = 0, **options: Any
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHILD), str(source), str(out), json.dumps(options)]
    shown = ["sh", "-c", f'ulimit -f {file_limit} && exec "$@"', "sh", *command] if file_limit else command
    return subprocess.run(
        [*shown, *([action] if action else [])], capture_output=True, text=True, check=False
    )


CHILD_OPTIONS: dict[str, Any] = {"outtype": "q4_k_m", "verify": False, "pre_tokenizer": "gpt-2", "threads": 2}


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, f"{pids} outlived the conversion"
        time.sleep(0.05)


@pytest.mark.parametrize("phase", ["starting the converter", "converting", "quantising"])
def test_ctrl_c_leaves_nothing(checkpoints: Checkpoints, tmp_path: Path, phase: str) -> None:
    done = run_child(checkpoints["bf16"], tmp_path / "x.gguf", f"int:{phase}", **CHILD_OPTIONS)
    assert done.returncode == 130, done.stderr
    wait_until_gone([int(pid) for pid in done.stdout.split()])
    assert list(tmp_path.iterdir()) == []


def test_a_killed_conversion_leaves_no_output_and_the_next_cleans_up(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    out = tmp_path / "x.gguf"
    done = run_child(checkpoints["bf16"], out, "kill:quantising", **CHILD_OPTIONS)
    assert done.returncode == -9
    wait_until_gone([int(pid) for pid in done.stdout.split()])
    assert [path.name for path in tmp_path.iterdir()] == [work_path(out).name]
    done = run_child(checkpoints["bf16"], out, **CHILD_OPTIONS)
    assert done.returncode == 0, done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_file_that_cannot_grow_is_told_in_one_line(checkpoints: Checkpoints, tmp_path: Path) -> None:
    done = run_child(checkpoints["bf16"], tmp_path / "x.gguf", file_limit=4096, **CHILD_OPTIONS)
    assert done.returncode == 1
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    assert "File too large" in done.stdout or "full" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_quantiser_s_silent_write_error_is_found(
    f32_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nulimit -f 2048\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(wrapper))
    request = QuantizeRequest("q8_0", threads=2)
    with pytest.raises(MobileError, match="full or failed"):
        quantize.quantize(f32_gguf, tmp_path / "x.gguf", request, progress=lambda text, done: None)


def test_too_small_a_disk_is_found_first(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(MobileError, match=r"needs .* MiB on its disk, which has 1\.0 MiB free"):
        convert_checkpoint(checkpoints["bf16"], tmp_path / "x.gguf", STACKED)
    assert list(tmp_path.iterdir()) == []


def test_two_conversions_to_one_file(checkpoints: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    folder = work_path(out)
    with lock.exclusive(folder / "lock"), pytest.raises(MobileError, match="another process"):
        convert_checkpoint(checkpoints["bf16"], out, STACKED)
    assert folder.exists()


def test_an_existing_output_is_kept(checkpoints: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    out.write_text("precious")
    with pytest.raises(UsageError, match="--force"):
        convert_checkpoint(checkpoints["bf16"], out, STACKED)
    with pytest.raises(UsageError, match="is a directory"):
        convert_checkpoint(checkpoints["bf16"], tmp_path, replace(STACKED, force=True))
    assert out.read_text() == "precious"


def test_quantised_weights_are_not_quantised_again(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = checkpoints["gpt-oss-mxfp4"]
    with pytest.raises(ModelFormatError, match="quantised already"):
        convert_checkpoint(source, tmp_path / "x.gguf", replace(STACKED, outtype="q4_0"))
    assert list(tmp_path.iterdir()) == []


def test_a_work_directory_goes_with_its_block(tmp_path: Path) -> None:
    out = tmp_path / "new" / "x.gguf"
    with work_directory(out) as folder:
        (folder / "part").mkdir()
        assert folder.parent == out.parent
    assert list(out.parent.iterdir()) == []
    with pytest.raises(ZeroDivisionError), work_directory(out):
        raise ZeroDivisionError
    assert list(out.parent.iterdir()) == []


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(upstream.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'mobile-gguf\[convert\]'"):
        convert_checkpoint(tmp_path, tmp_path / "x.gguf")


def test_a_file_where_the_output_s_folder_should_be(checkpoints: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MobileError, match="cannot write"):
        convert_checkpoint(checkpoints["bf16"], tmp_path / "file" / "x.gguf", STACKED)
    assert os.listdir(tmp_path) == ["file"]
