"""Whole runs of video models: from clips to a model that the plain pipeline loads, with clips drawn on the way."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from PIL import Image
from safetensors.torch import load_file

from ray_sd.adapter import read_manifest
from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config
from ray_sd.errors import ConfigError
from ray_sd.generate import read_parameters, save_mp4
from ray_sd.generate.videos import read_frames, read_video_parameters
from ray_sd.methods import load_adapter
from ray_sd.methods.temporal import is_temporal
from ray_sd.models import load_model
from ray_sd.train.run import TrainingResult, fit

OF_CLIPS = (
    "dataset=video_folder",
    "dataset.resolution=64",
    "dataset.video.num_frames=3",
    "dataset.video.cut_threshold=null",
    "model=tiny_random_video",
    "method=temporal",
    "trainer.learning_rate=1e-2",
    "trainer.ema_decay=0.9",
)


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos of squares that move, and a picture of one."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(5):
        frames = []
        for step in range(8):
            pixels = np.full((64, 64, 3), 40 * number, np.uint8)
            pixels[20:40, 4 * step : 4 * step + 20] = (250, 200, 30 * number)
            frames.append(Image.fromarray(pixels))
        save_mp4(frames, folder / f"{number}.mp4", fps=14, parameters={})
    frames[0].save(folder / "first.png")
    return folder


@pytest.fixture
def of_clips(settings: list[str], videos: Path) -> Callable[..., ExperimentConfig]:
    return lambda *more: load_config([*settings, *OF_CLIPS, f"dataset.source.path={videos}", *more])


def state(run: TrainingResult) -> dict[str, torch.Tensor]:
    """All that a run's last checkpoint holds: weights, the optimizer's moments, moving averages."""
    files = sorted(Path(run.checkpoint).glob("state-*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one
    assert one.keys() == other.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


def test_a_run_on_two_workers_goes_on_exactly_and_its_model_loads_in_the_plain_pipeline(of_clips, videos, ray_cluster):
    two = ("trainer.num_workers=2", "trainer.zero.stage=2", "trainer.checkpoint.every_steps=2")
    shown = (f"trainer.validation.images=[{videos}/first.png]", "trainer.validation.num_inference_steps=2")
    whole = fit(of_clips("name=whole", "dataset.holdout=1", *two, *shown))
    assert whole.step == 4
    assert "validation_loss" in whole.metrics
    assert "video.model=tiny_random_video" in whole.summary()
    frames = read_frames(Path(whole.run) / "samples.mp4")
    assert len(frames) == 3
    assert read_video_parameters(Path(whole.run) / "samples.mp4")["step"] == 4
    sheet = Path(whole.run) / "samples.png"
    assert sheet.read_bytes() == (Path(whole.run) / "samples" / "step-00000004.png").read_bytes()
    assert read_parameters(sheet)["images"] == [f"{videos}/first.png"]
    assert Image.open(sheet).width >= 3 * 64  # a row of all frames
    assert {path.stem for path in (Path(whole.run) / "samples").glob("*.mp4")} == {"step-00000002", "step-00000004"}
    manifest = read_manifest(Path(whole.adapter))
    assert (manifest.kind, manifest.family) == ("temporal", "stable_video_diffusion")

    begun = fit(of_clips("name=begun", "dataset.holdout=1", *two, "trainer.max_steps=2"))
    resumed = fit(of_clips("name=resumed", "dataset.holdout=1", *two, f"resume={begun.checkpoint}"))
    assert_same_bits(state(resumed), state(whole))
    learnt = [load_file(Path(run.adapter) / "unet" / "diffusion_pytorch_model.safetensors") for run in (whole, resumed)]
    assert_same_bits(*learnt)

    base = load_model(of_clips("name=x").model)
    before = base.unet.state_dict()
    changed = {name for name, tensor in learnt[0].items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(map(is_temporal, changed))
    unet = UNetSpatioTemporalConditionModel.from_pretrained(Path(whole.adapter) / "unet", use_safetensors=True)
    pipeline = StableVideoDiffusionPipeline(base.vae, base.image_encoder, unet, base.sampler(), base.image_processor)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(Image.open(videos / "first.png"), height=64, width=64, num_frames=3, num_inference_steps=2)
    assert len(drawn.frames[0]) == 3
    assert load_adapter(base, whole.adapter) == len(before)


def test_a_decoder_is_trained_on_the_pixels_of_clips_and_goes_on_exactly(of_clips, videos, ray_cluster):
    decoder = ("method=temporal_decoder", "method.chunk_size=2", "trainer.max_steps=2")
    shown = (f"trainer.validation.images=[{videos}/first.png]", "trainer.validation.num_inference_steps=1")
    result = fit(of_clips("name=decoder", *decoder, *shown))
    assert len(read_frames(Path(result.run) / "samples.mp4")) == 3
    said = read_parameters(Path(result.run) / "samples.png")
    assert (said["step"], said["run"], said["images"]) == (2, "decoder", [f"{videos}/first.png"])

    begun = fit(of_clips("name=begun", *decoder, "trainer.max_steps=1"))
    resumed = fit(of_clips("name=resumed", *decoder, f"resume={begun.checkpoint}"))
    assert_same_bits(state(resumed), state(result))

    vae = AutoencoderKLTemporalDecoder.from_pretrained(Path(result.adapter) / "vae", use_safetensors=True)
    fresh = load_model(of_clips("name=x").model, {"vae"}).vae
    changed = {name for name, value in vae.state_dict().items() if not torch.equal(value, fresh.state_dict()[name])}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)


def test_frames_between_key_frames_are_learnt_and_drawn(of_clips, videos, ray_cluster):
    images = f"trainer.validation.images=[{videos}/first.png, {videos}/first.png]"
    result = fit(of_clips("name=between", "method=interpolation", images, "trainer.validation.num_inference_steps=1"))
    assert len(read_frames(Path(result.run) / "samples.mp4")) == 3
    assert "interpolation.adapter=" in result.summary()


@pytest.mark.parametrize(
    ("settings_of", "words"),
    [
        (("model=tiny_random",), "method 'temporal' trains video models, and model 'tiny_random' is of family"),
        (("method=lora",), "method 'lora' trains image models, and model 'tiny_random_video' makes videos"),
        (("method=interpolation", "method.key_frames=[0, 3]"), "clips of 3 frames have no frame 3"),
        (("method=interpolation", "method.key_frames=[0, -3]"), "names a frame of the 3 twice"),
        (("trainer.validation.prompts=a cat",), "a video model reads none"),
        (
            ("method=interpolation", "trainer.validation.images=a.png"),
            "1 pictures are no whole number of clips of 2 key frames",
        ),
        (("trainer.quantize_base=nf4", "trainer.use_gpu=true"), "'temporal' trains the weights themselves"),
        (
            ("method=temporal_lora", "trainer.quantize_base=nf4", "trainer.use_gpu=true"),
            "trainer.quantize_base: 'temporal' exports its lora fused into the weights",
        ),
        (("method=temporal_decoder", "trainer.compile=true"), "which method 'temporal_decoder' does not run"),
    ],
)
def test_what_does_not_go_together_is_told_at_composition(of_clips, settings_of: tuple[str, ...], words: str):
    with pytest.raises(ConfigError, match=words):
        of_clips("name=x", *settings_of)


def test_a_clip_method_without_clips_is_told():
    with pytest.raises(ConfigError, match=r"method 'temporal' learns from clips; set dataset.video=\{\}"):
        load_config(["name=x", "dataset=owl", "model=tiny_random_video", "method=temporal"])


def test_validation_images_are_found_before_ray_starts(of_clips, videos, monkeypatch):
    monkeypatch.setattr("ray_sd.train.run.connect", lambda: pytest.fail("Ray was started"))
    for path in ("absent.png", videos / "0.mp4"):
        with pytest.raises(ConfigError, match=r"trainer.validation.images: .* cannot be read as a picture"):
            fit(of_clips("name=x", f"trainer.validation.images={path}"))
