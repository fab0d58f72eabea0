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
        controls=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"),
        marks=("<|start|>functions", "assistant"),
    )


def _deepseek(name: str, arguments: dict[str, Any]) -> Says:
    begin, end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    called = f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{json.dumps(arguments)}<｜tool▁call▁end｜>"
    return Says(
        "deepseek-ai-DeepSeek-V3.1",
        f"<think>{THOUGHT}</think>{begin}{called}{end}",
        starts={"<think>": THOUGHT, "</think>": begin, "<｜tool▁output▁end｜>": "<think>"},
        end="<｜end▁of▁sentence｜>",
        then=TOLD,
        told="<｜tool▁output▁begin｜>",
        controls=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        marks=(
            *_THINK, "<｜User｜>", "<｜Assistant｜>", begin, end, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
            "<｜tool▁sep｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
        ),
    )  # fmt: skip


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
