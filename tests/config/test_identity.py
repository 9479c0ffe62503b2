"""What makes a run another run."""

import pytest

from ray_sd.config import ExperimentConfig
from ray_sd.config.identity import is_identity
from ray_sd.config.settings import settings_below

MAY_CHANGE = (
    "dataset.source",
    "dataset.mask.path",
    "dataset.max_pixels",
    "dataset.max_rejected_fraction",
    "dataset.reader_memory",
    "dataset.crop.detector.batch_size",
    "dataset.encode.batch_size",
    "dataset.encode.num_actors",
    "dataset.encode.rows_per_shard",
    "method.class_images.folder",
    "method.class_images.batch_size",
    "method.class_images.num_workers",
)
"""Of what a run learns from, with which model and how: where it lies, and how quickly it is prepared."""
STAYS = (
    "seed",
    "trainer.batch_size",
    "trainer.ema_decay",
    "trainer.optimizer.name",
    "trainer.optimizer.beta1",
    "trainer.optimizer.slice_p",
)
"""Of everything else what decides which steps are taken, or what a checkpoint holds."""


def test_all_of_data_model_and_method_stays_but_where_it_lies_and_how_quickly_it_is_prepared():
    paths = {path for path, _, _ in settings_below(ExperimentConfig)}
    own = {path for path in paths if path.startswith(("dataset.", "model.", "method."))}
    assert paths >= set(MAY_CHANGE)
    free = {path for path in own if f"{path}.".startswith(tuple(f"{place}." for place in MAY_CHANGE))}
    assert {path for path in own if not is_identity(path, ExperimentConfig)} == free
    others = {path for path in paths - own if is_identity(path, ExperimentConfig)}
    assert others == {*STAYS, "dataset", "model", "method"}


@pytest.mark.parametrize(
    ("path", "stays"),
    [
        ("dataset.sharpness", True),
        ("dataset.encode.sharpness", True),
        ("dataset.source.sharpness", False),
        ("dataset.caption.replace.a.b", True),
        ("model.vae.sharpness", True),
        ("method.class_images.sharpness", True),
        ("trainer.sharpness", False),
        ("sharpness", False),
    ],
)
def test_a_setting_that_is_not_known_is_what_its_group_is(path: str, stays: bool):
    assert is_identity(path, ExperimentConfig) == stays
