from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from PIL import Image
from tiny_models import SCHEDULER_VIDEO, UNET_VIDEO, random_clips, save_tiny_video_model, tiny_video_config

from ray_sd.config import ModelConfig
from ray_sd.errors import ArtifactError
from ray_sd.methods.temporal import is_temporal
from ray_sd.models import VideoLoss, load_model, noise
from ray_sd.models.stable_video_diffusion import time_ids

TRAINING = ("unet", "vae", "scheduler")
SIGMAS = (0.01, 0.3, 1.0, 7.5, 200.0)


def picture(seed: int = 0, height: int = 64, width: int = 64) -> Image.Image:
    """Smooth colours: neither flat nor noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_the_plain_loss_of_the_output_is_the_weighted_loss_of_the_denoised():
    generator = torch.Generator().manual_seed(0)
    x0, eps, output = (torch.randn(5, 4, 4, 8, 8, dtype=torch.float64, generator=generator) for _ in range(3))
    sigma = torch.tensor(SIGMAS, dtype=torch.float64).view(-1, 1, 1, 1, 1)
    c_skip, c_out, weight = 1 / (sigma**2 + 1), -sigma / (sigma**2 + 1).sqrt(), (sigma**2 + 1) / sigma**2
    denoised = c_skip * (x0 + sigma * eps) + c_out * output
    plain = (output - noise.edm_target(x0, eps, sigma)).square()
    torch.testing.assert_close(weight * (denoised - x0).square(), plain, rtol=1e-9, atol=1e-12)
    noised = noise.edm_noised(x0, eps, sigma)
    torch.testing.assert_close((noised - sigma * output) / (sigma**2 + 1).sqrt(), denoised)


@pytest.mark.parametrize("timestep_type", ["continuous", "discrete"])
def test_input_target_and_timestep_are_those_of_the_scheduler(tmp_path: Path, timestep_type: str):
    scheduler = EulerDiscreteScheduler(**SCHEDULER_VIDEO | {"timestep_type": timestep_type, "sigma_max": 14.0})
    scheduler.set_timesteps(6)
    folder = save_tiny_video_model(tmp_path, timestep_type=timestep_type)
    model = load_model(tiny_video_config(folder), {"scheduler"})
    x0, eps = torch.randn(2, 1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        noisy = x0 + sigma * eps
        torch.testing.assert_close(noise.edm_noised(x0, eps, sigma), scheduler.scale_model_input(noisy, timestep))
        step = scheduler.step(noise.edm_target(x0, eps, sigma), timestep, noisy)
        torch.testing.assert_close(step.pred_original_sample, x0, rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(model.timesteps_of(sigma[None])[0], timestep, rtol=1e-4, atol=1e-3)


def reference_losses(model, batch: dict, settings: VideoLoss) -> torch.Tensor:
    """The loss of section D of arXiv:2311.15127, clip by clip, with the pipeline's own parts."""
    pipeline = StableVideoDiffusionPipeline(
        model.vae, None, model.unet, EulerDiscreteScheduler(**SCHEDULER_VIDEO), None
    )
    losses = []
    for row in range(len(batch["row_seed"])):
        generator = torch.Generator().manual_seed(batch["row_seed"][row].item())
        sigma = torch.exp(0.7 + 1.6 * torch.randn((), generator=generator))
        augmentation = torch.exp(-3 + 0.5 * torch.randn((), generator=generator))
        torch.rand((), generator=generator)
        posterior, eps = (torch.randn(1, 4, 4, 8, 8, generator=generator) for _ in range(2))
        shown = batch["condition_pixels"][row].float() / 127.5 - 1
        shown = shown + augmentation * torch.randn(1, 3, 64, 64, generator=generator)
        condition = pipeline._encode_vae_image(shown, "cpu", 1, False)[:, None].repeat(1, 4, 1, 1, 1)
        x0 = (batch["latent_mean"][row] + batch["latent_std"][row] * posterior) * 0.5
        x = x0 + sigma * eps
        ids = pipeline._get_add_time_ids(
            batch["fps"][row] - 1, batch["motion_bucket_id"][row], augmentation, torch.float32, 1, 1, False
        )
        given = torch.cat([x / (sigma**2 + 1).sqrt(), condition], dim=2)
        output = model.unet(given, 0.25 * sigma.log(), batch["image_embeds"][row : row + 1], ids).sample
        denoised = x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1).sqrt()
        losses.append(((sigma**2 + 1) / sigma**2 * (denoised - x0).square()).mean())
    return torch.stack(losses)


def test_the_loss_equals_the_reference(tiny_video: Path):
    model = load_model(tiny_video_config(tiny_video), TRAINING)
    batch = random_clips()
    losses = model.loss(batch)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, reference_losses(model, batch, VideoLoss()), rtol=2e-4, atol=1e-5)


def test_a_clips_loss_does_not_depend_on_its_batch(tiny_video: Path):
    model = load_model(tiny_video_config(tiny_video), TRAINING)
    batch = random_clips(rows=4)
    whole = model.loss(batch, VideoLoss(dropout=0.2))
    parts = [
        model.loss({name: value[rows] for name, value in batch.items()}, VideoLoss(dropout=0.2))
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-5)
    assert len(whole.unique()) == 4


def test_noise_levels_are_lognormal_and_fixed_quantiles_take_their_place(tiny_video: Path, monkeypatch):
    model = load_model(tiny_video_config(tiny_video), TRAINING)
    told = []
    monkeypatch.setattr(model, "denoise", lambda latents, timesteps, _: (told.append(4 * timesteps), latents)[1])
    batch = random_clips(rows=400, num_frames=1)
    batch["condition_pixels"] = batch["condition_pixels"][..., :8, :8]
    model.loss(batch, VideoLoss(sigma_mean=1.0, sigma_std=0.5))
    assert told[0].mean() == pytest.approx(1.0, abs=0.1)
    assert told[0].std() == pytest.approx(0.5, abs=0.06)
    few = {name: value[:3] for name, value in batch.items()}
    model.loss(few | {"quantile": torch.tensor([0.5, 0.1, 0.9])})
    torch.testing.assert_close(told[1], torch.tensor([0.7, 0.7 - 1.6 * 1.28155, 0.7 + 1.6 * 1.28155]))


def test_each_clip_is_told_its_own_noise_frames_a_second_less_one_and_motion(tiny_video: Path, monkeypatch):
    model = load_model(tiny_video_config(tiny_video), TRAINING)
    given = {}
    monkeypatch.setattr(model, "denoise", lambda latents, timesteps, conditions: (given.update(conditions), latents)[1])
    batch = random_clips(rows=60, num_frames=1)
    batch["condition_pixels"] = batch["condition_pixels"][..., :8, :8]
    model.loss(batch, VideoLoss(augmentation_mean=-2.0, augmentation_std=0.25))
    ids = given["added_time_ids"]
    torch.testing.assert_close(ids[:, :2], torch.stack([batch["fps"] - 1, batch["motion_bucket_id"]], dim=1))
    assert len(ids[:, 2].unique()) == 60
    assert ids[:, 2].log().mean() == pytest.approx(-2, abs=0.1)
    assert ids.dtype == torch.float32


def test_time_ids_are_those_of_the_pipeline(tiny_video: Path):
    pipeline = StableVideoDiffusionPipeline.from_pretrained(tiny_video)
    expected = pipeline._get_add_time_ids(7 - 1, 127, 0.02, torch.float32, 1, 1, False)
    torch.testing.assert_close(time_ids(*(torch.tensor([value]) for value in (7, 127, 0.02))), expected)


def test_image_embeddings_are_those_of_the_pipeline(tiny_video: Path):
    pipeline = StableVideoDiffusionPipeline.from_pretrained(tiny_video)
    model = load_model(tiny_video_config(tiny_video))
    image = picture(height=300, width=500)
    with torch.no_grad():
        expected = pipeline._encode_image(image, "cpu", 1, False)
        embedded = model.embed_images(pixels(image))
    assert embedded.shape == (1, 1, 32)
    torch.testing.assert_close(embedded, expected, rtol=1e-4, atol=1e-5)


def test_condition_latents_repeat_one_frame_or_stand_at_their_places(tiny_video: Path):
    model = load_model(tiny_video_config(tiny_video), TRAINING)
    frames = torch.cat([pixels(picture(seed)) for seed in (0, 1)])
    with torch.no_grad():
        expected = model.vae.encode(frames).latent_dist.mode()
        repeated = model.condition_latents(frames[None, :1], 5, None)
        placed = model.condition_latents(frames[None], 5, (0, -1))
    torch.testing.assert_close(repeated, expected[:1].expand(5, -1, -1, -1)[None])
    torch.testing.assert_close(placed[0, [0, 4]], expected)
    assert not placed[:, 1:4].any()


def test_dropout_leaves_out_the_image_the_latents_or_both(tiny_video: Path, monkeypatch):
    model = load_model(tiny_video_config(tiny_video), TRAINING)
    given = {}
    monkeypatch.setattr(model, "denoise", lambda latents, timesteps, conditions: (given.update(conditions), latents)[1])
    batch = random_clips(rows=600, num_frames=1)
    batch["condition_pixels"] = batch["condition_pixels"][..., :8, :8]
    model.loss(batch, VideoLoss(dropout=0.2))
    no_image = ~given["image_embeds"].flatten(1).any(dim=1)
    no_latents = ~given["condition_latents"].flatten(1).any(dim=1)
    kinds = [no_image & ~no_latents, no_latents & ~no_image, no_image & no_latents]
    for kind in kinds:
        assert kind.float().mean() == pytest.approx(0.2, abs=0.05)
    assert given["added_time_ids"].all()


def test_the_full_size_unet_has_the_papers_parameters():
    """Of 1,521 M in all, 656 M in temporal layers (table of appendix D in arXiv:2311.15127).

    Without `add_embedding`, which reads frames a second, motion and noise, there are 1,521,999,082: the paper's, cut off.
    """
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel(num_attention_heads=(5, 10, 20, 20), cross_attention_dim=1024)
    sizes = {name: parameter.numel() for name, parameter in unet.named_parameters()}
    assert sum(sizes.values()) == 1_524_623_082
    assert sum(size for name, size in sizes.items() if not name.startswith("add_embedding.")) == 1_521_999_082
    assert sum(size for name, size in sizes.items() if is_temporal(name)) == 656_076_838
    assert sum(1 for name in sizes if name.endswith("time_mixer.mix_factor")) == 38


def test_a_whole_model_makes_the_pipelines_clip(tiny_video: Path):
    settings = {"height": 64, "width": 64, "num_frames": 4, "num_inference_steps": 3, "output_type": "pt"}
    clips = []
    for pipeline in (
        StableVideoDiffusionPipeline.from_pretrained(tiny_video),
        load_model(tiny_video_config(tiny_video)).pipeline(),
    ):
        pipeline.set_progress_bar_config(disable=True)
        clips.append(pipeline(picture(), generator=torch.Generator().manual_seed(2), **settings).frames)
    torch.testing.assert_close(*clips, rtol=0, atol=2e-3)  # half a step of 255, as for pictures elsewhere


def test_the_autoencoder_stays_whole_where_it_asks_for_it(tiny_video: Path):
    model = load_model(tiny_video_config(tiny_video)).to_half()
    assert model.vae.dtype == torch.float32
    assert model.unet.dtype == torch.float16
    assert load_model(tiny_video_config(tiny_video, vae_float32=False)).to_half().vae.dtype == torch.float16


def test_a_skeleton_has_names_and_shapes_without_memory(tiny_video: Path):
    whole = load_model(tiny_video_config(tiny_video))
    skeleton = load_model(tiny_video_config(tiny_video), skeleton=True)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    shapes = [{name: value.shape for name, value in model.named_parameters()} for model in (whole, skeleton)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("unet", "words"),
    [
        ({"in_channels": 4}, "takes 4 channels and gives 4"),
        ({"projection_class_embeddings_input_dim": 16}, "takes 16 numbers for 3 conditions of 8"),
        ({"cross_attention_dim": 48}, "takes image embeddings of width 48, the image encoder makes 32"),
        ({"in_channels": 16, "out_channels": 8}, "takes latents of 8 channels, the autoencoder makes 4"),
    ],
)
def test_parts_that_do_not_fit_are_told(tiny_video: Path, unet: dict, words: str):
    with pytest.raises(ArtifactError, match=words):
        load_model(tiny_video_config(tiny_video, unet={"architecture": UNET_VIDEO | unet}), skeleton=True)


def test_a_scheduler_of_another_prediction_is_told(tmp_path: Path):
    folder = save_tiny_video_model(tmp_path, prediction_type="epsilon", timestep_type="discrete")
    with pytest.raises(ArtifactError, match="predicts 'epsilon'"):
        load_model(tiny_video_config(folder), {"scheduler"})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scheduler": {"sampler": "ddim"}}, "sampled by euler, not ddim"),
        ({"text_encoder": "folder"}, "has no text_encoder"),
    ],
)
def test_settings_of_image_models_are_refused(settings: dict, words: str):
    with pytest.raises(ValueError, match=words):
        tiny_video_config(Path("base"), **settings)


def test_settings_of_video_schedules_are_refused_for_image_models():
    with pytest.raises(ValueError, match=r"sigma_max is of Stable Video Diffusion"):
        ModelConfig.model_validate({"name": "x", "base": "x", "scheduler": {"noise": {"sigma_max": 7}}})
