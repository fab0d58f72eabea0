"""A loaded model made to speak by another chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import engine_libs

from mobile_gguf.api.model import Model, backend_of
from mobile_gguf.generate.prompts.chat_prompt import ChatPrompts

DROPS = "Qwen3.5-4B"  # of a finished turn; a template of llama.cpp's source
KEEPS = """{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
# It thinks for four tokens, as it is made to, and says a few.
SHORT: dict[str, Any] = {"reasoning_budget": 4, "max_tokens": 14, "temperature": 0.0}


def has_thought(prompt: str, thought: str) -> bool:
    """Whether the prompt of a second question says what was thought at the first; both must be there."""
    assert thought.strip()
    assert "one" in prompt.partition("two")[0]
    return " ".join(thought.split()) in " ".join(prompt.split())


def use(model: Model, template: str, library: str | None = None) -> None:
    """Have ``model`` speak by the template of that name in llama.cpp's source."""
    path = engine_libs.source_tree() / "models" / "templates" / f"{template}.jinja"
    text = path.read_text(encoding="utf-8") if path.is_file() else template
    backend = backend_of(model)
    before: ChatPrompts = backend._prompts
    before.close()
    library = before._renderer.library if library is None else library
    backend._prompts = ChatPrompts(
        backend, backend.vocabulary, text, before._bos, before._eos, before._n_ctx, library
    )
    model.info = dataclasses.replace(model.info, chat_template=text)


@contextmanager
def prompts() -> Iterator[list[str]]:
    """What templates make of chats meanwhile, as text."""
    made: list[str] = []
    tokens_of = ChatPrompts._tokens_of

    def heard(self: ChatPrompts, prompt: str, hidden: object) -> list[int]:
        made.append(prompt)
        return tokens_of(self, prompt, hidden)  # type: ignore[arg-type]

    with patch.object(ChatPrompts, "_tokens_of", heard):
        yield made
