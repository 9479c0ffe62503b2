"""Restarts: what is told of workers that were lost, after which a run goes on.

Imports no torch: Ray Train's controller, in whose process this is called, would start ten seconds later.
"""

import logging
from typing import Any

import ray.train

from ray_sd.cluster import OWNER_IS_GONE

logger = logging.getLogger(__name__)


class Restarts(ray.train.UserCallback):
    """Tells why a run that goes on had to. How it ends is told where it was called."""

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures
        self._failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        from ray_sd.train.failures import cause_of, reason_of

        reason = reason_of(cause_of(list(worker_exceptions.values())))
        if OWNER_IS_GONE in reason:
            return  # a trial that was stopped: its controller ends next
        self._failures += 1
        if self._failures <= self._max_failures:
            logger.warning(
                "a worker was lost: %s; the run goes on from what it has stored (%d of trainer.max_failures=%d)",
                reason,
                self._failures,
                self._max_failures,
            )
