"""ggml through ctypes, as much of it as measuring takes: matrices on a backend, products timed, bytes moved.

The functions are looked up in the library that llama-cpp-python has loaded, so what is measured is what will
run. Everything is freed when the context managers end.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile_gguf.engine.binding import load_library
from mobile_gguf.engine.devices import CPU, SIGNATURES, Device
from mobile_gguf.errors import EngineError

F32, F16, I32 = 0, 1, 26
_BUFFER_OFFSET = 8  # of `buffer` in struct ggml_tensor, after an enum
_GRAPH_NODES = 4096
_FILL = 0x11  # as a half it is a small ordinary number, as it is in quants
_USAGE_WEIGHTS = 1

_A, _N, _I, _T = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_char_p


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", _N), ("mem_buffer", _A), ("no_alloc", ctypes.c_bool)]


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    **SIGNATURES,
    "ggml_init": (_A, (_InitParams,)),
    "ggml_free": (None, (_A,)),
    "ggml_nbytes": (_N, (_A,)),
    "ggml_blck_size": (_I, (ctypes.c_int,)),
    "ggml_new_tensor_2d": (_A, (_A, ctypes.c_int, _I, _I)),
    "ggml_new_tensor_3d": (_A, (_A, ctypes.c_int, _I, _I, _I)),
    "ggml_mul_mat": (_A, (_A, _A, _A)),
    "ggml_mul_mat_id": (_A, (_A, _A, _A, _A)),
    "ggml_soft_max_ext": (_A, (_A, _A, _A, ctypes.c_float, ctypes.c_float)),
    "ggml_flash_attn_ext": (_A, (_A, _A, _A, _A, _A, ctypes.c_float, ctypes.c_float, ctypes.c_float)),
    "ggml_new_graph_custom": (_A, (_A, _N, ctypes.c_bool)),
    "ggml_build_forward_expand": (None, (_A, _A)),
    "ggml_backend_alloc_ctx_tensors": (_A, (_A, _A)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_A, (_A, _A)),
    "ggml_backend_buft_alloc_buffer": (_A, (_A, _N)),
    "ggml_backend_buffer_free": (None, (_A,)),
    "ggml_backend_buffer_set_usage": (None, (_A, ctypes.c_int)),
    "ggml_backend_tensor_set": (None, (_A, _A, _N, _N)),
    "ggml_backend_tensor_get": (None, (_A, _A, _N, _N)),
    "ggml_backend_tensor_memset": (None, (_A, ctypes.c_uint8, _N, _N)),
    "ggml_backend_graph_compute": (ctypes.c_int, (_A, _A)),
    "ggml_backend_synchronize": (None, (_A,)),
    "ggml_backend_free": (None, (_A,)),
    "ggml_backend_dev_init": (_A, (_A, _T)),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, (_A, _A)),
    "ggml_backend_reg_get_proc_address": (_A, (_A, _T)),
}


def device_key(name: str, description: str) -> str:
    """What a device's measurements are called; RPC servers differ in the description alone."""
    return f"device.{name}:{description.strip()}".replace(" ", "_")


@dataclass(frozen=True)
class Matrices:
    """What to multiply with: ``k`` of ``n_expert`` matrices of ``n_in`` x ``n_out``, ``n_stacks`` times over.

    One expert and k = 1 stand for an ordinary matrix. ``usual`` puts them where llama.cpp would put weights
    of an ordinary buffer on the CPU, repacked where the processor has kernels for that. ``n_tokens`` at once.
    """

    type_id: int
    n_in: int
    n_out: int
    n_expert: int = 1
    k: int = 1
    n_stacks: int = 1
    usual: bool = False
    n_tokens: int = 1

    @property
    def multiplications(self) -> int:
        """Of a weight with a value, in one pass."""
        return self.n_in * self.n_out * self.k * self.n_stacks * self.n_tokens


@dataclass(frozen=True)
class Attention:
    """One layer: heads, of keys and values of so many numbers; ``n_tokens`` attend to ``n_positions``."""

    n_head: int
    n_head_kv: int
    keys: int
    values: int
    n_positions: int
    n_tokens: int
    flash: bool = False


class Ggml:
    """The bound library. Raises EngineError if it is missing or lacks a function."""

    def __init__(self) -> None:
        library, path = load_library()
        folder = Path(path).parent
        self._libraries = [library]
        for name in ("ggml", "ggml-base", "ggml-cpu"):
            for file in sorted(folder.glob(f"*{name}.*")):
                with contextlib.suppress(OSError):
                    self._libraries.append(ctypes.CDLL(str(file)))
        self._functions = {name: self._find(name, *types) for name, types in _SIGNATURES.items()}
        self._path = path

    def _find(self, name: str, result: Any, arguments: tuple[Any, ...]) -> Any:
        for library in self._libraries:
            function = getattr(library, name, None)
            if function is not None:
                # a prototype of our own: the library's may be llama-cpp-python's
                address = ctypes.cast(function, ctypes.c_void_p).value or 0
                return ctypes.CFUNCTYPE(result, *arguments)(address)
        raise EngineError(f"cannot measure: {name} is not in llama-cpp-python's library")

    def call(self, name: str, *arguments: Any) -> Any:
        """Call ``ggml_NAME``."""
        return self._functions[f"ggml_{name}"](*arguments)

    @contextlib.contextmanager
    def backend(self, device: Device, threads: int = 0) -> Iterator[int]:
        """A backend on a device; ``threads`` for the CPU."""
        handle = self.call("backend_dev_init", device.handle, None)
        if not handle:
            raise EngineError(f"the device {device.name} ({device.description}) cannot be used")
        try:
            if threads and device.type == CPU:
                reg = self.call("backend_dev_backend_reg", device.handle)
                address = self.call("backend_reg_get_proc_address", reg, b"ggml_backend_set_n_threads")
                if address:
                    ctypes.CFUNCTYPE(None, _A, ctypes.c_int)(address)(handle, threads)
            yield handle
        finally:
            self.call("backend_free", handle)

    @contextlib.contextmanager
    def _context(self) -> Iterator[int]:
        handle = self.call("init", _InitParams(8 << 20, None, True))
        try:
            yield handle
        finally:
            self.call("free", handle)

    def time_products(
        self,
        device: Device,
        backend: int,
        what: Matrices,
        seconds: float,
        check: Callable[[], None] = lambda: None,
    ) -> tuple[int, list[float]]:
        """Multiply vectors with the matrices, again and again for ``seconds``, by other experts each time.

        Returns the bytes of weights that one pass reads, and the seconds of every pass. Raises EngineError
        if the device has no memory for them.
        """
        with self._context() as weights_ctx, self._context() as ctx, contextlib.ExitStack() as buffers:
            shape = (what.n_in, what.n_out)
            stacks = [
                self.call("new_tensor_3d", weights_ctx, what.type_id, *shape, what.n_expert)
                if what.n_expert > 1
                else self.call("new_tensor_2d", weights_ctx, what.type_id, *shape)
                for _ in range(what.n_stacks)
            ]
            n_tokens = what.n_tokens
            columns = (1, n_tokens) if what.n_expert > 1 else (n_tokens, 1)
            x = self.call("new_tensor_3d", ctx, F32, what.n_in, *columns)
            ids = (
                [self.call("new_tensor_2d", ctx, I32, what.k, n_tokens) for _ in stacks]
                if what.n_expert > 1
                else []
            )
            graph = self.call("new_graph_custom", ctx, _GRAPH_NODES, False)
            products = [
                self.call("mul_mat_id", ctx, stack, x, ids[i]) if ids else self.call("mul_mat", ctx, stack, x)
                for i, stack in enumerate(stacks)
            ]
            for product in products:
                self.call("build_forward_expand", graph, product)
            place = self._repacking(device, products[0], stacks[0]) if what.usual else None
            made = (
                self.call("backend_alloc_ctx_tensors_from_buft", weights_ctx, place)
                if place
                else self.call("backend_alloc_ctx_tensors", weights_ctx, backend)
            )
            self._own(buffers, made, device, weights=True)
            self._own(buffers, self.call("backend_alloc_ctx_tensors", ctx, backend), device)
            for stack in stacks:
                check()  # over a slow link this takes longest
                self._fill(stack)
            self._fill(x)
            n_bytes = sum(self.call("nbytes", stack) for stack in stacks) // what.n_expert * what.k
            pick = random.Random(0)
            one = ctypes.c_float()
            times: list[float] = []
            deadline = time.perf_counter() + seconds
            while time.perf_counter() < deadline or len(times) < 3:
                check()
                for tensor in ids:
                    rows = [pick.sample(range(what.n_expert), what.k) for _ in range(n_tokens)]
                    chosen = (ctypes.c_int32 * (what.k * n_tokens))(*(id for row in rows for id in row))
                    self.call(
                        "backend_tensor_set", tensor, ctypes.addressof(chosen), 0, ctypes.sizeof(chosen)
                    )
                started = time.perf_counter()
                if self.call("backend_graph_compute", backend, graph) != 0:
                    raise EngineError(f"the device {device.name} failed to multiply matrices")
                self.call("backend_synchronize", backend)
                if device.type != CPU:
                    # an RPC server answers to nothing but this: without it only the sending was timed
                    self.call("backend_tensor_get", products[-1], ctypes.addressof(one), 0, 4)
                times.append(time.perf_counter() - started)
            return n_bytes, times[1:]

    def time_attention(
        self,
        backend: int,
        what: Attention,
        seconds: float,
        check: Callable[[], None] = lambda: None,
    ) -> list[float]:
        """Seconds of every pass of a layer's attention on the CPU, as llama.cpp's graphs compute it."""
        with self._context() as ctx, contextlib.ExitStack() as buffers:

            def tensor(kind: int, *shape: int) -> int:
                return self.call("new_tensor_3d", ctx, kind, *shape)

            query = tensor(F32, what.keys, what.n_tokens, what.n_head)
            key = tensor(F16, what.keys, what.n_positions, what.n_head_kv)
            if what.flash:
                value = tensor(F16, what.values, what.n_positions, what.n_head_kv)
                result = self.call("flash_attn_ext", ctx, query, key, value, None, 1.0, 0.0, 0.0)
            else:
                value = tensor(F16, what.n_positions, what.values, what.n_head_kv)
                scores = self.call("mul_mat", ctx, key, query)
                weights = self.call("soft_max_ext", ctx, scores, None, 1.0, 0.0)
                result = self.call("mul_mat", ctx, value, weights)
            graph = self.call("new_graph_custom", ctx, _GRAPH_NODES, False)
            self.call("build_forward_expand", graph, result)
            made = self.call("backend_alloc_ctx_tensors", ctx, backend)
            if not made:
                raise EngineError("no memory to measure attention with")
            buffers.callback(self.call, "backend_buffer_free", made)
            for one in (query, key, value):
                self._fill(one)
            times: list[float] = []
            deadline = time.perf_counter() + seconds
            while time.perf_counter() < deadline or len(times) < 3:
                check()
                started = time.perf_counter()
                if self.call("backend_graph_compute", backend, graph) != 0:
                    raise EngineError("attention could not be computed")
                times.append(time.perf_counter() - started)
            return times[1:]

    def time_copies(
        self,
        device: Device,
        backend: int,
        n_bytes: int,
        seconds: float,
        check: Callable[[], None] = lambda: None,
    ) -> tuple[list[float], list[float]]:
        """Seconds of uploads to and of downloads from a device, of ``n_bytes`` (a multiple of 4) each."""
        host = ctypes.create_string_buffer(n_bytes)
        with self._context() as ctx, contextlib.ExitStack() as buffers:
            tensor = self.call("new_tensor_2d", ctx, F32, n_bytes // 4, 1)
            self._own(buffers, self.call("backend_alloc_ctx_tensors", ctx, backend), device)
            found: list[list[float]] = []
            for name in ("backend_tensor_set", "backend_tensor_get"):
                times: list[float] = []
                deadline = time.perf_counter() + seconds / 2
                while time.perf_counter() < deadline or len(times) < 3:
                    check()
                    started = time.perf_counter()
                    self.call(name, tensor, ctypes.addressof(host), 0, n_bytes)
                    self.call("backend_synchronize", backend)
                    times.append(time.perf_counter() - started)
                found.append(times[1:])
            return found[0], found[1]

    def _own(
        self, stack: contextlib.ExitStack, buffer: int, device: Device, *, weights: bool = False
    ) -> None:
        if not buffer:
            raise EngineError(f"no memory on {device.name} to measure it with")
        stack.callback(self.call, "backend_buffer_free", buffer)
        if weights:
            self.call("backend_buffer_set_usage", buffer, _USAGE_WEIGHTS)

    def _fill(self, tensor: int) -> None:
        n_bytes = self.call("nbytes", tensor)
        block = (ctypes.c_char * n_bytes).from_buffer(bytearray([_FILL]) * n_bytes)
        self.call("backend_tensor_set", tensor, ctypes.addressof(block), 0, n_bytes)

    def _repacking(self, device: Device, product: int, weight: int) -> int | None:
        """The first extra buffer type of the CPU that has kernels for this product, as llama.cpp chooses
        it."""
        reg = self.call("backend_dev_backend_reg", device.handle)
        address = self.call("backend_reg_get_proc_address", reg, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        places = ctypes.CFUNCTYPE(ctypes.POINTER(_A), _A)(address)(device.handle)
        field = _A.from_address(weight + _BUFFER_OFFSET)
        index = 0
        while places and places[index]:
            place, index = places[index], index + 1
            buffer = self.call("backend_buft_alloc_buffer", place, 0)
            if not buffer:
                continue
            field.value = buffer
            fits = self.call("backend_dev_supports_op", device.handle, product)
            field.value = None
            self.call("backend_buffer_free", buffer)
            if fits:
                return place
        return None
