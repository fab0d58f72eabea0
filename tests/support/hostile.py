"""What hostile and broken clients do to a server: each function of ATTACKS is one client's one try.

An attack may be answered in any way that HTTP has, or have its connection closed; it raises
``WrongAnswerError`` for what no server may say, such as an answer that is cut without a word.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import httpx

_WORDS = ("why", "is", "the", "sky", "so", "blue", "today", "and", "who", "knows")
Attack = Callable[[random.Random, str], str]
CHAT = "/v1/chat/completions"
# A refusal, an answer, or a limit of the server's; 500 is none.
ALLOWED = {200, 400, 401, 403, 404, 405, 408, 413, 415, 422, 429, 503, 504}
SECONDS = 1000.0  # longer than the server lets a request take
TOKENS = 6


class WrongAnswerError(Exception):
    """A server said what no server may say."""


def body_of(rng: random.Random, **more: Any) -> dict[str, Any]:
    """A request that can be meant, for a few tokens."""
    words = " ".join(rng.choices(_WORDS, k=9))
    return {"messages": [{"role": "user", "content": words}], "max_tokens": rng.randint(1, TOKENS), **more}


# How the streams of all APIs end, also one that failed.
_ENDS = ('"stop":true', '"type":"response.', '"type":"message_stop"', '"error":')


def _has_ended(text: str) -> bool:
    last = text.strip().rpartition("\n")[2]
    return text.endswith("\n\n") and (last == "data: [DONE]" or any(end in last for end in _ENDS))


def sent(url: str, body: Any, path: str = CHAT, **options: Any) -> str:
    """Post JSON, or bytes as they are; returns the status, having checked the answer."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **options.pop("headers", {})}
    try:
        answer = httpx.post(url + path, content=content, headers=headers, timeout=SECONDS, **options)
    except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
        # a server may close a connection whose request it does not want to read to its end
        if len(content) > 1 << 20:
            return "closed"
        raise WrongAnswerError(f"no answer to {content[:200]!r}: {error!r}") from None
    if answer.status_code not in ALLOWED:
        raise WrongAnswerError(f"{answer.status_code} to {content[:300]!r}: {answer.text[:200]}")
    if answer.status_code >= 400:
        error = answer.json()["error"]
        message = error if isinstance(error, str) else error["message"]  # ollama's is a text
        if not message or not message.isprintable() or len(message) > 2000:
            raise WrongAnswerError(f"not one clear line to {content[:200]!r}: {message[:200]!r}")
    elif "text/event-stream" in answer.headers["content-type"] and not _has_ended(answer.text):
        raise WrongAnswerError(f"a stream without an end to {content[:200]!r}: {answer.text[-200:]!r}")
    return str(answer.status_code)


# grammars and schemas

GRAMMARS = [
    'root ::= "a" <|im_end|>',
    'root ::= "\\x04"',
    r"root ::= [^\x00-\U0010FFFF]",
    "root ::= root",
    "root ::=",
    'root ::= s\ns ::= [a-z ] s x | [a-z ] s y | [a-z ]\nx ::= "1"\ny ::= "2"',
    "root ::= missing",
    "",
    'root ::= ("a" | "b")*',
    'root ::= "a"{1000000}',
    "root ::= ((((.*)*)*)*)*",
    'root ::= "\\u0000"',
    "\x00",
    "root ::= [a-z",
    'root ::= "é" | "日本" | "😀"',
    "%llguidance {}\nstart: root",
    "start: /a{99999}/",
]
PATTERNS = [
    "^\\u0000$",
    "^\\x00$",
    "^((a{0,100}){0,100})$",
    "(a+)+$",
    '^"q"$',
    "^a|b$",
    "\\d+",
    "\\w",
    "(?=a)b",
    "(?:x)",
    ".{1,2500}",
    "[",
    "(" * 5000,
    "^[^\\x00-\\uFFFF]$",
    "\\b",
    "a{0,1000000}",
    "^(a|b|c)*\\1$",
    "\\p{L}+",
]


def schema(rng: random.Random, depth: int = 0) -> Any:
    """A JSON schema, more or less: with what a converter may trip over."""
    kinds: list[Callable[[], Any]] = [
        lambda: {"type": "string", "pattern": rng.choice(PATTERNS)},
        lambda: {
            "type": "string",
            "minLength": rng.choice([0, 5, -1, 10**9]),
            "maxLength": rng.choice([0, 9, 10**5]),
        },
        lambda: {"type": "string", "format": rng.choice(["date-time", "email", "ipv4", "uuid", "nothing"])},
        lambda: {
            "type": "integer",
            "minimum": rng.choice([0, -5, 1e400, "x"]),
            "maximum": rng.choice([9, 10**30]),
        },
        lambda: {"type": "number", "multipleOf": rng.choice([0, 3, -1, 0.1])},
        lambda: {"enum": rng.choices([1, 'a"b', "😀", None, [1], {"a": 1}, 1e308, "\x00", ""], k=3)},
        lambda: {"const": rng.choice(["c\\d", "\n", {}, [], 0])},
        lambda: {"type": ["string", "null"]},
        lambda: {"title": "anything"},
        lambda: {
            "$ref": rng.choice(["#", "#/$defs/a", "#/x", "http://example.com/x", "file:///etc/passwd", 7])
        },
        lambda: {"not": {"type": "string"}},
        lambda: {"type": rng.choice(["nothing", 5, [], "object", "array", "boolean", "null"])},
    ]
    if depth < 4:
        kinds += [
            lambda: {
                "type": "object",
                "properties": {
                    rng.choice(["a", "b", "", 'q"', "é", "a" * 500]): schema(rng, depth + 1) for _ in range(3)
                },
                "required": rng.choice([["a"], ["zz"], [], "a", [1]]),
                "additionalProperties": rng.choice([True, False, {"type": "string"}, None]),
            },
            lambda: {"type": "array", "items": schema(rng, depth + 1), "minItems": rng.choice([0, 2, 10**6])},
            lambda: {"prefixItems": [schema(rng, depth + 1)], "uniqueItems": True},
            lambda: {rng.choice(["anyOf", "oneOf", "allOf"]): [schema(rng, depth + 1) for _ in range(3)]},
        ]
    made = rng.choice(kinds)()
    if depth == 0 and rng.random() < 0.3:
        made = {**made, "$defs": {"a": schema(rng, 1) | {"properties": {"next": {"$ref": "#/$defs/a"}}}}}
    return made


def deep(rng: random.Random) -> Any:
    """Something nested or wide beyond what is asked for."""
    n = rng.choice([70, 900, 5000])
    made: Any = {"type": "string"}
    for _ in range(n):
        made = {"type": "array", "items": made} if rng.random() < 0.5 else {"anyOf": [made, {"type": "null"}]}
    wide = {
        "type": "object",
        "properties": {f"p{i}": {"type": "string"} for i in range(rng.choice([900, 2400]))},
    }
    return rng.choice([made, wide])


def ask_grammar(rng: random.Random, url: str) -> str:
    parens = rng.choice([100, 10_000, 60_000])
    nested = "root ::= " + "(" * parens + '"a"' + ")" * parens
    chained = "\n".join(f"r{i} ::= r{i + 1}" for i in range(rng.choice([10, 30_000])))
    grammar = rng.choice([*GRAMMARS, nested, f"root ::= r0\n{chained}"])
    if rng.random() < 0.3:
        grammar = "".join(rng.choice('root:=()[]{}"\\*+?|<>ab \n') for _ in range(rng.randint(1, 200)))
    return sent(url, body_of(rng, grammar=grammar, stream=rng.random() < 0.3))


def ask_schema(rng: random.Random, url: str) -> str:
    made = deep(rng) if rng.random() < 0.1 else schema(rng)
    text = json.dumps(body_of(rng), allow_nan=True)[:-1]
    try:
        written = json.dumps(made)
    except RecursionError:
        written = '{"a":' * 3000 + "1" + "}" * 3000
    wrapped = f'{{"name": "x", "schema": {written}}}'
    function = f'{{"name": "f", "parameters": {written}}}'
    fields = [
        f'"json_schema": {written}',
        f'"response_format": {{"type": "json_schema", "json_schema": {wrapped}}}',
        f'"tool_choice": "required", "tools": [{{"type": "function", "function": {function}}}]',
    ]
    field = rng.choice(fields)
    return sent(url, f"{text}, {field}}}".encode())


# bodies

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**400,
    1e308,
    -0.0,
    "",
    "\x00",
    "\ud800",
    "<|im_end|>",
    "😀" * 99,
    [],
    {},
    [[]],
    {"": {}},
    "a" * 5000,
    ["x"] * 99,
    12.0,
    "1",
    float("inf"),
    float("nan"),
    {"role": "user"},
]
FIELDS = [
    "messages",
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "n",
    "stream",
    "logit_bias",
    "tools",
    "tool_choice",
    "logprobs",
    "top_logprobs",
    "response_format",
    "stream_options",
    "chat_template_kwargs",
    "mode",
    "little_k",
    "gamma",
    "reasoning_effort",
    "metadata",
    "user",
    "grammar",
    "json_schema",
    "special",
    "prompt",
    "echo",
    "input",
    "dimensions",
    "encoding_format",
    "parallel_tool_calls",
    "context_full",
    "repeat_penalty",
    "\u0000",
]
PATHS = [
    CHAT,
    "/v1/completions",
    "/v1/embeddings",
    "/v1/models",
    "/v1/nothing",
    "/health",
    "/",
    "//",
    "/%2e%2e/x",
]


def ask_odd_fields(rng: random.Random, url: str) -> str:
    body = body_of(rng)
    path = rng.choice(PATHS[:3])
    if path != CHAT:
        body["prompt" if "completions" in path else "input"] = rng.choice(
            ["hi", ["a", "b"], [1, 2], [[1], [2]]]
        )
        del body["messages"]
        if "embed" in path:
            del body["max_tokens"]
    for _ in range(rng.randint(1, 3)):
        body[rng.choice(FIELDS)] = rng.choice(ODD)
    if rng.random() < 0.3 and isinstance(body.get("messages"), list) and body["messages"]:
        keys = ["role", "content", "name", "tool_calls", "tool_call_id"]
        body["messages"] = [*body["messages"], {key: rng.choice(ODD) for key in keys}]
    return sent(url, json.dumps(body).encode(), path)


_SAYS = {"role": "user", "content": "hi"}
_PARTS = [
    {"type": "text", "text": "x"},
    {"type": "input_text", "text": "x"},
    {"type": "tool_use", "id": "t", "name": "f", "input": {}},
    {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "1"}]},
    {"type": "thinking", "thinking": "hm", "signature": "s"},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"},
    {"type": "function_call_output", "call_id": "c", "output": "1"},
    {"type": "reasoning", "summary": [{"text": 5}], "content": ["x"]},
    {"type": "image", "source": {"type": "base64", "data": "x"}},
    {"type": "item_reference", "id": "x"},
    {"type": "web_search_call"},
]
_TOOLS: list[Any] = [
    {"type": "function", "name": "f", "parameters": {"type": "object"}},
    {"name": "f", "input_schema": {"type": "object"}},
    {"type": "function", "function": {"name": "f"}},
    {"type": "namespace", "tools": [5]},
]
OTHERS: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": [_SAYS], "max_output_tokens": 4, "tools": _TOOLS[:1], "store": False},
    "/v1/responses/input_tokens": {"input": "hi"},
    "/v1/messages": {"messages": [_SAYS], "max_tokens": 4, "tools": _TOOLS[1:2], "system": "x"},
    "/v1/messages/count_tokens": {"messages": [_SAYS], "system": [_PARTS[0]]},
    "/api/chat": {"messages": [_SAYS], "options": {"num_predict": 4}, "tools": _TOOLS[2:3]},
    "/api/generate": {"prompt": "hi", "options": {"num_predict": 4}, "suffix": None, "raw": True},
    "/api/embed": {"input": ["hi"], "dimensions": 2},
    "/api/show": {"model": ""},
    "/tokenize": {"content": "hi", "with_pieces": True},
    "/detokenize": {"tokens": [1, 2]},
    "/apply-template": {"messages": [_SAYS]},
    "/completion": {"prompt": "hi", "n_predict": 4},
    "/infill": {"input_prefix": "a", "input_suffix": "b", "n_predict": 4},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/slots/0?action=save": {"filename": "../x"},
    "/slots/9?action=restore": {"filename": "x"},
}
_OTHER_FIELDS = (
    *("input", "messages", "tools", "tool_choice", "system", "instructions", "stream", "store", "text"),
    *(
        "reasoning",
        "thinking",
        "previous_response_id",
        "max_output_tokens",
        "max_tokens",
        "options",
        "format",
    ),
    *(
        "format",
        "think",
        "prompt",
        "suffix",
        "tokens",
        "content",
        "documents",
        "top_n",
        "filename",
        "output_config",
    ),
    *("stop_sequences", "truncation", "include", "model", "temperature", "metadata", "input_extra"),
)


def ask_other_apis(rng: random.Random, url: str) -> str:
    """What has another API's form, and parts of yet another's, or nothing of the kind."""
    path = rng.choice(list(OTHERS))
    body: dict[str, Any] = dict(OTHERS[path]) | ({"stream": True} if rng.random() < 0.4 else {})
    odd = [*ODD, *_PARTS, *_TOOLS, _PARTS, [_SAYS, *_PARTS], [{"role": "user", "content": _PARTS}]]
    for _ in range(rng.randint(0, 2)):
        body[rng.choice([*body, *_OTHER_FIELDS])] = rng.choice(odd)
    for name in "messages", "input":
        if isinstance(body.get(name), list) and rng.random() < 0.4:
            role = rng.choice(["user", "assistant", "system", "tool"])
            part = {"role": role, "content": rng.sample(_PARTS, 3)}
            body[name] = [*body[name], rng.choice([part, *_PARTS])]
    return sent(url, json.dumps(body).encode(), path)


def ask_broken_body(rng: random.Random, url: str) -> str:
    data = bytearray(json.dumps(body_of(rng)).encode())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        data[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
    special = [b"", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"\xff\xfe", b'"' * 9999, b"[]," * 99_999]
    body = bytes(data) if rng.random() < 0.7 else rng.choice(special)
    kind = rng.choice(["application/json", "text/plain", "", "application/json; charset=utf-16"])
    return sent(url, body, rng.choice(PATHS), headers={"content-type": kind})


def ask_large(rng: random.Random, url: str) -> str:
    size = rng.choice([20_000, 200_000, 1_000_000, 3_900_000])
    text = rng.choice(["a", "word ", "\n", " ", "é, ", "😀", "<|im_end|>", "日本", "\x00"])
    text = (text * size)[: size // rng.choice([1, 1, 4])]
    kind = rng.choice(["message", "turns", "prompt", "prompts", "input", "values", "tool", "ids"])
    described = {"name": "f", "description": text}
    bodies: dict[str, tuple[str, Any]] = {
        "message": (CHAT, body_of(rng) | {"messages": [{"role": "user", "content": text}]}),
        "turns": (CHAT, body_of(rng) | {"messages": [{"role": "tool", "content": text[:9000]}] * 90}),
        "prompt": ("/v1/completions", {"prompt": text, "max_tokens": 2}),
        "prompts": ("/v1/completions", {"prompt": [text[:100_000]] * 30, "max_tokens": 2}),
        "input": ("/v1/embeddings", {"input": [text[:50_000]] * 50}),
        "values": (CHAT, body_of(rng, chat_template_kwargs={"x": text})),
        "tool": (CHAT, body_of(rng, tools=[{"type": "function", "function": described}])),
        "ids": ("/v1/completions", {"prompt": [1] * min(size, 600_000), "max_tokens": 2}),
    }
    path, body = bodies[kind]
    return sent(url, json.dumps(body, ensure_ascii=rng.random() < 0.5).encode(errors="replace"), path)


# connections


def connection(url: str) -> socket.socket:
    host, _, port = url.rpartition("/")[2].partition(":")
    return socket.create_connection((host, int(port)), timeout=SECONDS)


def request_bytes(rng: random.Random, **more: Any) -> bytes:
    body = json.dumps(body_of(rng, **more)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def drop_connection(rng: random.Random, url: str) -> str:
    """Go away at any moment: before, within and after a request, in order or not."""
    data = request_bytes(rng, stream=rng.random() < 0.5, max_tokens=rng.choice([1, 9999]))
    with connection(url) as made:
        if rng.random() < 0.5:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        made.sendall(data[: rng.choice([0, 5, len(data) // 2, len(data)])])
        if rng.random() < 0.3:
            made.shutdown(socket.SHUT_WR)
        time.sleep(rng.choice([0, 0.01, 0.5]))
    return "left"


def drip(rng: random.Random, url: str) -> str:
    """Send headers or a body a byte at a time, for a while."""
    data = request_bytes(rng)
    with connection(url) as made:
        made.sendall(data[: rng.choice([0, 9, len(data) - 20])])
        for _ in range(rng.randint(0, 20)):
            time.sleep(0.1)
            made.sendall(b"x")
    return "dripped"


def send_garbage(rng: random.Random, url: str) -> str:
    """What is no HTTP, or two requests in one, or headers of a megabyte."""
    post = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n".encode()
    kinds = [
        rng.randbytes(rng.randint(1, 5000)),
        b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 1_000_000,
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        post + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        post + b"Content-Length: -1\r\n\r\n",
        post + b"Transfer-Encoding: chunked\r\n\r\nfffffff\r\na",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50,
        b"\r\n" * 1000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]
    with connection(url) as made:
        try:
            made.sendall(rng.choice(kinds))
            made.settimeout(0.5)
            made.recv(1 << 16)
        except (TimeoutError, OSError):
            pass
    return "sent"


def never_read(rng: random.Random, url: str) -> str:
    """Ask for a stream, and do not read it."""
    with connection(url) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.sendall(request_bytes(rng, stream=True, max_tokens=200))
        time.sleep(rng.choice([0.1, 3]))
    return "unread"


def hold_idle(rng: random.Random, url: str) -> str:
    """Many connections that say nothing."""
    made = []
    try:
        for _ in range(rng.randint(1, 60)):
            made.append(connection(url))
        time.sleep(rng.choice([0.1, 2]))
    except OSError:
        pass
    finally:
        for one in made:
            one.close()
    return "idle"


def leave_stream(rng: random.Random, url: str) -> str:
    """Read a part of an answer and go."""
    body = body_of(rng, stream=True, max_tokens=100, stream_options={"continuous_usage_stats": True})
    with httpx.stream("POST", url + CHAT, json=body, timeout=SECONDS) as answer:
        if answer.status_code != 200:
            return str(answer.status_code)
        for _, _line in zip(range(rng.randint(1, 9)), answer.iter_lines(), strict=False):
            pass
    return "left"


def leave_early(rng: random.Random, url: str) -> str:
    """Give up waiting."""
    try:
        timeout = httpx.Timeout(SECONDS, read=rng.choice([0.05, 0.5]))
        httpx.post(url + CHAT, json=body_of(rng, max_tokens=100, n=rng.choice([1, 16])), timeout=timeout)
    except httpx.ReadTimeout:
        return "left"
    return "answered"


def look(rng: random.Random, url: str) -> str:
    """Ask for everything else that there is."""
    paths = [
        "/health",
        "/metrics",
        "/v1/models",
        "/v1/models/x",
        "/v1/experts",
        "/openapi.json",
        "/app.js",
        *PATHS,
    ]
    method = rng.choice(["GET", "HEAD", "OPTIONS", "DELETE", "PUT", "TRACE"])
    answer = httpx.request(method, url + rng.choice(paths), timeout=SECONDS)
    if answer.status_code not in ALLOWED:
        raise WrongAnswerError(f"{answer.status_code} to {method} {answer.url}")
    return str(answer.status_code)


ATTACKS: dict[str, tuple[Attack, ...]] = {
    "grammars": (ask_grammar, ask_schema),
    "bodies": (ask_odd_fields, ask_broken_body, ask_large, ask_other_apis),
    "connections": (drop_connection, drip, send_garbage, never_read, hold_idle, look),
    "disconnects": (leave_stream, leave_early),
}
