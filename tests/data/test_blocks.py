"""Ray Data sets as all of the package needs them."""

import pyarrow as pa
import pytest
from ray.data import DataContext
from ray.exceptions import ActorDiedError

from ray_sd.data import blocks
from ray_sd.data.blocks import TRIES, actor_restarts, ordered_dataset, tried_again
from ray_sd.errors import RaySdError


@pytest.mark.parametrize(
    ("one_machine", "beside_training", "rests"),
    [(True, False, True), (False, True, True), (True, True, True), (False, False, False)],
)
def test_scheduling_rests_beside_training_and_where_one_machine_does_everything(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, one_machine: bool, beside_training: bool, rests: bool
):
    resting: list[DataContext] = []
    monkeypatch.setattr(blocks, "is_one_machine", lambda: one_machine)
    monkeypatch.setattr(blocks, "rest_between_steps", resting.append)
    table = pa.table({"number": [1, 2]})
    dataset = ordered_dataset([table], block_bytes=1, bytes_under_way=1, beside_training=beside_training)
    assert resting == ([dataset.context] if rests else [])


def test_an_encoding_pass_that_lost_an_actor_is_begun_again_but_not_for_ever(caplog: pytest.LogCaptureFixture):
    left = TRIES - 1

    def encode(name: str) -> str:
        nonlocal left
        left -= 1
        if left >= 0:
            raise ActorDiedError
        return name

    assert tried_again(encode, "encoded") == "encoded"
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["data"] * (TRIES - 1)
    left = TRIES
    with pytest.raises(RaySdError, match="encoders were lost 3 times: .*; a smaller dataset.encode.batch_size"):
        tried_again(encode, "encoded")
    with pytest.raises(ZeroDivisionError):
        tried_again(lambda: 1 / 0)


def test_ray_starts_lost_actors_again_where_machines_come_and_go(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "is_one_machine", lambda: False)
    assert actor_restarts() == {}
    monkeypatch.setattr(blocks, "is_one_machine", lambda: True)
    assert actor_restarts() == {"max_restarts": 0}
