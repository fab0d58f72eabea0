"""Each part of a whole request of an endpoint made into what it may not be: one clear line, or an answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fake_backend import FakeBackend, fake_info, scripted

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
from hostile_fields import WHOLE, damaged, sweep
from server_harness import get, running

from mobile_gguf.api.model import Model
from mobile_gguf.options import LoadOptions

# Of some 23,000 damaged requests; all of them by hand, as the module's head says.
EVERY = 37


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    model = Model(FakeBackend(scripted("hello there")), fake_info(n_ctx_train=8192), LoadOptions())
    with running(model, names=("fake",), pooling="mean") as started:
        yield started
    model.close()


@pytest.mark.parametrize("path", WHOLE)
def test_what_a_field_may_not_be_is_one_clear_line(server: Any, path: str) -> None:
    found = sweep(server.url, path, EVERY, first=len(path))
    assert found
    assert set(found) <= {"200", "400", "404", "413"}, found
    assert get(server.url + "/health").status_code == 200


@pytest.mark.parametrize("path", WHOLE)
def test_what_is_whole_is_answered(server: Any, path: str) -> None:
    """So that what is refused is refused for what was damaged."""
    answer = server.post(path, WHOLE[path])
    others = ("/infill", "/v1/completions?suffix", "/v1/rerank", "/slots")  # what this one cannot
    is_other_model = path.startswith(others)
    assert answer.status_code == (400 if is_other_model else 200), answer.text
    assert sum(1 for _ in damaged(path)) > 30
