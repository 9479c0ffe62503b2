import logging
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from tiny_models import random_batch, save_tiny_model, tiny_config

from ray_sd.errors import ArtifactError, ConfigError, RequestError
from ray_sd.models import DiffusionLoss, DiffusionModel, load_model, noise
from ray_sd.models.schedulers import SAMPLERS

TRAINING = ("unet", "scheduler")


def reference_losses(model: DiffusionModel, batch: dict, prediction_type: str, gamma: float | None, offset: float):
    """The loss of diffusers' text-to-image example, row by row, from the formulas."""
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )
    losses = []
    for row in range(len(batch["row_seed"])):
        generator = torch.Generator().manual_seed(batch["row_seed"][row].item())
        timestep = torch.randint(1000, (), generator=generator)
        posterior = torch.randn(4, 8, 8, generator=generator)
        noise = torch.randn(4, 8, 8, generator=generator)
        noise = noise + offset * torch.randn(4, 1, 1, generator=generator)
        latents = (batch["latent_mean"][row] + batch["latent_std"][row] * posterior)[None] * 0.5
        noise, timestep = noise[None], timestep[None]
        noisy = scheduler.add_noise(latents, noise, timestep)
        targets = {"epsilon": noise, "sample": latents}
        target = targets.get(prediction_type, scheduler.get_velocity(latents, noise, timestep))
        output = model.unet(noisy, timestep, batch["text_embeds"][row : row + 1]).sample
        loss = torch.nn.functional.mse_loss(output, target)
        if gamma is not None:
            alpha = scheduler.alphas_cumprod[timestep]
            snr = alpha / (1 - alpha)
            loss = loss * min(snr.item(), gamma) / {"epsilon": snr, "sample": 1}.get(prediction_type, snr + 1)
        losses.append(loss.squeeze())
    return torch.stack(losses)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("gamma", "offset"), [(None, 0.0), (5.0, 0.0), (1.0, 0.1)])
def test_the_loss_equals_the_reference(tiny: Path, prediction_type: str, gamma: float | None, offset: float):
    config = tiny_config(tiny, scheduler={"noise": {"prediction_type": prediction_type}})
    model = load_model(config, TRAINING)
    batch = random_batch(rows=4)
    expected = reference_losses(model, batch, prediction_type, gamma, offset)
    losses = model.loss(batch, DiffusionLoss(gamma, offset))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def test_a_rows_loss_does_not_depend_on_its_batch(tiny: Path):
    model = load_model(tiny_config(tiny), TRAINING)
    batch = random_batch(rows=4)
    whole = model.loss(batch)
    halves = [model.loss({name: value[rows] for name, value in batch.items()}) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(whole, torch.cat(halves), rtol=1e-4, atol=1e-5)
    assert len(whole.unique()) == 4


def test_given_timesteps_replace_the_drawn_ones_and_nothing_else(tiny: Path):
    model = load_model(tiny_config(tiny), TRAINING)
    batch = random_batch(rows=2)
    drawn = torch.stack(
        [torch.randint(1000, (), generator=torch.Generator().manual_seed(seed)) for seed in batch["row_seed"].tolist()]
    )
    torch.testing.assert_close(model.loss(batch | {"timesteps": drawn}), model.loss(batch))
    assert not torch.allclose(model.loss(batch | {"timesteps": (drawn + 300) % 1000}), model.loss(batch))


def test_tokens_and_their_embeddings_give_one_loss(tiny: Path):
    model = load_model(tiny_config(tiny), (*TRAINING, "text_encoder", "tokenizer"))
    batch = random_batch(rows=2, text="tokens")
    embedded = {name: value for name, value in batch.items() if name != "input_ids"}
    embedded |= model.encode_text(batch)
    torch.testing.assert_close(model.loss(batch), model.loss(embedded))


def test_the_loss_is_fp32_under_autocast_and_with_a_bf16_unet(tiny: Path):
    model = load_model(tiny_config(tiny), TRAINING)
    batch = random_batch(rows=2)
    exact = model.loss(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model.loss(batch)
    low = load_model(tiny_config(tiny), TRAINING)
    low.unet.to(torch.bfloat16)
    for losses in (mixed, low.loss(batch)):
        assert losses.dtype == torch.float32
        assert not torch.equal(losses, exact)
        torch.testing.assert_close(losses, exact, rtol=0.02, atol=0.02)


def test_only_what_was_asked_for_is_loaded(tiny: Path):
    model = load_model(tiny_config(tiny), TRAINING)
    assert (model.vae, model.text_encoder, model.tokenizer) == (None, None, None)
    assert model.latent_scale == 0.5  # of the autoencoder's configuration, without its weights
    assert not model.unet.training
    with pytest.raises(ValueError, match="has no component clip; it has unet, vae"):
        load_model(tiny_config(tiny), ("clip",))


def test_images_are_encoded_to_the_posterior(tiny: Path):
    model = load_model(tiny_config(tiny), ("vae",))
    pixels = torch.rand(2, 3, 64, 32) * 2 - 1
    mean, std = model.encode_images(pixels)
    posterior = model.vae.encode(pixels).latent_dist
    assert mean.shape == (2, 4, 8, 4)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(std, posterior.std)


def test_long_captions_are_cut_and_counted(tiny: Path, caplog: pytest.LogCaptureFixture):
    model = load_model(tiny_config(tiny), ("tokenizer", "text_encoder"))
    with caplog.at_level(logging.WARNING):
        tokens = model.tokenize(["a cat", "x" * 40, ""])
    ids = tokens["input_ids"]
    assert ids.shape == (3, 16)
    assert ids.dtype == torch.int64
    assert ids[:, 0].tolist() == [512] * 3
    assert ids[1, -1] == 513  # the end stays
    assert "1 of 3 captions cut to 14 tokens" in caplog.text
    assert model.encode_text(tokens)["text_embeds"].shape == (3, 16, 32)


def test_noise_settings_replace_the_saved_ones(tiny: Path):
    noise = {"num_train_timesteps": 500, "beta_start": 0.001, "beta_schedule": "linear", "timestep_spacing": "trailing"}
    scheduler = load_model(tiny_config(tiny, scheduler={"noise": noise}), ("scheduler",)).noise_scheduler
    assert len(scheduler.alphas_cumprod) == 500
    assert scheduler.alphas_cumprod[0].item() == pytest.approx(1 - 0.001)
    assert scheduler.config.beta_end == 0.012
    assert scheduler.config.clip_sample is False


def test_what_a_saved_scheduler_says_of_its_last_step_is_kept(tiny: Path, tmp_path: Path):
    save_tiny_model(tmp_path, set_alpha_to_one=True, clip_sample=True, steps_offset=0)
    sampler = load_model(tiny_config(tmp_path), ("scheduler",)).sampler("ddim")
    assert sampler.config.set_alpha_to_one is True
    assert (sampler.config.clip_sample, sampler.config.steps_offset) == (False, 1)  # as StableDiffusionPipeline has it


def test_zero_terminal_snr_with_a_base_that_predicts_the_noise_is_refused(tiny: Path):
    config = tiny_config(tiny, scheduler={"noise": {"rescale_betas_zero_snr": True}})
    with pytest.raises(
        ConfigError, match="zero terminal SNR with epsilon .* scheduler.noise.prediction_type=v_prediction"
    ):
        load_model(config, ("scheduler",))
    velocity = tiny_config(
        tiny, scheduler={"noise": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}}
    )
    model = load_model(velocity, TRAINING)
    assert model.noise_scheduler.alphas_cumprod[-1] == pytest.approx(0, abs=1e-6)
    last = random_batch(rows=2) | {"timesteps": torch.tensor([999, 0])}
    assert model.loss(last, DiffusionLoss(min_snr_gamma=5.0)).isfinite().all()


def test_a_base_that_predicts_something_else_is_refused(tmp_path: Path):
    save_tiny_model(tmp_path, prediction_type="flow_prediction")
    with pytest.raises(ArtifactError, match="its scheduler predicts 'flow_prediction'"):
        load_model(tiny_config(tmp_path), ("scheduler",))


def test_a_sampler_that_cannot_use_clean_latents_is_refused(tiny: Path):
    config = tiny_config(tiny, scheduler={"noise": {"prediction_type": "sample"}, "sampler": "euler_ancestral"})
    words = "euler_ancestral samples no model that predicts 'sample'"
    with pytest.raises(ConfigError, match=f"scheduler.sampler: {words}"):
        load_model(config, ("scheduler",)).sampler()
    config = tiny_config(tiny, scheduler={"noise": {"prediction_type": "sample"}})
    with pytest.raises(RequestError, match=f"^{words}"):
        load_model(config, ("scheduler",)).sampler("euler_ancestral")


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_have_the_schedule_of_training(tiny: Path, name: str):
    noise = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    model = load_model(tiny_config(tiny, scheduler={"sampler": name, "noise": noise}), ("scheduler",))
    sampler = model.sampler()
    assert type(sampler) is SAMPLERS[name]
    assert sampler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(sampler.alphas_cumprod, model.noise_scheduler.alphas_cumprod, rtol=0, atol=1e-6)
    assert model.sampler() is not sampler


@pytest.mark.parametrize(
    ("component", "change", "words"),
    [
        ("vae", {"latent_channels": 8}, "the U-Net takes latents of 4 channels, the autoencoder makes 8"),
        ("text_encoder", {"hidden_size": 64}, "text embeddings of width 32, the text encoder makes 64"),
        ("text_encoder", {"vocab_size": 100, "eos_token_id": 9}, "514 kinds of tokens, the text_encoder takes 100"),
        ("text_encoder", {"max_position_embeddings": 8}, "16 tokens a caption, the text_encoder takes 8"),
        ("unet", {"in_channels": 9}, "takes 9 channels and gives 4; inpainting"),
        ("unet", {"time_cond_proj_dim": 32}, "takes conditions besides text .time_cond_proj_dim."),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(tiny: Path, component: str, change: dict, words: str):
    import tiny_models

    architecture = getattr(tiny_models, component.upper()) | change
    with pytest.raises(ArtifactError, match=words):
        load_model(tiny_config(tiny, **{component: {"architecture": architecture}}))


def test_a_masked_row_counts_only_within_its_mask(tiny: Path):
    model = load_model(tiny_config(tiny), TRAINING)
    batch = random_batch(rows=2)
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :4] = 1
    mask[0, :, 4:] = 0.25
    batch |= {"loss_mask": mask, "timesteps": torch.tensor([500, 500])}
    found = model.loss(batch, DiffusionLoss(masked=True))

    draws = noise.draw_rows(batch["row_seed"], (4, 8, 8), 1000)
    alpha_bar = model.noise_scheduler.alphas_cumprod[500]
    latents = (batch["latent_mean"] + batch["latent_std"] * draws.posterior) * 0.5
    noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * draws.noise
    error = (model.unet(noisy, batch["timesteps"], batch["text_embeds"]).sample - draws.noise).square()[0]
    expected = (error[:, :4].sum() + 0.25 * error[:, 4:].sum()) / (4 * 8 * (4 + 0.25 * 4))
    assert float(found[0].detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert found[1] == 0  # nothing of it counts
    assert torch.equal(model.loss(batch), model.loss({k: v for k, v in batch.items() if k != "loss_mask"}))
