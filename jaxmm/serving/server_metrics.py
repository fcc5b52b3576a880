"""Metrics of a server in Prometheus' format."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SIZES = (1, 2, 4, 8, 16, 32, 64)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class ServerMetrics:
    """Counts requests and batches. `waiting` returns the number of requests that are not answered yet."""

    def __init__(self, waiting: Callable[[], int]):
        self._registry = CollectorRegistry()
        self._requests = Counter("jaxmm_requests", "Requests that were answered.", ("endpoint", "status"),
                                 registry=self._registry)
        self._seconds = Histogram("jaxmm_request_seconds", "Seconds from the headers to the end of the answer.",
                                  ("endpoint",), buckets=SECONDS, registry=self._registry)
        self._sizes = Histogram("jaxmm_batch_size", "Requests that were computed together.", ("function",),
                                buckets=SIZES, registry=self._registry)
        self._batch_seconds = Histogram("jaxmm_batch_seconds", "Seconds to compute a batch.", ("function",),
                                        buckets=SECONDS, registry=self._registry)
        Gauge("jaxmm_waiting_requests", "Requests that are decoded, wait, or are computed.",
              registry=self._registry).set_function(waiting)

    def count_request(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(endpoint, status).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def count_batch(self, function: str, size: int, seconds: float) -> None:
        """Count a batch that was computed."""
        self._sizes.labels(function).observe(size)
        self._batch_seconds.labels(function).observe(seconds)

    def text(self) -> bytes:
        """Return all metrics as text."""
        return generate_latest(self._registry)
