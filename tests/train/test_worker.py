from threading import Event

import pytest
from checkpoints import write_checkpoint
from without_ray import fit_without_ray

from ray_sd.errors import RaySdError
from ray_sd.train.resume import Beginning
from ray_sd.train.worker import begun


def test_the_first_batch_is_read_before_anyone_asks_for_it():
    read = Event()

    def batches():
        read.set()
        yield from (1, 2, 3)

    found = begun(batches())
    assert read.wait(60)
    assert list(found) == [1, 2, 3]
    assert list(begun(iter(()))) == []


def test_what_reading_the_first_batch_raises_is_raised_where_it_is_asked_for():
    def batches():
        raise RaySdError("a shard is lost")
        yield

    found = begun(batches())
    with pytest.raises(RaySdError, match="a shard is lost"):
        next(found)


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_run_from_its_first_step_begins_to_read_before_it_loads_models(configure, monkeypatch, tmp_path, goes_on):
    """Which step another goes on with is told by its checkpoint."""
    given = []

    def train(job, batches):
        given.append(batches)
        return RaySdError("the end")

    monkeypatch.setattr("ray_sd.train.loop.train", train)
    checkpoint = str(write_checkpoint(tmp_path, step=2)) if goes_on else None
    monkeypatch.setattr("ray_sd.train.run.find_beginning", lambda *_: Beginning(None, checkpoint))
    with pytest.raises(RaySdError, match="the end"):
        fit_without_ray(configure("name=begun"))
    [batches] = given
    assert (batches is None) == goes_on
    assert goes_on or "latent_mean" in next(batches)
