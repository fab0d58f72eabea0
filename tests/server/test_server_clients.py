"""Clients that are no Python over the real engine: Node's, and the page in a browser."""

import contextlib
import json
import re
import shutil
import subprocess

import pytest

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")
from page_harness import chromium
from server_harness import SECONDS

# for minutes on any processor, in a context that has room for it
ENDLESS = {"grammar": "root ::= [a-z ] root", "max_tokens": 7000}
ROOMY = ("--ram-budget", "40%", "-c", "8192")

NODE_SCRIPT = """
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Hello" }];
// computed whole each time, where answers do not hang on their place in a context: the same bits
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


def test_the_node_clients(serve, demo_gguf, tmp_path):
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
    served = serve(demo_gguf, "--ram-budget", "40%", "--alias", "demo", "-c", "1024", "--deterministic")
    done = subprocess.run(
        ["node", "ask.mjs", served.url], cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS
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


def test_the_page_when_the_server_is_killed(demo_gguf, serve):
    served = serve(demo_gguf, *ROOMY)
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


def test_the_page_in_a_browser(demo_gguf, serve):
    served = serve(demo_gguf, *ROOMY, "-n", "40")
    with browser_page() as page:
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(served.url)
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
        page.wait_for_selector("#map-note:has-text('in memory')")
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
