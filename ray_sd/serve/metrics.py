"""What Prometheus is told of serving, by Ray's own exporter: `ray_sd_…`, with `_total` behind what counts."""

from collections import defaultdict
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

COUNTED = {
    "steps": "Calls of the U-Net.",
    "rows": "Rows that they had together; over `steps`, the mean batch.",
    "stepping_seconds": "What they took; over a minute, the share of it that the model was busy.",
    "decodes": "Calls of the autoencoder.",
    "pictures": "Pictures that were drawn.",
    "cancelled": "Pictures that nobody wanted any longer.",
    "failed": "Pictures that could not be drawn, or not in time.",
    "results_found": "Pictures that were there already, or under way for somebody else.",
    "prompts_found": "Prompts that were encoded before.",
    "prompts_encoded": "Prompts that were not.",
    "adapters_found": "Adapters that were in memory when they were asked for.",
    "adapters_loaded": "Adapters that were not.",
}
"""Of a replica, by base model."""
SEEN = {
    "waiting": "Pictures that have taken no step yet.",
    "adapter_bytes": "What the adapters in memory take.",
}
TIMED = {
    "queue_seconds": "From a picture's order to its first step.",
    "first_look_seconds": "From a picture's order to the first look at it, of those that are streamed.",
    "picture_seconds": "From a picture's order to its end.",
}
SECONDS = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0]
"""Limits of a histogram's parts."""
MODEL = ("model",)


class ReplicaMetrics:
    """Of one replica of a base model."""

    def __init__(self, model: str) -> None:
        self._of_model = {"model": model}
        self._counters = {name: Counter(f"sd_{name}", words, MODEL) for name, words in COUNTED.items()}
        self._gauges = {name: Gauge(f"sd_{name}", words, MODEL) for name, words in SEEN.items()}
        self._histograms = {name: Histogram(f"sd_{name}", words, SECONDS, MODEL) for name, words in TIMED.items()}
        self._told: dict[str, float] = defaultdict(float)

    def tell(self, figures: Mapping[str, float]) -> None:
        """What is so by now: totals since the start of COUNTED, and what SEEN names."""
        for name, counter in self._counters.items():
            if figures[name] > self._told[name]:
                counter.inc(figures[name] - self._told[name], self._of_model)
                self._told[name] = figures[name]
        for name, gauge in self._gauges.items():
            gauge.set(figures[name], self._of_model)

    def took(self, name: str, seconds: float) -> None:
        """One of TIMED."""
        self._histograms[name].observe(seconds, self._of_model)


class RequestMetrics:
    """Of one replica of the HTTP side."""

    def __init__(self) -> None:
        tags = ("method", "route", "status", "reason")
        self._requests = Counter("sd_requests", "Requests; those that were refused say why.", tags)
        self._seconds = Histogram("sd_request_seconds", "From a request to the end of its answer.", SECONDS, ("route",))

    def tell(self, method: str, route: str, status: int, reason: str, seconds: float) -> None:
        tags = {"method": method, "route": route, "status": str(status), "reason": reason}
        self._requests.inc(tags=tags)
        self._seconds.observe(seconds, {"route": route})
