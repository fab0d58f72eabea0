"""What Prometheus is told: requests, tokens by kind, expert traffic, queue and speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mobile_gguf.generate.answer.answer import Chunk

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_SPEEDS = (0.5, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# A receipt's field, the metric it adds to, and what that is.
_TRAFFIC = {
    "expert_hits": ("expert_hits", "Experts that were needed and in host memory"),
    "expert_misses": ("expert_misses", "Experts that were needed and had to be read"),
    "bytes_read": ("expert_read_bytes", "Expert bytes read from the file"),
    "device_hits": ("device_hits", "Experts that were needed and in device memory"),
    "device_misses": ("device_misses", "Experts that were needed and not in device memory"),
    "bytes_uploaded": ("expert_uploaded_bytes", "Expert bytes uploaded to a device"),
}


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self, n_waiting: Callable[[], int], n_running: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"mobile_gguf_{name}", text, labels, registry=self.registry)

        self.requests = counter("requests", "Requests by endpoint and HTTP status", ("endpoint", "status"))
        self.cancelled = counter("cancelled_requests", "Requests whose client left before the end")
        self._tokens = counter("tokens", "Tokens: prompt, cached, big, little, fallback", ("kind",))
        self._stall = counter("stall_seconds", "Time that decoding waited for experts")
        self._traffic = {field: counter(name, text) for field, (name, text) in _TRAFFIC.items()}
        self.seconds = Histogram(
            "mobile_gguf_request_seconds",
            "Time from a request to its end, with its waiting",
            ("endpoint",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.queue_seconds = Histogram(
            "mobile_gguf_queue_seconds",
            "Time that requests waited for their turn",
            ("endpoint",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "mobile_gguf_first_token_seconds",
            "Time from a request to its first token",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._speed = Histogram(
            "mobile_gguf_tokens_per_second",
            "Speed of the answers",
            buckets=_SPEEDS,
            registry=self.registry,
        )
        self._last_speed = Gauge(
            "mobile_gguf_last_tokens_per_second", "Speed of the last answer", registry=self.registry
        )
        waiting = Gauge("mobile_gguf_queue_length", "Requests that wait", registry=self.registry)
        waiting.set_function(n_waiting)
        running = Gauge("mobile_gguf_requests_running", "Requests being answered", registry=self.registry)
        running.set_function(n_running)
        for kind in ("prompt", "cached", "big", "little", "fallback"):
            self._tokens.labels(kind)

    def add_answer(self, last: Chunk, is_first: bool) -> None:
        """Count an answer by its last chunk; its prompt if it is the first to that."""
        receipt = last.receipt.to_dict()
        if is_first:
            self._tokens.labels("prompt").inc(last.prompt_tokens)
            self._tokens.labels("cached").inc(max(0, last.prompt_tokens - last.prompt_evaluated))
        for kind in ("big", "little", "fallback"):
            self._tokens.labels(kind).inc(receipt[f"tokens_{kind}"])
        self._add_traffic(receipt)
        if last.tokens_per_second > 0:
            self._speed.observe(last.tokens_per_second)
            self._last_speed.set(last.tokens_per_second)

    def add_embedding(self, n_tokens: int, receipt: Mapping[str, Any]) -> None:
        """Count a text that was embedded, by its receipt."""
        self._tokens.labels("prompt").inc(n_tokens)
        self._add_traffic(receipt)

    def _add_traffic(self, receipt: Mapping[str, Any]) -> None:
        for field, traffic in self._traffic.items():
            traffic.inc(receipt.get(field) or 0)
        self._stall.inc(receipt["stall_ms"] / 1e3)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
