import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionUpscalePipeline
from tiny_models import (
    SCHEDULER_LOW_RES,
    SCHEDULER_UPSCALE,
    UNET_UPSCALE,
    VAE_UPSCALE,
    random_upscale_batch,
    tiny_upscale_config,
)

from ray_sd.config import ExperimentConfig, ModelConfig
from ray_sd.config.load import load_config
from ray_sd.errors import ArtifactError
from ray_sd.models import DiffusionLoss, DiffusionModel, load_model
from ray_sd.models.noise import LOW_RES

TRAINING = ("unet", "scheduler")
MAX_NOISE_LEVEL = 300  # of the fixture


def reference_losses(
    model: DiffusionModel, batch: dict, prediction_type: str, levels: list[int] | None = None
) -> torch.Tensor:
    """The loss that the pipeline's inputs and scheduler mean, row by row."""
    scheduler = DDIMScheduler(**SCHEDULER_UPSCALE | {"prediction_type": prediction_type})
    low_res_scheduler = DDPMScheduler(**SCHEDULER_LOW_RES)
    losses = []
    for row, seed in enumerate(batch["row_seed"].tolist()):
        generator = torch.Generator().manual_seed(seed)
        timestep = torch.randint(1000, (1,), generator=generator)
        posterior, noise = (torch.randn(1, 4, 16, 16, generator=generator) for _ in range(2))
        generator = torch.Generator().manual_seed(seed ^ LOW_RES)
        level = torch.randint(MAX_NOISE_LEVEL + 1, (1,), generator=generator)
        low_res_noise = torch.randn(1, 3, 16, 16, generator=generator)
        if "timesteps" in batch:
            timestep, level = batch["timesteps"][row : row + 1], torch.tensor([20])
        latents = (batch["latent_mean"][row] + batch["latent_std"][row] * posterior) * 0.08333
        image = batch["low_res_pixels"][row : row + 1].float() / 255 * 2 - 1
        image = low_res_scheduler.add_noise(image, low_res_noise, level)
        noisy = scheduler.add_noise(latents, noise, timestep)
        output = model.unet(
            torch.cat([scheduler.scale_model_input(noisy, timestep), image], dim=1),
            timestep,
            encoder_hidden_states=batch["text_embeds"][row : row + 1],
            class_labels=level,
        ).sample
        target = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timestep)
        losses.append((output - target).square().mean())
    return torch.stack(losses)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_equals_the_reference(tiny_upscale: Path, prediction_type: str):
    noise = {"noise": {"prediction_type": prediction_type}}
    model = load_model(tiny_upscale_config(tiny_upscale, scheduler=noise), TRAINING)
    batch = random_upscale_batch(rows=4)
    losses = model.loss(batch)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, reference_losses(model, batch, prediction_type), rtol=1e-4, atol=1e-5)


def test_given_timesteps_come_with_one_noise_level(tiny_upscale: Path):
    model = load_model(tiny_upscale_config(tiny_upscale), TRAINING)
    batch = random_upscale_batch(rows=3) | {"timesteps": torch.tensor([100, 500, 900])}
    expected = reference_losses(model, batch, "v_prediction")
    torch.testing.assert_close(model.loss(batch), expected, rtol=1e-4, atol=1e-5)


def test_a_rows_loss_does_not_depend_on_its_batch(tiny_upscale: Path):
    model = load_model(tiny_upscale_config(tiny_upscale), TRAINING)
    batch = random_upscale_batch(rows=4)
    whole = model.loss(batch)
    halves = [model.loss({name: value[rows] for name, value in batch.items()}) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(whole, torch.cat(halves), rtol=1e-4, atol=1e-5)
    assert len(whole.unique()) == 4


def test_noise_levels_are_uniform_up_to_the_models_most(tiny_upscale: Path, monkeypatch: pytest.MonkeyPatch):
    model = load_model(tiny_upscale_config(tiny_upscale), TRAINING)
    told = {}
    monkeypatch.setattr(model, "denoise", lambda latents, _, conditions: (told.update(conditions), latents)[1])
    model.loss(random_upscale_batch(rows=2000))
    levels = told["noise_level"].float()
    assert (levels.min(), levels.max()) == (0, MAX_NOISE_LEVEL)
    assert levels.mean() == pytest.approx(MAX_NOISE_LEVEL / 2, rel=0.05)
    assert told["low_res"].shape == (2000, 3, 16, 16)


def test_the_small_picture_changes_the_loss_and_the_levels_do_not_change_other_draws(tiny_upscale: Path):
    model = load_model(tiny_upscale_config(tiny_upscale), TRAINING)
    batch = random_upscale_batch()
    other = batch | {"low_res_pixels": 255 - batch["low_res_pixels"]}
    assert not torch.allclose(model.loss(batch), model.loss(other), rtol=1e-3)


def test_masks_and_snr_weights_go_with_it(tiny_upscale: Path):
    model = load_model(tiny_upscale_config(tiny_upscale), TRAINING)
    batch = random_upscale_batch() | {"loss_mask": torch.ones(3, 1, 16, 16)}
    batch["loss_mask"][0] = 0
    losses = model.loss(batch, DiffusionLoss(min_snr_gamma=5.0, masked=True))
    assert losses[0] == 0
    assert (losses[1:] > 0).all()
    assert (losses[1:] < model.loss(batch)[1:]).any()


def test_tokens_and_their_embeddings_give_one_loss(tiny_upscale: Path):
    model = load_model(tiny_upscale_config(tiny_upscale), (*TRAINING, "text_encoder", "tokenizer"))
    batch = random_upscale_batch(rows=2, text="tokens")
    embedded = {name: value for name, value in batch.items() if name != "input_ids"} | model.encode_text(batch)
    torch.testing.assert_close(model.loss(batch), model.loss(embedded))


def test_a_whole_model_is_the_plain_pipeline(tiny_upscale: Path):
    found = load_model(tiny_upscale_config(tiny_upscale)).pipeline()
    expected = StableDiffusionUpscalePipeline.from_pretrained(tiny_upscale)
    assert found.config.max_noise_level == expected.config.max_noise_level == MAX_NOISE_LEVEL
    for name in ("scheduler", "low_res_scheduler"):
        own, wanted = getattr(found, name), getattr(expected, name)
        assert type(own) is type(wanted)
        torch.testing.assert_close(own.alphas_cumprod, wanted.alphas_cumprod)
    for name in ("unet", "vae", "text_encoder"):
        torch.testing.assert_close(dict(getattr(found, name).state_dict()), dict(getattr(expected, name).state_dict()))


def test_the_autoencoder_stays_whole_where_it_asks_for_it(tiny_upscale: Path):
    model = load_model(tiny_upscale_config(tiny_upscale)).to_half()
    assert (model.unet.dtype, model.vae.dtype) == (torch.float16, torch.float32)
    assert load_model(tiny_upscale_config(tiny_upscale, vae_float32=False)).to_half().vae.dtype == torch.float16


def test_a_skeleton_has_names_and_shapes_without_memory(tiny_upscale: Path):
    whole, skeleton = (load_model(tiny_upscale_config(tiny_upscale), skeleton=skeleton) for skeleton in (False, True))
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    shapes = [{name: value.shape for name, value in model.named_parameters()} for model in (whole, skeleton)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("component", "change", "words"),
    [
        ("unet", {"in_channels": 4}, "takes 4 channels and gives 4; an upscaler's takes 3 more"),
        ("unet", {"num_class_embeds": None}, "is not told how noisy .* no upscaler"),
        ("unet", {"num_class_embeds": 300}, "knows 300 noise levels, and max_noise_level is 300"),
        ("unet", {"time_cond_proj_dim": 32}, "takes conditions .time_cond_proj_dim."),
        ("vae", {"latent_channels": 8}, "takes latents of 4 channels, the autoencoder makes 8"),
        ("vae", {"scaling_factor": 0.5}, "scaling_factor is 0.5; .* root mean square of 12"),
    ],
)
def test_parts_that_do_not_fit_are_told(tiny_upscale: Path, component: str, change: dict, words: str):
    architecture = {"unet": UNET_UPSCALE, "vae": VAE_UPSCALE}[component] | change
    with pytest.raises(ArtifactError, match=words):
        load_model(tiny_upscale_config(tiny_upscale, **{component: {"architecture": architecture}}))


def test_another_familys_folder_is_told(tiny: Path, tiny_upscale: Path, tmp_path: Path):
    with pytest.raises(ArtifactError, match="takes 7 channels and gives 4"):
        load_model(ModelConfig(name="x", base=str(tiny_upscale)), {"unet"})
    with pytest.raises(ArtifactError, match="num_class_embeds"):
        load_model(tiny_upscale_config(tiny), {"unet"})
    shutil.copytree(tiny_upscale, tmp_path / "part", ignore=shutil.ignore_patterns("low_res_scheduler"))
    with pytest.raises(ArtifactError, match="holds no low_res_scheduler .* is the base an upscaler, all of it?"):
        load_model(tiny_upscale_config(tmp_path / "part"), {"scheduler"})


def test_an_index_that_names_no_most_level_means_the_published_one(tiny_upscale: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_upscale, folder)
    index = json.loads((folder / "model_index.json").read_text())
    del index["max_noise_level"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load_model(tiny_upscale_config(folder), {"scheduler"}).max_noise_level == 350


def test_a_new_model_takes_as_much_noise_as_its_u_net_knows_levels():
    photos = ("dataset=image_folder", "dataset.source.path=photos", "method=full")
    levels = "model.unet.architecture.num_class_embeds=41"
    config = load_config(["name=x", "model=tiny_random_upscale", levels, *photos], ExperimentConfig)
    assert load_model(config.model, ("unet",), skeleton=True).max_noise_level == 40


def test_a_single_file_is_refused():
    with pytest.raises(ValueError, match="from a folder in the diffusers layout, not from a single file"):
        tiny_upscale_config(Path("x4-upscaler.safetensors"))
