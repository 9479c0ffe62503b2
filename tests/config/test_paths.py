from pathlib import Path

import pytest

from ray_sd.config import SweepConfig, TextToVideoConfig
from ray_sd.config.load import load_config
from ray_sd.config.overrides import value_at
from ray_sd.config.paths import absolute_paths

SWEEP = (
    "name=x",
    "experiment=smoke",
    "dataset=image_folder",
    "dataset.holdout=1",
    "sweep.space={seed: {choice: [1, 2]}}",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where a command runs, with models in it and in a home."""
    for name in ("models/mine", "embedded/emoji", "home/vae"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def test_paths_lead_on_from_the_folder_where_they_were_given(folder: Path, monkeypatch: pytest.MonkeyPatch):
    sweep = load_config([*SWEEP, "model.vae=models/mine", "dataset.source.path=~/photos"], SweepConfig)
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    for config in (sweep, sweep.experiment, sweep.model_copy(update={"seed": 1})):
        found = absolute_paths(config)
        assert (found.storage_path, found.cache_path) == (f"{folder}/runs/sweeps", f"{folder}/runs/cache")
        assert found.model.vae.path == f"{folder}/models/mine"
        assert found.dataset.source.path == f"{folder}/home/photos"
        assert absolute_paths(found) == found
        assert (config.storage_path, config.model.vae.path) == ("runs/sweeps", "models/mine")


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("method.class_images.folder=dogs", "{}/dogs"),
        ("method.class_images.folder=s3://b/dogs", "s3://b/dogs"),
        ("method.class_images.folder=null", None),
        ("dataset.mask={name: files, path: masks}", "{}/masks"),
        ("dataset.source.path=embedded/pictures/owl", "embedded/pictures/owl"),
        ("dataset.source.path=~no-such-user/photos", "~no-such-user/photos"),
        ("cache_path=file:///tmp/cache", "file:///tmp/cache"),
        ("resume=runs/x/checkpoint-00000002", "{}/runs/x/checkpoint-00000002"),
        ("resume=true", True),
    ],
)
def test_places_become_absolute_whether_or_not_they_are_there(folder: Path, setting: str, found: str | bool | None):
    path, _, _ = setting.partition("=")
    settings = ["name=x", "model=tiny_random", "method=dreambooth", "dataset=image_folder", "dataset.source.path=x"]
    config = absolute_paths(load_config([*settings, setting]))
    path = "dataset.mask.path" if path == "dataset.mask" else path
    expected = found.format(folder) if isinstance(found, str) else found
    assert value_at(config.model_dump(), path) == expected


def test_local_models_of_a_run_become_absolute_and_nothing_else_changes(folder: Path):
    config = load_config(
        [
            "name=x",
            "model=svd",
            "model.base=models/mine",
            "model.unet=models/../models/mine",
            "model.vae=~/vae",
            "model.image_encoder=embedded/emoji",
            "model.scheduler.path=models/mine",
            "method=inflate",
            "method.image_model=models/mine",
            "dataset=video_folder",
            "dataset.source.path=models",
        ]
    )
    found = absolute_paths(config)
    mine = f"{folder}/models/mine"
    assert (found.model.base, found.model.unet.path) == (mine, f"{folder}/models/../models/mine")
    assert (found.model.vae.path, found.model.image_encoder.path) == (f"{folder}/home/vae", "embedded/emoji")
    assert (found.model.scheduler.path, found.method.image_model) == (mine, mine)
    assert found.dataset.source.path == f"{folder}/models"
    own = {name: getattr(config, name) for name in ("model", "method", "dataset", "storage_path", "cache_path")}
    assert found.model_copy(update=own) == config
    assert config.model.base == "models/mine"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse"),
        ("model.safetensors", "{}/model.safetensors"),
        ("models/absent", "models/absent"),
        ("/models", "/models"),
    ],
)
def test_what_is_not_found_here_stays_as_it_is(folder: Path, given: str, found: str):
    config = load_config(["name=x", "model=sd15", "dataset=owl", "method=autoencoder", f"method.teacher={given}"])
    assert absolute_paths(config).method.teacher == found.format(folder)


def test_validation_images_become_absolute(folder: Path):
    given = "trainer.validation.images=[model.safetensors, embedded/a.png, s3://b/c.png]"
    config = load_config(
        ["name=x", "model=svd", "method=temporal", "dataset=video_folder", "dataset.source.path=x", given]
    )
    images = absolute_paths(config).trainer.validation.images
    assert images == (f"{folder}/model.safetensors", "embedded/a.png", "s3://b/c.png")


def test_models_of_stages_and_of_detectors_become_absolute(folder: Path):
    settings = ["chain=svd", "prompt=a cat", "upscale.model.vae=models/mine", "video.model.base=models/mine"]
    found = absolute_paths(load_config(settings, TextToVideoConfig))
    mine = f"{folder}/models/mine"
    assert (found.upscale.model.vae.path, found.video.model.base) == (mine, mine)
    crop = load_config(["experiment=smoke", "dataset.crop={name: subject, detector: models/mine}"]).dataset.crop
    assert absolute_paths(crop).detector.path == mine
