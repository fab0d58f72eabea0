"""``engine_child`` with devices: runs whose layers are on RPC servers, and ops of the device tier.

A run's settings may have "rpc" (endpoints that become devices; its layers go there) and "on_host". With
MOBILE_GGUF_TEST_QUEUE the library of that name (shim/queue_device.cpp) makes a device of this process.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_child
from engine_child import mobile

from mobile_gguf.engine.structs import DeviceCountersStruct, DeviceInfoStruct, DeviceParamsStruct


def bind() -> None:
    if mobile is None:
        return
    void_p, int32 = ctypes.c_void_p, ctypes.c_int32
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "default_params": (DeviceParamsStruct, []),
        "start": (int32, [void_p, ctypes.POINTER(DeviceParamsStruct)]),
        "stop": (int32, [void_p]),
        "set_placement": (int32, [void_p, int32]),
        "set_miss": (int32, [void_p, int32]),
        "count": (int32, [void_p]),
        "get_info": (int32, [void_p, int32, ctypes.POINTER(DeviceInfoStruct)]),
        "get_counters": (int32, [void_p, ctypes.POINTER(DeviceCountersStruct)]),
        "get_residency": (int32, [void_p, ctypes.POINTER(ctypes.c_uint8), ctypes.c_size_t]),
    }
    for name, (restype, argtypes) in signatures.items():
        function = getattr(mobile, f"mobile_device_{name}")
        function.restype, function.argtypes = restype, argtypes


def add_server(endpoint: str) -> None:
    """Makes an RPC server a device of this process, once."""
    if endpoint in _servers:
        return
    folder = Path(os.environ["LLAMA_CPP_LIB_PATH"])
    base, rpc = ctypes.CDLL(str(folder / "libggml.so")), ctypes.CDLL(str(folder / "libggml-rpc.so"))
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    rpc.ggml_backend_rpc_add_server.argtypes = [ctypes.c_char_p]
    registry = rpc.ggml_backend_rpc_add_server(endpoint.encode())
    assert registry, f"no RPC server at {endpoint}"
    base.ggml_backend_register.argtypes = [ctypes.c_void_p]
    base.ggml_backend_register.restype = None
    base.ggml_backend_register(registry)
    _servers.append(endpoint)


_servers: list[str] = []


def add_queue_device() -> Any:
    """The library of the device whose queue runs late, None without it."""
    path = os.environ.get("MOBILE_GGUF_TEST_QUEUE")
    if path is None:
        return None
    library = ctypes.CDLL(path)
    library.queue_device_register.restype = None
    library.queue_device_waits.restype = ctypes.c_int64
    library.queue_device_sum.restype = ctypes.c_float
    library.queue_device_register()
    return library


queue = add_queue_device()


class DeviceRun(engine_child.Run):
    """A run on devices; the ops ``device_*`` are mobile.h's calls."""

    def load(self, budget: int | None) -> bool:
        for endpoint in self.spec.get("rpc", []):
            add_server(endpoint)
        return super().load(budget)

    def status(self, status: int) -> dict[str, Any]:
        assert mobile is not None
        return {"status": status, "error": mobile.mobile_last_error().decode() if status < 0 else ""}

    def infos(self) -> list[dict[str, Any]]:
        assert mobile is not None
        found = []
        for i in range(max(0, mobile.mobile_device_count(self.ctx))):
            info = DeviceInfoStruct()
            assert mobile.mobile_device_get_info(self.ctx, i, ctypes.byref(info)) == 0
            values = {name: getattr(info, name) for name, *_ in DeviceInfoStruct._fields_}
            found.append(
                {key: value.decode() if isinstance(value, bytes) else value for key, value in values.items()}
            )
        return found

    def op_device_start(self, op: dict[str, Any]) -> dict[str, Any]:
        """budget: bytes, or a share of the experts' bytes on devices as a float; other fields by name."""
        assert mobile is not None
        params = mobile.mobile_device_default_params()
        budget = op["budget"]
        if isinstance(budget, float):
            budget = int(budget * sum(info["expert_bytes"] for info in self.infos()))
        params.budget_bytes = budget
        for name in ("miss", "placement", "eviction", "n_batch_max", "n_uploads", "poison"):
            if name in op:
                setattr(params, name, op[name])
        return self.status(mobile.mobile_device_start(self.ctx, ctypes.byref(params)))

    def op_queue_waits(self, op: dict[str, Any]) -> dict[str, Any]:
        """How often somebody has waited for a queue so far."""
        return {"n": queue.queue_device_waits()}

    def op_queue_sum(self, op: dict[str, Any]) -> dict[str, Any]:
        """What a graph gives that is run twice before anybody waits."""
        return {"sum": queue.queue_device_sum()}

    def op_device_stop(self, op: dict[str, Any]) -> dict[str, Any]:
        assert mobile is not None
        return self.status(mobile.mobile_device_stop(self.ctx))

    def op_device_placement(self, op: dict[str, Any]) -> dict[str, Any]:
        assert mobile is not None
        return self.status(mobile.mobile_device_set_placement(self.ctx, op["placement"]))

    def op_device_miss(self, op: dict[str, Any]) -> dict[str, Any]:
        assert mobile is not None
        return self.status(mobile.mobile_device_set_miss(self.ctx, op["miss"]))

    def op_device_count(self, op: dict[str, Any]) -> dict[str, Any]:
        assert mobile is not None
        return {"status": mobile.mobile_device_count(self.ctx)}

    def op_device_info(self, op: dict[str, Any]) -> dict[str, Any]:
        return {"status": 0, "devices": self.infos()}

    def op_device_counters(self, op: dict[str, Any]) -> dict[str, Any]:
        return self.counters("mobile_device_get_counters", DeviceCountersStruct)

    def op_device_residency(self, op: dict[str, Any]) -> dict[str, Any]:
        """Of the slots."""
        return self.residency(op, "mobile_device_get_residency", self.ctx)

    def rounds(self, op: dict[str, Any]) -> Iterator[dict[str, int]]:
        """The device counters now, and after each round of ``ops``, ``rounds`` at most.

        How far a thread in the background has come after so many tokens is the machine's affair: what it
        counts is waited for by rounds.
        """
        yield self.op_device_counters({})
        for _ in range(op["rounds"]):
            for each in op["ops"]:
                done = getattr(self, f"op_{each['op']}")(each)
                assert done.get("rc", 0) == 0, done
                assert done.get("status", 0) >= 0, done
            yield self.op_device_counters({})

    def op_device_settle(self, op: dict[str, Any]) -> dict[str, Any]:
        """Rounds till one misses nothing in the slots or a slot is given away."""
        before = after = self.op_device_counters({})
        for before, after in itertools.pairwise(self.rounds(op)):
            if after["n_misses"] == before["n_misses"] or after["n_evictions"] > 0:
                break
        return {"n_misses": after["n_misses"] - before["n_misses"], "n_evictions": after["n_evictions"]}

    def op_device_until(self, op: dict[str, Any]) -> dict[str, Any]:
        """Rounds till all counters of ``above`` are above their numbers; the job fails if they never are."""
        counted: dict[str, int] = {}
        for counted in self.rounds(op):
            if all(counted[name] > n for name, n in op["above"].items()):
                return counted
        counters = {name: counted[name] for name in op["above"]}
        raise AssertionError(f"{self.spec['name']}: {counters} after {op['rounds']} rounds")

    def op_device_watch(self, op: dict[str, Any]) -> dict[str, Any]:
        """Rounds of ops while another thread reads the slots' residency, till it has seen three.

        n_maps: different ones that it saw.
        """
        library = mobile
        assert library is not None
        info = self.result["info"]
        stop, maps, statuses = threading.Event(), set[bytes](), set[int]()

        def watch() -> None:
            state = (ctypes.c_uint8 * (info["n_layer"] * info["n_expert"]))()
            while not stop.is_set():
                statuses.add(library.mobile_device_get_residency(self.ctx, state, len(state)))
                maps.add(bytes(state))

        thread = threading.Thread(target=watch)
        thread.start()
        done: list[dict[str, Any]] = []
        try:
            for _ in range(op["rounds"]):
                done += [getattr(self, f"op_{each['op']}")(each) for each in op["ops"]]
                if len(maps) > 2:
                    break
        finally:
            stop.set()
            thread.join()
        values = sorted({value for seen in maps for value in seen})
        return {"status": min(statuses), "n_maps": len(maps), "values": values, "done": done}


if __name__ == "__main__":
    bind()
    code = engine_child.main(DeviceRun)
    sys.stdout.flush()
    os._exit(code)
