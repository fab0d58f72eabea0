"""Runs llama.cpp jobs in a process of its own, so that tests can hold two builds against each other.

The library is the one in $LLAMA_CPP_LIB_PATH. stdin: one line with a job, {"out": npz path, "runs": [...]};
a run is one model load, one context and a list of ops (the ``op_`` methods of ``Run``, by name). stdout: one
JSON line per ``pause`` op, answered by one line on stdin, and last {"runs": [...]}. Arrays that ops save are
in the npz as "run/name". A load or a call that fails is a result, not an exception.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
from peak_memory import peak_resident_bytes

from mobile_gguf.engine.structs import (
    GUESSED,
    LOADING,
    CountersStruct,
    LoadParamsStruct,
    LossCountersStruct,
    LossParamsStruct,
    ModelInfoStruct,
    PrefetchCountersStruct,
    WarmCountersStruct,
)


def fields(struct: ctypes.Structure) -> dict[str, int]:
    return {name: getattr(struct, name) for name, *_ in struct._fields_}


def bind() -> ctypes.CDLL | None:
    """The library with the signatures of mobile.h, or None for a stock build."""
    dll = lib._lib
    if not hasattr(dll, "mobile_abi_version"):
        return None
    void_p, int32, char_p = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
    int32_p = ctypes.POINTER(int32)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "mobile_abi_version": (int32, []),
        "mobile_last_error": (char_p, []),
        "mobile_load_default_params": (LoadParamsStruct, []),
        "mobile_load_set_params": (int32, [ctypes.POINTER(LoadParamsStruct)]),
        "mobile_model_get_info": (int32, [void_p, ctypes.POINTER(ModelInfoStruct)]),
        "mobile_model_get_n_segments": (int32, [void_p]),
        "mobile_model_get_residency": (int32, [void_p, ctypes.POINTER(ctypes.c_uint8), ctypes.c_size_t]),
        "mobile_set_n_expert_used": (int32, [void_p, int32]),
        "mobile_set_mass": (int32, [void_p, int32]),
        "mobile_set_correction": (int32, [void_p, int32, void_p, void_p, int32, int32]),
        "mobile_set_corrected": (int32, [void_p, ctypes.c_bool]),
        "mobile_set_batch_n_expert_used": (int32, [void_p, int32_p, int32]),
        "mobile_prefetch_masked": (int32, [void_p]),
        "mobile_set_prefetch": (int32, [void_p, int32]),
        "mobile_set_predictor": (int32, [void_p, int32]),
        "mobile_get_worth": (int32, [void_p, int32_p, int32]),
        "mobile_warm": (int32, [void_p, int32_p, int32]),
        "mobile_get_warm_counters": (int32, [void_p, ctypes.POINTER(WarmCountersStruct)]),
        "mobile_set_split": (int32, [void_p, ctypes.c_bool, void_p, void_p, int32]),
        "mobile_loss_default_params": (LossParamsStruct, []),
        "mobile_set_loss": (int32, [void_p, ctypes.POINTER(LossParamsStruct)]),
        "mobile_set_lossy": (int32, [void_p, ctypes.c_bool]),
        "mobile_set_batch_lossy": (int32, [void_p, int32_p, int32]),
        "mobile_set_buddies": (int32, [void_p, void_p, void_p, void_p, int32, int32, int32]),
        "mobile_set_loss_residency": (int32, [void_p, void_p, ctypes.c_size_t]),
        "mobile_get_loss_counters": (int32, [void_p, ctypes.POINTER(LossCountersStruct)]),
        "mobile_get_token_loss": (int32, [void_p, int32, ctypes.POINTER(LossCountersStruct)]),
        "mobile_get_prefetch_counters": (int32, [void_p, ctypes.POINTER(PrefetchCountersStruct)]),
        "mobile_get_counters": (int32, [void_p, ctypes.POINTER(CountersStruct)]),
        "mobile_reset_counters": (int32, [void_p]),
        "mobile_context_error": (char_p, [void_p]),
        "mobile_trace_start": (int32, [void_p, char_p]),
        "mobile_trace_stop": (int32, [void_p]),
        "mobile_routed_watch": (int32, [void_p, ctypes.c_bool]),
        "mobile_routed_read": (int32, [void_p, ctypes.c_uint64, void_p, int32, void_p, void_p]),
        "mobile_set_replay": (int32, [void_p, int32_p, int32, int32, int32]),
        "mobile_set_guessed": (int32, [void_p, int32]),
        "mobile_refuse": (int32, [void_p, int32_p, int32]),
    }
    for name, (restype, argtypes) in signatures.items():
        function = getattr(dll, name)
        function.restype, function.argtypes = restype, argtypes
    return dll


SECONDS = 600.0  # for what ends by itself, on any machine

mobile = bind()
log_lines: list[str] = []


@lib.llama_log_callback
def keep_log(level: int, text: bytes, user_data: Any) -> None:
    log_lines.append(text.decode(errors="replace"))


def set_fault(model: str, fault: dict[str, Any]) -> int:
    path, mode = fault.get("path", model).encode(), fault.get("mode", 0)
    return ctypes.CDLL(None).read_fault_set(path, mode, fault.get("after", 0), fault.get("times", -1))


class Run:
    """One model and one context; ``ops`` records what each op returned."""

    def __init__(self, spec: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self.spec = spec
        self.arrays = arrays
        self.model: Any = None
        self.ctx: Any = None
        self.result: dict[str, Any] = {"loaded": False, "load_error": "", "log": "", "info": None, "ops": []}

    def load(self, budget: int | None) -> bool:
        """Loads the model; with a budget, into the expert store."""
        log_lines.clear()
        if budget is not None:
            assert mobile is not None
            params = mobile.mobile_load_default_params()
            params.budget_bytes = budget
            for name in ("n_io_threads", "eviction", "io", "on_host", "prefault", "n_at_once"):
                if name in self.spec["mobile"]:
                    setattr(params, name, self.spec["mobile"][name])
            self.result["set_params"] = mobile.mobile_load_set_params(ctypes.byref(params))
        model_params = lib.llama_model_default_params()
        model_params.load_mode = self.spec.get("load_mode", lib.LLAMA_LOAD_MODE_NONE)
        model_params.use_extra_bufts = self.spec.get("use_extra_bufts", False)
        model_params.n_gpu_layers = self.spec.get("n_gpu_layers", 0)
        model_params.check_tensors = self.spec.get("check_tensors", False)
        if "load_fault" in self.spec:
            set_fault(self.spec["model"], self.spec["load_fault"])
        self.model = lib.llama_model_load_from_file(self.spec["model"].encode(), model_params)
        if "load_fault" in self.spec:
            self.result["n_spoilt"] = set_fault(self.spec["model"], {})
        self.result["loaded"] = bool(self.model)
        if mobile is not None:
            self.result["load_error"] = mobile.mobile_last_error().decode()
        self.result["log"] = "".join(log_lines)[-4000:]
        if self.model and mobile is not None:
            info = ModelInfoStruct()
            self.result["info_status"] = mobile.mobile_model_get_info(self.model, ctypes.byref(info))
            self.result["info"] = fields(info) if self.result["info_status"] == 0 else None
        return bool(self.model)

    def budget(self) -> int | None:
        """The budget in bytes; "min" and "40%" are resolved by loading the model once with slots for all."""
        settings = self.spec.get("mobile")
        if settings is None:
            return None
        budget = settings.get("budget", 0)
        if isinstance(budget, int):
            return budget
        if self.load(1 << 60):
            lib.llama_model_free(self.model)
        info = self.result["info"]
        if info is None:
            return 0
        if budget == "min":
            return info["budget_min_bytes"]
        return max(info["budget_min_bytes"], int(info["budget_all_bytes"] * float(budget.rstrip("%")) / 100))

    def open(self) -> bool:
        if not self.load(self.budget()):
            return False
        params = lib.llama_context_default_params()
        params.n_ctx = self.spec.get("n_ctx", 640)
        params.n_batch = self.spec.get("n_batch", params.n_ctx)
        params.n_ubatch = self.spec.get("n_ubatch", 512)
        params.n_seq_max = self.spec.get("n_seq_max", 1)
        params.kv_unified = self.spec.get("kv_unified", False)
        params.n_threads = params.n_threads_batch = self.spec.get("threads", 1)
        if self.spec.get("f32_kv"):
            params.type_k = params.type_v = lib.GGML_TYPE_F32
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.ctx = lib.llama_init_from_model(self.model, params)
        vocab = lib.llama_model_get_vocab(self.model)
        assert vocab is not None
        self.n_vocab = lib.llama_vocab_n_tokens(vocab)
        self.result["context"] = bool(self.ctx)
        self.result["log"] = "".join(log_lines)[-4000:]
        return bool(self.ctx)

    def close(self) -> None:
        if self.ctx:
            lib.llama_free(self.ctx)
        if self.model:
            lib.llama_model_free(self.model)

    def decode(
        self, tokens: list[int], pos: list[int], seqs: list[int], outputs: list[int]
    ) -> tuple[int, np.ndarray]:
        """Decodes one batch; returns llama_decode's code and logits [n_outputs, n_vocab]."""
        n = len(tokens)
        batch = lib.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i in range(n):
            batch.token[i], batch.pos[i] = tokens[i], pos[i]
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, seqs[i]
            batch.logits[i] = i in outputs
        code = lib.llama_decode(self.ctx, batch)
        lib.llama_batch_free(batch)
        if code != 0 or not outputs:
            return code, np.empty((0, self.n_vocab), np.float32)
        logits = np.ctypeslib.as_array(lib.llama_get_logits(self.ctx), (len(outputs) * self.n_vocab,))
        return 0, logits.reshape(len(outputs), self.n_vocab).copy()

    def finish(self, op: dict[str, Any], code: int, rows: list[np.ndarray]) -> dict[str, Any]:
        if "save" in op:
            self.arrays[f"{self.spec['name']}/{op['save']}"] = np.concatenate(rows)
        error = mobile.mobile_context_error(self.ctx).decode() if mobile is not None else ""
        return {"rc": code, "error": error, "n_done": sum(len(r) for r in rows)}

    def op_decode(self, op: dict[str, Any]) -> dict[str, Any]:
        """One batch: tokens, pos (the first's, or a list), seqs, k (per token), outputs (indices; or all)."""
        tokens, pos = op["tokens"], op.get("pos", 0)
        if "k" in op:
            assert mobile is not None
            k = (ctypes.c_int32 * len(op["k"]))(*op["k"])
            status = mobile.mobile_set_batch_n_expert_used(self.ctx, k, len(op["k"]))
            if status != 0:
                return {
                    "rc": None,
                    "status": status,
                    "error": mobile.mobile_last_error().decode(),
                    "n_done": 0,
                }
        positions = pos if isinstance(pos, list) else list(range(pos, pos + len(tokens)))
        seqs = op.get("seqs", [0] * len(tokens))
        outputs = op.get("outputs", list(range(len(tokens))))
        code, logits = self.decode(tokens, positions, seqs, outputs)
        return self.finish(op, code, [logits])

    def op_steps(self, op: dict[str, Any]) -> dict[str, Any]:
        """One decode per token from pos on, until one fails."""
        code, rows = 0, [np.empty((0, self.n_vocab), np.float32)]
        for i, token in enumerate(op["tokens"]):
            code, logits = self.decode([token], [op["pos"] + i], [op.get("seq", 0)], [0])
            if code != 0:
                break
            rows.append(logits)
        return self.finish(op, code, rows)

    def op_greedy(self, op: dict[str, Any]) -> dict[str, Any]:
        """Generates n tokens after ``tokens``, the likeliest each time; returns them."""
        n = len(op["tokens"])
        code, logits = self.decode(op["tokens"], list(range(n)), [0] * n, [n - 1])
        out: list[int] = []
        while code == 0 and len(out) < op["n"]:
            out.append(int(logits[-1].argmax()))
            code, logits = self.decode([out[-1]], [n + len(out) - 1], [0], [0])
        return self.finish(op, code, [logits]) | {"tokens": out}

    def op_follow(self, op: dict[str, Any]) -> dict[str, Any]:
        """Runs ``following`` one by one after ``tokens``: the logits of ``tokens``' last and of each, and the
        likeliest token after each."""
        n = len(op["tokens"])
        code, logits = self.decode(op["tokens"], list(range(n)), [0] * n, [n - 1])
        rows = [logits]
        for i, token in enumerate(op["following"]):
            if code != 0:
                break
            code, logits = self.decode([token], [n + i], [0], [0])
            rows.append(logits)
        return self.finish(op, code, rows) | {"likeliest": [int(row[-1].argmax()) for row in rows]}

    def memory(self) -> Any:
        memory = lib.llama_get_memory(self.ctx)
        assert memory is not None
        return memory

    def op_clear(self, op: dict[str, Any]) -> dict[str, Any]:
        lib.llama_memory_clear(self.memory(), True)
        return {}

    def op_remove(self, op: dict[str, Any]) -> dict[str, Any]:
        """Forgets everything from pos on."""
        removed = lib.llama_memory_seq_rm(self.memory(), op.get("seq", 0), op["pos"], -1)
        return {"removed": bool(removed)}

    def op_set_k(self, op: dict[str, Any]) -> dict[str, Any]:
        assert mobile is not None
        return {"status": mobile.mobile_set_n_expert_used(self.ctx, op["k"])}

    def op_mass(self, op: dict[str, Any]) -> dict[str, Any]:
        """Of how many experts kept weights are divided by the mass."""
        assert mobile is not None
        return self.status(mobile.mobile_set_mass(self.ctx, op["k"]))

    def op_correction(self, op: dict[str, Any]) -> dict[str, Any]:
        """scale, shift: [n_layer][n_embd], or null; on: whether tokens with k experts are corrected."""
        assert mobile is not None
        arrays = [None if op[name] is None else np.array(op[name], np.float32) for name in ("scale", "shift")]
        data = [None if array is None else array.ctypes.data for array in arrays]
        shape = next((array.shape for array in arrays if array is not None), (0, 0))
        status = mobile.mobile_set_correction(self.ctx, op["k"], *data, *shape)
        return self.status(status or mobile.mobile_set_corrected(self.ctx, op.get("on", True)))

    def op_corrected(self, op: dict[str, Any]) -> dict[str, Any]:
        assert mobile is not None
        return self.status(mobile.mobile_set_corrected(self.ctx, op["on"]))

    def op_set_batch_k(self, op: dict[str, Any]) -> dict[str, Any]:
        assert mobile is not None
        k = (ctypes.c_int32 * len(op["k"]))(*op["k"])
        return {"status": mobile.mobile_set_batch_n_expert_used(self.ctx, k, len(op["k"]))}

    def status(self, status: int) -> dict[str, Any]:
        """A call's status, and what the engine says of an error."""
        assert mobile is not None
        return {"status": status, "error": mobile.mobile_last_error().decode() if status < 0 else ""}

    def op_split(self, op: dict[str, Any]) -> dict[str, Any]:
        """kept, shares: [n_layer], or null."""
        assert mobile is not None
        arrays = [
            None if values is None else np.array(values, kind)
            for values, kind in ((op["kept"], np.int32), (op["shares"], np.float32))
        ]
        data = [None if array is None else array.ctypes.data for array in arrays]
        n_layer = max(0 if array is None else len(array) for array in arrays)
        return self.status(mobile.mobile_set_split(self.ctx, op.get("on_device", False), *data, n_layer))

    def op_loss(self, op: dict[str, Any]) -> dict[str, Any]:
        """The ladder's ``rules`` by their names in mobile.h, null: none; tokens from now on may lose."""
        assert mobile is not None
        params = mobile.mobile_loss_default_params()
        for name, value in (op["rules"] or {}).items():
            setattr(params, name, value)
        status = mobile.mobile_set_loss(self.ctx, ctypes.byref(params) if op["rules"] is not None else None)
        return self.status(status or mobile.mobile_set_lossy(self.ctx, op.get("lossy", True)))

    def op_batch_lossy(self, op: dict[str, Any]) -> dict[str, Any]:
        assert mobile is not None
        values = (ctypes.c_int32 * len(op["lossy"]))(*op["lossy"])
        return self.status(mobile.mobile_set_batch_lossy(self.ctx, values, len(values)))

    def op_buddies(self, op: dict[str, Any]) -> dict[str, Any]:
        """experts, shares [n_layer][n_expert][n], tau [n_layer]."""
        assert mobile is not None
        experts, shares = np.array(op["experts"], np.int32), np.array(op["shares"], np.float32)
        tau = np.array(op["tau"], np.float32)
        data = [array.ctypes.data for array in (experts, shares, tau)]
        return self.status(mobile.mobile_set_buddies(self.ctx, *data, *experts.shape))

    def op_loss_residency(self, op: dict[str, Any]) -> dict[str, Any]:
        """What the rules take for resident, 0 and 1: [n_layer][n_expert], or [n_expert][segments]."""
        assert mobile is not None
        if op["resident"] is None:
            return self.status(mobile.mobile_set_loss_residency(self.ctx, None, 0))
        state = np.array(op["resident"], np.uint8)
        return self.status(mobile.mobile_set_loss_residency(self.ctx, state.ctypes.data, state.size))

    def op_loss_counters(self, op: dict[str, Any]) -> dict[str, Any]:
        """until_read: once what is to be admitted has been."""
        until = time.monotonic() + SECONDS
        while True:
            counted = self.counters("mobile_get_loss_counters", LossCountersStruct)
            if not op.get("until_read") or counted["n_admit_left"] == 0:
                return counted
            assert time.monotonic() < until, "displaced experts were not read"
            time.sleep(0.002)

    def op_token_loss(self, op: dict[str, Any]) -> dict[str, Any]:
        """What token ``i`` of the last decode's batch lost."""
        assert mobile is not None
        counted = LossCountersStruct()
        return {
            "status": mobile.mobile_get_token_loss(self.ctx, op["i"], ctypes.byref(counted)),
            **fields(counted),
        }

    def op_prefetch(self, op: dict[str, Any]) -> dict[str, Any]:
        assert mobile is not None
        return {"status": mobile.mobile_prefetch_masked(self.ctx)}

    def op_set_prefetch(self, op: dict[str, Any]) -> dict[str, Any]:
        """mode: 0 off, 1 on, 2 auto; predictor: 0 auto, 1 router, 2 transitions."""
        assert mobile is not None
        status = mobile.mobile_set_predictor(self.ctx, op.get("predictor", 0))
        return {"status": status or mobile.mobile_set_prefetch(self.ctx, op["mode"])}

    def counters(self, function: str, kind: type[ctypes.Structure]) -> dict[str, Any]:
        """What a function of mobile.h counts, by the fields of its struct."""
        assert mobile is not None
        counted = kind()
        return {"status": getattr(mobile, function)(self.ctx, ctypes.byref(counted)), **fields(counted)}

    def op_prefetch_counters(self, op: dict[str, Any]) -> dict[str, Any]:
        return self.counters("mobile_get_prefetch_counters", PrefetchCountersStruct)

    def op_worth(self, op: dict[str, Any]) -> dict[str, Any]:
        """experts: [layer, expert] of what single tokens used, the most used first."""
        assert mobile is not None
        n = mobile.mobile_get_worth(self.ctx, None, 0)
        pairs = np.zeros((max(n, 0), 2), np.int32)
        pointer = pairs.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        return {"status": mobile.mobile_get_worth(self.ctx, pointer, n), "experts": pairs.tolist()}

    def op_warm(self, op: dict[str, Any]) -> dict[str, Any]:
        """experts: [layer, expert], the most worthy first; wait: until all are read that will be."""
        assert mobile is not None
        pairs = np.ascontiguousarray(op["experts"], np.int32).reshape(-1, 2)
        pointer = pairs.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        status = mobile.mobile_warm(self.ctx, pointer, len(pairs))
        error = mobile.mobile_last_error().decode() if status < 0 else ""
        until = time.monotonic() + SECONDS
        while op.get("wait") and status > 0 and not self.is_warm():
            assert time.monotonic() < until, "the warm set was not read"
            time.sleep(0.002)
        return {"status": status, "error": error}

    def is_warm(self) -> bool:
        left = self.counters("mobile_get_warm_counters", WarmCountersStruct)["n_left"]
        self.op_residency({"save": "_warming"})
        return left == 0 and not (self.arrays[f"{self.spec['name']}/_warming"] == LOADING).any()

    def op_warm_counters(self, op: dict[str, Any]) -> dict[str, Any]:
        return self.counters("mobile_get_warm_counters", WarmCountersStruct)

    def op_counters(self, op: dict[str, Any]) -> dict[str, Any]:
        return self.counters("mobile_get_counters", CountersStruct)

    def op_reset_counters(self, op: dict[str, Any]) -> dict[str, Any]:
        assert mobile is not None
        return {"status": mobile.mobile_reset_counters(self.ctx)}

    def op_n_segments(self, op: dict[str, Any]) -> dict[str, Any]:
        assert mobile is not None
        return {"status": mobile.mobile_model_get_n_segments(self.model)}

    def op_quantize(self, op: dict[str, Any]) -> dict[str, Any]:
        """Quantises the run's file with libllama."""
        params = lib.llama_model_quantize_default_params()
        params.ftype, params.nthread = op["ftype"], 2
        code = lib.llama_model_quantize(
            self.spec["model"].encode(), op["out"].encode(), ctypes.pointer(params)
        )
        error = mobile.mobile_last_error().decode() if mobile is not None else ""
        return {"rc": code, "error": error}

    def op_save(self, op: dict[str, Any]) -> dict[str, Any]:
        """Copies the weights to a GGUF, through their tensors; n_wrong: values that differ from ``like``."""
        import gguf

        lib.llama_model_save_to_file(self.model, op["path"].encode())
        made = {tensor.name: tensor.data for tensor in gguf.GGUFReader(op["path"]).tensors}
        right = {tensor.name: tensor.data for tensor in gguf.GGUFReader(op["like"]).tensors}
        return {"n_wrong": int(sum(np.count_nonzero(made[name] != right[name]) for name in right))}

    def residency(self, op: dict[str, Any], function: str, of: Any) -> dict[str, Any]:
        """Saves enum mobile_residency, uint8 [n_layer, n_expert]; n_resident: those that have a slot."""
        assert mobile is not None
        info = self.result["info"]
        state = np.zeros((info["n_layer"], info["n_expert"]), np.uint8)
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        status = getattr(mobile, function)(of, pointer, op.get("size", state.size))
        self.arrays[f"{self.spec['name']}/{op['save']}"] = state
        return {"status": status, "n_resident": int((state > 0).sum())}

    def op_residency(self, op: dict[str, Any]) -> dict[str, Any]:
        return self.residency(op, "mobile_model_get_residency", self.model)

    def op_trace_start(self, op: dict[str, Any]) -> dict[str, Any]:
        assert mobile is not None
        return {"status": mobile.mobile_trace_start(self.ctx, op["path"].encode())}

    def op_trace_stop(self, op: dict[str, Any]) -> dict[str, Any]:
        assert mobile is not None
        return {"status": mobile.mobile_trace_stop(self.ctx)}

    def op_watch(self, op: dict[str, Any]) -> dict[str, Any]:
        """Records in memory what is routed, or no longer."""
        assert mobile is not None
        return {"status": mobile.mobile_routed_watch(self.ctx, op["on"])}

    def read_routed(self, since: int, room: np.ndarray, n: int) -> tuple[int, int, int]:
        """What mobile_routed_read returns, the next number, and how many were lost."""
        assert mobile is not None
        following, lost = ctypes.c_uint64(), ctypes.c_uint64()
        status = mobile.mobile_routed_read(
            self.ctx, since, room.ctypes.data, n, ctypes.byref(following), ctypes.byref(lost)
        )
        return status, following.value, lost.value

    def op_routed(self, op: dict[str, Any]) -> dict[str, Any]:
        """Saves up to ``n`` entries from ``since`` on: int32 [entries, (step, layer, expert, missed)]."""
        room = np.zeros((max(0, op["n"]), 4), np.int32)
        n, following, lost = self.read_routed(op["since"], room, op["n"])
        if "save" in op:
            self.arrays[f"{self.spec['name']}/{op['save']}"] = room[: max(0, n)]
        return {"status": n, "next": following, "lost": lost}

    def op_routed_while(self, op: dict[str, Any]) -> dict[str, Any]:
        """Rounds of ops while another thread reads and saves what is routed, ``n`` entries at a time.

        They end once it has read something while an op ran. n_while_running: of a round's ops.
        """
        stop, taken, lost = threading.Event(), [np.zeros((0, 4), np.int32)], 0
        runs = threading.Event()
        n_while_running = 0

        def read() -> None:
            nonlocal lost, n_while_running
            room, since = np.zeros((op["n"], 4), np.int32), 0
            while True:
                ending, running = stop.is_set(), runs.is_set()
                n, since, n_lost = self.read_routed(since, room, op["n"])
                lost += n_lost
                taken.append(room[:n].copy())
                n_while_running += n if running and runs.is_set() else 0
                if ending and n == 0:
                    return

        thread = threading.Thread(target=read)
        thread.start()
        done: list[dict[str, Any]] = []
        try:
            for _ in range(op["rounds"]):
                for each in op["ops"]:
                    runs.set()
                    done.append(getattr(self, f"op_{each['op']}")(each))
                    runs.clear()
                if n_while_running:
                    break
        finally:
            stop.set()
            thread.join()
        self.arrays[f"{self.spec['name']}/{op['save']}"] = np.concatenate(taken)
        return {"lost": lost, "n_while_running": n_while_running, "done": done}

    def op_replay(self, op: dict[str, Any]) -> dict[str, Any]:
        """Sets a replay of ids [n_steps][n_layer][k]; null ends it."""
        assert mobile is not None
        if op["ids"] is None:
            return {"status": mobile.mobile_set_replay(self.ctx, None, 0, 0, 0)}
        ids = np.ascontiguousarray(op["ids"], np.int32)
        pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        return {"status": mobile.mobile_set_replay(self.ctx, pointer, *ids.shape)}

    def op_set_guessed(self, op: dict[str, Any]) -> dict[str, Any]:
        """guessed: which tokens of the passes to come are of the text, a name of GUESSED."""
        assert mobile is not None
        return self.status(mobile.mobile_set_guessed(self.ctx, GUESSED[op["guessed"]]))

    def op_refuse(self, op: dict[str, Any]) -> dict[str, Any]:
        """tokens: those of the last decode's batch that are none of the text, by their places."""
        assert mobile is not None
        places = (ctypes.c_int32 * len(op["tokens"]))(*op["tokens"])
        return self.status(mobile.mobile_refuse(self.ctx, places, len(places)))

    def op_fault(self, op: dict[str, Any]) -> dict[str, Any]:
        """Sets the preloaded read shim (shim/read_fault.c); n_spoilt: reads that the last setting spoilt."""
        return {"n_spoilt": set_fault(self.spec["model"], op)}

    def op_pause(self, op: dict[str, Any]) -> dict[str, Any]:
        """Hands over to the parent, which answers with one line."""
        print(json.dumps({"pause": op["name"]}), flush=True)
        sys.stdin.readline()
        return {}

    def op_rss(self, op: dict[str, Any]) -> dict[str, Any]:
        """Highest resident size of the process so far, in bytes."""
        return {"peak": peak_resident_bytes()}


def main(run_type: type[Run] = Run) -> int:
    job = json.loads(sys.stdin.readline())
    lib.llama_backend_init()
    lib.llama_log_set(keep_log, ctypes.c_void_p(0))
    arrays: dict[str, np.ndarray] = {}
    results: dict[str, Any] = {}
    for spec in job["runs"]:
        run = run_type(spec, arrays)
        if run.open():
            for op in spec["ops"]:
                run.result["ops"].append({"op": op["op"], **getattr(run, f"op_{op['op']}")(op)})
        run.close()
        results[spec["name"]] = run.result
    with open(job["out"], "wb") as f:
        np.savez(f, **arrays)  # type: ignore[arg-type]
    print(json.dumps({"runs": results}), flush=True)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # a build under test may not tear down cleanly at exit; what the job asked for is done by then
    os._exit(code)
