"""What the page makes of a model's words: Markdown, formulas and thoughts, and nothing that runs or loads."""

import json

import pytest
from fake_backend import FakeBackend, fake_info, scripted

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
from page_harness import ask, bodies_of, opened
from server_harness import running

from mobile_gguf.api.model import Model
from mobile_gguf.options import LoadOptions

# what may not be in an answer: what runs, loads, sends, covers the page, or leads elsewhere than to the web
UNSAFE = r"""(box) => {
    const tags = ["script", "img", "image", "iframe", "object", "embed", "form", "input", "style", "link"];
    tags.push("meta", "base", "svg", "video", "audio", "use", "maction");
    const attributes = ["src", "srcdoc", "action", "formaction", "id", "name", "actiontype"];
    const found = [];
    for (const node of box.querySelectorAll("*")) {
        const name = node.localName;
        if (tags.includes(name)) found.push(name);
        for (const { name: attribute, value } of node.attributes) {
            if (/^on/i.test(attribute) || attributes.includes(attribute)) found.push(attribute);
            if (/href$/.test(attribute) && !/^(https?:\/\/|mailto:)/.test(value)) found.push(value);
            if (attribute === "style" && /url|position|expression/.test(value)) found.push(value);
        }
    }
    return found;
}"""

HOSTILE = [
    "<img src=x onerror=hit()>",
    "<script>hit()</script>",
    "<svg/onload=hit()>",
    "<a href='javascript:hit()'>x</a>",
    "[x](javascript:hit())",
    "[x](JaVaScRiPt:hit())",
    "[x](&#106;avascript:hit())",
    "[x](java\tscript:hit())",
    "[x](data:text/html,<script>hit()</script>)",
    "[x](vbscript:hit())",
    "[x](//evil.example/x)",
    "[x](/metrics)",
    "[x](#id)",
    "![x](http://evil.example/beacon)",
    "![x](javascript:hit())",
    "![](data:image/svg+xml,<svg/onload=hit()>)",
    "<javascript:hit()>",
    "[x]: javascript:hit()\n\n[x]",
    '[x](http://a.example "onmouseover=hit()")',
    '[x](http://a.example/"onclick="hit())',
    '```"><img src=x onerror=hit()>\n<b>\n```',
    "| <img src=x onerror=hit()> |\n|---|\n| <script>hit()</script> |",
    "# <iframe srcdoc='<script>parent.hit()</script>'>",
    "- [ ] <form action=/metrics><input name=x></form>",
    r"$\href{javascript:hit()}{x}$",
    r"$\url{javascript:hit()}$",
    r"$\includegraphics{http://evil.example/x.png}$",
    r"$\htmlStyle{position:fixed;background:url(http://evil.example)}{x}$",
    r"$\htmlId{send}{x} \htmlClass{stop}{x} \htmlData{a=b}{x}$",
    r"$\class{stop}{x} \id{send}{x} \style{position:fixed}{x} \data{a=b}{x}$",
    r"$\text{<img src=x onerror=hit()>}$",
    r"$\unicode{<script>}$ $\toggle{a}{b}\endtoggle$",
    r"$\color{red;position:fixed}x$ $\colorbox{url(http://evil.example)}{x}$",
    r"\[\label{send}\tag{<b>}x\]",
    "<think><img src=x onerror=hit()></think><img src=x onerror=hit()>",
    "<details open ontoggle=hit()>",
    "<math><maction actiontype='statusline' xlink:href='javascript:hit()'>x</maction></math>",
]
# what a parser can be slow at, or deep
LARGE = [
    "> " * 5000 + "x",
    "- " * 5000 + "x",
    "**a " * 20_000,
    "[" * 20_000,
    "`" * 20_001,
    "$" * 20_000,
    r"\(" * 20_000,
    r"$$ \frac{" * 4000,
    "\\[\n" * 5000,
    "| a " * 5000 + "\n" + "|---" * 5000,
    r"$\def\a{\b\b}\def\b{\c\c}\def\c{\d\d}\def\d{\a\a}\a$",
    "$" + "{" * 1900 + "x" + "}" * 1900 + "$",
    r"$\rule{100000em}{100000em}$",
]

RENDER = """async (texts) => {
    const { render } = await import("/markdown.js");
    const { formula } = await import("/math.js");
    formula("x", false);
    while (!globalThis.temml) await new Promise((done) => setTimeout(done, 10));
    const boxes = texts.map((text) => {
        const box = document.createElement("div");
        box.append(render(text));
        document.querySelector("#log").append(box);
        return box;
    });
    return CHECK;
}"""


@pytest.fixture(scope="module")
def page(browser):
    model = Model(FakeBackend(scripted("hello")), fake_info(), LoadOptions())
    with running(model) as server, opened(browser, server) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.evaluate("void (window.hit = () => { window.wasHit = true; })")
        page.asked = asked
        yield page
    model.close()


def html(page, *texts):
    return page.evaluate(RENDER.replace("CHECK", "boxes.map((box) => box.innerHTML)"), texts)


def test_nothing_in_an_answer_runs_loads_or_leads_astray(page):
    found = page.evaluate(RENDER.replace("CHECK", f"boxes.map({UNSAFE})"), HOSTILE)
    assert {text: what for text, what in zip(HOSTILE, found, strict=True) if what} == {}
    page.evaluate("new Promise((done) => setTimeout(done, 100))")
    assert page.evaluate("window.wasHit") is None
    assert [url for url in page.asked if "evil" in url or url.endswith("/x")] == []
    # the check finds what it is there for
    planted = ["<img src=x onerror=hit()>", "<a href='javascript:hit()'>x</a>", "<p style='position:fixed'>x"]
    bad = page.evaluate(
        "(texts) => texts.map((text) => { const box = document.createElement('template');"
        f" box.innerHTML = text; return ({UNSAFE})(box.content); }})",
        planted,
    )
    assert all(bad)


def test_large_and_deep_texts_are_shown(page):
    sizes = page.evaluate(RENDER.replace("CHECK", "boxes.map((box) => box.textContent.length)"), LARGE)
    assert all(sizes)
    page.evaluate("document.querySelectorAll('#log > div:not(#hello)').forEach((box) => box.remove())")


def test_markdown_as_models_write_it(page):
    nested, ordered, table, rest, tasks, split = html(
        page,
        "- one\n  - a\n  - b\n    1. deep\n- two",
        "3. three\n4. four\n\n   ```py\n   x = 1\n   ```",
        "| a | `x|y` |\n|---|:-:|\n| 1 | 2 |",
        "***both*** ~~gone~~ https://a.example/b(c) [l](https://a.example/b_(c))\nnext\n\n---\n\n"
        "> quote\n> - in it",
        "- [ ] to do\n- [x] done",
        "`a|b` is no table\n\n```\n| `a|b` |\n|---|\n```",
    )
    assert nested == "<ul><li>one<ul><li>a</li><li>b<ol><li>deep</li></ol></li></ul></li><li>two</li></ul>"
    assert '<ol start="3"><li><p>three</p></li><li><p>four</p><div class="code">' in ordered
    assert "<code>x = 1</code>" in ordered
    assert '<th style="text-align: center;"><code>x|y</code></th>' in table
    assert "<em><strong>both</strong></em> <s>gone</s>" in rest
    assert 'href="https://a.example/b_(c)"' in rest
    assert "<br>next" in rest
    assert "<hr><blockquote><p>quote</p><ul><li>in it</li></ul></blockquote>" in rest
    assert ">☐ to do<" in tasks
    assert ">☑ done<" in tasks
    assert "<code>a|b</code> is no table" in split
    assert "<code>| `a|b` |\n|---|</code>" in split


def test_formulas_become_mathml_and_prices_do_not(page):
    inline, display, block, prices, code, broken, cut = html(
        page,
        r"$E=mc^2$ and \(a_1\)",
        "$$\\sum_i i$$",
        "so\n\\[\na\n= b\n\n+ c\n\\]\nthen",
        "from $5 to $6, and $ 7 $",
        "`$x$` and \\$x\\$",
        r"$\frac{$ or $\nosuchthing$",
        "\\[ a = ",
    )
    assert inline.count("<math") == 2
    assert "<msup>" in inline
    assert 'display="block"' in display
    assert block.count("<math") == 1
    assert block.startswith("<p>so</p>")
    assert "<h3>" not in block
    assert prices == "<p>from $5 to $6, and $ 7 $</p>"
    assert code == "<p><code>$x$</code> and $x$</p>"
    assert "<math" not in broken
    assert "nosuchthing" in broken
    assert "<math" not in cut


def test_where_thoughts_end(page):
    parted = """async (texts) => {
        const { parted } = await import("/thinking.js");
        return texts.map((content) => Object.values(parted({ content })));
    }"""
    texts = [
        "<think>a\nb</think>\n\nc",
        "<thi",
        "<think>a",
        "so\n</think>\n\nc",
        "say `</think>` or\n</thin",
        "a <think> b\n</think>\nc",
    ]
    assert page.evaluate(parted, texts) == [
        ["a\nb", "c", False],
        ["", "", True],
        ["a", "", True],
        ["so", "c", False],  # the template began them
        ["", texts[4], False],
        ["", texts[5], False],
    ]


def test_thoughts_are_folded_and_sent_back_apart(browser, fake_model):
    text = "<think>first\n\nthen</think>\n\nhello"
    with (
        running(fake_model(FakeBackend(scripted(text), n_ctx=4096))) as server,
        opened(browser, server) as page,
    ):
        bodies = bodies_of(page)
        ask(page, "one")
        page.wait_for_selector(".again")
        assert page.inner_text(".assistant > .text") == "hello"
        assert page.inner_text(".thoughts summary").startswith("Thought")
        assert not page.is_visible(".thoughts .text")
        page.click(".thoughts summary")
        assert page.inner_text(".thoughts .text") == "first\n\nthen"
        # sent apart, as servers do that know the model's format
        deltas = [{"reasoning_content": "why "}, {"reasoning_content": "not"}, {"content": "bye"}]
        chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, body=events))
        ask(page, "two")
        page.wait_for_selector(".assistant >> nth=1 >> .again")
        assert page.locator(".assistant > .text").all_inner_texts() == ["hello", "bye"]
        assert page.locator(".thoughts .text").nth(1).text_content() == "why not"
        ask(page, "three")
        page.wait_for_selector(".assistant >> nth=2 >> .again")
        assert bodies[-1]["messages"] == [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "hello", "reasoning_content": "first\n\nthen"},
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": "bye", "reasoning_content": "why not"},
            {"role": "user", "content": "three"},
        ]
