"""What a policy server counts, in Prometheus' text format."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE

__all__ = ["CONTENT_TYPE", "ServerMetrics"]

_RECENT = 1000  # requests, of which the quantiles are
_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)


class ServerMetrics:
    """A server's, in a registry of its own.

    Args:
        waiting: how many requests wait.
        connections: how many clients are connected.
    """

    def __init__(self, waiting: Callable[[], int], connections: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._requests = Counter(
            "pruner_requests", "Requests by outcome.", ["outcome"], registry=registry
        )
        for outcome in ("ok", "error", "busy"):
            self._requests.labels(outcome)
        self._seconds = Histogram(
            "pruner_request_seconds",
            "From a request's receipt to its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._batch = Histogram(
            "pruner_batch_size",
            "Requests that were inferred together, by request.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self._kept = Gauge(
            "pruner_tokens_kept",
            "Patches kept by the last request, by camera.",
            ["camera"],
            registry=registry,
        )
        self._tokens = Counter(
            "pruner_tokens", "Patches seen and kept.", ["which"], registry=registry
        )
        self._gauge("pruner_queue_depth", "Requests that wait.", waiting)
        self._gauge("pruner_connections", "Clients that are connected.", connections)
        for percent in (50, 99):
            self._gauge(
                f"pruner_request_p{percent}_seconds",
                f"The {percent}th percentile of the last {_RECENT} answered requests.",
                lambda percent=percent: self._percentile(percent),
            )

    def answered(self, started: float, batch_size: int, pruning: Mapping[str, Any]) -> None:
        """Counts a request that was answered; `started` is of `time.perf_counter`."""
        seconds = time.perf_counter() - started
        self._recent.append(seconds)
        self._requests.labels("ok").inc()
        self._seconds.observe(seconds)
        self._batch.observe(batch_size)
        for camera, count in pruning.get("kept", {}).items():
            self._kept.labels(camera).set(count)
        self._tokens.labels("seen").inc(pruning.get("patches", 0))
        self._tokens.labels("kept").inc(pruning.get("kept_total", 0))

    def refused(self, outcome: str) -> None:
        """Counts a request that was not answered: an "error", or the server was "busy"."""
        self._requests.labels(outcome).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        Gauge(name, meaning, registry=self._registry).set_function(value)

    def _percentile(self, percent: int) -> float:
        return float(np.percentile(self._recent, percent)) if self._recent else 0.0
