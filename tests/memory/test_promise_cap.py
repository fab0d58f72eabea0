"""A total is a promise: under a hard limit of that very size what ``plan`` lets pass starts, talks and ends.

MOBILE_GGUF_TEST_PROMISES=100 tries so many settings.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from typing import Any

import engine_libs
import pytest
import tiny_models
from memory_caps import capped, inside
from places import SUPPORT

from mobile_gguf.flags import arguments
from mobile_gguf.options import LoadOptions, make_options
from mobile_gguf.sizes import MIB

pytestmark = pytest.mark.engine
MODELS = ("bulky", "bulky", "qwen3moe", "nemotron-h")
KILLED = -9
N_SETTINGS = int(os.environ.get("MOBILE_GGUF_TEST_PROMISES", "3"))


def a_setting(seed: int) -> tuple[str, dict[str, Any]]:
    """A model and options of a load."""
    pick = random.Random(seed)
    types = ["f16", "f16", "q8_0", "q4_0"]
    options: dict[str, Any] = {
        "memory": pick.randint(230, 700) * MIB,
        "n_ctx": pick.choice([None, None, 512, 2048, 4096, 8192]),
        "cache_type_k": pick.choice(types),
        "cache_type_v": pick.choice(types),
        "flash_attn": "auto",
        "n_ubatch": pick.choice(["auto", 512, 128]),
        "threads": 1,
        "threads_batch": 1,
        "vram_budget": "off",
        "parallel": pick.choice([None, None, 3]),
        "session_cache": pick.choice(["off", "32MiB"]),
    }
    if pick.random() < 0.3:
        options["prefix_cache"] = pick.choice(["off", "16MiB"])
    if pick.random() < 0.3:
        options["ram_budget"] = pick.choice(["30%", "100%"])
    return pick.choice(MODELS), options


def talk(
    name: str, options: dict[str, Any], *prefix: str, blind: bool = False
) -> subprocess.CompletedProcess[str]:
    flags = arguments(make_options(LoadOptions, options))
    path = str(tiny_models.path(name))
    job = {"path": path, "flags": flags, "options": options, "seed": 1, "blind": blind}
    command = [*prefix, sys.executable, str(SUPPORT / "promise_child.py"), json.dumps(job)]
    environment = engine_libs.child_environment(engine_libs.engine_lib())
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("seed", range(N_SETTINGS))
def test_what_a_plan_lets_pass_stays_within_its_total(seed: int) -> None:
    name, options = a_setting(seed)
    with capped(options["memory"]) as group:
        done = talk(name, options, *inside(group))
        assert group.oom_kills() == 0, (name, options)
    assert done.returncode == 0, (name, options, done.stderr[-1500:])
    told = json.loads(done.stdout.splitlines()[-1])
    if told["fits"]:
        assert sum(told["split"].values()) == options["memory"]
        assert told["computed"] > 0


def test_a_total_with_little_room_is_used() -> None:
    """Not refused: the same model without a bound takes more."""
    options = {"memory": 330 * MIB, "threads": 1, "threads_batch": 1, "vram_budget": "off"}
    with capped(options["memory"]) as group:
        done = talk("bulky", options, *inside(group))
        assert group.oom_kills() == 0
    assert done.returncode == 0, done.stderr[-1500:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["fits"]
    assert told["split"]["experts_bytes"] < 200 * MIB


def test_a_promise_that_is_broken_ends_the_process() -> None:
    """The planted fault: a total of more than the limit, by a plan that does not see it."""
    options = {"memory": 800 * MIB, "ram_budget": "100%", "threads": 1, "threads_batch": 1}
    with capped(230 * MIB) as group:
        done = talk("bulky", options | {"vram_budget": "off"}, *inside(group), blind=True)
        assert done.returncode == KILLED, (done.stdout, done.stderr[-500:])
        assert group.oom_kills() > 0
