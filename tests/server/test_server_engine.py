"""The server over the real engine and the demo model: the command, schemas, tools, the map, the page."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
openai = pytest.importorskip("openai", reason="pip install 'mobile-gguf[dev]'")
pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")
from page_harness import chromium  # noqa: E402
from server_harness import SECONDS, get, until  # noqa: E402

from mobile_gguf.engine.binding import find_engine  # noqa: E402
from mobile_gguf.engine.warm_files import remembered  # noqa: E402
from mobile_gguf.files.stamps import stamps  # noqa: E402
from mobile_gguf.server.produce import IN_WORDS  # noqa: E402

USER = [{"role": "user", "content": "Tell me about a person called Ann."}]
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
ENDLESS = {"grammar": "root ::= [a-z ] root"}
TOOL = {"type": "function", "function": {"name": "note_person", "parameters": PERSON}}


class Command:
    """``mobile-gguf serve`` in a process of its own."""

    def __init__(self, model: Path, *flags: str, **environment: str) -> None:
        command = [sys.executable, "-m", "mobile_gguf", "serve", str(model), "--port", "0", "-t", "1", *flags]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, env=os.environ | environment
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def client(self, key: str = "none"):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=SECONDS)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, error = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, error


@pytest.fixture
def serve():
    """Starts servers; whatever becomes of the test, none is left."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: Any, **environment: str) -> Command:
            served = Command(*arguments, **environment)
            stack.callback(served.process.communicate)
            stack.callback(served.process.kill)
            return served

        yield start


@pytest.fixture(scope="module")
def command(demo_gguf):
    if find_engine() is None:
        pytest.skip("llama-cpp-python is a stock build; run `mobile-gguf engine build`")
    served = Command(demo_gguf, "--ram-budget", "40%", "--alias", "demo", "-c", "1024", "-n", "40")
    assert served.url, served.process.communicate()[1]
    yield served
    code, error = served.end()
    assert code == 0, error
    assert "Traceback" not in error


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_follows_the_json_schema(command, stream):
    asked = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    answer = command.client().chat.completions.create(
        model="demo", messages=USER, response_format=asked, stream=stream, seed=1, max_tokens=100
    )
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
    person = json.loads(text)
    assert person["name"] in ("Ann", "Bob")
    assert isinstance(person["age"], int)


def test_a_request_may_ask_for_drafts(command):
    """The text is what it is without; a model that drafts is not named by who asks."""
    words = {"prompt": "one two three four five six one two three four", "seed": 5, "temperature": 0.3}
    plain, drafted = (
        httpx.post(f"{command.url}/v1/completions", json=words | more, timeout=SECONDS).json()
        for more in ({"speculate": "off"}, {"speculate": "ngram"})
    )
    assert drafted["choices"][0]["text"] == plain["choices"][0]["text"]
    assert plain["usage"]["receipt"]["speculation"] is None
    assert drafted["usage"]["receipt"]["speculation"]["source"] == "ngram"
    for source in ("draft=/etc/passwd", "draft"):
        answer = httpx.post(
            f"{command.url}/v1/completions", json=words | {"speculate": source}, timeout=SECONDS
        )
        assert answer.status_code == 400, answer.text


def test_a_json_object_is_one(command):
    answer = command.client().chat.completions.create(
        model="demo", messages=USER, response_format={"type": "json_object"}, seed=3, max_tokens=60
    )
    choice = answer.choices[0]
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "note_person"}}])
def test_a_required_tool_call_follows_its_schema(command, choice):
    stream = command.client().chat.completions.create(
        model="demo", messages=USER, tools=[TOOL], tool_choice=choice, stream=True, seed=2, max_tokens=100,
        parallel_tool_calls=False,
    )  # fmt: skip
    name, arguments, reason = "", "", None
    for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or []:
            name += call.function.name or ""
            arguments += call.function.arguments or ""
        reason = chunk.choices[0].finish_reason or reason
    assert (name, reason) == ("note_person", "tool_calls")
    assert json.loads(arguments).keys() == {"name", "age"}


@pytest.mark.parametrize(
    "rung",
    [{"mode": "little"}, {"drop": 2.0, "substitute": "prior"}, {"little_on_miss": "on"}, {"max_kld": 0.5}],
    ids=" ".join,
)  # fmt: skip
def test_a_tool_call_follows_its_schema_whatever_is_lost(command, rung):
    answer = command.client().chat.completions.create(
        model="demo", messages=USER, tools=[TOOL], tool_choice="required", seed=2, max_tokens=100,
        extra_body=rung,
    )  # fmt: skip
    choice, receipt = answer.choices[0], answer.usage.receipt
    (call,) = choice.message.tool_calls
    assert (call.function.name, choice.finish_reason) == ("note_person", "tool_calls")
    person = json.loads(call.function.arguments)
    assert person["name"] in ("Ann", "Bob")
    assert isinstance(person["age"], int)
    lost = receipt["loss"]
    if "mode" in rung:
        assert receipt["tokens_little"] > 0
    elif "max_kld" in rung:
        assert lost["budget"] == 0.5
    else:
        assert lost["dropped"] + lost["little"] > 0


def test_one_odd_tool_costs_no_request(command):
    odd = {
        "type": "object",
        "properties": {"x": {"title": "X"}, "tags": {"type": "array", "uniqueItems": True}},
    }
    odd_tool = {"type": "function", "function": {"name": "odd", "parameters": odd}}
    answer = command.client().chat.completions.with_raw_response.create(
        model="demo", messages=USER, tools=[odd_tool, TOOL], seed=2, max_tokens=100,
        tool_choice={"type": "function", "function": {"name": "note_person"}},
    )  # fmt: skip
    assert answer.headers["x-mobile-gguf-note"] == IN_WORDS
    answer = command.client().chat.completions.with_raw_response.create(
        model="demo", messages=USER, tools=[odd_tool, TOOL], tool_choice="required", seed=2, max_tokens=100
    )
    notes = [IN_WORDS, "tool odd: uniqueItems at #/properties/tags is not supported"]
    assert answer.headers["x-mobile-gguf-note"] == "; ".join(notes)
    usage = answer.parse().usage
    assert usage.notes == notes


HOSTILE = [
    ({"grammar": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000}, 400),
    ({"grammar": r'root ::= "\x04"'}, 400),
    ({"grammar": r'root ::= "a" "\x04"'}, 400),
    ({"grammar": 'root ::= "a" <|im_end|>'}, 200),
    ({"grammar": 'root ::= s\ns ::= [a-z ] s x | [a-z ] s y | [a-z ]\nx ::= "1"\ny ::= "2"'}, 200),
    ({"json_schema": {"type": "string", "pattern": r"^\u0000$"}}, 400),
    ({"json_schema": {"type": "string", "pattern": "^((a{0,100}){0,100})$"}}, 200),
    ({"json_schema": {"type": "integer", "minimum": -1e30, "maximum": -1e25}}, 400),
    ({"json_schema": {"not": {}}}, 400),
]


@pytest.mark.parametrize(("options", "status"), HOSTILE, ids=lambda one: str(one)[:40])
def test_no_grammar_ends_the_server(command, options, status):
    body = {"messages": USER, "max_tokens": 24, "seed": 1, **options}
    answer = httpx.post(f"{command.url}/v1/chat/completions", json=body, timeout=SECONDS)
    assert answer.status_code == status, answer.text
    assert "\n" not in answer.json().get("error", {}).get("message", "")
    assert command.process.poll() is None


def test_big_little_and_the_receipt(command):
    answer = command.client().chat.completions.create(
        model="demo", messages=USER, max_tokens=8, extra_body={"mode": "little"}
    )
    receipt = answer.usage.receipt
    assert receipt["mode"] == "little"
    assert receipt["tokens_little"] > 0
    assert receipt["expert_hits"] + receipt["expert_misses"] > 0


def test_the_map_shows_what_is_hit_and_missed(command):
    seen: set[str] = set()
    card = get(f"{command.url}/v1/models").json()["data"][0]["meta"]
    expert_bytes = card["expert_bytes"] / (card["n_expert"] * card["n_layer_moe"])
    with httpx.stream("GET", f"{command.url}/v1/experts?stream=true", timeout=SECONDS) as events:
        lines = events.iter_lines()
        first = json.loads(next(line for line in lines if line.startswith("data: "))[6:])
        chat = command.client().chat.completions.create(
            model="demo", messages=USER, max_tokens=400, stream=True, extra_body=ENDLESS
        )
        for line in lines:
            if line.startswith("data: "):
                now = json.loads(line[6:])
                seen.update(*(set(row) for row in now["tiers"]["host"]))
                # hits and misses may be gone again: what is there keeps to the budget all the same
                assert now["resident"]["host"] <= card["ram_budget_bytes"] / expert_bytes
            if {"3", "4"} <= seen:
                break
        chat.close()
    states = first["states"]
    assert {states["hit"], states["missed"], states["resident"]} <= seen
    assert len(first["tiers"]["host"]) == first["n_layer"]


def test_leaving_while_a_long_prompt_is_computed_frees_the_model(command):
    body = {"prompt": "word " * 900, "max_tokens": 1}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{command.url}/v1/completions", json=body, timeout=httpx.Timeout(SECONDS, read=0.3))
    until(lambda: not get(f"{command.url}/health").json()["busy"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_cuts_a_running_stream_cleanly(demo_gguf, command, serve, number, code):
    served = serve(demo_gguf, "--ram-budget", "40%", "--grace", "0.1", "-c", "1024", MOBILE_GGUF_API_KEY="k")
    stream = served.client("k").chat.completions.create(
        model=demo_gguf.stem, messages=USER, stream=True, extra_body=ENDLESS
    )
    next(iter(stream))
    served.process.send_signal(number)
    with pytest.raises(openai.APIError, match="the answer was cut"):
        list(stream)
    _, error = served.process.communicate(timeout=SECONDS)
    assert served.process.returncode == code
    assert "Traceback" not in error
    assert remembered(demo_gguf, stamps([demo_gguf])), "what was used was not remembered for the next start"


def test_a_second_ctrl_c_cuts_without_a_traceback(demo_gguf, command, serve):
    served = serve(demo_gguf, "--ram-budget", "40%", "--grace", "200", "-c", "1024")
    stream = served.client().chat.completions.create(
        model=demo_gguf.stem, messages=USER, stream=True, extra_body=ENDLESS
    )
    next(iter(stream))
    served.process.send_signal(signal.SIGINT)
    until(lambda: not takes_requests(served.url))
    served.process.send_signal(signal.SIGINT)
    with contextlib.suppress(openai.APIError, httpx.HTTPError):
        list(stream)
    _, error = served.process.communicate(timeout=SECONDS)
    assert served.process.returncode == 130
    assert "stopping: the running answer has 200 s to end; Ctrl-C again cuts it" in error
    assert "Traceback" not in error


def takes_requests(url: str) -> bool:
    try:
        return get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def refused(*flags: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "mobile_gguf", "serve", "nothing.gguf", *flags],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        ((), 3, "nothing.gguf"),
        (("--port", "70000"), 2, "argument --port: port is 70000: it must be at most 65535"),
        (("--queue", "-1"), 2, "argument --queue: queue is -1: it must be at least 0"),
        (("--max-request", "40%"), 2, "--max-request"),
        (("--api-key", "a b"), 2, "API key"),
        (("--api-key-file", "/nonexistent"), 2, "cannot read /nonexistent"),
        (("--api-key", "a", "--api-key-file", "b"), 2, "give --api-key or --api-key-file, not both"),
    ],
)
def test_what_cannot_be_served_is_one_line(flags, code, text):
    got, error = refused(*flags)
    assert got == code, error
    assert text in error
    assert len(error.strip().splitlines()) == 1


def test_a_port_that_is_taken_is_one_line(command, demo_gguf):
    port = command.url.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "mobile_gguf", "serve", str(demo_gguf), "--port", port, "--ram-budget", "40%"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


NODE_SCRIPT = """
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Hello" }];
// alone, and with a prompt that is computed whole each time: so both have the same bits
const asked = { model: "demo", messages, max_tokens: 8, temperature: 0, cache_prompt: false };
const streamed = { ...asked, stream: true, stream_options: { include_usage: true } };
const whole = await client.chat.completions.create(asked);
let text = "", usage = null;
for await (const chunk of await client.chat.completions.create(streamed)) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
let missing = 0;
try {
  await client.chat.completions.create({ ...asked, model: "other" });
} catch (error) {
  missing = error.status;
}
const same = text === whole.choices[0].message.content;
const input = { model: "demo", input: "Hello", max_output_tokens: 8, temperature: 0, cache_prompt: false };
let response = null;
for await (const event of await client.responses.create({ ...input, stream: true })) {
  if (event.type === "response.incomplete") response = event.response;
}
const claude = new Anthropic({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const stream = claude.messages.stream({ ...asked });
const message = await stream.finalMessage();
const counted = await claude.messages.countTokens({ model: "demo", messages });
const { input_tokens, cache_read_input_tokens } = message.usage;
console.log(JSON.stringify({
  same, text, receipt: usage.receipt.tokens_big, missing,
  response: response.output[0].content[0].text,
  message: message.content[0].text,
  counted: counted.input_tokens === input_tokens + cache_read_input_tokens,
}));
"""


def test_the_node_clients(command, tmp_path):
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no node and npm here: apt install nodejs npm")
    # without a way to the registry npm would try for minutes
    command_line = ["npm", "install", "--no-audit", "--no-fund", "--silent", "--fetch-retries=0"]
    installed = subprocess.run(
        [*command_line, "--fetch-timeout=30000", "openai", "@anthropic-ai/sdk"],
        cwd=tmp_path,
        capture_output=True,
    )
    if installed.returncode:
        pytest.skip("npm cannot install the openai and @anthropic-ai/sdk packages here")
    (tmp_path / "ask.mjs").write_text(NODE_SCRIPT)
    until(lambda: not get(f"{command.url}/health").json()["busy"])
    done = subprocess.run(
        ["node", "ask.mjs", command.url], cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["same"]
    assert answer["text"]
    assert answer["receipt"] == 8
    assert answer["missing"] == 404
    # made of what the context has already: last digits, and so words, may be others
    assert answer["response"]
    assert answer["message"]
    assert answer["counted"]


@contextlib.contextmanager
def browser_page():
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(1000 * SECONDS)
        yield page


def without_end(route):
    route.continue_(post_data=json.dumps(route.request.post_data_json | ENDLESS))


def test_the_page_when_the_server_is_killed(demo_gguf, command, serve):
    served = serve(demo_gguf, "--ram-budget", "40%", "-c", "1024")
    with browser_page() as page:
        page.goto(served.url)
        page.wait_for_selector("#mode option:nth-child(3)", state="attached")
        page.route("**/v1/chat/completions", without_end)
        page.fill("#prompt", "Say hello.")
        page.keyboard.press("Enter")
        page.wait_for_selector(".receipt:has-text('big')")
        served.process.kill()
        served.process.communicate(timeout=SECONDS)
        page.wait_for_selector(".end.bad")
        assert page.inner_text(".end") == "The connection to the server was lost."
        assert re.match(r"\d+ big \| \d+% hits \| ", page.inner_text(".receipt"))
        page.wait_for_selector("#notice:has-text('No connection to the server: trying again.')")


def test_the_page_in_a_browser(command):
    with browser_page() as page:
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(command.url)
        page.wait_for_selector("#mode option:nth-child(3)", state="attached")
        # What a model writes must not become a part of the page.
        hostile = "<img src=x onerror=alert(1)> **bold** [x](javascript:alert(1)) `<b>`"
        hostile += "\n\n```\n<script>\n```\n- a\n- b"
        html = page.evaluate(
            """async (text) => {
                const { render } = await import("/markdown.js");
                const box = document.createElement("div");
                box.append(render(text));
                return box.innerHTML;
            }""",
            hostile,
        )
        assert "<img" not in html
        assert "<script" not in html
        assert "href" not in html
        assert "<strong>bold</strong>" in html
        assert html.count("<li>") == 2
        page.select_option("#mode", "little")
        page.fill("#prompt", "Say hello.")
        page.keyboard.press("Enter")
        page.wait_for_selector(".again")
        assert re.search(r"\d+ big · \d+ little \| ", page.inner_text(".receipt"))
        assert "in memory" in page.inner_text("#map-note")
        # an answer that lasts until it is stopped
        page.route("**/v1/chat/completions", without_end)
        page.keyboard.press("Alt+r")
        page.wait_for_selector("#send.stop")
        page.wait_for_selector(".receipt:has-text('little')")
        page.keyboard.press("Escape")
        page.wait_for_selector("#send:not(.stop)")
        assert len(page.query_selector_all(".turn")) == 2
        page.wait_for_selector(".again")
        assert page.locator(".end").all_inner_texts()[0].startswith("Stopped")
        assert page.locator(".receipt").count() == 1
        assert not problems


def test_a_slot_is_saved_and_goes_on_where_it_was(serve, demo_gguf):
    """Its tokens are not computed again after it was erased, and after a restart."""
    words = "The little boat went out to sea. " * 12
    ask = {"input": words, "max_output_tokens": 4, "temperature": 0, "store": False}
    flags = ("--ram-budget", "40%", "-c", "512", "--parallel", "1", "--prefix-cache", "off")
    first = serve(demo_gguf, *flags)

    def asked(served):
        return httpx.post(f"{served.url}/v1/responses", json=ask, timeout=SECONDS).json()

    def act(served, action, **body):
        url = f"{served.url}/slots/0?action={action}"
        return httpx.post(url, json=body, timeout=SECONDS)

    assert "is empty" in act(first, "save", filename="boat").json()["error"]["message"]
    before = asked(first)
    held = get(f"{first.url}/slots").json()
    assert [(one["id"], one["is_processing"]) for one in held] == [(0, False)]
    saved = act(first, "save", filename="boat").json()
    assert saved["n_saved"] == held[0]["n_prompt_tokens"]
    assert act(first, "erase").json() == {"id_slot": 0, "n_erased": saved["n_saved"]}
    assert act(first, "restore", filename="boat").json()["n_restored"] == saved["n_saved"]
    again = asked(first)
    assert again["usage"]["input_tokens_details"]["cached_tokens"] >= before["usage"]["input_tokens"] - 2
    for name in "../boat", "", "a/b", "x" * 200:
        assert act(first, "save", filename=name).status_code == 400
    assert act(first, "restore", filename="other").status_code == 400
    assert httpx.post(f"{first.url}/slots/9?action=erase", timeout=SECONDS).status_code == 400
    assert first.end()[0] == 0
    second = serve(demo_gguf, *flags)
    assert act(second, "restore", filename="boat").json()["n_restored"] == saved["n_saved"]
    restarted = asked(second)
    assert restarted["usage"]["input_tokens_details"]["cached_tokens"] >= before["usage"]["input_tokens"] - 2
    texts = [one["output"][0]["content"][0]["text"] for one in (before, again, restarted)]
    assert len(set(texts)) == 1


def test_other_apis_say_what_completions_say(command):
    """One model, one answer, whichever way it is asked for."""
    chat = {"messages": USER, "temperature": 0, "seed": 1}
    said = httpx.post(
        f"{command.url}/v1/chat/completions", json=chat | {"max_tokens": 8}, timeout=SECONDS
    ).json()
    text, n = said["choices"][0]["message"]["content"], said["usage"]["prompt_tokens"]

    def post(path, body):
        return httpx.post(command.url + path, json=body, timeout=SECONDS).json()

    asked = {"input": USER[0]["content"], "max_output_tokens": 8, "temperature": 0, "seed": 1}
    assert post("/v1/responses", asked)["output"][0]["content"][0]["text"] == text
    message = post("/v1/messages", chat | {"max_tokens": 8})
    assert message["content"][0]["text"] == text
    assert post("/v1/messages/count_tokens", {"messages": USER}) == {"input_tokens": n}
    options = {"num_predict": 8, "temperature": 0, "seed": 1}
    told = post("/api/chat", {"messages": USER, "options": options, "stream": False})
    assert told["message"]["content"] == text
    prompt = post("/apply-template", {"messages": USER})["prompt"]
    tokens = post("/tokenize", {"content": prompt})["tokens"]
    assert len(tokens) == n
    assert post("/detokenize", {"tokens": tokens})["content"] == prompt
    raw = post("/completion", {"prompt": tokens, "n_predict": 8, "temperature": 0, "seed": 1})
    assert raw["content"] == text
