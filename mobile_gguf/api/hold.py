"""Who has a loaded model: one thread at a time, and the answers that it makes at once, until it is closed."""

from __future__ import annotations

import atexit
import contextlib
import threading
import weakref
from collections.abc import Generator

from mobile_gguf.engine.forks import abandon_in_children, forked
from mobile_gguf.engine.structs import Counters, DeviceCounters
from mobile_gguf.errors import ModelBusyError
from mobile_gguf.generate.answer.answer import Answer, Chunk
from mobile_gguf.generate.backend import Backend
from mobile_gguf.gguf.info import GgufInfo

_BUSY = """this Model is already generating: use it from one thread at a time, and finish or close a stream \
before the next answer"""
# The engine must be freed before the interpreter takes its log callback apart.
_held: weakref.WeakSet[Hold] = weakref.WeakSet()


class Hold:
    """The backend of ``info``'s model and the view of its ``experts``, which ``close`` frees.

    A second thread, or a second answer that is none of the thread's crew, gets a ModelBusyError. ``totals``
    and ``device_totals`` are what was counted before the answers that run. In a forked child all is refused.
    """

    def __init__(self, backend: Backend, info: GgufInfo) -> None:
        self.experts = backend.experts(info)
        self.lock = threading.Lock()
        self.totals = Counters()
        self.device_totals = DeviceCounters()
        self._name = info.path.name
        self._backend: Backend | None = backend
        self._is_forked = False
        self._n_together = 0  # answers of the thread that has the lock
        self._active: weakref.ref[Generator[Chunk, None, None]] | None = None
        # A view may be kept for longer than its model, and must not read what is freed.
        weakref.finalize(self, self.experts.close)
        _held.add(self)
        abandon_in_children(self)

    @property
    def is_closed(self) -> bool:
        return self._backend is None

    def backend(self) -> Backend:
        """The decoder under the model. Raises ModelBusyError once it is closed, EngineError after a fork."""
        if self._is_forked:
            raise forked()
        if self._backend is None:
            raise ModelBusyError(f"this Model of {self._name} is closed: load it again")
        return self._backend

    def stream(self, answer: Answer) -> Generator[Chunk, None, None]:
        """The chunks of ``answer``; the model is taken when the first one is asked for."""
        handle: list[weakref.ref[Generator[Chunk, None, None]]] = []
        running = self._run(answer, handle)
        handle.append(weakref.ref(running))
        return running

    def _run(
        self, answer: Answer, handle: list[weakref.ref[Generator[Chunk, None, None]]]
    ) -> Generator[Chunk, None, None]:
        with self.taken():
            self._active = handle[0]
            try:
                yield from answer.stream()
            finally:
                if self._active is handle[0]:
                    self._active = None

    @contextlib.contextmanager
    def taken(self) -> Generator[Backend, None, None]:
        """Hold the model, beside others of this thread's crew; the first has the counters begin anew."""
        lock = self.lock  # a forked child has another
        backend = self.backend()
        if not backend.scheduler.joins and not lock.acquire(blocking=False):
            raise ModelBusyError(_BUSY)
        self._n_together += 1
        try:
            backend = self.backend()
            if self._n_together == 1:
                self.totals = self.totals + backend.counters()
                self.device_totals = self.device_totals + backend.device_counters()
                backend.reset_counters()
            yield backend
        finally:
            self._n_together -= 1
            if self._n_together == 0:
                lock.release()

    def close(self) -> None:
        """Free the model; a stream that was left unfinished ends. Raises ModelBusyError while generating."""
        backend = self._backend
        if backend is None:
            return
        running = self._active() if self._active is not None else None
        try:
            if running is not None:
                running.close()
        except ValueError:  # the generator is executing
            raise ModelBusyError(
                "this Model is generating in another thread: wait before closing it"
            ) from None
        if not self.lock.acquire(blocking=False):
            raise ModelBusyError("this Model is generating: wait before closing it")
        try:
            self._backend = None
            self.experts.close()
            backend.close()
        finally:
            self.lock.release()

    def _abandon(self) -> None:
        """In a forked child: every call is refused, and nothing is freed."""
        self._is_forked = True
        self._backend = self._active = None
        self.lock, self._n_together = threading.Lock(), 0


@atexit.register
def _close_all() -> None:
    for hold in list(_held):
        # A daemon thread may still be generating; the process ends anyway.
        with contextlib.suppress(ModelBusyError):
            hold.close()
