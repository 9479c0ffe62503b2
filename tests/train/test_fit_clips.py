"""Whole runs of video models: from clips to a model that the plain pipeline loads, with clips drawn on the way."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from PIL import Image
from safetensors.torch import load_file
from traces import assert_same_bits, state_of
from without_ray import fit_without_ray

from ray_sd.adapter import read_manifest
from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config
from ray_sd.errors import ConfigError
from ray_sd.media.pictures import read_parameters
from ray_sd.media.videos import read_frames, read_video_parameters, save_mp4
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
TWICE_SAVED = ("dataset.holdout=1", "trainer.checkpoint.every_steps=2")
TWO_WORKERS = ("trainer.num_workers=2", "trainer.zero.stage=2")


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


def learnt_by(run: TrainingResult) -> dict[str, torch.Tensor]:
    return load_file(Path(run.adapter) / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module", params=["here", pytest.param("on two workers", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest) -> Callable[..., TrainingResult]:
    """Runs of temporal layers by one worker in this process, or, slowly, by two as they are."""
    if request.param == "here":
        return lambda *settings: fit_without_ray(load_config([*settings, *TWICE_SAVED]))
    request.getfixturevalue("ray_cluster")
    return lambda *settings: fit(load_config([*settings, *TWICE_SAVED, *TWO_WORKERS]))


@pytest.fixture(scope="module")
def whole(
    run: Callable[..., TrainingResult],
    run_settings: Callable[[Path], list[str]],
    videos: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> TrainingResult:
    """A run with clips drawn at its two checkpoints."""
    settings = [*run_settings(tmp_path_factory.mktemp("whole")), *OF_CLIPS, f"dataset.source.path={videos}"]
    shown = (f"trainer.validation.images=[{videos}/first.png]", "trainer.validation.num_inference_steps=2")
    return run(*settings, "name=whole", *shown)


def test_a_run_leaves_a_validation_loss_and_clips(whole: TrainingResult, videos: Path):
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


def test_its_model_loads_in_the_plain_pipeline(whole: TrainingResult, of_clips: Callable, videos: Path):
    base = load_model(of_clips("name=x").model)
    before = base.unet.state_dict()
    changed = {name for name, tensor in learnt_by(whole).items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(map(is_temporal, changed))
    unet = UNetSpatioTemporalConditionModel.from_pretrained(Path(whole.adapter) / "unet", use_safetensors=True)
    pipeline = StableVideoDiffusionPipeline(base.vae, base.image_encoder, unet, base.sampler(), base.image_processor)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(Image.open(videos / "first.png"), height=64, width=64, num_frames=3, num_inference_steps=2)
    assert len(drawn.frames[0]) == 3
    assert load_adapter(base, whole.adapter) == len(before)


def test_a_run_goes_on_exactly(
    run: Callable[..., TrainingResult], whole: TrainingResult, settings: list[str], videos: Path
):
    checkpoint = Path(whole.run) / "checkpoint-00000002"
    resumed = run(*settings, *OF_CLIPS, f"dataset.source.path={videos}", "name=resumed", f"resume={checkpoint}")
    assert_same_bits(state_of(resumed.checkpoint), state_of(whole.checkpoint))
    assert_same_bits(learnt_by(resumed), learnt_by(whole))


def test_a_decoder_is_trained_on_the_pixels_of_clips_and_goes_on_exactly(
    of_clips: Callable, videos: Path, train: Callable
):
    decoder = ("method=temporal_decoder", "method.chunk_size=2", "trainer.max_steps=2")
    shown = (f"trainer.validation.images=[{videos}/first.png]", "trainer.validation.num_inference_steps=1")
    result = train(of_clips("name=decoder", *decoder, *shown, "trainer.checkpoint.every_steps=1"))
    assert len(read_frames(Path(result.run) / "samples.mp4")) == 3
    said = read_parameters(Path(result.run) / "samples.png")
    assert (said["step"], said["run"], said["images"]) == (2, "decoder", [f"{videos}/first.png"])

    resumed = train(of_clips("name=resumed", *decoder, f"resume={Path(result.run) / 'checkpoint-00000001'}"))
    assert_same_bits(state_of(resumed.checkpoint), state_of(result.checkpoint))

    vae = AutoencoderKLTemporalDecoder.from_pretrained(Path(result.adapter) / "vae", use_safetensors=True)
    fresh = load_model(of_clips("name=x").model, {"vae"}).vae
    changed = {name for name, value in vae.state_dict().items() if not torch.equal(value, fresh.state_dict()[name])}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)


def test_frames_between_key_frames_are_learnt_and_drawn(of_clips: Callable, videos: Path, train: Callable):
    images = f"trainer.validation.images=[{videos}/first.png, {videos}/first.png]"
    result = train(of_clips("name=between", "method=interpolation", images, "trainer.validation.num_inference_steps=1"))
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
