"""The time that a sweep has: after it nothing new is tried, and what is at work comes to its end."""

import time
from collections.abc import Callable
from typing import Any

from ray.tune.search import ConcurrencyLimiter, Searcher, SearchGenerator


class LimitedSearch(SearchGenerator):
    """A search of so many trials at once, which is at its end, too, where its sweep's time is over.

    seconds_left: asked once a start. Tune keeps this object in files, and a sweep that goes on has the time that it is given
    then.
    """

    def __init__(self, search: Searcher, at_once: int, seconds_left: Callable[[], float]) -> None:
        super().__init__(ConcurrencyLimiter(search, max_concurrent=at_once))
        self._seconds_left = seconds_left
        self._end: float | None = None

    def is_finished(self) -> bool:
        if self._end is None:
            self._end = time.monotonic() + self._seconds_left()
        return super().is_finished() or time.monotonic() >= self._end

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_end": None}
