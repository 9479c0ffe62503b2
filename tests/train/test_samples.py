"""What is drawn at a checkpoint, with models that say what they were asked for."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config
from ray_sd.train import samples

CLIPS = ("model=tiny_random_video", "dataset=video_folder", "dataset.video.num_frames=3")
PICTURES = ("model=tiny_random_upscale", "dataset=image_folder", "method=full")


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., ExperimentConfig]:
    """Runs that draw from two pictures twice as wide as high, red in the middle."""

    def build(*settings: str) -> ExperimentConfig:
        for name in ("one", "other"):
            picture = Image.new("RGB", (128, 64), "blue")
            picture.paste("red", (32, 0, 96, 64))
            picture.save(tmp_path / f"{name}.png")
        images = f"trainer.validation.images=[{tmp_path}/one.png, {tmp_path}/other.png]"
        return load_config(["name=x", "dataset.source.path=x", "dataset.resolution=64", *settings, images])

    return build


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What clips and enlargements were asked for; all of them are black."""
    found: dict[str, Any] = {}

    def generate_clips(model: object, requests: list, decode_chunk_size: int | None = None) -> list:
        found.update(requests=requests, decode_chunk_size=decode_chunk_size)
        return [[Image.new("RGB", (64, 64))] * request.num_frames for request in requests]

    def generate(model: object, requests: list) -> list:
        found.update(requests=requests)
        return [Image.new("RGB", (64, 64)) for _ in requests]

    monkeypatch.setattr(samples, "generate_clips", generate_clips)
    monkeypatch.setattr(samples, "generate", generate)
    return found


def test_clips_begin_with_pictures_cut_to_size(configure: Callable, asked: dict[str, Any]):
    drawn = samples._draw_clips(SimpleNamespace(), configure(*CLIPS, "method=temporal"))
    assert drawn.what == "2 clips"
    assert [frame.size for frame in drawn.frames] == [drawn.frames[0].size] * 3
    assert asked["decode_chunk_size"] is None
    for request in asked["requests"]:
        [image] = request.images
        assert image.size == (64, 64)
        assert image.getcolors() == [(64 * 64, (255, 0, 0))]


def test_key_frames_of_one_clip_are_one_clip(configure: Callable, asked: dict[str, Any]):
    drawn = samples._draw_clips(SimpleNamespace(), configure(*CLIPS, "method=interpolation"))
    assert drawn.what == "1 clip"
    assert [len(request.images) for request in asked["requests"]] == [2]


def test_a_decoder_is_shown_as_it_is_trained(configure: Callable, asked: dict[str, Any]):
    samples._draw_clips(SimpleNamespace(), configure(*CLIPS, "method=temporal_decoder", "method.chunk_size=2"))
    assert asked["decode_chunk_size"] == 2


@pytest.mark.parametrize(("most", "level"), [(350, 20), (7, 7)])
def test_an_upscaler_is_given_no_more_noise_than_it_takes(
    configure: Callable, asked: dict[str, Any], most: int, level: int
):
    model = SimpleNamespace(latent_factor=4, max_noise_level=most)
    assert samples._draw_enlarged(model, configure(*PICTURES)).what == "2 pictures"
    assert [request.noise_level for request in asked["requests"]] == [level] * 2
    assert {request.image.size for request in asked["requests"]} == {(16, 16)}


@pytest.mark.parametrize("method", ["temporal", "interpolation", "decoder"])
@pytest.mark.parametrize("model", ["svd", "svd_xt"])
def test_published_video_models_are_shown_with_the_guidance_of_their_pipeline(method: str, model: str):
    config = load_config([f"experiment=svd_{method}_{model}", "dataset.source.path=x"])
    assert config.trainer.validation.guidance_scale == 3


@pytest.mark.parametrize("name", ["svd_temporal", "svd_decoder", "svd_interpolation"])
def test_experiments_with_the_embedded_video_model_draw_a_clip_of_an_embedded_picture(name: str):
    config = load_config([f"experiment={name}"])
    assert config.trainer.validation.draws
    samples.check_images(config)
