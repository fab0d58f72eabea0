"""Damaged and hostile GGUF and safetensors files: one clear error or a whole result, never anything else."""

import importlib.util
import os
import resource
import subprocess
import sys

import fuzz_target
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import SUPPORT

# a number of inputs and a seed: the same ones on every machine; long runs are `make fuzz FUZZ_SECONDS=600`
RUNS = {"gguf": 2000, "safetensors": 50_000, "schema": 600, "grammar": 1500}


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[bytes]:
    return [path.read_bytes() for path in fuzz_target.samples(tmp_path_factory.mktemp("samples"))]


def test_the_samples_are_whole(tmp_path, samples):
    # each of them reaches the end of some plan, so that damage is damage to something that works
    for number, raw in enumerate(samples):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(raw)
        assert fuzz_target.check(path) >= 2


def test_whole_safetensors_are_accepted(tmp_path):
    assert [fuzz_target.check_safetensors(path) for path in fuzz_target.safetensors_samples(tmp_path)] == [
        4,
        0,
    ]


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_damaged_files(tmp_path, samples, data):
    raw = bytearray(data.draw(st.sampled_from(samples)))
    # counts, lengths, shapes and offsets are numbers of 4 or 8 bytes: extreme ones say more than noise
    extreme = st.sampled_from([0, 1, 31, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 64) - 1])
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.one_of(st.integers(0, 1500), st.integers(0, len(raw) - 8)))
        width = data.draw(st.sampled_from([1, 4, 8]))
        number = data.draw(extreme) & ((1 << 8 * width) - 1)
        raw[position : position + width] = number.to_bytes(width, "little")
    cut = data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw[:cut])
    fuzz_target.check(path)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("target", fuzz_target.TARGETS)
def test_coverage_guided(tmp_path, target):
    fuzzer = SUPPORT / "fuzz.py"
    # what this process has taken at most counts as its child's, too (getrusage(2), across exec)
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 + 2048
    done = subprocess.run(
        [sys.executable, str(fuzzer), target, "corpus", f"-runs={RUNS[target]}", "-seed=1", "-timeout=600",
         f"-rss_limit_mb={megabytes}"],
        cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": "0"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DONE" in done.stderr
