from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from in_process import prepare
from pydantic import ValidationError
from sample_pictures import LATENTS, PIXELS, noise_png

from ray_sd.config import ExperimentConfig
from ray_sd.config.buckets import bucket_sizes
from ray_sd.config.dataset import DatasetConfig
from ray_sd.data import PreparedData, training_batches, validation_batches
from ray_sd.data.buckets import bucket_of
from ray_sd.data.lanes import LaneReader, lanes_of

SMALL = {"step": 8, "max_aspect_ratio": 2.0}
SHAPES = {"wide": ((48, 24), 7), "tall": ((24, 48), 5), "square": ((30, 30), 9)}
"""(width, height) of pictures, and how many there are."""


def settings(**values: object) -> DatasetConfig:
    source = {"name": "image_folder", "path": "pictures"}
    return DatasetConfig.model_validate({"source": source, "buckets": {}} | values)


def test_sizes_have_both_orientations_of_about_one_area():
    sizes = bucket_sizes(settings(resolution=512))
    assert (512, 512) in sizes
    assert sorted((width, height) for height, width in sizes) == sizes
    for height, width in sizes:
        assert height % 64 == width % 64 == 0
        assert 0.8 * 512 * 512 <= height * width <= 512 * 512
        assert max(height, width) <= 2 * min(height, width)
    assert {(384, 640), (448, 576)} <= set(sizes)  # of NovelAI's published table


def test_a_picture_takes_the_size_of_its_own_shape():
    config = settings(resolution=512)
    assert bucket_of(config, 2000, 2000) == (512, 512)
    assert bucket_of(config, 3000, 2000) == (384, 640)
    assert bucket_of(config, 2000, 3000) == (640, 384)
    assert bucket_of(config, 9000, 1000) == bucket_of(config, 2000, 1000)  # no longer than 2 : 1
    assert bucket_of(settings(resolution=512, buckets=None), 3000, 2000) == (512, 512)


def test_of_several_resolutions_a_picture_takes_the_largest_that_it_fills():
    config = settings(buckets={"resolutions": [1024, 512, 768]})
    assert bucket_of(config, 1100, 1100) == (1024, 1024)
    assert bucket_of(config, 1000, 1000) == (768, 768)
    assert bucket_of(config, 1500, 800) == (768, 1344)
    assert bucket_of(config, 300, 300) == (512, 512)
    assert bucket_of(config, 4000, 600) == bucket_of(config, 1200, 600) == (576, 1024)
    assert len(bucket_sizes(config)) == sum(len(bucket_sizes(settings(resolution=side))) for side in (512, 768, 1024))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"resolution": [512, 768]}, "buckets need one number for resolution"),
        ({"resolution": 520}, "resolution 520 is no positive multiple of buckets.step=64; try 512"),
        (
            {"buckets": {"resolutions": [512, 700]}},
            "resolution 700 is no positive multiple of buckets.step=64; try 704",
        ),
        ({"buckets": {"resolutions": [0, 512]}}, "resolution 0 is no positive multiple of buckets.step=64; try 64"),
        ({"buckets": {"resolutions": [-64]}}, "resolution -64 is no positive multiple of buckets.step=64; try 64"),
        ({"buckets": {"step": 12}}, "multiple of 8"),
    ],
)
def test_sizes_that_cannot_be_are_refused(values: dict, words: str):
    with pytest.raises(ValidationError, match=words):
        settings(**values)


def test_windows_of_the_autoencoder_fit_into_the_smallest_size(tmp_path: Path, configure: Callable):
    content = configure(tmp_path, resolution=512, buckets={}).model_dump(mode="json")
    fits, too_large = ({"method": {"name": "autoencoder", "crop_size": size}} for size in (384, 512))
    ExperimentConfig.model_validate(content | fits)
    with pytest.raises(
        ValidationError, match="method.crop_size 512 must be a multiple of 8 and at most 384, the small"
    ):
        ExperimentConfig.model_validate(content | too_large)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, (size, count) in SHAPES.items():
        for i in range(count):
            (folder / f"{i}-{name}.png").write_bytes(noise_png(i, size))
            (folder / f"{i}-{name}.txt").write_text(f"{name} number {i}")
    return folder


def test_batches_are_of_one_bucket_and_epochs_of_all_rows_on_any_number_of_workers(
    pictures: Path, configure: Callable, ray_cluster: None
):
    config = configure(pictures, resolution=32, buckets=SMALL, trainer={"batch_size": 4})
    data = prepare(config, LATENTS)
    assert data.summary.buckets == {"   24 x    40": 7, "   32 x    32": 9, "   40 x    24": 5}
    assert data.train.buckets == (7, 9, 5)
    alone = list(training_batches(data, config, LATENTS, 0, 0, 21))  # 21 rows in batches of 4: four epochs
    shapes = {(3, 5), (4, 4), (5, 3)}
    assert {tuple(batch["latent_mean"].shape[2:]) for batch in alone} == shapes
    targets = {tuple(batch["latent_mean"].shape[2:]): batch["add_time_ids"][0, 4:].tolist() for batch in alone}
    assert targets == {shape: [8 * shape[0], 8 * shape[1]] for shape in shapes}
    seeds = Counter(seed for batch in alone for seed in batch["row_seed"].tolist())
    assert len(seeds) == 84
    assert set(seeds.values()) == {1}

    trainer = config.trainer.model_copy(update={"num_workers": 2})
    several = config.model_copy(update={"trainer": trainer})
    readers = [LaneReader(data, several, LATENTS, lanes_of(data.train, several, rank)) for rank in range(2)]
    for step in range(21):
        parts = [torch.from_numpy(reader.micro_batch(step)["latent_mean"].copy()).float() for reader in readers]
        assert torch.equal(torch.cat(parts), alone[step]["latent_mean"])


def test_held_out_rows_are_measured_bucket_by_bucket(pictures: Path, configure: Callable):
    config = configure(
        pictures, resolution=32, buckets=SMALL, holdout=6, trainer={"batch_size": 4, "validation": {"num_timesteps": 2}}
    )
    data = prepare(config, LATENTS)
    for count in (1, 2, 3):
        ranks = [list(validation_batches(data.validation, config, LATENTS, rank, count)) for rank in range(count)]
        assert len({len(batches) for batches in ranks}) == 1
        assert sum(float(batch["weight"].sum()) for batches in ranks for batch in batches) == 12


def test_what_is_cached_finds_its_bucket_again(pictures: Path, configure: Callable):
    config = configure(pictures, resolution=32, buckets=SMALL)
    first: PreparedData = prepare(config, PIXELS)
    (pictures / "new.png").write_bytes(noise_png(99, (48, 24)))
    (pictures / "new.txt").write_text("one more")
    second = prepare(config, PIXELS)
    assert (second.summary.encoded, second.summary.reused) == (1, 21)
    assert second.train.buckets == (8, 9, 5)
    assert first.fingerprint != second.fingerprint
    assert prepare(config, PIXELS).train.buckets == (8, 9, 5)


def test_the_buckets_and_their_rows_are_told(pictures: Path, configure: Callable, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        prepare(configure(pictures, resolution=32, buckets=SMALL), PIXELS)
    assert "data: 3 buckets (height x width):\n     24 x    40  7 rows" in caplog.text
