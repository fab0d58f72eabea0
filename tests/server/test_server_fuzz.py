"""Requests and templates that are damaged: a request or one line, a text or one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
import fuzz_server
from places import DATA

FOUND = DATA / "fuzz"


@pytest.fixture(scope="module", autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    fuzz_server.close()


def test_the_samples_are_whole(tmp_path: Path) -> None:
    assert [fuzz_server.check_request(path) for path in fuzz_server.request_samples(tmp_path)] == [
        4, 1, 3, 4, 1, 1, 2, 1, 4, 2,
    ]  # fmt: skip
    assert [fuzz_server.check_template(path) for path in fuzz_server.template_samples(tmp_path)] == [
        1, 1, 1, 1, 1, 0,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["requests", "templates"])
def test_what_the_fuzzer_found(name: str) -> None:
    found = sorted((FOUND / name).iterdir())
    assert found
    for path in found:
        fuzz_server.TARGETS[name].check(path)


@pytest.mark.parametrize("name", list(fuzz_server.REQUESTS))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_request_is_one_line(name: str, data: st.DataObject, tmp_path: Path) -> None:
    raw = bytearray(
        (fuzz_server._write(tmp_path / "x", fuzz_server.json.dumps(fuzz_server.REQUESTS[name]))).read_bytes()
    )
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    (tmp_path / "x").write_bytes(raw)
    fuzz_server.check_request(tmp_path / "x")
