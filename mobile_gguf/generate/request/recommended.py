"""The sampling settings that a model's file asks for.

They are ``general.sampling.*``, which llama.cpp's converter writes of a checkpoint's generation_config.json.
"""

from __future__ import annotations

import struct
from typing import Any

from mobile_gguf.errors import UsageError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.options import GenerateOptions, declared

PREFIX = "general.sampling."
# llama.cpp's key, and our option
_OPTIONS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repeat_penalty",
}


def recommended(info: GgufInfo) -> tuple[dict[str, Any], list[str]]:
    """The options that the file asks for, and the keys of settings that are not followed."""
    options: dict[str, Any] = {}
    left: list[str] = []
    for key, value in info.metadata.items():
        if not key.startswith(PREFIX):
            continue
        name = _OPTIONS.get(key.removeprefix(PREFIX))
        try:
            if name is None:
                raise UsageError("no option")
            opt = declared(GenerateOptions)[name]
            options[name] = opt.take(name, _as_written(value) if isinstance(value, float) else value)
        except UsageError:
            left.append(key)
    return options, left


def _as_written(value: float) -> float:
    """The shortest decimal that is the same float32: 0.6 and not 0.60000002384."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value
