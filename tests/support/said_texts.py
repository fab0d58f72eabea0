"""What written models say: thoughts, then a call of a tool, in the forms of four families' own templates.

Each calls the tool that it was made for, and says ``TOLD`` once the tool has answered.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import engine_libs
import said_models
import tiny_models
from said_models import CUT, Says

THOUGHT, TOLD = "I have to look at the file first.", "The file holds one word."
TOOL, ARGUMENTS = "look", {"path": "notes.txt", "lines": 3}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "lines": {"type": "integer", "minimum": 1}},
    "required": ["path", "lines"],
}
_THINK = ("<think>", "</think>")


def _qwen(name: str, arguments: dict[str, Any]) -> Says:
    called = {"name": name, "arguments": arguments}
    return Says(
        "Qwen-Qwen3-0.6B",
        f"<think>\n{THOUGHT}\n</think>\n\n<tool_call>\n{json.dumps(called)}\n</tool_call>",
        starts={"\n": "<think>", "\n\n": "<tool_call>"},
        end="<|im_end|>",
        then=TOLD,
        told="</tool_response>",
        back=6,
        controls=("<|im_start|>", "<|im_end|>"),
        marks=(*_THINK, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    )


def _harmony(name: str, arguments: dict[str, Any]) -> Says:
    return Says(
        "openai-gpt-oss-120b",
        f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>ass{CUT}istant"
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{json.dumps(arguments)}",
        starts={"assistant": "<|channel|>"},
        end="<|call|>",
        then=f"<|channel|>final<|message|>{TOLD}<|return|>",
        told="<|start|>functions",
        controls=(
            "<|start|>",
            "<|end|>",
            "<|message|>",
            "<|channel|>",
            "<|constrain|>",
            "<|return|>",
            "<|call|>",
        ),
        marks=("<|start|>functions", "assistant"),
    )


def _deepseek(name: str, arguments: dict[str, Any]) -> Says:
    calls, end_calls = _mark("tool calls begin"), _mark("tool calls end")
    call, end_call, behind_name = _mark("tool call begin"), _mark("tool call end"), _mark("tool sep")
    output, end_output = _mark("tool output begin"), _mark("tool output end")
    user, assistant = _mark("User"), _mark("Assistant")
    begin, end = _mark("begin of sentence"), _mark("end of sentence")
    called = f"{call}{name}{behind_name}{json.dumps(arguments)}{end_call}"
    return Says(
        "deepseek-ai-DeepSeek-V3.1",
        f"<think>{THOUGHT}</think>{calls}{called}{end_calls}",
        starts={"<think>": THOUGHT, "</think>": calls, end_output: "<think>"},
        end=end,
        then=TOLD,
        told=output,
        controls=(begin, end),
        marks=(*_THINK, user, assistant, calls, end_calls, call, end_call, behind_name, output, end_output),
    )


def _mark(words: str) -> str:
    """A mark between wide bars, with blocks for spaces."""
    return f"<\uff5c{words}\uff5c>".replace(" ", "\u2581")


def _glm(name: str, arguments: dict[str, Any]) -> Says:
    told = [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in arguments.items()]
    given = "".join(f"\n<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>" for key, value in told)
    return Says(
        "GLM-4.6",
        f"\n<think>{THOUGHT}</think>\n<tool_call>{name}{given}\n</tool_call>",
        starts={"<|assistant|>": "\n<think>", "</think>": "\n<tool_call>"},
        end="<|observation|>",
        then=f"\n{TOLD}",
        told="</tool_response>",
        controls=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        marks=(*_THINK, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    )


FAMILIES = {"qwen3": _qwen, "harmony": _harmony, "deepseek": _deepseek, "glm": _glm}


def saying(family: str, demo: Path, tool: str = TOOL, arguments: Any = ARGUMENTS, **changes: Any) -> Path:
    """The file of a model of ``family`` that calls ``tool``; it is kept beside other models of the tests."""
    says = FAMILIES[family](tool, arguments)
    template = engine_libs.source_tree() / "models" / "templates" / f"{says.template}.jinja"
    says = replace(says, template=template.read_text(encoding="utf-8"), **changes)
    digest = hashlib.sha256(json.dumps(asdict(says), sort_keys=True).encode())
    for part in (Path(said_models.__file__).read_bytes(), demo.name.encode()):
        digest.update(part)
    path = tiny_models.CACHE / f"said-{family}-{digest.hexdigest()[:16]}.gguf"
    if not path.exists():
        with tiny_models.one_builder():
            if not path.exists():
                said_models.write(path.with_suffix(".partial"), says, demo).rename(path)
    return path
