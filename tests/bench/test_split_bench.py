"""The bench of splits: its simulation, and its page of measured rows."""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import pytest

from mobile_gguf.bench import split
from mobile_gguf.bench.synthetic import synthesise_trace


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    trace = synthesise_trace(3, 16, 3, n_prompt=4, n_decode=40)
    path = tmp_path / "made.csv.gz"
    with gzip.open(path, "wt") as stream:
        stream.write("# n_layer=3 n_expert=16 n_expert_used=3\n")
        stream.write("turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n")
        for step, layers in enumerate(trace.experts.tolist()):
            for layer, experts in enumerate(layers):
                for slot, expert in enumerate(experts):
                    stream.write(f"0,{int(step >= 4)},{step},{layer},{slot},{expert},0.3,0,0\n")
    return path


def test_a_table_for_every_budget_and_load(
    trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(trace_file), "--segments", "4", "--budget", "25%,50%", "--load", "0.01,2"]
    assert split.main([*arguments, "--expert-bytes", str(1 << 20), "--out", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    cells = [line.split("|") for line in page.splitlines() if line.startswith("|")][2:]
    found = [tuple(cell.strip() for cell in row[1:4]) for row in cells]
    splits = ["whole", "1 of 4", "2 of 4", "3 of 4", "by layer"]
    wanted = [(b, load, s) for b in ("25%", "50%") for load in ("0.01", "2") for s in splits]
    assert [(b, load, s.removesuffix(" *")) for b, load, s in found] == wanted
    chosen = [row for row in found if row[2].endswith("*")]
    assert len(chosen) == 4
    # where reading is all that counts
    assert [s for _, load, s in chosen if load == "2"] == ["whole *"] * 2
    assert (tmp_path / "split.json").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--budget", "auto"], "a benchmark needs sizes"), (["--budget", "1%"], "smaller than the experts")],
)
def test_what_cannot_be_simulated(
    trace_file: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert split.main([str(trace_file), *arguments]) == 1
    assert says in capsys.readouterr().err


def test_measured_rows_stand_beside_what_was_foreseen() -> None:
    row = {"budget": "25%", "kept": (4, 4), "seconds": 0.05, "n_bytes": 2 << 20, "chosen": False}
    foreseen = [row | {"split": "whole", "chosen": True}, row | {"split": "2 of 4", "kept": (2, 2)}]
    runs = [
        {
            "round": number, "budget": "25%", "split": name, "tokens_per_s": speed,
            "run": {"n_tokens": 2, "counters": {"bytes_read": 4 << 20}},
        }
        for number in range(2)
        for name, speed in (("whole", 20.0), ("2 of 4", 10.0))
    ]  # fmt: skip
    args = argparse.Namespace(model=Path("m.gguf"), tokens=2, rounds=2, threads=1)
    page = split.measured_page(foreseen, runs, args)
    whole, half = ("|".join(cell.strip() for cell in line.split("|")) for line in page.splitlines()[-2:])
    assert "whole *|50.0 (50.0-50.0)|50.0|1.00 (1.00-1.00)|2.0|2.0|4-4" in whole
    assert "2 of 4|100.0 (100.0-100.0)|50.0|2.00 (2.00-2.00)|2.0|2.0|2-2" in half
