"""The server over the real engine and the demo model: schemas, tools, drafts, the map, slots."""

import json

import httpx
import pytest

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")
from server_harness import SECONDS, Command, get, until

from mobile_gguf.server.produce import IN_WORDS

USER = [{"role": "user", "content": "Tell me about a person called Ann."}]
PERSON = {
    "type": "object",
    # without bounds an age may have as many digits as an answer has tokens
    "properties": {
        "name": {"enum": ["Ann", "Bob"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
ENDLESS = {"grammar": "root ::= [a-z ] root"}
TOOL = {"type": "function", "function": {"name": "note_person", "parameters": PERSON}}
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


@pytest.fixture(scope="module")
def exact(demo_gguf):
    """A server whose answers hang neither on their place in a context nor on what came before them."""
    served = Command(
        demo_gguf, "--ram-budget", "40%", "--alias", "demo", "-c", "1024", "-n", "40", "--parallel", "1",
        "--deterministic",
    )  # fmt: skip
    assert served.url, served.process.communicate()[1]
    yield served
    code, error = served.end()
    assert code == 0, error


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


def test_a_request_may_ask_for_drafts(exact):
    """The text is what it is without; a model that drafts is not named by who asks."""
    words = {"prompt": "one two three four five six one two three four", "seed": 5, "temperature": 0.3}
    words["cache_prompt"] = False  # computed whole each time: the same bits
    plain, drafted = (
        httpx.post(f"{exact.url}/v1/completions", json=words | more, timeout=SECONDS).json()
        for more in ({"speculate": "off"}, {"speculate": "ngram"})
    )
    assert drafted["choices"][0]["text"] == plain["choices"][0]["text"]
    assert plain["usage"]["receipt"]["speculation"] is None
    assert drafted["usage"]["receipt"]["speculation"]["source"] == "ngram"
    for source in ("draft=/etc/passwd", "draft"):
        answer = httpx.post(
            f"{exact.url}/v1/completions", json=words | {"speculate": source}, timeout=SECONDS
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
    with pytest.raises(httpx.ReadTimeout):  # no processor has computed it by then
        httpx.post(f"{command.url}/v1/completions", json=body, timeout=httpx.Timeout(SECONDS, read=0.05))
    until(lambda: not get(f"{command.url}/health").json()["busy"])


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
    asked(first)
    before = asked(first)  # as later: the last token of the prompt alone, for the same bits
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


def test_other_apis_say_what_completions_say(exact):
    """One model, one answer, whichever way it is asked for."""

    def post(path, body):
        return httpx.post(exact.url + path, json=body, timeout=SECONDS).json()

    chat = {"messages": USER, "temperature": 0, "seed": 1}
    post("/v1/chat/completions", chat | {"max_tokens": 1})  # all others compute the prompt's end alone
    said = post("/v1/chat/completions", chat | {"max_tokens": 8})
    text, n = said["choices"][0]["message"]["content"], said["usage"]["prompt_tokens"]
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
