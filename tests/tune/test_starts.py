"""Trials that take turns to start."""

import time
from queue import Queue

import pytest

from ray_sd.tune import starts
from ray_sd.tune.starts import Start, take_turns


@pytest.fixture
def turns() -> Queue:
    """One, that nobody has."""
    queue: Queue = Queue(1)
    queue.put(None)
    return queue


def test_a_trial_waits_until_the_start_before_its_own_is_over(turns: Queue, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(starts, "LONGEST_SECONDS", 0.0)
    with Start(turns) as first:
        assert turns.empty()
        first.over()
        with Start(turns):
            assert turns.empty()
            first.over()  # it has none to give back any more
            assert turns.empty()
        assert turns.qsize() == 1


def test_a_start_that_fails_is_over(turns: Queue):
    with pytest.raises(RuntimeError, match="lost"), Start(turns):
        raise RuntimeError("lost")
    assert turns.qsize() == 1


def test_a_turn_that_was_lost_is_given_back_by_the_next(turns: Queue, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(starts, "LONGEST_SECONDS", 0.1)
    turns.get()  # by one that was killed
    began = time.monotonic()
    with Start(turns):
        assert time.monotonic() - began >= 0.1
    assert turns.qsize() == 1


def test_a_turn_that_comes_late_does_not_make_more_of_them(turns: Queue, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(starts, "LONGEST_SECONDS", 0.0)
    slow, hasty = Start(turns), Start(turns)
    with slow, hasty:
        pass
    assert turns.qsize() == 1


class Local(Queue):
    """Ray's, without Ray."""

    def __init__(self, maxsize: int, actor_options: dict[str, object]) -> None:
        super().__init__(maxsize)
        assert actor_options == {"num_cpus": 0}  # a turn takes nothing from trials

    def put_nowait_batch(self, items: list[None]) -> None:
        for item in items:
            self.put_nowait(item)


@pytest.mark.parametrize(("cpus", "at_once"), [(1, 1), (2, 1), (5, 2)])
def test_as_many_start_at_once_as_have_two_cores_each(monkeypatch: pytest.MonkeyPatch, cpus: float, at_once: int):
    monkeypatch.setattr(starts, "Queue", Local)
    turns = take_turns(cpus)
    assert turns.qsize() == turns.maxsize == at_once
