"""The web page in a headless Chromium: opened, asked, and what it shows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from server_harness import SECONDS

DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; a skip where there is none, which CI does not take."""
    sync = pytest.importorskip("playwright.sync_api", reason="pip install 'mobile-gguf[dev]'")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no browser here: apt install chromium")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def context_of(browser: Any, size: Any = DESKTOP) -> Iterator[Any]:
    """A browser's context: its pages share what is stored, those of another one do not."""
    context = browser.new_context(viewport=size)
    yield context
    context.close()


@contextmanager
def opened(browser: Any, server: Any, size: Any = DESKTOP, at: str = "") -> Iterator[Any]:
    """The page of a browser, or of one of its contexts; its scripts must not have failed at the end."""
    page = browser.new_page() if not hasattr(browser, "new_context") else browser.new_page(viewport=size)
    page.set_default_timeout(1000 * SECONDS)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server.url + at)
    page.wait_for_selector("#mode option", state="attached")
    yield page
    assert not problems
    page.close()


def ask(page: Any, text: str = "hi") -> None:
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def bodies_of(page: Any) -> list[Any]:
    """The bodies of requests that the page makes from now on, as they come."""
    found: list[Any] = []
    page.on("request", lambda request: found.append(request.post_data_json) if request.post_data else None)
    return found


def lines(page: Any) -> list[str]:
    """The one line that each answer ended with."""
    return [line.strip() for line in page.locator(".end").all_inner_texts()]


def hide(page: Any) -> None:
    """Have the page think that nobody looks at it."""
    page.evaluate(
        "Object.defineProperty(document, 'hidden', { get: () => true });"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
