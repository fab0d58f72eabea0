"""``engine_child`` for what must become an error: exceptions under the C API, and tags that are gone."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import device_child
import engine_child
from engine_child import mobile

THROWN = {"bad_alloc": 1, "logic_error": 2, "int": 3}
THROWING = ("nothing", "read", "own read", "memory", "upload")  # shim/throwing_threads.cpp


class ErrorRun(device_child.DeviceRun):
    """A run with calls that throw; the shims of shim/ are preloaded where an op needs one."""

    def _calls(self) -> dict[str, Any]:
        """Calls of mobile.h that ask for memory."""
        library = mobile
        assert library is not None
        library.mobile_observe_start.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        many = 10_000
        k = (ctypes.c_int32 * many)()
        ids = (ctypes.c_int32 * (2 * self.result["info"]["n_layer"] * self.result["info"]["n_expert_used"]))()
        layers, used = self.result["info"]["n_layer"], self.result["info"]["n_expert_used"]
        path = f"/nowhere/{'x' * 40}"  # in no directory: never made, and too long for a small string
        return {
            "set_batch_n_expert_used": lambda: library.mobile_set_batch_n_expert_used(self.ctx, k, many),
            "set_replay": lambda: library.mobile_set_replay(self.ctx, ids, 2, layers, used),
            "trace_start": lambda: library.mobile_trace_start(self.ctx, path.encode()),
            "device_count": lambda: library.mobile_device_count(self.ctx),
            "observe_start": lambda: library.mobile_observe_start(self.ctx, 1),
            "set_n_expert_used": lambda: library.mobile_set_n_expert_used(self.ctx, -1),
        }

    def op_throw(self, op: dict[str, Any]) -> dict[str, Any]:
        """What each call returns and says while allocations throw ``what``."""
        assert mobile is not None
        arm = ctypes.CDLL(None).throwing_new_arm
        said = {}
        for name, call in self._calls().items():
            arm(THROWN[op["what"]])
            status = call()
            thrown = arm(0)
            said[name] = [thrown, status, mobile.mobile_last_error().decode()]
        return {"said": said}

    def op_arm(self, op: dict[str, Any]) -> dict[str, Any]:
        """From now on ``what`` throws once, in the engine's own threads; n_thrown: since the last arming."""
        return {"n_thrown": ctypes.CDLL(None).throwing_threads_arm(THROWING.index(op["what"]), 1)}

    def op_steps_until_failed(self, op: dict[str, Any]) -> dict[str, Any]:
        """The same steps, round after round, till some fail: when a thread comes to throw is its affair."""
        done: dict[str, Any] = {}
        for _ in range(op["rounds"]):
            self.op_remove(op)
            done = self.op_steps(op)
            if done["rc"] != 0:
                break
        return done

    def op_scribble(self, op: dict[str, Any]) -> dict[str, Any]:
        """Writes into the op_params of an expert tensor."""
        ctypes.CDLL(None).op_params_scribble()
        return {}


if __name__ == "__main__":
    device_child.bind()
    code = engine_child.main(ErrorRun)
    sys.stdout.flush()
    os._exit(code)
