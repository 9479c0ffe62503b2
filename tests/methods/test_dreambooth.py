"""A subject beside its class: the loss, what trains, and exports with and without a word of their own."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from pydantic import ValidationError
from tiny_models import difference, draw, random_batch, tiny_config
from transformers import CLIPTextModel

from ray_sd.config import ExperimentConfig, TrainerConfig
from ray_sd.config.load import load_config
from ray_sd.config.method import DreamBoothMethod
from ray_sd.errors import ArtifactError, ConfigError
from ray_sd.generate import ImageRequest, generate
from ray_sd.methods import Method, build_method
from ray_sd.models import DiffusionLoss, DiffusionModel, load_model, noise

TRAINER = TrainerConfig(learning_rate=0.05, token_learning_rate=0.5)
TOKENS = {"placeholder_token": "<cat>", "initializer_token": "a", "num_vectors": 2}
VARIANTS = {
    "lora": {},
    "lora with text": {"adapter": {"name": "lora", "text_encoder": True}},
    "full": {"adapter": "full"},
    "pivotal": {"tokens": TOKENS},
    "pivotal with text": {"tokens": TOKENS, "adapter": {"name": "lora", "text_encoder": True}},
    "pivotal loha with text": {"tokens": TOKENS, "adapter": {"name": "loha", "text_encoder": True}},
}


def prepared(folder: Path, **settings: object) -> tuple[Method, DiffusionModel]:
    method = build_method(DreamBoothMethod.model_validate(settings))
    model = load_model(tiny_config(folder), method.components())
    torch.manual_seed(0)
    method.prepare(model, TRAINER)
    return method, model


def batch_of(method: Method, model: DiffusionModel, seed: int) -> dict[str, torch.Tensor]:
    """Two rows of the subject, and two of its class."""
    text = method.rows().text
    subject, prior = random_batch(2, text, seed), random_batch(2, text, seed + 100)
    if method.config.tokens is not None:
        subject |= model.tokenize(["a <cat>", "<cat> b"])
    return subject | {f"class_{name}": value for name, value in prior.items()}


def test_the_loss_is_the_papers_with_each_rows_own_weight(tiny: Path):
    """Mean over the subject's rows plus λ times the mean over class rows, Min-SNR weights by each row's own timestep."""
    method, model = prepared(tiny, class_prompt="a cat", prior_loss_weight=0.3, min_snr_gamma=5.0)
    batch = batch_of(method, model, 0)
    parts = []
    for prefix in ("", "class_"):
        rows = {name: batch[prefix + name] for name in ("latent_mean", "latent_std", "row_seed", "text_embeds")}
        draws = noise.draw_rows(rows["row_seed"], (4, 8, 8), 1000)
        alpha_bar = model.noise_scheduler.alphas_cumprod[draws.timesteps].view(-1, 1, 1, 1)
        latents = (rows["latent_mean"] + rows["latent_std"] * draws.posterior) * 0.5
        noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * draws.noise
        error = (model.unet(noisy, draws.timesteps, rows["text_embeds"]).sample - draws.noise).square()
        ratio = alpha_bar.flatten() / (1 - alpha_bar.flatten())
        parts.append((error.mean(dim=(1, 2, 3)) * ratio.clamp(max=5) / ratio).mean())
    expected = parts[0] + 0.3 * parts[1]
    assert float(method.objective(model, batch).detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_class_rows_of_another_size_have_the_same_loss_as_alone(tiny: Path):
    method, model = prepared(tiny, class_prompt="a cat", prior_loss_weight=0.3, min_snr_gamma=5.0)
    batch = batch_of(method, model, 0)
    for name in ("latent_mean", "latent_std"):
        batch[name] = batch[name][:, :, :4]
    parts = [{name: batch[prefix + name] for name in random_batch(1)} for prefix in ("", "class_")]
    weighting = DiffusionLoss(min_snr_gamma=5.0)
    expected = model.loss(parts[0], weighting).mean() + 0.3 * model.loss(parts[1], weighting).mean()
    assert float(method.objective(model, batch).detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_without_class_rows_the_loss_is_that_of_the_adapter(tiny: Path):
    method, model = prepared(tiny)
    batch = random_batch(3)
    assert method.objective(model, batch).item() == pytest.approx(model.loss(batch).mean().item(), rel=1e-5)
    assert method.rows().prior is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trainable_parameter_is_in_one_group_and_moves(tiny: Path, variant: str):
    method, model = prepared(tiny, class_prompt="a cat", **VARIANTS[variant])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _train(method, model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved == trainable
    groups = method.parameter_groups(model, TRAINER)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(
        id(p) for p in model.parameters() if p.requires_grad
    )
    assert [group["name"] for group in groups if group["lr"] == 0.5] == (["tokens"] if "pivotal" in variant else [])


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_export_draws_alike_in_training_in_plain_diffusers_and_here(tiny: Path, tmp_path: Path, variant: str):
    method, trained = prepared(tiny, class_prompt="a cat", **VARIANTS[variant])
    _train(method, trained)
    method.export(trained, tmp_path)
    whole = load_model(tiny_config(tiny))
    trained.vae = whole.vae
    if trained.text_encoder is None:
        trained.text_encoder, trained.tokenizer = whole.text_encoder, whole.tokenizer
    request = ImageRequest("a <cat> on", seed=1, num_inference_steps=3)
    expected = generate(trained, [request])[0]
    assert difference(generate(load_model(tiny_config(tiny)), [request])[0], expected) > 10

    ours = load_model(tiny_config(tiny))
    assert method.attach(ours, tmp_path, 1.0) > 0
    assert difference(generate(ours, [request])[0], expected) <= 1

    if variant != "full":
        plain = load_model(tiny_config(tiny)).pipeline()
        if "loha" in variant:
            plain.unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
            folder = tmp_path / "text_encoder"
            plain.text_encoder, report = CLIPTextModel.from_pretrained(folder, output_loading_info=True)
            assert not any(report.values())
        else:
            plain.load_lora_weights(tmp_path)
        if "pivotal" in variant:
            plain.load_textual_inversion(tmp_path / "embeddings", local_files_only=True)
        assert difference(draw(plain, request.prompt, negative_prompt=""), expected) <= 1


def test_an_embedding_of_a_pivotal_tuning_has_to_be_there(tiny: Path, tmp_path: Path):
    method, trained = prepared(tiny, tokens=TOKENS)
    method.export(trained, tmp_path)
    (tmp_path / "embeddings" / "learned_embeds.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"embeddings has no learned_embeds.safetensors"):
        method.attach(load_model(tiny_config(tiny)), tmp_path, 1.0)


def test_what_rows_hold():
    rows = build_method(DreamBoothMethod(instance_prompt="a sks cat", class_prompt=("a cat",))).rows()
    assert (rows.text, rows.templates, rows.prior.prompts) == ("embeddings", ("a sks cat",), ("a cat",))
    rows = build_method(DreamBoothMethod.model_validate({"tokens": TOKENS})).rows()
    assert (rows.text, rows.placeholders, rows.prior) == ("tokens", (("<cat>", 2),), None)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValidationError, match="do not go together"):
        DreamBoothMethod.model_validate({"tokens": TOKENS, "adapter": {"name": "full", "text_encoder": True}})
    for settings, words in (
        (["trainer.text_encoder_learning_rate=1"], "needs method.adapter.text_encoder=true"),
        (["trainer.token_learning_rate=1"], "needs a method that learns tokens"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_config(["experiment=smoke", "method=dreambooth", *settings], ExperimentConfig)


def _train(method: Method, model: DiffusionModel, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(
        [{k: v for k, v in g.items() if k != "name"} for g in method.parameter_groups(model, TRAINER)]
    )
    for step in range(steps):
        optimizer.zero_grad()
        method.objective(model, batch_of(method, model, step)).backward()
        optimizer.step()
    model.eval()
