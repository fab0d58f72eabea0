"""A plan counts a model's MTP block where a load has it: the same rule, and what the engine then takes."""

from __future__ import annotations

import json
import re
from typing import Any

import families
import pytest
import tiny_models
from llama_cpp import llama_cpp

import mobile_gguf
from mobile_gguf.api.model import backend_of
from mobile_gguf.cli import main
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info
from mobile_gguf.memory.machine import Memory
from mobile_gguf.memory.threads import default_threads
from mobile_gguf.options import LoadOptions
from mobile_gguf.plan.machine import Measurements, Rate
from mobile_gguf.plan.measure import product_name
from mobile_gguf.plan.planner import make_plan
from mobile_gguf.plan.workload import Workload, read_workload
from mobile_gguf.sizes import GIB, parse_size

pytestmark = pytest.mark.engine
# an attention with biases, a latent one, a hybrid with keys in every fourth layer
SHAPES = ("glm-4.5", "glm-4.7-flash", "qwen3.5-moe")
MIB = 1 << 20
PLENTY = Memory(64 * GIB, 64 * GIB, "the machine")
_SIZE = re.compile(r"(KV|RS|compute) buffer size =\s*([\d.]+) MiB")
_DIGITS = 0.006  # it logs two


def planned(capsys: pytest.CaptureFixture[str], name: str, *words: str) -> dict[str, Any]:
    path = families.folder(name) / "model.gguf"
    command = ["plan", str(path), "-c", "512", "-ub", "64", "--no-measure", "--json", *words]
    capsys.readouterr()
    assert main(command) == 0
    return json.loads(capsys.readouterr().out)


def load(name: str, **options: Any) -> mobile_gguf.Model:
    path = families.folder(name) / "model.gguf"
    return mobile_gguf.load(path, n_ctx=512, n_ubatch=64, threads=1, threads_batch=1, **options)


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_planned_is_what_is_loaded(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    plan = planned(capfd, name, "--speculate", "mtp", "--ram-budget", "60%")
    capfd.readouterr()
    with load(name, speculate="mtp", ram_budget="60%", verbose=True) as model:
        log, backend = capfd.readouterr().err, backend_of(model)
        store, weights = backend.store, int(llama_cpp.llama_model_size(backend.model))
        assert backend.mtp is not None
    found = [(kind, float(size)) for kind, size in _SIZE.findall(log)]
    kept = [size for kind, size in found if kind != "compute"]
    assert plan["kv_bytes"] / MIB == pytest.approx(sum(kept), abs=_DIGITS * len(kept))
    compute = sum(size for kind, size in found if kind == "compute")
    assert compute <= plan["compute_bytes"] / MIB < compute + 4
    assert store is not None
    assert plan["dense_bytes"] == weights - store.expert_bytes
    assert plan["expert_bytes"] == store.expert_bytes
    assert plan["ram_budget_bytes"] == store.budget_bytes
    # and the block's part of it is what is more than without
    plain = planned(capfd, name, "--speculate", "off", "--ram-budget", "60%")
    assert plain["mtp"] is None
    parts = {key: plan[key] - plain[key] for key in plan["mtp"]}
    assert parts == plan["mtp"]
    assert min(parts.values()) > 0


@pytest.mark.parametrize("words", [["100%"], ["60%"], ["100%", "--flash-attn"], ["auto"]])
@pytest.mark.parametrize("speculate", ["auto", "mtp", "ngram"])
def test_a_plan_has_the_block_where_a_load_has(
    words: list[str], speculate: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, "glm-4.5", "--speculate", speculate, "--ram-budget", *words)
    flash = {"flash_attn": True} if len(words) > 1 else {}
    with load("glm-4.5", speculate=speculate, ram_budget=words[0], **flash) as model:
        backend = backend_of(model)
        assert (plan["mtp"] is not None) == (backend.mtp is not None)
        assert backend.fit is not None
        assert plan["dense_bytes"] == backend.fit.demand.dense_bytes
        assert plan["kv_bytes"] == backend.fit.demand.kv_bytes
        assert plan["compute_bytes"] == backend.fit.demand.compute_bytes
    is_there = {"auto": words in (["100%"], ["auto"]), "mtp": True, "ngram": False}[speculate]
    assert (plan["mtp"] is not None) == is_there


def test_who_reads_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    path = families.folder("glm-4.5") / "model.gguf"
    words = ["plan", str(path), "-c", "512", "--no-measure", "--ram-budget", "60%"]
    assert main([*words, "--speculate", "mtp"]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"^drafts +by the model's MTP block, counted here: dense weights .*, experts .*$", said, re.M
    )
    assert "not loaded" not in said
    assert main(words) == 0
    assert re.search(r"^not loaded .*\(MTP\)$", capsys.readouterr().out, re.M)


def made_up(info: GgufInfo, workload: Workload) -> Measurements:
    """A machine that computes all products alike."""
    known, threads = Measurements({}), max(default_threads())
    for n in range(1, threads + 1):
        for product in (*workload.dense, *workload.experts):
            for k in range(1, info.n_expert_used + 1):
                name = product_name(product, n, n_expert=info.n_expert, k=k, usual=True)
                known.put(name, Rate(1e9, 9e8, 1.1e9))
            known.put(product_name(product, n, usual=True), Rate(1e9, 9e8, 1.1e9))
    return known


def test_predicted_speeds_are_those_without_drafts() -> None:
    """The block takes its part of memory, and none of a token's time."""
    path = families.folder("glm-4.5") / "model.gguf"
    info, loaded = (read_gguf_info(path, runs_mtp) for runs_mtp in (False, True))
    assert loaded.n_layer_moe == info.n_layer_moe + 1
    workload = read_workload(info)
    options = LoadOptions(n_ctx=512, n_ubatch=64, ram_budget=parse_size("100%"))
    plan, plain = (
        make_plan(info, workload, made_up(info, workload), options, memory=PLENTY, loaded=one)
        for one in (loaded, None)
    )
    assert plan.fit.ram_budget_bytes > plain.fit.ram_budget_bytes
    assert plan.predictions == plain.predictions != ()


def test_a_model_without_a_block_has_none_to_plan(capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_models.path("qwen3moe")
    assert main(["plan", str(path), "-c", "512", "--no-measure", "--json", "--speculate", "mtp"]) == 0
    assert json.loads(capsys.readouterr().out)["mtp"] is None
