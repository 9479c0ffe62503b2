from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from tiny_models import VAE, difference, draw, tiny_config

from ray_sd.config import TrainerConfig
from ray_sd.config.method import AutoencoderMethod
from ray_sd.errors import ArtifactError, ConfigError
from ray_sd.methods import Method, build_method
from ray_sd.models import DiffusionModel, load_model


def prepared(folder: Path, **settings: object) -> tuple[Method, DiffusionModel]:
    method = build_method(AutoencoderMethod(**settings))
    model = load_model(tiny_config(folder), method.components())
    method.prepare(model, TrainerConfig())
    return method, model


def pixel_batch(rows: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (rows, 3, 64, 48), generator=generator, dtype=torch.uint8)
    return {"pixels": pixels, "row_seed": torch.arange(rows) + 5}


def train(method: Method, model: DiffusionModel, batch: dict[str, torch.Tensor]) -> None:
    optimizer = torch.optim.AdamW(method.parameter_groups(model, TrainerConfig(learning_rate=3e-3)))
    for _ in range(10):
        optimizer.zero_grad()
        method.objective(model, batch).backward()
        optimizer.step()


def test_the_loss_equals_the_formula(tiny: Path):
    method, model = prepared(tiny, kl_weight=0.3)
    batch = pixel_batch()
    expected = []
    for pixels, seed in zip(batch["pixels"], batch["row_seed"].tolist(), strict=True):
        x = pixels[None].float() / 127.5 - 1
        posterior = model.vae.encode(x).latent_dist
        eps = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(seed))
        decoded = model.vae.decode(posterior.mean + posterior.std * eps).sample
        normal = torch.distributions.Normal(0.0, 1.0)
        kl = torch.distributions.kl_divergence(torch.distributions.Normal(posterior.mean, posterior.std), normal)
        loss = torch.nn.functional.l1_loss(decoded, x) + torch.nn.functional.mse_loss(decoded, x) + 0.3 * kl.mean()
        expected.append(loss)
    losses = method.row_losses(model, batch)
    torch.testing.assert_close(losses, torch.stack(expected))
    torch.testing.assert_close(method.objective(model, batch), losses.mean())
    torch.testing.assert_close(method.validation_losses(model, batch), losses.detach())


def test_windows_come_from_the_rows_own_seeds(tiny: Path):
    method, model = prepared(tiny, crop_size=32)
    batch = pixel_batch()
    whole = method.row_losses(model, batch)
    alone = method.row_losses(model, {name: value[1:2] for name, value in batch.items()})
    torch.testing.assert_close(whole[1:2], alone)
    moved = method.row_losses(model, batch | {"row_seed": batch["row_seed"] + 100})
    assert not torch.allclose(whole, moved)
    seen = {
        tuple(torch.randint(size, (), generator=generator).item() for size in (33, 17))
        for generator in (torch.Generator().manual_seed(seed) for seed in range(20))
    }
    assert len(seen) > 10


def test_a_window_as_large_as_the_picture_is_the_picture(tiny: Path):
    batch = {"pixels": pixel_batch()["pixels"][..., :48, :48], "row_seed": torch.arange(3)}
    from ray_sd.methods.autoencoder import crop_rows
    from ray_sd.models.noise import row_generators

    assert torch.equal(crop_rows(batch["pixels"], row_generators(batch["row_seed"]), 48), batch["pixels"])


def test_training_reconstructs_better_and_exports_what_diffusers_loads(tiny: Path, tmp_path: Path):
    method, model = prepared(tiny, crop_size=32)
    batch = pixel_batch()
    first = method.validation_losses(model, batch).mean()
    train(method, model, batch)
    assert method.validation_losses(model, batch).mean() < first - 0.05

    model.eval()
    method.export(model, tmp_path)
    plain = AutoencoderKL.from_pretrained(tmp_path / "vae")
    pixels = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(
        plain.encode(pixels).latent_dist.mean, model.encode_images(pixels)[0], rtol=1e-4, atol=1e-4
    )

    ours = load_model(tiny_config(tiny))
    before = draw(ours.pipeline())
    assert method.attach(ours, tmp_path, 1.0) == len(plain.state_dict())
    assert difference(draw(ours.pipeline()), before) > 5
    with pytest.raises(ArtifactError, match="no strength"):
        method.attach(ours, tmp_path, 0.5)


def test_the_decoder_alone_learns_and_leaves_the_latents(tiny: Path):
    method, model = prepared(tiny, decoder_only=True, kl_weight=10.0)
    assert not method.moves_latents
    batch = pixel_batch()
    latents = [p.clone() for part in (model.vae.encoder, model.vae.quant_conv) for p in part.parameters()]
    first = method.validation_losses(model, batch).mean()
    train(method, model, batch)
    assert method.validation_losses(model, batch).mean() < first - 0.05
    after = [p for part in (model.vae.encoder, model.vae.quant_conv) for p in part.parameters()]
    assert all(torch.equal(*pair) for pair in zip(latents, after, strict=True))


def test_a_teacher_of_an_encoder_that_does_not_learn_is_refused():
    with pytest.raises(ValueError, match=r"decoder_only leaves no encoder to learn from method\.teacher"):
        AutoencoderMethod(decoder_only=True, teacher="embedded/emoji")


def test_checkpointing_gives_the_same_gradients(tiny: Path):
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        method = build_method(AutoencoderMethod())
        model = load_model(tiny_config(tiny), method.components())
        method.prepare(model, TrainerConfig(gradient_checkpointing=checkpointing))
        assert model.vae.is_gradient_checkpointing is checkpointing
        method.objective(model, pixel_batch(rows=1)).backward()
        return [parameter.grad for parameter in model.vae.parameters()]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ({"latent_channels": 6}, "its latents have channels 4, those of model 'tiny' 6"),
        (
            {"block_out_channels": [8, 8], "down_block_types": VAE["down_block_types"][:2],
             "up_block_types": VAE["up_block_types"][:2]},
            "its latents have pixels a side 8, those of model 'tiny' 2",
        ),
    ],
)  # fmt: skip
def test_a_teacher_with_latents_of_another_shape_is_refused(tiny: Path, architecture: dict, words: str):
    method = build_method(AutoencoderMethod(teacher=str(tiny)))
    model = load_model(tiny_config(tiny, vae={"architecture": VAE | architecture}), method.components())
    with pytest.raises(ConfigError, match=f"^method.teacher: {words}"):
        method.prepare(model, TrainerConfig())


def test_it_learns_from_pixels_without_text():
    rows = build_method(AutoencoderMethod()).rows()
    assert (rows.images, rows.text) == ("pixels", "none")
    assert build_method(AutoencoderMethod()).components() == ("vae",)
