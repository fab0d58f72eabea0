"""``mobile-gguf convert``: whole transcripts, exit codes, JSON; nothing written where nothing may be."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
from gguf_samples import write_sample

from mobile_gguf.cli import main
from mobile_gguf.cli.progress import Progress
from mobile_gguf.convert.options import ConvertOptions, ConvertResult
from mobile_gguf.errors import MobileError
from mobile_gguf.files import atomic


@pytest.fixture
def convert(capsys, tmp_path, monkeypatch):
    """Runs the command in an empty directory: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        try:
            code = main(["convert", *map(str, argv)])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def sample(tmp_path):
    return write_sample(tmp_path / "model.gguf", n_tokens=4)


def rows(out):
    return {line[:24].strip(): line[24:] for line in out.splitlines()}


def test_there_and_back(convert, sample):
    code, out, err = convert("model.gguf")
    assert code == 0
    shown = rows(out)
    size = Path("model.mobile.gguf").stat().st_size
    n_tensors = len(gguf.GGUFReader("model.mobile.gguf").tensors)
    assert shown.pop("time").endswith("/s)")
    assert shown == {
        "written": "model.mobile.gguf",
        "layout": "per-expert",
        "tensors": str(n_tensors),
        "size": f"{size / 1024:.1f} KiB ({size} bytes)",
    }
    assert err.startswith(f"converting model.gguf: tensor 1/{n_tensors}, 512 B of ")
    assert len(err.splitlines()) <= 12
    assert convert("model.gguf", "--check", "model.mobile.gguf")[:2] == (0, "the same weights\n")
    code, out, _ = convert("model.mobile.gguf", "--export")
    assert (code, rows(out)["written"], rows(out)["layout"]) == (0, "model.stacked.gguf", "stacked")
    assert Path("model.stacked.gguf").read_bytes() == sample.read_bytes()
    assert len(os.listdir()) == 3


def test_segments(convert, sample):
    code, out, _ = convert("model.gguf", "--segments", "4", "--segment-order", "natural", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["path"], told["segments"], told["layout"]) == ("model.s4.mobile.gguf", 4, "per-expert")
    assert told["n_bytes"] == Path(told["path"]).stat().st_size
    code, out, _ = convert("model.s4.mobile.gguf", "--stacked", "-o", "plain.gguf")
    assert (code, rows(out)["layout"]) == (0, "stacked")


def test_parts_make_one_file(convert, tmp_path):
    write_sample(tmp_path / "big.gguf", split_max_tensors=4, n_tokens=4)
    code, out, _ = convert("big-00001-of-00003.gguf")
    assert (code, rows(out)["written"]) == (0, "big.mobile.gguf")


def test_a_dry_run(convert, sample):
    code, out, err = convert("model.gguf", "--dry-run")
    assert (code, err) == (0, "")
    shown = rows(out)
    assert shown["would write"] == "model.mobile.gguf"
    assert shown["disk free"].endswith(": enough")
    assert os.listdir() == ["model.gguf"]
    told = json.loads(convert("model.gguf", "--dry-run", "--json")[1])
    convert("model.gguf")
    assert told["dry_run"] is True
    assert told["peak_disk_bytes"] == told["n_bytes"] == Path("model.mobile.gguf").stat().st_size


def test_a_dry_run_for_a_small_disk(convert, sample, monkeypatch):
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _path: SimpleNamespace(free=999))
    code, out, _ = convert("model.gguf", "--dry-run")
    assert (code, rows(out)["disk free"]) == (0, "999 B (999 bytes): NOT ENOUGH")
    code, out, err = convert("model.gguf")
    assert (code, out) == (1, "")
    assert "cannot write model.mobile.gguf: it needs" in err
    assert os.listdir() == ["model.gguf"]


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (("none.gguf",), 3, "no such model: none.gguf"),
        (
            ("model.gguf", "--outtype", "q8_0"),
            2,
            "weights stay as they are: --outtype is for checkpoints",
        ),
        (("model.gguf", "--tensor-type", "a=q8_0"), 2, "--tensor-type is for checkpoints"),
        (("model.gguf", "--tensor-type", "q8_0"), 2, "no PATTERN=TYPE"),
        (("model.gguf", "--pure"), 2, "--pure is for checkpoints"),
        (("model.gguf", "--verify"), 2, "--verify needs the checkpoint"),
        (("model.gguf", "--export"), 2, "is a stacked file already"),
        (("model.gguf", "--export", "--segments", "2"), 2, "goes without --stacked and --segments"),
        (("model.gguf", "--stacked", "--segments", "2"), 2, "goes without --segments"),
        (("model.gguf", "--segment-order", "natural"), 2, "--segment-order needs --segments"),
        (("model.gguf", "--segments", "0"), 2, "at least 1"),
        (("model.gguf", "--segments", "2"), 2, "run `mobile-gguf calibrate model.gguf` first"),
        (
            ("model.gguf", "--segments", "5", "--segment-order", "natural"),
            2,
            "possible numbers of segments: 2, 4",
        ),
        (("model.gguf", "-o", "model.gguf", "--force"), 2, "is the file that is read"),
        (("model.gguf", "-o", "."), 2, "is a directory"),
        (("model.gguf", "-o", "there.gguf"), 2, "there.gguf exists"),
        (("model.gguf", "-o", "none/x.gguf"), 1, "cannot write none/x.gguf"),
        (("there.gguf",), 1, "there.gguf is not a GGUF file"),
        (("there.safetensors",), 2, "give the folder"),
        (("hf:org/repo", "--export"), 2, "is a checkpoint: --export is for"),
        (("hf:org/repo", "--segments", "2"), 2, "which no checkpoint says"),
        (("model.gguf", "--check", "none.gguf"), 3, "no such model"),
        (("model.gguf", "--check", "model.gguf", "--force"), 2, "--check writes nothing"),
    ],
)
def test_what_cannot_be_done(convert, sample, argv, code, words):
    Path("there.gguf").write_bytes(b"PK")
    Path("there.safetensors").write_bytes(b"")
    before = sorted(os.listdir())
    found, out, err = convert(*argv)
    assert (found, out) == (code, "")
    assert err.splitlines()[-1].startswith("mobile-gguf: error: ")
    assert len(err.splitlines()) == 1
    assert words in err
    assert sorted(os.listdir()) == before


def test_files_that_differ(convert, sample, tmp_path):
    write_sample(tmp_path / "other.gguf", n_tokens=4, kind="F16")
    code, out, err = convert("model.gguf", "--check", "other.gguf")
    assert (code, out) == (1, "")
    assert "differ: blk.0.ffn_down_exps.weight: type 0 (64, 32, 4) against type 1" in err
    assert " and 6 more" in err
    code, out, _ = convert("model.gguf", "--check", "other.gguf", "--json")
    assert (code, len(json.loads(out)["differences"])) == (1, 7)


def test_a_checkpoint_goes_to_the_pipeline(convert, tmp_path, monkeypatch):
    called = []

    def fake(source, out, options, progress):
        called.append((source, out, options))
        return ConvertResult(
            path=Path("x.gguf"), source=source, layout="per-expert", segments=1, n_tensors=3, n_bytes=10,
            peak_disk_bytes=20, free_bytes=30, seconds=1.0, verification="failed",
            rows=(("outtype", "q4_k_m"),), details={"more": 1}, exit_code=1,
        )  # fmt: skip

    # the pipeline imports what a conversion of a checkpoint needs
    module = SimpleNamespace(convert_checkpoint=fake)
    monkeypatch.setitem(sys.modules, "mobile_gguf.convert.pipeline", module)
    (tmp_path / "checkpoint").mkdir()
    flags = "--outtype q4_k_m --experts q3_k --attention q8_0 --tensor-type a=q8_0 --tensor-type b.*=f16"
    flags += " --imatrix i.gguf --pure --no-verify --keep-intermediate --force -t 3 -o out.gguf"
    code, out, _ = convert("checkpoint", *flags.split())
    assert code == 1
    assert rows(out)["outtype"] == "q4_k_m"
    assert rows(out)["verification"] == "failed"
    expected = ConvertOptions(
        outtype="q4_k_m", experts="q3_k", attention="q8_0", tensor_types=(("a", "q8_0"), ("b.*", "f16")),
        imatrix=Path("i.gguf"), pure=True, verify=False, keep_intermediate=True, force=True, threads=3,
    )  # fmt: skip
    assert called == [("checkpoint", Path("out.gguf"), expected)]
    code, out, _ = convert("hf:org/repo", "--json")
    assert (code, json.loads(out)["more"]) == (1, 1)
    assert called[1] == ("hf:org/repo", None, ConvertOptions())
    convert("hf:org/repo", "--verify", "--segments", "2", "--segment-order", "natural")
    assert called[2][2] == ConvertOptions(verify=True, segments=2, segment_order="natural")


def test_an_error_while_writing_leaves_nothing(convert, sample, monkeypatch):
    def broken(*_arguments):
        raise MobileError("the disk is gone")

    monkeypatch.setattr("mobile_gguf.convert.gguf.file._write", broken)
    assert convert("model.gguf") == (1, "", "mobile-gguf: error: the disk is gone\n")
    assert os.listdir() == ["model.gguf"]


def test_ctrl_c_leaves_nothing(sample, tmp_path):
    # the first write waits until the signal comes
    script = (
        "import sys, time; from mobile_gguf import cli\n"
        "from mobile_gguf.convert.gguf import file as gguf_file\n"
        "real = gguf_file._write\n"
        "def slow(file, data):\n"
        "    real(file, data); print('writing', flush=True); time.sleep(600)\n"
        "gguf_file._write = slow\n"
        "sys.exit(cli.main(['convert', 'model.gguf']))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    assert (tmp_path / "model.mobile.gguf.partial").exists()
    child.send_signal(signal.SIGINT)
    assert child.wait(300) == 130
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_progress_with_details_is_a_line_for_each_tenth(capsys):
    import io

    stream = io.StringIO()
    with Progress(stream) as progress:
        for step in range(101):
            progress(f"converting: tensor {step}", step / 100)
        progress("converting: waiting", 1.0)
        progress("checking", 0.0)
        progress("checking", 1.0)
    assert stream.getvalue().splitlines() == [
        *(f"converting: tensor {step}" for step in range(0, 101, 10)), "checking",
    ]  # fmt: skip
