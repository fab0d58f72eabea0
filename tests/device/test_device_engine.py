"""The device tier over the real engine, by the Python API and the command; the device is an RPC server."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import engine_libs
import numpy as np
import pytest
import tiny_models
from contest_bound import most_steps
from device_oracle import assert_close, same_choices
from device_server import Server, rpc_server, run_child
from engine_jobs import tokens
from memory_caps import capped, inside

from mobile_gguf.device.contest import Rules

MODEL = "qwen3moe"  # 4 layers of 16 experts, top-4
PROMPT, FORCED = tokens(20, 1), tokens(48, 2)
LONG = tokens(1200, 3)
N = 64
MIB = 1 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with rpc_server() as running:
        yield running


def spec(name: str, server: Server | None, model: str = MODEL, **settings: Any) -> dict[str, Any]:
    """A run of ``device_api_child``; ``settings`` that it does not know are load options."""
    own = ("n", "forced", "prompt", "placements", "mode", "watch")
    job = {key: settings.pop(key) for key in own if key in settings}
    options = {"n_ctx": 512, **settings}
    if server is not None:
        options = {"rpc": server.endpoint, "vram_budget": "60%", "placement": "cache", **options}
    path = str(tiny_models.path(model))
    return {"name": name, "model": path, "prompt": PROMPT, "options": options, **job}


def one(job: dict[str, Any], **how: Any) -> dict[str, Any]:
    return run_child(job, **how)[0][job["name"]]


def one_with_choices(job: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """A run that answers, and the logits that chose its tokens."""
    results, arrays = run_child(job)
    return results[job["name"]], arrays[f"{job['name']}-choices"]


def tokens_of(result: dict[str, Any]) -> list[int]:
    return result["answers"][0]["tokens"]


# the same results


def test_an_answer_may_part_only_where_a_rounding_decides():
    logits = np.array([[0.0, 4.0, 3.9], [5.0, 1.0, 4.0]])
    assert same_choices([1, 0], [1, 0], logits, "the same")
    assert not same_choices([2, 2], [1, 0], logits, "near")
    with pytest.raises(AssertionError, match="far: 2 instead of 0"):
        same_choices([1, 2], [1, 0], logits, "far")


@cache
def on_host() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The host alone: 64 tokens, and forced logits."""
    return run_child(
        spec("tokens", None, n=N, vram_budget="off"), spec("logits", None, forced=FORCED, vram_budget="off")
    )


def test_logits_are_stocks_on_the_same_device_and_tokens_the_hosts(server):
    """Every miss policy, both placements, experts in the store and in plain host memory."""
    host, host_arrays = on_host()
    jobs = [
        spec(
            f"{miss}-{ram}", server, forced=FORCED, miss=miss, ram_budget=ram, placements=["cache", "layers"]
        )
        for miss in ("auto", "fetch", "cpu")
        for ram in ("100%", "50%")
    ]
    jobs += [
        spec(f"tokens-{miss}", server, n=N, miss=miss, ram_budget="50%") for miss in ("auto", "fetch", "cpu")
    ]
    results, arrays = run_child(*jobs)
    stock = {"name": "stock", "stock": server.endpoint, "prompt": PROMPT, "forced": FORCED}
    stock["model"] = jobs[0]["model"]
    expected = run_child(stock, lib=engine_libs.stock_lib())[1]["stock"]
    forced = [name for name in arrays if not name.endswith("-choices")]
    assert len(forced) == 12
    for name in forced:
        assert_close(arrays[name], expected, name)
        assert_close(arrays[name], host_arrays["logits"], name)
    for miss in ("auto", "fetch", "cpu"):
        answer = results[f"tokens-{miss}"]["answers"][0]
        same_choices(answer["tokens"], tokens_of(host["tokens"]), host_arrays["tokens-choices"], miss)
        receipt = answer["receipt"]
        assert receipt["vram_budget_bytes"] > 0
        assert receipt["device_hits"] + receipt["device_misses"] > 0, miss
        # whether an upload pays for what the CPU would compute is measured, and may be never
        assert receipt["device_hits"] > 0 or miss != "fetch"


def test_little_and_fallback_are_the_hosts(server):
    jobs = [
        spec(f"{where}-{mode}", on, n=24, mode=mode, ram_budget="50%", **extra)
        for where, on, extra in (("host", None, {"vram_budget": "off"}), ("device", server, {}))
        for mode in ("little", "big-little")
    ]
    results, arrays = run_child(*jobs)
    for mode in ("little", "big-little"):
        host, device = (results[f"{where}-{mode}"]["answers"][0] for where in ("host", "device"))
        if same_choices(device["tokens"], host["tokens"], arrays[f"host-{mode}-choices"], mode):
            for field in ("tokens_big", "tokens_little", "tokens_fallback"):
                assert device["receipt"][field] == host["receipt"][field]


# what is counted


@pytest.mark.parametrize("miss", ["auto", "fetch", "cpu"])
@pytest.mark.parametrize("budget", ["55%", "80%"])
def test_counters_add_up(server, miss, budget):
    result = one(spec("r", server, forced=FORCED, miss=miss, vram_budget=budget, ram_budget="50%"))
    host, _ = on_host()
    routed = host["logits"]["counters"]["n_hits"] + host["logits"]["counters"]["n_misses"]
    counted = result["device_counters"]
    store = result["stats"]["store"]
    expert = store["expert_bytes"] // (store["n_layer_moe"] * store["n_expert"])
    assert counted["n_hits"] + counted["n_misses"] == routed
    assert counted["n_misses"] == counted["n_fetched"] + counted["n_cpu"]
    assert result["counters"]["n_hits"] + result["counters"]["n_misses"] == counted["n_misses"]
    n_uploads = counted["n_fetched"] + counted["n_admitted"] + counted["n_ahead"]
    assert counted["bytes_uploaded"] == n_uploads * expert
    assert counted["bytes_uploaded_background"] == counted["n_admitted"] * expert
    # what came and did not leave is there, once
    n_there = n_uploads - counted["n_evictions"]
    assert result["n_resident"] == n_there
    assert counted["resident_bytes"] == n_there * expert
    assert counted["resident_bytes_peak"] <= result["stats"]["device"]["budget_bytes"]
    if miss == "cpu":
        assert counted["n_fetched"] == 0
    if miss == "fetch":
        assert counted["n_admitted"] == 0


# budgets are promises


def test_both_budgets_hold_and_nothing_grows_after_the_load():
    """Three tiers of 200 MB of experts: a quarter on the device, a fifth in memory, under a hard cap."""
    # of the policies the one that uploads whatever was measured
    options = {
        "model": "bulky", "n": 24, "ram_budget": "20%", "vram_budget": "25%", "n_ctx": 2048, "miss": "fetch",
    }  # fmt: skip
    off, choices = one_with_choices(spec("r", None, **(options | {"vram_budget": "off"}), prompt=LONG))
    with rpc_server() as server:
        before = server.resident()
        free = one(spec("r", server, **options, prompt=LONG, watch=server.process.pid))
        grown = server.resident() - before
    device = free["stats"]["device"]
    expert_bytes, budget = free["stats"]["store"]["expert_bytes"], device["budget_bytes"]
    same_choices(tokens_of(free), tokens_of(off), choices, "without a cap")
    assert budget == expert_bytes // 4
    pool = sum(item["pool_bytes"] for item in device["devices"])
    assert 0.9 * budget < pool <= budget
    assert pool <= grown < expert_bytes / 2, "the server holds more than its budget"
    # beside buffers the server takes memory for messages; attention scores alone are twice as much as allowed
    scores = 4 * 2048 * 512 * 4
    assert free["watched"] < free["watched_at_load"] + scores // 2, "a long prompt took more device memory"
    # room for the process itself and its own budget, but not for half of the experts beside
    limit = int((off["peak"] + 8 * MIB) * 1.1)
    with rpc_server() as server, capped(limit) as group:
        held = one(spec("r", server, **options, prompt=LONG), prefix=inside(group))
        assert group.oom_kills() == 0
    same_choices(tokens_of(held), tokens_of(off), choices, "under a cap")
    counters = held["stats"]["counters"]
    assert counters["resident_bytes_peak"] <= free["stats"]["store"]["budget_bytes"]
    assert held["stats"]["device"]["counters"]["bytes_uploaded"] > 0
    assert counters["bytes_read"] > 0


def test_a_device_that_refuses_the_pool():
    """An asked budget is an error with numbers, auto takes what there is, the host alone goes on working."""
    with rpc_server() as server:
        status = server.resident("VmSize")
        # the dense part and its buffers take some 60 MB, the pool would take 200
        resource.prlimit(server.process.pid, resource.RLIMIT_AS, (status + 160 * MIB, status + 160 * MIB))
        options = {"model": "bulky", "n": 4, "ram_budget": "20%", "n_ctx": 512}
        asked = one(spec("r", server, **options, vram_budget="100%"))
        automatic = one(spec("r", server, **options, vram_budget="auto"))
        host, choices = one_with_choices(spec("r", None, **options, vram_budget="off"))
    assert asked["error"] == "BudgetError"
    for part in ("vram_budget 100%", "RPC0", "bytes", "free", "vram_budget off"):
        assert part in asked["message"]
    assert 0 < automatic["stats"]["device"]["budget_bytes"] < host["stats"]["store"]["expert_bytes"]
    assert any("less room for experts" in notice for notice in automatic["notices"])
    same_choices(tokens_of(automatic), tokens_of(host), choices, "auto")


# never slower


def test_placement_is_decided_on_the_users_tokens_and_remembered(server):
    job = spec("r", server, n=most_steps(Rules()) + 2, placement="auto", ram_budget="100%")
    (first, choices), second = one_with_choices(job), one(job | {"n": 8})
    facts = first["stats"]["device"]["placement"]
    assert facts["decided"]
    assert facts["chosen"] in ("cache", "layers", "host")
    assert all(facts[f"{arm}_tps"] > 0 for arm in ("cache", "layers", "host"))
    again = second["stats"]["device"]["placement"]
    assert (again["chosen"], again["reason"]) == (facts["chosen"], "measured in an earlier run")
    same_choices(tokens_of(second), tokens_of(first)[:8], choices[:8], "an earlier run's placement")


def test_everything_on_the_device(server):
    result = one(spec("r", server, n=N, placement="auto", vram_budget="100%"))
    facts = result["stats"]["device"]["placement"]
    assert (facts["chosen"], facts["reason"]) == ("layers", "all experts fit")
    host, arrays = on_host()
    same_choices(tokens_of(result), tokens_of(host["tokens"]), arrays["tokens-choices"], "layers")


def test_a_dense_model_on_the_device(server):
    result = one(spec("r", server, model="dense", n=8, vram_budget="auto"))
    host, choices = one_with_choices(spec("r", None, model="dense", n=8, vram_budget="off"))
    same_choices(tokens_of(result), tokens_of(host), choices, "dense")
    assert result["stats"]["device"] is None


# the command


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mobile_gguf", *arguments],
        capture_output=True, text=True, timeout=800, check=False,
        env=engine_libs.child_environment(engine_libs.engine_lib()),
    )  # fmt: skip


def test_run_json_has_the_tier_in_its_receipt(server, demo_gguf):
    line = [
        "run",
        str(demo_gguf),
        "Why is the sky blue?",
        "--temp",
        "0",
        "-n",
        "24",
        "-t",
        "1",
        "-c",
        "512",
        "--json",
    ]
    there = [*line, "--rpc", server.endpoint]
    device = command(*there, "--vram-budget", "50%", "--placement", "cache", "--miss", "fetch")
    # the host's own kernels (repacked weights, AMX) round otherwise, and a real model's text goes its own way
    whole = command(*there, "--vram-budget", "100%")
    host = command(*line, "--vram-budget", "off")
    assert device.returncode == whole.returncode == host.returncode == 0, device.stderr
    on_device, all_there, alone = (json.loads(done.stdout) for done in (device, whole, host))
    assert on_device["text"] == all_there["text"]
    assert on_device["receipt"]["device_hits"] > 0
    assert on_device["receipt"]["bytes_uploaded"] > 0
    assert alone["receipt"]["device_hits"] == alone["receipt"]["vram_budget_bytes"] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--vram-budget", "1KiB", "--rpc", "SERVER"], 2, "smallest legal one for this model is"),
        (["--vram-budget", "off", "--rpc", "SERVER"], 2, "--vram-budget off uses none"),
        (["--vram-budget", "3X"], 2, "'3X' is not a size"),
        (["--vram-budget", "50%"], 2, "no device here"),
        (["--miss", "fly"], 2, "choose auto, fetch, cpu"),
    ],
)
def test_errors_are_one_line(server, arguments, code, words):
    arguments = [server.endpoint if argument == "SERVER" else argument for argument in arguments]
    done = command("run", str(tiny_models.path(MODEL)), "x", "--raw", "-n", "1", *arguments)
    assert done.returncode == code
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


# slow links


@contextmanager
def slow_link(server: Server, megabytes: float) -> Iterator[Server]:
    """The server behind a link of so many megabytes per second."""
    port = server.endpoint.rpartition(":")[2]
    command = [sys.executable, "-m", "mobile_gguf.bench.slow_link", port, str(megabytes)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield Server(f"127.0.0.1:{process.stdout.readline().decode().strip()}", process)
    finally:
        process.kill()
        process.communicate()


ATTEMPTS = 5


def run_on(link: Server, holds: Callable[[dict[str, int]], bool], **options: Any) -> dict[str, Any]:
    """A run whose device counters are as they have to be where the processor computes when it is asked to.

    What the CPU takes for an expert is measured, and on a busy machine now and then as long as an upload.
    """
    counted: dict[str, int] = {}
    for _ in range(ATTEMPTS):
        result = one(spec("slow", link, **options))
        counted = result["stats"]["device"]["counters"]
        if holds(counted):
            return result
    raise AssertionError(f"{options}: never, and last {counted}")


def test_over_a_slow_link_uploads_are_measured_and_left_out(server):
    """An upload takes a hundred thousand times as long as the CPU: nothing the CPU computes pays for one."""
    megabytes = 0.5

    def left_out(tries: bool) -> Callable[[dict[str, int]], bool]:
        # auto does not even try it
        return lambda counted: counted["bytes_uploaded"] == 0 and (counted["n_ahead_dropped"] > 0) == tries

    with slow_link(server, megabytes) as link:
        for miss, prefetch in (("cpu", "auto"), ("auto", "auto"), ("cpu", "on")):
            options = {"n": 12, "miss": miss, "prefetch": prefetch, "vram_budget": "60%"}
            result = run_on(link, left_out(prefetch == "on"), **options)
            device = result["stats"]["device"]
            info, counted = device["devices"][0], device["counters"]
            bytes_per_expert = info["expert_bytes"] / (info["n_layers"] * 16)
            # a link is never faster than its limit, however busy the machine is
            assert info["upload_us"] > 0.9 * bytes_per_expert / megabytes
            assert info["stall_us"] > 0
            assert counted["n_misses"] > 0
            assert counted["n_admitted"] == counted["n_fetched"] == counted["n_ahead"] == 0
            host, arrays = on_host()
            expected, choices = tokens_of(host["tokens"])[:12], arrays["tokens-choices"][:12]
            same_choices(tokens_of(result), expected, choices, result["answers"][0]["text"])

        # fetched experts keep the link busy: a hinted one would come too late
        def too_late(counted: dict[str, int]) -> bool:
            return counted["n_fetched"] > 0 == counted["n_ahead"] and counted["n_ahead_dropped"] > 0

        run_on(link, too_late, n=4, miss="fetch", prefetch="on")
