"""Starts of trials, which take turns: a start keeps two cores busy, and trials that begin together end together, too, so that
nobody would step while all of them start and end."""

from contextlib import AbstractContextManager, suppress
from queue import Empty, Full
from types import TracebackType
from typing import Self

from ray.util.queue import Queue

CPUS_OF_A_START = 2
LONGEST_SECONDS = 60.0
"""How long a trial waits for its turn at most."""


def take_turns(cpus: float) -> Queue:
    """Turns for all trials of a sweep. cpus: of the cluster."""
    turns = Queue(max(1, int(cpus / CPUS_OF_A_START)), actor_options={"num_cpus": 0})
    turns.put_nowait_batch([None] * turns.maxsize)
    return turns


class Start(AbstractContextManager["Start"]):
    """A trial's start, which begins when its turn has come, and is over when it says so, or fails."""

    def __init__(self, turns: Queue) -> None:
        self._turns = turns
        self._is_over = False

    def __enter__(self) -> Self:
        # Whoever has it may take long, or have been killed with it; then this one gives one back in its place.
        with suppress(Empty):
            self._turns.get(timeout=LONGEST_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.over()

    def over(self) -> None:
        """Let another trial start."""
        if self._is_over:
            return
        self._is_over = True
        with suppress(Full):  # where it did not wait for one
            self._turns.put_nowait(None)
