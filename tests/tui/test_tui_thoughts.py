"""What was thought in earlier turns: the chat template keeps or drops it, as in the other chats."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")
from speaking import DROPS, KEEPS, SHORT, has_thought, prompts, use
from tui_app import Loader, chat, submit, until

import mobile_gguf
from mobile_gguf.api.model import Model


class RealLoader(Loader):
    """The demo model, which speaks by ``template``."""

    def __init__(self, file: Path, template: str) -> None:
        super().__init__()
        self.file, self.template = file, template

    def __call__(self, reference: str, **_options: Any) -> Model:
        model = mobile_gguf.load(self.file, ram_budget="60%", n_ctx=1024, threads=1)
        use(model, self.template)
        return model


@pytest.mark.parametrize("template", [KEEPS, DROPS], ids=["keeps", "drops"])
def test_the_template_says_what_stays(tmp_path: Path, demo_gguf: Path, template: str) -> None:
    async def go() -> str:
        async with chat(tmp_path, loader=RealLoader(demo_gguf, template), given=SHORT) as (app, pilot):
            for n_turns, question in ((2, "one"), (4, "two")):
                await submit(app, pilot, question)
                await until(pilot, lambda n=n_turns: len(app.chat.session.turns) == n and not app.chat.busy)
            session = app.chat.session
            session.open(session.id)  # as it was saved
            return session.messages[1]["reasoning_content"]

    with prompts() as made:
        thought = asyncio.run(go())
    assert has_thought(made[-1], thought) == (template == KEEPS)
