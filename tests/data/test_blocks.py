"""Ray Data sets as all of the package needs them."""

import pyarrow as pa
import pytest
from ray.data import DataContext

from ray_sd.data import blocks
from ray_sd.data.blocks import ordered_dataset


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
