"""The web page in a headless browser over the scripted engine, when an answer does not end well."""

import pytest
from expert_source import ScriptedSource
from fake_backend import FakeBackend, fake_info, scripted

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
from page_harness import DESKTOP, PHONE, ask, lines, opened
from server_harness import SECONDS, Gate, running, until

from mobile_gguf.errors import ExpertReadError
from mobile_gguf.gguf.info import ExpertLayer

FIRST_WORDS = 4  # the prompt and three tokens


def gated(answer="hello there", **options):
    backend = FakeBackend(scripted(answer, **options))
    backend.on_evaluate = Gate()
    return backend, backend.on_evaluate


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_after_stop_the_page_shows_the_receipt_of_what_was_made(browser, fake_model, size):
    backend, gate = gated(end=False)
    with running(fake_model(backend)) as server, opened(browser, server, size) as page:
        ask(page)
        gate.allow(FIRST_WORDS)
        page.wait_for_selector(".receipt:has-text('4 big')")
        page.keyboard.press("Escape")
        page.wait_for_selector(".end")
        assert lines(page) == ["Stopped."]
        assert page.inner_text(".receipt").startswith("4 big | 75% hits | ")
        assert page.inner_text(".assistant .text") == "hell"
        assert page.inner_text(".again") == "Regenerate"
        assert page.inner_text("#send") == "Send"
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide == 0
        gate.open()


def test_stopped_before_the_first_word_and_asked_again(browser, fake_model):
    backend, gate = gated()
    with running(fake_model(backend)) as server, opened(browser, server) as page:
        ask(page)
        assert gate.reached.wait(SECONDS)
        page.click("#send")
        page.wait_for_selector(".end")
        assert lines(page) == ["Stopped before the first word."]
        assert page.locator(".receipt").count() == 0
        gate.open()
        until(lambda: not server.serving.worker.is_busy)
        ask(page, "again")
        page.wait_for_selector(".again:has-text('Regenerate')")
        assert page.locator(".assistant .text").all_inner_texts()[1] == "hello there"
        # what got no answer is not part of the conversation
        prompt = bytes(token for token, _ in backend.rows if token < 256).decode()
        assert prompt.startswith("<user>again\n<assistant>")


def test_a_full_queue_is_one_line_and_a_second_try(browser, fake_model):
    backend, gate = gated()
    with running(fake_model(backend), queue=0) as server, opened(browser, server) as page:
        with opened(browser, server) as other:
            ask(other)
            assert gate.reached.wait(SECONDS)
            ask(page)
            page.wait_for_selector(".end")
            (line,) = lines(page)
            assert line.startswith("Busy: 0 requests are waiting for the model already. Try again in ")
            assert page.locator(".receipt").count() == 0
            gate.open()
            other.wait_for_selector(".again")
        until(lambda: not server.serving.worker.is_busy)
        assert page.inner_text(".again") == "Try again"
        page.click(".again")
        page.wait_for_selector(".receipt:has-text('12 big')")
        page.wait_for_selector(".again:has-text('Regenerate')")
        assert lines(page) == []


def test_an_engine_that_fails_in_the_middle(browser, fake_model):
    backend = FakeBackend(scripted("hello there"))
    backend.errors[FIRST_WORDS] = ExpertReadError("layer 3: the disk\nis gone")
    with running(fake_model(backend)) as server, opened(browser, server) as page:
        ask(page)
        page.wait_for_selector(".end.bad")
        assert lines(page) == ["Failed: layer 3: the disk is gone"]
        assert page.inner_text(".receipt").startswith("4 big")
        assert page.inner_text(".assistant .text") == "hell"


def test_a_server_that_is_gone(browser, fake_model):
    with running(fake_model(FakeBackend(scripted("hello there")))) as server, opened(browser, server) as page:
        page.route("**/v1/chat/completions", lambda route: route.abort())
        ask(page)
        page.wait_for_selector(".end.bad")
        assert lines(page) == ["The server does not answer: is mobile-gguf serve still running?"]
        assert page.locator(".receipt").count() == 0
        # a stream that ends without saying so
        chunk = 'data: {"choices": [{"index": 0, "delta": {"content": "hel"}}]}\n\n'
        page.unroute("**/v1/chat/completions")
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, body=chunk))
        page.click(".again")
        page.wait_for_selector(".end:has-text('lost')")
        assert lines(page) == ["The connection to the server was lost."]
        assert page.inner_text(".assistant .text") == "hel"
        page.unroute("**/v1/chat/completions")
        page.click(".again")
        page.wait_for_selector(".receipt:has-text('12 big')")


def test_a_server_that_comes_back(browser, fake_model):
    with running(fake_model()) as server, opened(browser, server, PHONE) as page:
        page.route("**/v1/models", lambda route: route.abort())
        page.reload()
        page.wait_for_selector("#notice:has-text('No connection to the server')")
        page.unroute("**/v1/models")
        page.wait_for_selector("#notice", state="hidden")
        assert page.inner_text("#model") == "Fake MoE"


def test_shutdown_and_a_model_that_does_not_chat(browser, fake_model):
    backend, gate = gated(end=False)
    model = fake_model(backend)
    model.n_ctx = 1 << 20  # the answer lasts until it is cut
    with running(model, grace=0.2) as server, opened(browser, server) as page:
        ask(page)
        gate.allow(FIRST_WORDS)
        page.wait_for_selector(".receipt:has-text('4 big')")
        server.server.should_exit = True
        until(lambda: server.serving.closing.is_set())
        gate.open()
        page.wait_for_selector(".end")
        assert lines(page) == ["The server is shutting down."]
        assert "big | " in page.inner_text(".receipt")
    encoder = FakeBackend(pooling="mean", can_generate=False)
    with running(fake_model(encoder)) as server, opened(browser, server) as page:
        page.wait_for_selector("#notice:has-text('This model makes embeddings and does not chat')")
        assert page.is_disabled("#send")


def test_the_key_is_asked_for(browser, fake_model):
    with running(fake_model(FakeBackend(scripted("hello"))), api_key="secret") as server:
        page = browser.new_page(viewport=PHONE)
        page.set_default_timeout(1000 * SECONDS)
        page.goto(server.url)
        page.wait_for_selector("#key-row", state="visible")
        page.fill("#key", "guess")
        page.keyboard.press("Enter")
        page.wait_for_selector("#notice:has-text('The API key is wrong.')")
        page.fill("#key", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#mode option", state="attached")
        ask(page)
        page.wait_for_selector(".receipt:has-text('6 big')")
        page.close()


def test_the_receipt_opens_to_words(browser, fake_model):
    with running(fake_model(FakeBackend(scripted("hello")))) as server, opened(browser, server) as page:
        assert "4.0 MiB are experts: 16 in each of 4 layers, and a token uses 8" in page.inner_text("#facts")
        assert "At most 2.0 MiB of them are in memory at once" in page.inner_text("#facts")
        assert "little 4, big-little 4 and then all 8" in page.inner_text("#modes")
        ask(page)
        page.wait_for_selector(".again")
        assert not page.is_visible(".cost dl")
        # by keyboard alone: back from the message over the answer's buttons
        for name in ("again", "copy"):
            page.keyboard.press("Shift+Tab")
            assert page.evaluate("document.activeElement.className") == name
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Enter")
        words = dict(
            zip(page.locator("dt").all_inner_texts(), page.locator("dd").all_inner_texts(), strict=True)
        )
        assert list(words) == ["Tokens", "Read from the file", "In memory already", "Memory for experts"]
        assert words["Tokens"] == "6 with all 8 experts"
        assert words["In memory already"].startswith("75% of ")
        assert words["Memory for experts"] == "1.0 MiB at most, 25% of the model's 4.0 MiB"


def test_code_tables_and_what_must_not_move(browser, fake_model):
    text = "| a | `x|y` |\n|---|:-:|\n| 1 | 2 |\n\n```py\none\n```\n" + "more words\n\n" * 60
    backend, gate = gated(text)
    with running(fake_model(backend)) as server, opened(browser, server) as page:
        ask(page)
        page.wait_for_selector(".foot:has-text('Waiting for the first word')")
        gate.allow(FIRST_WORDS + 400)
        page.wait_for_selector(".text p >> nth=10")
        assert page.locator("th, td").all_inner_texts() == ["a", "x|y", "1", "2"]
        assert page.inner_text(".bar span") == "py"
        assert page.inner_text("pre") == "one"
        page.evaluate("document.querySelector('pre').seen = true")
        page.evaluate("document.querySelector('#log').scrollTop = 0")
        gate.open()
        page.wait_for_selector(".again", state="attached")
        # who reads above is left there, and what was there is the same node
        assert page.evaluate("document.querySelector('#log').scrollTop") == 0
        assert page.evaluate("document.querySelector('pre').seen") is True


def test_the_last_words_stay_in_sight_when_the_map_takes_room(browser, fake_model):
    text = "many words\n\n" * 60
    with running(fake_model(FakeBackend(scripted(text)))) as server, opened(browser, server, PHONE) as page:
        ask(page)
        page.wait_for_selector(".again")
        page.click("#show-map")
        page.wait_for_selector("#side", state="visible")
        until(
            lambda: page.evaluate(
                "(() => { const l = document.querySelector('#log');"
                " return l.scrollHeight - l.scrollTop - l.clientHeight < 2; })()"
            )
        )


def test_who_asked_for_less_motion_gets_none(browser, fake_model):
    backend, gate = gated(end=False)
    cursor = "getComputedStyle(document.querySelector('.wait > p:last-child'), '::after').animationName"
    with running(fake_model(backend)) as server, opened(browser, server) as page:
        ask(page)
        gate.allow(FIRST_WORDS)
        page.wait_for_selector(".wait > p")
        assert page.evaluate(cursor) == "blink"
        page.emulate_media(reduced_motion="reduce")
        assert page.evaluate(cursor) == "none"
        page.keyboard.press("Escape")
        gate.open()


def test_the_map_has_no_row_for_a_dense_layer_and_says_so(browser, fake_model):
    backend = FakeBackend(scripted("hello"))
    backend.expert_source = ScriptedSource(4, 16)
    info = fake_info(expert_layers=(ExpertLayer(16, (1 << 15, 1 << 15)),) * 3)
    with running(fake_model(backend, info=info)) as server, opened(browser, server) as page:
        page.wait_for_selector("#map-size:has-text('(1 more without experts)')", state="attached")
        assert "0 of 48 in memory" in page.text_content("#map-note")
