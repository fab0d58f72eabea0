"""Configurations that plans are held against, and how each is measured, foreseen and run."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from mobile_gguf.device.tier import find_devices
from mobile_gguf.engine.devices import Device
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.fit import asked_of, fit_model
from mobile_gguf.memory.machine import read_memory
from mobile_gguf.options import LoadOptions, make_options
from mobile_gguf.options.words import BIG_LITTLE
from mobile_gguf.plan.disk import disk_name
from mobile_gguf.plan.ggml import Ggml
from mobile_gguf.plan.machine import Lesson, Measurements, correct, identify_machine
from mobile_gguf.plan.measure import measure, steps_for
from mobile_gguf.plan.planner import settings_of
from mobile_gguf.plan.predict import predict
from mobile_gguf.plan.speed import Prediction
from mobile_gguf.plan.workload import read_workload
from mobile_gguf.sizes import OFF

from .arm import Arm, Runner, text_of
from .disk import drop_page_cache
from .rpc_device import rpc_server
from .trace import Trace

PROMPT = "The history of the city begins long before the first written records, and"
N_TOKENS = 48
SLACK = 700 << 20
N_CTX = 512


@dataclass(frozen=True)
class Case:
    """One configuration; with ``vram`` the device is an RPC server on loopback with one CPU thread."""

    model: str  # "demo" or "replay"
    mode: str
    budget: str
    threads: int
    vram: str = ""
    placement: str = ""
    miss: str = "auto"

    @property
    def device(self) -> str:
        """For the table."""
        miss = f", {self.miss}" if self.placement == "cache" else ""
        return f"{self.placement} {self.vram}{miss}" if self.vram else "-"

    def options(self, rpc: str = "") -> LoadOptions:
        """What the model is loaded with."""
        asked = {"mode": self.mode, "ram_budget": self.budget, "threads": self.threads, "n_ctx": N_CTX}
        device = {"rpc": rpc, "vram_budget": self.vram, "placement": self.placement, "miss": self.miss}
        return make_options(LoadOptions, asked | (device if rpc else {"vram_budget": OFF}))


@dataclass
class Result:
    """A case's runs: predicted and actual tokens per second, one each per round."""

    case: Case
    predicted: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    actual: list[float] = field(default_factory=list)
    learnt: list[float] = field(default_factory=list)  # as corrected by the rounds before
    loads: list[float] = field(default_factory=list)  # of the machine
    lesson: Lesson = field(default_factory=Lesson)

    @property
    def error(self) -> float:
        """Of the medians: predicted over actual, less one."""
        return statistics.median(self.predicted) / statistics.median(self.actual) - 1


HOST_CASES = (
    *(Case("demo", "exact", budget, 1) for budget in ("100%", "50%", "25%", "12%")),
    *(Case("demo", mode, budget, 1) for mode in ("little", "big-little") for budget in ("100%", "25%")),
    *(Case("demo", "exact", budget, 2) for budget in ("100%", "25%")),
    *(Case("replay", "exact", budget, 1) for budget in ("100%", "50%", "25%", "12%")),
    *(Case("replay", "little", budget, 1) for budget in ("100%", "25%", "12%")),
    *(Case("replay", "exact", budget, 2) for budget in ("25%",)),
)
DEVICE_CASES = (
    *(Case("demo", "exact", "100%", 1, vram, "layers") for vram in ("100%", "50%", "25%", "12%")),
    *(Case("demo", "exact", "100%", 1, vram, "cache", "cpu") for vram in ("50%", "25%")),
    *(Case("demo", "exact", "100%", 1, vram, "cache", "fetch") for vram in ("50%", "25%")),
    *(Case("demo", "exact", "100%", 1, vram, "cache", "auto") for vram in ("50%", "25%")),
    Case("demo", "little", "100%", 1, "25%", "cache", "cpu"),
    Case("demo", "little", "100%", 1, "25%", "layers"),
    Case("demo", "exact", "50%", 1, "25%", "cache", "fetch"),
    Case("demo", "exact", "50%", 1, "50%", "layers"),
)


@contextmanager
def server_of(case: Case) -> Iterator[str]:
    """The case's RPC server; empty where it has none."""
    if not case.vram:
        yield ""
        return
    with rpc_server() as endpoint:
        yield endpoint


def measure_anew(info: GgufInfo, case: Case, rpc: str = "") -> Measurements:
    """A measurement of what this case needs, kept nowhere but here."""
    known = Measurements(identify_machine())
    k, half = info.n_expert_used, max(1, info.n_expert_used // 2)
    ks = {"exact": [k], "little": [half], BIG_LITTLE: [k, half]}[case.mode]
    resident = case.budget == "100%"
    ggml = Ggml()
    steps = steps_for(
        info, read_workload(info), ks, case.threads, resident=resident, stored=bool(rpc) or not resident,
        devices=_devices(rpc), ggml=ggml, known=known.get,
    )  # fmt: skip
    for problem in measure(known, steps):
        print(problem, file=sys.stderr)
    return known


def foresee(
    case: Case, info: GgufInfo, known: Measurements, n_tokens: int, lesson: Lesson, rpc: str = ""
) -> tuple[Prediction, Prediction]:
    """The prediction without and with what earlier rounds taught."""
    options = case.options(rpc)
    fit = fit_model(info, asked_of(info, options), read_memory(), _devices(rpc))
    workload, disk = read_workload(info), disk_name(info.path)
    found = []
    for share in (None, lesson.big_share):
        settings = replace(settings_of(info, options, fit, case.mode, share), n_tokens=n_tokens)
        found.append(predict(info, workload, known, settings, disk))
    plain, taught = found
    if plain is None or taught is None:
        raise SystemExit("the machine could not be measured")
    return plain, correct(taught, lesson)


def _devices(rpc: str) -> list[Device]:
    return find_devices(rpc) if rpc else []


def mean(predictions: Sequence[Prediction]) -> Prediction:
    """One prediction of several: geometric means."""
    columns = zip(*((one.predicted_tps, one.low, one.high) for one in predictions), strict=True)
    return Prediction(predictions[0].mode, *(statistics.geometric_mean(column) for column in columns))


def run(case: Case, info: GgufInfo, trace: Trace | None, rpc: str = "") -> tuple[float, int, float | None]:
    """Tokens per second, tokens, and the share of big ones."""
    if case.model == "replay":
        assert trace is not None
        return run_replay(case, info, trace)
    from mobile_gguf import load

    drop_page_cache(info.path)
    with load("demo", **_given(case.options(rpc))) as model:
        reply = model.generate(PROMPT, max_tokens=N_TOKENS, seed=1, speculate="off")
    receipt, n_tokens = reply.receipt, reply.usage["completion_tokens"]
    big = receipt.tokens_big - 1 + receipt.tokens_fallback
    share = big / max(1, n_tokens - 1) if case.mode == BIG_LITTLE else None
    return reply.timings["predicted_per_second"], n_tokens, share


def _given(options: LoadOptions) -> dict[str, Any]:
    """The options that differ from the defaults, as keywords of ``load``."""
    usual = LoadOptions()
    return {name: value for name, value in vars(options).items() if value != getattr(usual, name)}


def run_replay(case: Case, info: GgufInfo, trace: Trace) -> tuple[float, int, None]:
    """The same for the model that replays a trace, in a process of its own."""
    budget = fit_model(info, asked_of(info, case.options()), read_memory()).ram_budget_bytes
    resident = case.budget == "100%"
    arm = Arm(
        system="engine", mode=case.mode, budget=case.budget, budget_bytes=0 if resident else budget,
        cap_bytes=budget + SLACK, resident=resident, threads=case.threads, repack=True,
    )  # fmt: skip
    drop_page_cache(info.path)
    runner = Runner(info.path, text_of(trace), {"engine": None}, little_k=info.n_expert_used // 2)
    result = runner.run(arm, N_TOKENS, 60.0)
    if result.error or not result.n_tokens:
        raise SystemExit(f"{case}: {result.error or 'no token came'}")
    return result.n_tokens / result.seconds, result.n_tokens, None
