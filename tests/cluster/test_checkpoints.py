"""Ray Train's list of checkpoints."""

from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from ray_sd.cluster import SNAPSHOT


def test_the_list_lies_where_ray_train_writes_it():
    assert SNAPSHOT == CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
