"""Runs arms on a loaded model with a device: ``python -m mobile_gguf.bench.gpu_kit.replay_child``.

Reads one JSON job from stdin and writes one JSON event a line: ``loaded``, ``run``, ``refused``, ``done``.
One load serves all arms of the engine, which are slot pools of one context; an arm of stock llama.cpp is a
load of its own, since ``--n-cpu-moe`` is decided there. The trace's tokens are fed by id. Device memory is
what the driver calls free, before the load and while the arm is in force.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mobile_gguf.device.controller import PlacementController
from mobile_gguf.device.tier import find_devices
from mobile_gguf.engine import binding
from mobile_gguf.engine import log as llama_log
from mobile_gguf.engine.device_calls import DeviceCalls
from mobile_gguf.engine.devices import Device, device_array, list_devices
from mobile_gguf.errors import EngineError, MobileError
from mobile_gguf.options.words import BIG_LITTLE, CACHE, LAYERS

_ALL_LAYERS = 999
_CONTEST_STEPS = 330  # of which a contest of placements takes 312 at most


@dataclass(frozen=True)
class KitArm:
    """One system under one budget. ``placement`` auto: the contest is held first, and its winner measured.

    ``mode`` big-little: each token with half of its experts, and each second one again with all of them, the
    share that plan expects where nothing is known of a model. What the text would decide is not asked: the
    replay's means nothing.
    """

    name: str
    budget_bytes: int = 0
    placement: str = CACHE
    miss: str = "auto"
    mode: str = "exact"


@dataclass(frozen=True)
class KitJob:
    """``n_cpu_moe`` makes it a run of the library as it comes, with so many layers' experts on the host."""

    model: str
    prompt: list[int]
    decode: list[int]
    rpc: str = ""
    threads: int = 1
    little_k: int = 1
    repeats: int = 3
    limit_s: float = 10.0
    n_cpu_moe: int | None = None
    arms: list[KitArm] = field(default_factory=list)


class _Override(ctypes.Structure):
    """``struct llama_model_tensor_buft_override``."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p)]


def _devices_of_stock(library: Any, endpoint: str) -> list[Device]:
    """A server's device in a library without our calls, through ggml's own."""
    rpc = ctypes.CDLL(str(Path(os.environ["LLAMA_CPP_LIB_PATH"]) / "libggml-rpc.so"))
    address = ctypes.c_void_p
    add = binding.bind_function(rpc, "ggml_backend_rpc_add_server", address, [ctypes.c_char_p])
    get = binding.bind_function(library, "ggml_backend_reg_dev_get", address, [address, ctypes.c_size_t])
    registry = add(endpoint.encode())
    if not registry:
        raise EngineError(f"no RPC server at {endpoint}")
    return list_devices(library, [get(registry, 0)])[:1]


class _Loaded:
    """The model and its context on the device."""

    def __init__(self, job: KitJob) -> None:
        self.job = job
        library, self.path = binding.load_library()
        from llama_cpp import llama_cpp

        self.llama = llama_cpp
        llama_log.capture_log()
        llama_cpp.llama_backend_init()
        self.engine = binding.find_engine() if job.n_cpu_moe is None else None
        if job.n_cpu_moe is None and self.engine is None:
            raise binding.needs_engine("this arm")
        stock_on_server = self.engine is None and job.rpc
        self.devices = _devices_of_stock(library, job.rpc) if stock_on_server else find_devices(job.rpc)[:1]
        if not self.devices:
            raise EngineError("the engine sees no device")
        self.free_before = self.devices[0].free_bytes
        started = time.perf_counter()
        self._load(library)
        self.load_s = time.perf_counter() - started
        self.n_past = 0

    def _load(self, library: Any) -> None:
        llama_cpp, job = self.llama, self.job
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = _ALL_LAYERS
        params.load_mode = 0  # read, not mapped: both alike
        self._array = device_array(self.devices)  # kept while loading
        params.devices = ctypes.cast(self._array, ctypes.c_void_p)
        if self.engine is not None:
            self.engine.set_load_params(budget_bytes=0, on_host=True)
        elif job.n_cpu_moe:
            params.tensor_buft_overrides = ctypes.cast(self._overrides(library), ctypes.c_void_p)
        self.model = llama_cpp.llama_model_load_from_file(job.model.encode(), params)
        if not self.model:
            raise EngineError(f"{job.model} does not load: {llama_log.last_errors() or 'no reason given'}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = (len(job.prompt) + len(job.decode) // 256 + 2) // 256 * 256 + 512
        context.n_batch = context.n_ubatch = 512
        context.n_threads = context.n_threads_batch = job.threads
        context.no_perf = True
        self.ctx = llama_cpp.llama_init_from_model(self.model, context)
        if not self.ctx:
            raise EngineError(f"no context: {llama_log.last_errors() or 'no reason given'}")

    def _overrides(self, library: Any) -> Any:
        """What llama.cpp's ``--n-cpu-moe N`` stands for: the experts of the first N layers on the host."""
        host = binding.bind_function(library, "ggml_backend_cpu_buffer_type", ctypes.c_void_p, [])()
        layers = range(self.job.n_cpu_moe or 0)
        self._patterns = [rf"blk\.{i}\.ffn_(up|down|gate|gate_up)_(ch|)exps".encode() for i in layers]
        self._table = (_Override * (len(self._patterns) + 1))(*((p, host) for p in self._patterns))
        return self._table

    def driver(self) -> dict[str, int]:
        """Bytes of the device by its driver: free now, and taken since before the load."""
        free = find_devices(self.job.rpc)[0].free_bytes if not self.job.rpc else self.devices[0].free_bytes
        return {"free_bytes": free, "taken_bytes": self.free_before - free}

    @property
    def _memory(self) -> Any:
        return self.llama.llama_get_memory(self.ctx)

    def clear(self) -> None:
        """No tokens."""
        self.llama.llama_memory_clear(self._memory, True)

    def forget_last(self, n_past: int) -> None:
        """Take back what follows the first ``n_past`` tokens."""
        self.llama.llama_memory_seq_rm(self._memory, 0, n_past, -1)

    def feed(self, tokens: list[int]) -> None:
        """Decode and wait for the end."""
        array = (self.llama.llama_token * len(tokens))(*tokens)
        status = self.llama.llama_decode(self.ctx, self.llama.llama_batch_get_one(array, len(tokens)))
        self.llama.llama_synchronize(self.ctx)
        if status != 0:
            reason = self.engine.context_error(self.ctx) if self.engine is not None else ""
            raise EngineError(f"decoding failed with status {status}{': ' + reason if reason else ''}")


def _run(loaded: _Loaded, step: Callable[[int, int], None]) -> dict[str, Any]:
    """One pass over the trace: prompt, then tokens one by one until the limit."""
    job = loaded.job
    loaded.clear()
    if loaded.engine is not None:
        loaded.engine.set_n_expert_used(loaded.ctx, 0)
    started = time.perf_counter()
    loaded.feed(job.prompt)
    prompt_s = time.perf_counter() - started
    started, n_done = time.perf_counter(), 0
    for token in job.decode:
        step(token, len(job.prompt) + n_done)
        n_done += 1
        if time.perf_counter() - started > job.limit_s:
            break
    return {"prompt_s": prompt_s, "decode_s": time.perf_counter() - started, "n_tokens": n_done}


def _stepper(
    loaded: _Loaded, arm: KitArm, controller: PlacementController | None
) -> Callable[[int, int], None]:
    """How the arm decodes the token at a position."""
    engine = loaded.engine

    def exact(token: int, _at: int) -> None:
        if controller is None:
            loaded.feed([token])
            return
        controller.before_step("exact")
        started = time.perf_counter()
        loaded.feed([token])
        controller.after_step(time.perf_counter() - started)

    def big_little(token: int, at: int) -> None:
        assert engine is not None
        engine.set_n_expert_used(loaded.ctx, loaded.job.little_k)
        loaded.feed([token])
        if at % 2:
            engine.prefetch_masked(loaded.ctx)
            loaded.forget_last(at)
            engine.set_n_expert_used(loaded.ctx, 0)
            loaded.feed([token])

    return big_little if arm.mode == BIG_LITTLE else exact


def _run_engine(loaded: _Loaded) -> None:
    """All arms in turn, round after round; the first use of an arm fills its slots and is not counted."""
    assert loaded.engine is not None
    calls = DeviceCalls(loaded.engine, loaded.ctx)
    winners: dict[str, str] = {}
    for repeat in range(loaded.job.repeats):
        for arm in loaded.job.arms:
            placement = winners.get(arm.name, CACHE if arm.placement == "auto" else arm.placement)
            try:
                calls.start(
                    arm.budget_bytes, miss=arm.miss, placement=LAYERS if placement == LAYERS else CACHE
                )
            except MobileError as error:
                _emit("refused", arm=asdict(arm), repeat=repeat, error=str(error))
                continue
            contest = None
            if arm.placement == "auto" and arm.name not in winners:
                contest = _contest(loaded, calls, arm)
                placement = winners[arm.name] = contest["chosen"]
            calls.set_placement(placement)
            step = _stepper(loaded, arm, None)
            warm_up = _run(loaded, step)
            loaded.engine.reset_counters(loaded.ctx)
            found = _run(loaded, step)
            _emit(
                "run", arm=asdict(arm), repeat=repeat, placement=placement, contest=contest, warm_up=warm_up,
                driver=loaded.driver(), device=asdict(calls.counters()),
                host=asdict(loaded.engine.counters(loaded.ctx)),
                slots=[asdict(one) for one in calls.devices()], **found,
            )  # fmt: skip
            calls.stop()


def _contest(loaded: _Loaded, calls: DeviceCalls, arm: KitArm) -> dict[str, Any]:
    """Placements compared on the trace as a run would do it, remembered nowhere."""
    controller = PlacementController(calls.set_placement, lambda _mode: "")
    step, n_steps = _stepper(loaded, arm, controller), 0
    while n_steps < _CONTEST_STEPS and not controller.facts()["decided"]:
        n_steps += _run(loaded, step)["n_tokens"]
    return controller.facts() | {"steps": n_steps}


def _run_stock(loaded: _Loaded) -> None:
    for repeat in range(loaded.job.repeats):
        warm_up = None if repeat else _run(loaded, lambda token, _at: loaded.feed([token]))
        found = _run(loaded, lambda token, _at: loaded.feed([token]))
        arm = {"name": "stock", "n_cpu_moe": loaded.job.n_cpu_moe}
        _emit("run", arm=arm, repeat=repeat, warm_up=warm_up, driver=loaded.driver(), **found)


def main() -> int:
    """Run the job on stdin."""
    fields = json.loads(sys.stdin.readline())
    job = KitJob(**fields | {"arms": [KitArm(**arm) for arm in fields["arms"]]})
    try:
        loaded = _Loaded(job)
        device = loaded.devices[0].to_dict()
        _emit("loaded", seconds=loaded.load_s, library=loaded.path, device=device, driver=loaded.driver())
        _run_engine(loaded) if job.n_cpu_moe is None else _run_stock(loaded)
    except MobileError as error:
        _emit("error", message=str(error))
        return error.exit_code
    _emit("done")
    loaded.llama.llama_free(loaded.ctx)
    loaded.llama.llama_model_free(loaded.model)
    return 0


def _emit(event: str, **fields: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
