"""What the server counts, in Prometheus' format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKENS = tuple(2**power for power in range(6, 18))


class Metrics:
    """Counters of requests, scores and batches."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._requests = Counter("helpsteer_rloo_requests", "Requests answered.", ["path", "status"], registry=registry)
        self._seconds = Histogram(
            "helpsteer_rloo_request_seconds", "Seconds to an answer.", ["path"], buckets=_SECONDS, registry=registry
        )
        self._scores = Counter("helpsteer_rloo_scores", "Responses scored.", registry=registry)
        self._batch_requests = Histogram(
            "helpsteer_rloo_batch_requests", "Requests of a batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self._batch_tokens = Histogram(
            "helpsteer_rloo_batch_tokens", "Tokens of a batch.", buckets=_TOKENS, registry=registry
        )
        self.queue = Gauge("helpsteer_rloo_queue_tokens", "Tokens that wait to be scored.", registry=registry)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def scored(self, responses: int) -> None:
        """Count scores."""
        self._scores.inc(responses)

    def batch(self, requests: int, tokens: int) -> None:
        """Count a batch."""
        self._batch_requests.observe(requests)
        self._batch_tokens.observe(tokens)
