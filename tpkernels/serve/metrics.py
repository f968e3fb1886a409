"""The metrics of the server, for Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """The numbers of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        where: Any = {"registry": self._registry}
        self.requests = Counter(
            "tpkernels_requests", "Requests that were answered, by path and status.", ["path", "status"], **where
        )
        self.tokens = Counter("tpkernels_tokens", "Tokens of prompts and of answers.", ["kind"], **where)
        self.queue = Gauge("tpkernels_queue_length", "Sequences that wait for a slot.", **where)
        self.running = Gauge("tpkernels_running", "Sequences in slots.", **where)
        self.healthy = Gauge("tpkernels_healthy", "1 while the model can be served.", **where)
        self.first = Histogram(
            "tpkernels_first_token_seconds", "From request to first token.", buckets=SECONDS, **where
        )
        self.whole = Histogram("tpkernels_request_seconds", "From request to last token.", buckets=SECONDS, **where)

    def generated(self, prompt: int, first_s: float | None) -> None:
        """Count one token, and the prompt before it when it is the first."""
        self.tokens.labels("generated").inc()
        if first_s is not None:
            self.tokens.labels("prompt").inc(prompt)
            self.first.observe(first_s)

    def text(self) -> bytes:
        """All of it, in the format that Prometheus reads."""
        return generate_latest(self._registry)
