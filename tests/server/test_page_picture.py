"""docs/serve.png: what it shows is still what the page has, and where one sees it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from expert_source import ScriptedSource
from fake_backend import FakeBackend, fake_info, scripted

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
pytest.importorskip("playwright", reason="pip install 'mobile-gguf[dev]'")
from page_makers import page_maker
from server_harness import SECONDS, running


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return page_maker("make_page_picture")


def composed(script: ModuleType, browser: Any, fake_model: Any, style: str = "") -> None:
    info = fake_info()
    backend = FakeBackend(scripted("The sky scatters blue light."), n_ctx=4096)
    backend.expert_source = ScriptedSource(info.n_layer, info.n_expert)
    with running(fake_model(backend)) as server:
        page = browser.new_page(viewport=script.SIZE)
        page.route(
            "**/app.css",
            lambda route: route.fulfill(
                status=200, content_type="text/css", body=server_css(server.url) + style
            ),
        )
        try:
            script.compose(page, server.url)
        finally:
            page.close()


def server_css(url: str) -> str:
    import httpx

    return httpx.get(f"{url}/app.css", timeout=SECONDS).text


def test_the_page_still_looks_so(script: ModuleType, browser: Any, fake_model: Any) -> None:
    composed(script, browser, fake_model)
    header = script.OUT.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(header[at : at + 4]) for at in (16, 20)] == list(script.SIZE.values())


@pytest.mark.parametrize(
    ("style", "what"),
    [
        ("#legend { display: none !important; }", "the page does not show what the map's colours mean"),
        ("form { translate: -900px; }", "the page does not show the prompt"),
    ],
)
def test_what_is_not_seen_is_found(
    script: ModuleType, browser: Any, fake_model: Any, style: str, what: str
) -> None:
    with pytest.raises(SystemExit, match=what):
        composed(script, browser, fake_model, style)
