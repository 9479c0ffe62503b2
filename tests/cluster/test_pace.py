"""Ray Data's scheduling loop."""

from types import SimpleNamespace

import pyarrow as pa
import pytest
import ray

from ray_sd.cluster import quiet_data, rest_between_steps


def test_ray_data_rests_between_its_steps_where_it_is_told_to(
    ray_cluster: None, levels: None, monkeypatch: pytest.MonkeyPatch
):
    rests: list[float] = []
    monkeypatch.setattr("ray_sd.cluster.pace.time", SimpleNamespace(sleep=rests.append))
    for told in (False, True):
        dataset = ray.data.from_blocks([pa.table({"number": [1, 2]})])
        quiet_data(dataset.context)
        if told:
            rest_between_steps(dataset.context)
        assert [row["number"] for row in dataset.map(lambda row: row).iter_rows()] == [1, 2]
        assert bool(rests) == told
