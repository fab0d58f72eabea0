"""Chat templates in their process: what Transformers gives them, and what they may not take."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from mobile_gguf.errors import PromptTooLongError, UsageError
from mobile_gguf.generate.prompts import templates
from mobile_gguf.generate.prompts.templates import Renderer

USER = {"messages": [{"role": "user", "content": "hi"}]}
LIMIT = 1 << 20


@pytest.fixture(autouse=True)
def _no_clock_on_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "_WALL_SECONDS", 800.0)


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    made = Renderer()
    yield made
    made.close()


def test_what_templates_use(renderer: Renderer) -> None:
    template = """{% generation %}{{ messages[0].content | upper }}{% endgeneration %}
{%- for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}
{{ {"é<": [1]} | tojson }} {{ strftime_now("%Y") | length }}"""
    assert renderer.render(template, USER, LIMIT) == 'HI01{"é<": [1]} 4'


def test_half_a_surrogate_pair_goes_through(renderer: Renderer) -> None:
    assert renderer.render("{{ text }}", {"text": "a\ud800"}, LIMIT) == "a\ud800"


GREEDY = [
    "{{ 'a' * 10**9 }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ [1] | batch(10**9, 'x') | list }}",
    "{{ 'a' | replace('', 'b' * 100000) | replace('b', 'c' * 100000) }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}"
    "{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}"
    "{{ ns.s | tojson }}",
]


@pytest.mark.parametrize("template", GREEDY)
def test_a_template_that_takes_memory_is_refused(
    renderer: Renderer, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "CPU_SECONDS", 600)  # a slow processor takes its time to take as much
    with pytest.raises(UsageError, match="chat template fails: it needs too much memory"):
        renderer.render(template, USER, LIMIT)
    assert renderer.render("{{ messages[0].content }}", USER, LIMIT) == "hi"


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set r = range(99999) | list %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "{{ 3 ** (7 ** 9) }}",
]


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_that_does_not_end_is_stopped(
    renderer: Renderer, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "CPU_SECONDS", 1)
    with pytest.raises(
        UsageError, match=r"it takes more than 1 s of computing|OverflowError|too much memory"
    ):
        renderer.render(template, USER, LIMIT)
    assert renderer.render("{{ messages[0].content }}", USER, LIMIT) == "hi"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError: division by zero"),
        ("{{ 2.0 ** 5000 }}", "fails: OverflowError"),
        ("{{ range(10 ** 6) | length }}", "fails: OverflowError: Range too big"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "fails: RecursionError"),
        ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "fails: RecursionError"),
        ("{{ messages[0].content + 1 }}", "fails: TypeError"),
        ("{{ raise_exception('no\n way') }}", "refuses these messages: no way"),
        ("{{ messages[0].a.b }}", "refuses these messages: .* no attribute 'a'"),
        ("{% for %}", "refuses these messages: Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages: .* is unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "refuses these messages: .* is unsafe"),
    ],
)
def test_why_a_template_failed_is_one_line(renderer: Renderer, template: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as failed:
        renderer.render(template, USER, LIMIT)
    assert str(failed.value).isprintable()


def test_a_text_that_is_too_long_is_refused(renderer: Renderer) -> None:
    with pytest.raises(PromptTooLongError):
        renderer.render("{{ 'a' * 1001 }}", USER, 1000)
    assert renderer.render("{{ 'a' * 1000 }}", USER, 1000) == "a" * 1000


def test_messages_that_are_no_json(renderer: Renderer) -> None:
    loop: list[Any] = []
    loop.append(loop)
    for value in (object(), loop, {1j: 2}):
        with pytest.raises(UsageError, match="cannot be given to a chat template"):
            renderer.render("", {"value": value}, LIMIT)


def test_a_process_that_is_gone_is_replaced(renderer: Renderer) -> None:
    renderer.render("", USER, LIMIT)
    assert renderer._child is not None
    os.kill(renderer._child.pid, signal.SIGKILL)
    renderer._child.wait()
    assert renderer.render("{{ messages[0].content }}", USER, LIMIT) == "hi"


def test_names_of_pythons_own_do_no_harm(renderer: Renderer) -> None:
    assert renderer.render("{{ self }}|{{ messages[0].content }}", USER | {"self": 1}, LIMIT).endswith("|hi")
