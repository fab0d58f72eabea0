"""One measured run in a process of its own: ``python -m mobile_gguf.bench.child``.

Reads one JSON job from stdin (so that the parent can move the process into its cgroup first), loads the
model through llama-cpp-python's low-level API, feeds the trace's tokens by id and writes one JSON event a
line to stdout: ``loaded``, ``prompt``, ``token`` (one per decoded token, so that a run that is stopped
still counts), ``done``; or ``error``. Which library is measured is up to ``LLAMA_CPP_LIB_PATH``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mobile_gguf.errors import EngineError, MobileError
from mobile_gguf.options.words import DEFAULT_EVICTION, DEFAULT_IO_THREADS

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOAD_MODES = {"no-mmap": 0, "mmap": 1, "direct-io": 4}  # enum llama_load_mode


@dataclass(frozen=True)
class Job:
    """What to run. ``engine`` uses the expert store with ``budget_bytes`` (0: all experts); without it the
    library is used as it comes, with ``load_mode``. ``decode_k`` experts a token after the prompt, 0 for
    all; a stock library uses them in the prompt too. ``ids`` also returns the routed ids of every pass."""

    model: str
    prompt: list[int]
    decode: list[int]
    engine: bool = False
    load_mode: str = "mmap"
    repack: bool = False
    threads: int = 1
    threads_auto: bool = False
    n_ubatch: int = 512
    decode_k: int = 0
    budget_bytes: int = 0
    io_threads: int = DEFAULT_IO_THREADS
    eviction: str = DEFAULT_EVICTION
    ids: bool = False
    warm: Sequence[tuple[int, int]] = ()  # (layer, expert), as the warm set has them
    split: tuple[Sequence[int], Sequence[float]] | None = None  # kept segments and shares of each layer
    idle_s: float = 0.0  # before the prompt, at most: until the warm set is read


def main() -> int:
    """Run the job on stdin."""
    end_with_parent()
    job = Job(**json.loads(sys.stdin.readline()))
    try:
        _run(job)
    except MobileError as error:
        _emit("error", message=str(error))
        return error.exit_code
    return 0


def end_with_parent(parent: int | None = None) -> None:
    """A long prompt writes nothing for minutes: no broken pipe would say that the parent was killed.

    ``parent`` is its process id, for a child that reads nothing from it, which may be gone already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        raise SystemExit(1)


def _run(job: Job) -> None:
    from mobile_gguf.engine import binding
    from mobile_gguf.engine import log as llama_log
    from mobile_gguf.engine.split import Split, set_split
    from mobile_gguf.engine.warm import warm_counters, worth

    _, path = binding.load_library()
    from llama_cpp import llama_cpp

    llama_log.capture_log()
    llama_cpp.llama_backend_init()
    engine = binding.find_engine() if job.engine else None
    if job.engine and engine is None:
        raise binding.needs_engine("this arm")
    started = time.perf_counter()
    if engine is not None:
        engine.set_load_params(
            budget_bytes=job.budget_bytes, io_threads=job.io_threads, eviction=job.eviction, prefault=True
        )
    model = _load_model(llama_cpp, job)
    recorder = _IdRecorder() if job.ids else None
    ctx = _new_context(llama_cpp, model, job, recorder)
    _emit("loaded", seconds=time.perf_counter() - started, library=path)
    if engine is not None:
        if job.split is not None:
            set_split(engine, ctx, Split(tuple(job.split[0]), tuple(job.split[1])))
        _warm_up(engine, ctx, job)
        engine.reset_counters(ctx)
    before = _Usage.now()
    started = time.perf_counter()
    _decode(llama_cpp, engine, ctx, job.prompt)
    _emit("prompt", seconds=time.perf_counter() - started, **_spent(before, engine, ctx))
    if engine is not None:
        engine.set_n_expert_used(ctx, job.decode_k)
        engine.reset_counters(ctx)
    before = _Usage.now()
    started = time.perf_counter()
    following = _following(llama_cpp, ctx, job) if job.threads_auto else None
    for token in job.decode:
        if following is not None:
            following.before()
        _decode(llama_cpp, engine, ctx, [token])
        if following is not None:
            following.after()
        _emit("token", seconds=time.perf_counter() - started, **_spent(before, engine, ctx))
    used = worth(engine, ctx) if engine is not None else None
    warmed = asdict(warm_counters(engine, ctx)) if engine is not None else None
    _emit("done", ids=recorder.ids if recorder else None, worth=used, warm=warmed)
    llama_cpp.llama_free(ctx)
    llama_cpp.llama_model_free(model)


def _warm_up(engine: Any, ctx: Any, job: Job) -> None:
    from mobile_gguf.engine.warm import warm, warm_counters

    warm(engine, ctx, job.warm)
    until = time.perf_counter() + job.idle_s
    while warm_counters(engine, ctx).n_left > 0 and time.perf_counter() < until:
        time.sleep(0.01)


def _load_model(llama_cpp: Any, job: Job) -> Any:
    from mobile_gguf.engine import log as llama_log

    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    # the engine reads experts itself and wants the rest read, not mapped
    params.load_mode = LOAD_MODES["no-mmap" if job.engine else job.load_mode]
    params.use_extra_bufts = job.repack
    overrides = (llama_cpp.llama_model_kv_override * 2)()
    if job.decode_k and not job.engine:
        overrides[0].tag = 0  # an integer
        overrides[0].key = b"qwen3moe.expert_used_count"
        overrides[0].value.val_i64 = job.decode_k
        params.kv_overrides = overrides
    model = llama_cpp.llama_model_load_from_file(job.model.encode(), params)
    if not model:
        reason = llama_log.last_errors() or "no reason given"
        raise EngineError(f"the model {job.model} does not load: {reason}")
    return model


def _new_context(llama_cpp: Any, model: Any, job: Job, recorder: _IdRecorder | None) -> Any:
    from mobile_gguf.engine import log as llama_log

    params = llama_cpp.llama_context_default_params()
    n_tokens = len(job.prompt) + len(job.decode)
    params.n_ctx = (n_tokens // 256 + 1) * 256
    params.n_batch = max(512, len(job.prompt))
    params.n_ubatch = job.n_ubatch
    params.n_threads = params.n_threads_batch = job.threads
    params.no_perf = True
    if recorder is not None:
        recorder.callback = llama_cpp.ggml_backend_sched_eval_callback(recorder.on_tensor)
        params.cb_eval = recorder.callback
    ctx = llama_cpp.llama_init_from_model(model, params)
    if not ctx:
        raise EngineError(f"no context for {job.model}: {llama_log.last_errors() or 'no reason given'}")
    return ctx


def _following(llama_cpp: Any, ctx: Any, job: Job) -> Any:
    from mobile_gguf.generate.context.threads import FollowingThreads
    from mobile_gguf.memory.competition import Competition

    return FollowingThreads(
        job.threads, lambda n: llama_cpp.llama_set_n_threads(ctx, n, job.threads), Competition()
    )


def _decode(llama_cpp: Any, engine: Any, ctx: Any, tokens: list[int]) -> None:
    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    status = llama_cpp.llama_decode(ctx, llama_cpp.llama_batch_get_one(array, len(tokens)))
    llama_cpp.llama_synchronize(ctx)
    if status != 0:
        reason = engine.context_error(ctx) if engine is not None else ""
        raise EngineError(f"decoding failed with status {status}{': ' + reason if reason else ''}")


@dataclass(frozen=True)
class _Usage:
    """What this process has cost the machine so far: seconds of CPU, bytes read from disks, faults."""

    cpu_s: float
    read_bytes: int
    major_faults: int

    @classmethod
    def now(cls) -> _Usage:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        read_bytes = 0
        # absent on some kernels and in some containers; then there is nothing to say
        with contextlib.suppress(OSError), open("/proc/self/io", encoding="ascii") as stream:
            read_bytes = next((int(line.split()[1]) for line in stream if line.startswith("read_bytes")), 0)
        return cls(usage.ru_utime + usage.ru_stime, read_bytes, usage.ru_majflt)


def _spent(before: _Usage, engine: Any, ctx: Any) -> dict[str, Any]:
    now = _Usage.now()
    return {
        "cpu_s": now.cpu_s - before.cpu_s,
        "read_bytes": now.read_bytes - before.read_bytes,
        "major_faults": now.major_faults - before.major_faults,
        "counters": asdict(engine.counters(ctx)) if engine is not None else None,
    }


class _Tensor(ctypes.Structure):
    """``struct ggml_tensor`` of the pinned llama.cpp, up to its name."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]


class _IdRecorder:
    """Reads the ids that each layer routed, from the scheduler's callback; for checking, not for timing."""

    def __init__(self) -> None:
        # [layer, ids of the pass's tokens, k each], in order of computation
        self.ids: list[tuple[int, list[list[int]]]] = []
        self.callback: Any = None

    def on_tensor(self, address: int, asking: bool, _user_data: Any) -> bool:
        tensor = _Tensor.from_address(address)
        name, _, layer = tensor.name.decode(errors="replace").rpartition("-")
        if name != "ffn_moe_topk":
            return not asking  # when asked: no interest; afterwards: go on
        if not asking:
            k, n_tokens = tensor.ne[0], tensor.ne[1]
            rows = [
                list((ctypes.c_int32 * k).from_address(tensor.data + token * tensor.nb[1]))
                for token in range(n_tokens)
            ]
            self.ids.append((int(layer), rows))
        return True


def _emit(event: str, **fields: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
