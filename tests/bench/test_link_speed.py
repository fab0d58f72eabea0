"""Arms behind a link: which there are, and their rows."""

from __future__ import annotations

from typing import Any

import pytest

from mobile_gguf.bench import link_speed


@pytest.mark.parametrize(
    ("arms", "says"),
    [
        ("fetch,fast", "'fast' is none of host, cpu, fetch, auto, buddy, ahead, kept:N"),
        ("fetch,kept:", "'kept:' is none of"),
        ("host", "one is to be on the device"),
    ],
)
def test_what_is_no_arm(arms: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        link_speed.main(["--arms", arms])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_every_arm_is_a_row() -> None:
    arm: dict[str, Any] = {
        "tokens_per_s": {"median": 2.0, "low": 1.0, "high": 3.0},
        "hit_rate": 0.75,
        "bytes_per_token": 2048.0,
    }
    page = link_speed.page(
        {
            "hardware": "a machine", "model": "m.gguf", "vram_budget": "75%", "tokens": 8, "rounds": 3,
            "command": "python -m mobile_gguf.bench.link_speed",
            "links": [
                {
                    "megabytes_per_s": 20.0, "devices": [{}],
                    "arms": {"host": arm | {"hit_rate": None}, "buddy": arm, "kept:2": arm},
                }
            ],
        }
    )  # fmt: skip
    assert "| 20 MB/s | 0.00 / 0.00 ms | host | 2.00 (1.00-3.00) |  |  |" in page
    assert "| 20 MB/s | 0.00 / 0.00 ms | kept:2 | 2.00 (1.00-3.00) | 75% | 2.0 KiB |" in page
