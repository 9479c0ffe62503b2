"""The time that a sweep has: after it nothing new is tried, and what is at work comes to its end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ray.tune.search import ConcurrencyLimiter, Searcher, SearchGenerator

_end = float("inf")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Let sweeps of this process begin trials for so long. Nothing of it is in what Tune keeps of a search in files, so
    that a sweep which goes on has the time that it is given then."""
    global _end
    _end = time.monotonic() + seconds
    try:
        yield
    finally:
        _end = float("inf")


class LimitedSearch(SearchGenerator):
    """A search of so many trials at once, which is at its end, too, where the time is over."""

    def __init__(self, search: Searcher, at_once: int) -> None:
        super().__init__(ConcurrencyLimiter(search, max_concurrent=at_once))

    def is_finished(self) -> bool:
        return super().is_finished() or time.monotonic() >= _end
