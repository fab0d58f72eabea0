"""What is told of a model that runs: answers count from their prompts on."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")

import mobile_gguf
from mobile_gguf.api.stats import running_facts
from mobile_gguf.cli.ps import _row
from mobile_gguf.files.running import CHAT, Running


def test_an_answer_counts_from_its_prompt_on(demo_gguf: Path) -> None:
    with mobile_gguf.load(demo_gguf, ram_budget="60%", n_ctx=512, threads=1) as model:

        def at_work() -> tuple[int, int, int]:
            facts = running_facts(model)
            return facts["answers"], facts["prompts"], facts["most_answers"]

        assert at_work() == (0, 0, 1)
        while_reading, while_speaking = [], []
        for _ in model.stream_chat(
            "Hello", max_tokens=3, on_prompt=lambda *_: while_reading.append(at_work())
        ):
            while_speaking.append(at_work())
        assert set(while_reading) == {(1, 1, 1)}
        assert set(while_speaking) == {(1, 0, 1)}
        assert at_work() == (0, 0, 1)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"answers": 0, "prompts": 0, "most_answers": 4}, "0 of 4"),
        ({"answers": 2, "prompts": 0, "most_answers": 4}, "2 of 4"),
        ({"answers": 2, "prompts": 1, "most_answers": 4}, "2 of 4, 1 reads its prompt"),
        ({"answers": 3, "prompts": 2, "most_answers": 4}, "3 of 4, 2 read their prompts"),
        ({"answers": 1, "most_answers": 1}, "1 of 1"),  # by another version
        ({"prompts": "x"}, "-"),
    ],
)
def test_how_they_are_listed(told: dict[str, object], said: str) -> None:
    assert _row(Running(1, "", CHAT, told))[6] == said
