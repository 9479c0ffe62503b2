"""Ray Data sets as all of the package needs them."""

import pyarrow as pa
import pytest

from ray_sd.cluster import Pace
from ray_sd.data import blocks
from ray_sd.data.blocks import ordered_dataset


@pytest.mark.parametrize(
    ("one_machine", "beside_training", "rests"),
    [(True, False, True), (False, True, True), (True, True, True), (False, False, False)],
)
def test_scheduling_rests_beside_training_and_where_one_machine_does_everything(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, one_machine: bool, beside_training: bool, rests: bool
):
    monkeypatch.setattr(blocks, "is_one_machine", lambda: one_machine)
    table = pa.table({"number": [1, 2]})
    dataset = ordered_dataset([table], block_bytes=1, bytes_under_way=1, beside_training=beside_training)
    assert (Pace in dataset.context.execution_callback_classes) == rests
