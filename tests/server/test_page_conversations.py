"""Conversations on the page: kept over a reload, changed by several tabs at once, out to a file and in."""

import json

import pytest
from fake_backend import FakeBackend, scripted

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
from page_harness import PHONE, ask, bodies_of, context_of, hide, lines, opened
from server_harness import SECONDS, Gate, running, until

FIRST_WORDS = 4  # the prompt and three tokens


def titles(page):
    return page.locator("#chats a").all_inner_texts()


def said(page):
    return page.locator(".turn > .text").all_inner_texts()


def roles(body):
    return [(one["role"], one["content"]) for one in body["messages"]]


def test_an_answer_is_kept_as_it_comes_and_the_conversation_over_a_reload(browser, fake_model):
    backend = FakeBackend(scripted("hello there"), n_ctx=4096)
    backend.on_evaluate = gate = Gate()
    with (
        running(fake_model(backend)) as server,
        context_of(browser) as context,
        opened(context, server) as page,
    ):
        ask(page, "What is it?\nTell me.")
        gate.allow(FIRST_WORDS)
        page.wait_for_selector(".receipt:has-text('4 big')")
        page.reload()
        page.wait_for_selector("#mode option", state="attached")
        assert said(page) == ["What is it?\nTell me.", "hell"]
        assert lines(page) == ["The page was left before the end."]
        assert page.inner_text(".receipt").startswith("4 big | 75% hits | ")
        until(lambda: titles(page) == ["What is it?"])
        gate.open()
        until(lambda: not server.serving.worker.is_busy)
        bodies = bodies_of(page)
        ask(page, "And now?")
        page.wait_for_selector(".assistant >> nth=1 >> .again")
        assert roles(bodies[0]) == [
            ("user", "What is it?\nTell me."),
            ("assistant", "hell"),
            ("user", "And now?"),
        ]
        # a screen reader is told the whole, once
        assert page.inner_text("#said") == "hello there"
        assert page.get_attribute("#log", "aria-live") == "off"


# the database is at work for somebody else, until the page is left
BUSY = """async () => {
    const opened = indexedDB.open("mobile-gguf");
    await new Promise((resolve) => { opened.onsuccess = resolve; });
    const heads = opened.result.transaction(["heads", "bodies"], "readwrite").objectStore("heads");
    const again = () => { heads.get("none").onsuccess = again; };
    again();
}"""


def test_what_a_busy_database_has_not_stored_is_kept_over_a_reload(browser, fake_model):
    model = fake_model(FakeBackend(scripted("hello"), n_ctx=4096))
    with running(model) as server, context_of(browser) as context, opened(context, server) as page:
        asked = []
        for question in ("one", "two"):
            page.evaluate(BUSY)
            ask(page, question)
            asked += [question, "hello"]
            page.wait_for_selector(f".assistant >> nth={len(asked) // 2 - 1} >> .again")
            page.reload()
            page.wait_for_selector("#mode option", state="attached")
            assert said(page) == asked
            until(lambda: titles(page) == ["one"])
        # and a question in the place of another
        page.evaluate(BUSY)
        page.locator(".user >> nth=1").get_by_role("button", name="Edit").focus()
        page.keyboard.press("Enter")
        page.keyboard.press("Control+a")
        page.keyboard.type("three")
        page.keyboard.press("Enter")
        page.wait_for_selector(".user:has-text('three')")
        page.wait_for_selector(".assistant >> nth=1 >> .again")
        page.reload()
        page.wait_for_selector("#mode option", state="attached")
        assert said(page) == ["one", "hello", "three", "hello"]


def test_new_open_rename_delete_and_take_back(browser, fake_model):
    model = fake_model(FakeBackend(scripted("hello"), n_ctx=4096))
    with running(model) as server, context_of(browser, PHONE) as context, opened(context, server) as page:
        assert not page.is_visible("#list")
        for question in ("first", "second"):
            page.keyboard.press("Alt+n")
            page.wait_for_selector("#hello", state="visible")
            ask(page, question)
            page.wait_for_selector(".again")
        page.click("#show-list")
        until(lambda: titles(page) == ["second", "first"])
        page.click("#chats a >> text=first")
        page.wait_for_selector(".user:has-text('first')")
        assert not page.is_visible("#list")  # it would hide the conversation
        page.click("#show-list")
        page.click("#show-list")
        assert not page.is_visible("#list")
        page.click("#show-list")
        page.click("#chats button:has-text('Rename')")
        page.keyboard.type("renamed")
        page.keyboard.press("Enter")
        page.wait_for_selector("#chats a:has-text('renamed')")
        page.click("#chats button:has-text('Delete')")
        page.wait_for_selector("#deleted:has-text('renamed')")
        assert page.is_visible("#hello")
        page.reload()  # what is deleted stays so
        page.wait_for_selector("#mode option", state="attached")
        page.click("#show-list") if not page.is_visible("#list") else None
        until(lambda: titles(page) == ["second"])
        page.click("#chats a >> text=second")
        page.click("#show-list") if not page.is_visible("#list") else None
        page.click("#chats button:has-text('Delete')")
        page.click("#undo")
        page.wait_for_selector(".user:has-text('second')")
        assert said(page) == ["second", "hello"]
        until(lambda: titles(page) == ["second"])
        page.go_back()
        page.wait_for_selector("#hello", state="visible")


def test_a_question_is_edited_and_an_answer_copied(browser, fake_model):
    backend = FakeBackend(scripted("hello"), n_ctx=4096)
    with running(fake_model(backend)) as server, context_of(browser) as context:
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        with opened(context, server) as page:
            bodies = bodies_of(page)
            for n, question in enumerate(("first", "second")):
                ask(page, question)
                page.wait_for_selector(f".assistant >> nth={n} >> .again")
            page.click(".assistant >> nth=0 >> .foot .copy")
            page.wait_for_selector(".foot .copy:has-text('Copied')")
            assert page.evaluate("navigator.clipboard.readText()") == "hello"
            # by keys alone; Esc leaves it as it is, and ends no answer
            edit = page.locator(".user >> nth=0").get_by_role("button", name="Edit")
            edit.focus()
            page.keyboard.press("Enter")
            page.keyboard.press("Control+a")
            page.keyboard.type("other")
            page.keyboard.press("Escape")
            assert said(page) == ["first", "hello", "second", "hello"]
            assert page.evaluate("document.activeElement.textContent") == "Edit"
            page.keyboard.press("Enter")
            page.keyboard.press("Control+a")
            page.keyboard.type("third")
            backend.on_evaluate = gate = Gate()
            page.keyboard.press("Enter")
            page.wait_for_selector("#send.stop")
            assert not page.locator("button:has-text('Edit')").count()  # while it is answered
            gate.open()
            page.wait_for_selector(".again")
            assert said(page) == ["third", "hello"]
            assert roles(bodies[-1]) == [("user", "third")]
            until(lambda: titles(page) == ["third"])
            page.reload()
            page.wait_for_selector("#mode option", state="attached")
            assert said(page) == ["third", "hello"]
            until(lambda: titles(page) == ["third"])
            page.set_viewport_size(PHONE)
            page.wait_for_selector("#list", state="hidden")


def test_what_is_copied_without_a_secure_context(browser, fake_model):
    with (
        running(fake_model(FakeBackend(scripted("hello"), n_ctx=4096))) as server,
        context_of(browser) as context,
        opened(context, server) as page,
    ):
        ask(page, "one")
        page.wait_for_selector(".again")
        page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
        page.click(".foot .copy")
        page.wait_for_selector(".foot .copy:has-text('Copied')")
        page.focus("#prompt")
        page.keyboard.press("Control+v")
        assert page.input_value("#prompt") == "hello"


def test_two_tabs_of_one_conversation_keep_the_turns_of_both(browser, fake_model):
    backend = FakeBackend(scripted("hello"), n_ctx=4096)
    with (
        running(fake_model(backend)) as server,
        context_of(browser) as context,
        opened(context, server) as one,
    ):
        ask(one, "begin")
        one.wait_for_selector(".again")
        at = "/" + one.evaluate("location.hash")
        with opened(context, server, at=at) as other:
            other.wait_for_selector(".again")
            backend.on_evaluate = gate = Gate()
            ask(one, "from one")
            assert gate.reached.wait(SECONDS)
            ask(other, "from the other")
            # the first is being answered, the second waits, and each tab shows both
            other.wait_for_selector(".state:has-text('Waiting in line: next')")
            other.wait_for_selector(".state:has-text('Another tab answers')")
            one.wait_for_selector(".user:has-text('from the other')")
            gate.open()
            both = ["begin", "hello", "from one", "hello", "from the other", "hello"]
            for page in (one, other):
                until(lambda page=page: page.locator(".receipt").count() == 3)
                until(lambda page=page: said(page) == both)
            one.reload()
            one.wait_for_selector("#mode option", state="attached")
            assert said(one) == both
            # what one tab deletes is told in the other, which keeps it again with its next message
            one.click("#chats button:has-text('Delete')")
            other.wait_for_selector("#notice:has-text('deleted in another tab')")
            ask(other, "still here")
            other.wait_for_selector(".assistant >> nth=3 >> .again")
            one.wait_for_selector("#chats a")
        one.click("#chats a")
        until(lambda: said(one) == [*both, "still here", "hello"])


def test_answers_of_several_conversations_go_on_beside_one_another(browser, fake_model):
    backend = FakeBackend(scripted("hello"), n_ctx=4096)
    backend.on_evaluate = gate = Gate()
    with (
        running(fake_model(backend)) as server,
        context_of(browser) as context,
        opened(context, server) as page,
    ):
        ask(page, "slow")
        assert gate.reached.wait(SECONDS)
        page.keyboard.press("Alt+n")
        page.wait_for_selector("#hello", state="visible")
        assert page.inner_text("#send") == "Send"
        ask(page, "other")
        page.wait_for_selector(".state:has-text('Waiting in line: next')")
        until(lambda: page.locator("#chats .running").count() == 2)
        gate.open()
        page.wait_for_selector(".again")
        page.click("#chats a >> text=slow")
        page.wait_for_selector(".user:has-text('slow')")
        page.wait_for_selector(".again")
        assert said(page) == ["slow", "hello"]
        # a browser has six connections for all its tabs: one that nobody looks at holds none for the map
        with page.expect_event("requestfailed", lambda request: "/v1/experts" in request.url):
            hide(page)


def test_system_prompt_and_sampling_are_the_conversations(browser, fake_model):
    model = fake_model(FakeBackend(scripted("hello"), n_ctx=4096))
    with (
        running(model, defaults={"temperature": 0.25}) as server,
        context_of(browser) as context,
        opened(context, server) as page,
    ):
        bodies = bodies_of(page)
        page.keyboard.press("Alt+s")
        assert page.get_attribute("#set-temperature", "placeholder") == "0.25"
        assert page.get_attribute("#set-top-p", "placeholder") == "0.95"
        assert page.get_attribute("#set-seed", "placeholder") == "random"
        page.fill("#set-system", "Be brief.")
        page.fill("#set-temperature", "0.5")
        page.fill("#set-top-p", "7")
        page.fill("#set-max-tokens", "3")
        page.fill("#set-seed", "11")
        page.click("#settings-done")
        assert page.evaluate("document.querySelector('#set-top-p').validationMessage") == (
            "A number from 0 to 1, or nothing"
        )
        page.fill("#set-top-p", "0.75")
        page.select_option("#set-thinking", "off")
        page.click("#settings-done")
        page.select_option("#mode", "little")
        ask(page, "one")
        page.wait_for_selector(".again")
        assert page.inner_text(".assistant > .text") == "hel"
        assert page.inner_text(".foot .bad") == "Cut at the token limit."
        page.reload()
        page.wait_for_selector("#mode option", state="attached")
        ask(page, "two")
        page.wait_for_selector(".assistant >> nth=1 >> .again")
        asked = {"temperature": 0.5, "top_p": 0.75, "max_tokens": 3, "seed": 11, "mode": "little"}
        for body in bodies:
            assert asked.items() <= body.items()
            assert body["chat_template_kwargs"] == {"enable_thinking": False}
            assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        # another conversation is as the server has it, but for the mode that was chosen
        page.keyboard.press("Alt+n")
        page.wait_for_selector("#hello", state="visible")
        page.keyboard.press("Alt+s")
        page.fill("#set-max-kld", "0.01")
        page.click("#settings-done")
        page.select_option("#mode", "auto")
        ask(page, "three")
        until(lambda: len(bodies) == 3)
        assert bodies[-1]["messages"] == [{"role": "user", "content": "three"}]
        assert bodies[-1]["max_kld"] == 0.01
        assert "temperature" not in bodies[-1]


def test_out_to_a_file_and_in_again(browser, fake_model, tmp_path):
    model = fake_model(FakeBackend(scripted("hello"), n_ctx=4096))
    with running(model) as server:
        with context_of(browser) as context, opened(context, server) as page:
            ask(page, "kept?")
            page.wait_for_selector(".again")
            with page.expect_download() as download:
                page.click("#export")
            file = tmp_path / "all.json"
            download.value.save_as(file)
            page.set_input_files("#import-file", file)
            page.wait_for_selector("#notice:has-text('Imported 0 of 1: the others are here already.')")
        kept = json.loads(file.read_text())
        (conversation,) = kept["conversations"]
        assert [turn["content"] for turn in conversation["turns"]] == ["kept?", "hello"]
        odd = json.loads(json.dumps(conversation))
        odd |= {
            "id": "../x",
            "title": "<b>odd</b>",
            "settings": {"temperature": "hot", "system": 5, "seed": 3},
        }
        odd["turns"][1]["usage"] = {"receipt": "none"}
        odd["turns"][1]["content"] = "<img src=x onerror=alert(1)>"
        (tmp_path / "odd.json").write_text(json.dumps(kept | {"conversations": [conversation, odd]}))
        wrong = {
            "not.json": ("{", "the file is not JSON"),
            "other.json": ("[]", "the file holds no conversations of this page"),
            "later.json": (json.dumps(kept | {"version": 9}), "of a later version"),
            "turn.json": (
                json.dumps(kept | {"conversations": [conversation, {"turns": [{"role": "system"}]}]}),
                "turn 1 of conversation 2 is none",
            ),
        }
        with context_of(browser) as context, opened(context, server) as page:
            for name, (text, why) in wrong.items():
                (tmp_path / name).write_text(text)
                page.set_input_files("#import-file", tmp_path / name)
                page.wait_for_selector(f"#notice:has-text('{why}')")
                assert titles(page) == []
            page.set_input_files("#import-file", tmp_path / "odd.json")
            page.wait_for_selector("#notice:has-text('Imported 2 of 2.')")
            page.click("#chats a >> text=<b>odd</b>")
            page.wait_for_selector(".user")
            assert said(page) == ["kept?", "<img src=x onerror=alert(1)>"]
            page.keyboard.press("Alt+s")
            assert page.input_value("#set-temperature") == ""
            assert page.input_value("#set-system") == ""
            assert page.input_value("#set-seed") == "3"


def test_what_the_browser_does_not_store_is_one_line_and_nothing_is_lost(browser, fake_model):
    model = fake_model(FakeBackend(scripted("hello"), n_ctx=4096))
    with running(model) as server, context_of(browser) as context, opened(context, server) as page:
        page.evaluate(
            """() => {
                const put = IDBObjectStore.prototype.put;
                window.isFull = true;
                IDBObjectStore.prototype.put = function (...all) {
                    if (window.isFull) throw new DOMException("no room", "QuotaExceededError");
                    return put.apply(this, all);
                };
            }"""
        )
        ask(page, "one")
        page.wait_for_selector("#kept:has-text('The browser has no room for this conversation')")
        page.wait_for_selector(".again")
        page.keyboard.press("Alt+n")
        page.wait_for_selector("#hello", state="visible")
        until(lambda: titles(page) == ["one"])
        page.click("#chats a")
        page.wait_for_selector(".user:has-text('one')")
        page.evaluate("window.isFull = false")
        ask(page, "two")
        page.wait_for_selector("#kept", state="hidden")
        page.wait_for_selector(".assistant >> nth=1 >> .again")
        page.reload()
        page.wait_for_selector("#mode option", state="attached")
        assert said(page) == ["one", "hello", "two", "hello"]
    with running(model) as server, context_of(browser) as context:
        context.add_init_script(
            "IDBFactory.prototype.open = () => { throw new DOMException('no', 'SecurityError'); }"
        )
        with opened(context, server) as page:
            page.wait_for_selector("#kept:has-text('This browser keeps no conversations here')")
            ask(page, "one")
            page.wait_for_selector(".again")
            until(lambda: titles(page) == ["one"])
            page.keyboard.press("Alt+n")
            page.wait_for_selector("#hello", state="visible")
            page.click("#chats a")
            page.wait_for_selector(".user:has-text('one')")
            assert said(page) == ["one", "hello"]
