"""Many windows of one browser: one follows the map for all, and whatever ends it, another one does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from expert_source import ScriptedSource
from fake_backend import FakeBackend, scripted

from mobile_gguf.engine.structs import RESIDENT

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
from page_harness import ask, context_of, hide, opened
from server_harness import SECONDS, running, until

ALL = 64  # experts of the map


class Windows:
    """The windows of one context, and the requests for the map that they have open."""

    def __init__(self, context: Any, server: Any) -> None:
        self.context = context
        self._server = server
        self._open: list[Any] = []
        context.on("request", self._begun)
        context.on("requestfailed", self._ended)
        context.on("requestfinished", self._ended)
        self.pages: list[Any] = []

    def open(self) -> Any:
        page = self.context.new_page()
        page.set_default_timeout(1000 * SECONDS)
        page.goto(self._server.url)
        self.pages.append(page)
        return page

    def _begun(self, request: Any) -> None:
        if "experts" in request.url:
            self._open.append(request)

    def _ended(self, request: Any) -> None:
        if request in self._open:
            self._open.remove(request)

    def leader(self, but: Any = None) -> Any:
        """The one page that follows, once it is another than ``but``."""
        found: list[Any] = []

        def one() -> bool:
            self.pages[-1].evaluate("1")  # lets events come
            found[:] = [request.frame.page for request in self._open if request.frame.page in self.pages]
            return len(found) == 1 and found[0] is not but

        until(one)
        return found[0]

    def forget(self, page: Any) -> None:
        self.pages.remove(page)

    def all_show(self, n_resident: int) -> None:
        for page in self.pages:
            page.wait_for_selector(f"#map-note:has-text('{n_resident} of {ALL} in memory')")


@pytest.fixture
def source() -> ScriptedSource:
    return ScriptedSource(4, 16)


@pytest.fixture
def server(fake_model: Any, source: ScriptedSource) -> Iterator[Any]:
    backend = FakeBackend(scripted("hello"), n_ctx=4096)
    backend.expert_source = source
    with running(fake_model(backend)) as made:
        yield made


@contextmanager
def windows(browser: Any, server: Any, n: int) -> Iterator[Windows]:
    with context_of(browser) as context:
        made = Windows(context, server)
        for _ in range(n):
            made.open()
        yield made


def test_many_windows_leave_connections_for_answers(browser: Any, server: Any) -> None:
    """A browser has six for all of them, and each of these is looked at."""
    with ExitStack() as stack:
        context = stack.enter_context(context_of(browser))
        seen = Windows(context, server)
        seen.pages = [stack.enter_context(opened(context, server)) for _ in range(9)]
        ask(seen.pages[-1], "here")
        seen.pages[-1].wait_for_selector(".again")
        seen.all_show(0)
        # who followed is gone, and another does
        first = seen.leader()
        hide(first)
        seen.leader(but=first)


def crash(page: Any, left: list[Any]) -> None:
    """End the page's process where it stands, as a signal would: nothing of it runs any more."""
    gone: list[bool] = []
    page.on("crash", lambda _page: gone.append(True))
    with pytest.raises(Exception, match=r"crash|ERR_ABORTED"):
        page.goto("chrome://crash")  # of the process that the page is in; nothing else is loaded
    until(lambda: left[0].evaluate("1") and gone)


def close(page: Any, _left: list[Any]) -> None:
    page.close()


@pytest.mark.parametrize("end", [crash, close])
def test_a_window_that_dies_leaves_the_map_to_the_others(
    browser: Any, server: Any, source: ScriptedSource, end: Callable[[Any, list[Any]], None]
) -> None:
    with windows(browser, server, 4) as seen:
        seen.all_show(0)
        for n in (1, 2, 3):  # down to the last one
            first = seen.leader()
            seen.forget(first)
            end(first, seen.pages)
            source.host_codes[0, :n] = RESIDENT
            seen.all_show(n)
            seen.leader(but=first)
        assert len(seen.pages) == 1


def test_a_context_that_is_closed_leaves_the_map_to_another(
    browser: Any, server: Any, source: ScriptedSource
) -> None:
    """Windows of another profile hear nothing of these."""
    with windows(browser, server, 2) as others:
        with windows(browser, server, 3) as seen:
            for one in (seen, others):
                one.all_show(0)
                one.leader()
            assert server.serving.metrics  # both are followed
        source.host_codes[1, :5] = RESIDENT
        others.all_show(5)
        # and the server has the one that is left
        others.leader()
