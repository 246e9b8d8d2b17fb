"""What a retrieval service counts, in the text format of Prometheus."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Metrics:
    """One service's numbers, in a registry of their own, so that several services fit into one process.

    Attributes:
        in_flight: requests whose bodies were read and whose answers are not ready.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "retrievers_requests", "Requests answered.", ["path", "status"], registry=self._registry
        )
        self._queries = Counter("retrievers_queries", "Queries searched.", registry=self._registry)
        self._failures = Counter("retrievers_failures", "Searches and readings that failed.", registry=self._registry)
        self._seconds = Histogram(
            "retrievers_request_seconds",
            "From a request's first byte of body to its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.in_flight = Gauge("retrievers_in_flight", "Requests that wait for their answer.", registry=self._registry)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request. `path` must be one of few, because each has numbers of its own."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def searched(self, queries: int) -> None:
        self._queries.inc(queries)

    def failed(self) -> None:
        self._failures.inc()

    def render(self) -> bytes:
        """Everything, as `CONTENT_TYPE`."""
        return generate_latest(self._registry)
