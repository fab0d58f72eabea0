"""A long conversation of an agent, and first requests of real ones, on a real engine: what is computed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")
from places import DATA
from said_apis import APIS, ask
from said_texts import THOUGHT, TOLD, saying
from server_harness import Running, running

import mobile_gguf

TURNS, TOOLS = 30, 20
ARGUMENTS = {"file_path": "/notes.txt"}
_WORDS = "The quick brown fox reads a file, edits a line of it, and runs all of the tests again. "


def recorded(name: str) -> dict[str, Any]:
    """A recorded request, with texts of their lengths for those that were cut out."""
    return json.loads((DATA / "agents" / f"{name}.json").read_text())


def as_long(value: Any) -> Any:
    if isinstance(value, str):
        cut = re.fullmatch(r"\((\d+) characters\)", value)
        return (_WORDS * (int(cut[1]) // len(_WORDS) + 1))[: int(cut[1])] if cut else value
    if isinstance(value, list):
        return [as_long(one) for one in value]
    return {key: as_long(one) for key, one in value.items()} if isinstance(value, dict) else value


def of_api(name: str, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Anthropic's tools in the form of another API."""
    if name == "messages":
        return tools
    made = [
        {"name": one["name"], "description": one["description"], "parameters": one["input_schema"]}
        for one in tools
    ]
    if name == "responses":
        return [{"type": "function", **one} for one in made]
    return [{"type": "function", "function": one} for one in made]


@pytest.fixture(scope="module")
def server(demo_gguf: Path) -> Iterator[Running]:
    """With the context that a model gets by default."""
    path = saying("qwen3", demo_gguf, "Read", ARGUMENTS)
    with mobile_gguf.load(path, ram_budget="60%", threads=1) as model, running(model, names=("demo",)) as run:
        yield run


@pytest.mark.parametrize("name", ["chat", "responses", "messages"])
def test_each_turn_of_an_agent_computes_what_is_new(server: Running, name: str) -> None:
    """Thirty questions, each answered by a call and, when its result is there, by words."""
    api = APIS[name]
    tools = of_api(name, [one for one in recorded("claude-code")["body"]["tools"] if "input_schema" in one])
    tools = sorted(tools, key=lambda one: "Read" not in json.dumps(one.get("function", one)["name"]))[:TOOLS]
    assert len(tools) == TOOLS
    conversation: list[Any] = []
    asked = whole = computed = (
        0  # tokens of the last question's prompt, of the last one, and all that were computed
    )

    def say(stream: bool) -> Any:
        answer = ask(server.url, api, conversation, stream, tools=tools)
        cached = answer.usage["prompt_tokens_details"]["cached_tokens"]
        return answer, answer.usage["prompt_tokens"], cached

    for turn in range(TURNS):
        conversation.append(api.question(f"What is in the notes, asked for the {turn}th time?"))
        answer, n_prompt, cached = say(stream=turn % 2 == 0)
        assert (answer.thought.strip(), answer.calls) == (THOUGHT, [("Read", ARGUMENTS)])
        # the template drops what was thought before the last question: from there on it is another prompt
        assert cached >= asked - 2, (turn, n_prompt, asked)
        computed += n_prompt - cached
        asked = n_prompt
        conversation += [*answer.again, *api.result(answer, f"line {turn}\n" * 5)]
        answer, n_prompt, cached = say(stream=turn % 2 == 1)
        assert (answer.thought, answer.words) == ("", TOLD)
        assert asked < cached < n_prompt  # all of the question's prompt, and what was said to it
        computed += n_prompt - cached
        whole = n_prompt
        conversation += answer.again
        # the receipt of an answer says the same of the prompt's tokens
        assert answer.usage["receipt"]["tokens_big"] < 64
    assert computed < 2 * whole


@pytest.mark.parametrize("name", ["codex", "claude-code", "opencode"])
def test_the_first_request_of_an_agent_fits_by_default(server: Running, name: str) -> None:
    first = recorded(name)
    body = as_long(first["body"])
    cut = {"max_output_tokens": 1} if "input" in body else {"max_tokens": 1}
    answer = server.post(first["path"].partition("?")[0], {**body, **cut, "stream": False})
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    n = usage.get("prompt_tokens") or usage["input_tokens"] + usage.get("cache_read_input_tokens", 0)
    assert n > 6000, usage
    assert usage["turns_left_out"] == 0
