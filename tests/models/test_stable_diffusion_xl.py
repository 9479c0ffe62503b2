from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from tiny_models import (
    TEXT_ENCODER,
    UNET,
    UNET_XL,
    difference,
    draw,
    random_xl_batch,
    save_tiny_xl_model,
    tiny_xl_config,
)

from ray_sd.errors import ArtifactError
from ray_sd.generate import ImageRequest, generate
from ray_sd.models import DiffusionLoss, fingerprint, load_model, noise
from ray_sd.models.tokens import splice

TRAINING = ("unet", "scheduler")
TEXT = ("text_encoder", "tokenizer")


@pytest.mark.parametrize("sampler", ["euler", "ddim", "euler_ancestral", "dpmpp_2m"])
@pytest.mark.parametrize("settings", [{}, {"negative_prompt": "a dog"}, {"height": 32, "width": 64}], ids=str)
def test_pictures_equal_the_plain_pipelines(tiny_xl: Path, sampler: str, settings: dict):
    model = load_model(tiny_xl_config(tiny_xl, scheduler={"sampler": sampler}))
    request = ImageRequest("a cat", seed=3, num_inference_steps=4, guidance_scale=5.0, **settings)
    plain = draw(model.pipeline(), "a cat", seed=3, num_inference_steps=4, guidance_scale=5.0, **settings)
    assert difference(generate(model, [request])[0], plain) <= 1


def test_pictures_equal_those_of_the_folder_in_plain_diffusers(tiny_xl: Path):
    """With the folder's own scheduler, which says steps_offset 0."""
    plain = StableDiffusionXLPipeline.from_pretrained(tiny_xl)
    assert plain.scheduler.config.steps_offset == 0
    expected = draw(plain, "a cat", guidance_scale=5.0)
    request = ImageRequest("a cat", seed=1, num_inference_steps=3, guidance_scale=5.0)
    assert difference(generate(load_model(tiny_xl_config(tiny_xl)), [request])[0], expected) <= 1


def test_loss_and_gradient_equal_those_written_from_the_papers(tiny_xl: Path):
    """Noise prediction of arXiv:2006.11239 with Min-SNR weights, conditions as in arXiv:2307.01952."""
    model = load_model(tiny_xl_config(tiny_xl), (*TRAINING, *TEXT))
    batch = random_xl_batch(text="tokens")
    draws = noise.draw_rows(batch["row_seed"], (4, 8, 8), 1000)
    alpha_bar = model.noise_scheduler.alphas_cumprod[draws.timesteps].view(-1, 1, 1, 1)
    latents = (batch["latent_mean"] + batch["latent_std"] * draws.posterior) * 0.5
    first = model.text_encoder(batch["input_ids"], output_hidden_states=True)
    second = model.text_encoder_2(batch["input_ids_2"], output_hidden_states=True)
    predicted = model.unet(
        alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * draws.noise,
        draws.timesteps,
        torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1),
        added_cond_kwargs={"text_embeds": second.text_embeds, "time_ids": batch["add_time_ids"]},
    ).sample
    ratio = alpha_bar.flatten() / (1 - alpha_bar.flatten())
    expected = (predicted - draws.noise).square().mean(dim=(1, 2, 3)) * ratio.clamp(max=5) / ratio
    expected.mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = model.loss(batch, DiffusionLoss(min_snr_gamma=5.0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.mean().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-5)


def test_embeddings_made_beforehand_give_the_same_loss(tiny_xl: Path):
    model = load_model(tiny_xl_config(tiny_xl), (*TRAINING, *TEXT))
    batch = random_xl_batch(text="tokens")
    kept = {name: value for name, value in batch.items() if not name.startswith("input_ids")}
    torch.testing.assert_close(model.loss(kept | model.encode_text(batch)), model.loss(batch))
    assert tuple(model.encode_text(batch)) == model.embeddings


def test_sizes_reach_a_bf16_unet_unrounded(tiny_xl: Path):
    model = load_model(tiny_xl_config(tiny_xl), TRAINING)
    seen = []
    model.unet.add_time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.unet.to(torch.bfloat16)
    batch = random_xl_batch(rows=1) | {"add_time_ids": torch.tensor([[1023.0, 769, 3, 257, 1024, 1023]])}
    model.loss(batch)
    assert seen[0].tolist() == [1023, 769, 3, 257, 1024, 1023]


def test_size_and_crop_change_the_prediction(tiny_xl: Path):
    model = load_model(tiny_xl_config(tiny_xl), TRAINING)
    batch = random_xl_batch()
    other = batch | {"add_time_ids": batch["add_time_ids"] + 100}
    assert (model.loss(batch) - model.loss(other)).abs().min() > 1e-6


def test_the_empty_prompt_is_zeros_where_the_base_was_trained_so(tiny_xl: Path, tmp_path: Path):
    for folder, zeros in ((tiny_xl, True), (save_tiny_xl_model(tmp_path, force_zeros_for_empty_prompt=False), False)):
        model = load_model(tiny_xl_config(folder), TEXT)
        encoded = model.encode_text(model.tokenize(["", "a cat"]))
        for tensor in encoded.values():
            assert bool((tensor[0] == 0).all()) is zeros
            assert (tensor[1] != 0).any()
        assert load_model(tiny_xl_config(folder)).pipeline().config.force_zeros_for_empty_prompt is zeros


def test_a_long_prompt_fills_several_chunks(tiny_xl: Path):
    model = load_model(tiny_xl_config(tiny_xl, prompt_chunks=3), TEXT)
    alone = load_model(tiny_xl_config(tiny_xl), TEXT)
    long = " ".join("a" * 14 + "b" * 14 + "c")  # a token a letter, 14 of them between start and end
    assert model.excess_tokens([long, " ".join("d" * 50)]) == [0, 8]
    assert alone.excess_tokens([long]) == [15]
    found, parts = model.encode_text(model.tokenize([long])), alone.encode_text(alone.tokenize([" ".join("a" * 14)]))
    assert found["text_embeds"].shape == (1, 48, 80)
    torch.testing.assert_close(found["text_embeds"][:, :16, :], parts["text_embeds"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found["pooled_text_embeds"], parts["pooled_text_embeds"], atol=1e-4, rtol=0)


def test_pooling_finds_the_end_of_text_behind_a_new_token(tiny_xl: Path):
    model = load_model(tiny_xl_config(tiny_xl), TEXT)
    first_id = len(model.tokenizer_2)
    model.add_placeholder("<cat>", 1)
    for encoder, _ in model.text_encoders().values():
        splice(encoder, first_id, torch.randn(1, encoder.config.hidden_size))
    tokens = model.tokenize(["a <cat> b"])
    hidden = model.text_encoder_2.text_model(tokens["input_ids_2"]).last_hidden_state
    end = int((tokens["input_ids_2"][0] == 513).nonzero()[0])
    expected = model.text_encoder_2.text_projection(hidden[0, end])
    torch.testing.assert_close(model.encode_text(tokens)["pooled_text_embeds"][0], expected)


def test_half_precision_spares_an_autoencoder_that_overflows(tiny_xl: Path):
    config = tiny_xl_config(tiny_xl)
    model = load_model(config).to_half()
    assert {part.dtype for part in (model.unet, model.text_encoder, model.text_encoder_2)} == {torch.float16}
    assert model.vae.dtype == torch.float32
    request = ImageRequest("a cat", num_inference_steps=3)
    assert difference(generate(model, [request])[0], generate(load_model(config), [request])[0]) <= 8
    assert load_model(config.model_copy(update={"vae_float32": False})).to_half().vae.dtype == torch.float16


def test_the_fingerprint_of_the_text_covers_both_encoders(tiny_xl: Path, tmp_path: Path):
    config = tiny_xl_config(tiny_xl)
    other = tiny_xl_config(tiny_xl, text_encoder_2=str(save_tiny_xl_model(tmp_path, seed=1) / "text_encoder_2"))
    assert fingerprint(config, "text_encoder") != fingerprint(other, "text_encoder")
    assert fingerprint(config, "tokenizer") == fingerprint(other, "tokenizer")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"unet": {"architecture": UNET}}, "addition_embed_type is None, .* is text_time; is model.family right?"),
        ({"unet": {"architecture": UNET_XL | {"time_cond_proj_dim": 8}}}, "besides text and sizes .time_cond_proj_dim"),
        (
            {"text_encoder_2": {"architecture": {"hidden_size": 48, "num_attention_heads": 4, "projection_dim": 20}}},
            "takes 72 numbers of pooled text and sizes, the text_encoder_2 and six sizes make 68; refiners",
        ),
        (
            {"text_encoder": {"architecture": TEXT_ENCODER | {"hidden_size": 16}}},
            "text embeddings of width 80, the text encoder makes 64",
        ),
        ({"family": "stable_diffusion"}, "takes conditions besides text .addition_embed_type.*model=sdxl"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_together_are_refused(tiny_xl: Path, change: dict, words: str):
    with pytest.raises(ArtifactError, match=words):
        load_model(tiny_xl_config(tiny_xl, **change))
