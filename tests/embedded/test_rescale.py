import numpy as np
import torch
from PIL import Image

from ray_sd.embedded.autoencoder import build_start, build_upscaler_start, mean_square, rescale_latents
from ray_sd.embedded.sprites import png_bytes, write_parquet


def test_rescaled_latents_have_unit_scale_and_decode_to_the_same_pictures():
    autoencoder = build_start(latent_channels=8).eval()
    pixels = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        before = autoencoder.encode(pixels).latent_dist
        reconstruction = autoencoder.decode(before.mean).sample
        scale = before.mean.square().mean(dim=(0, 2, 3)).sqrt()
        rescale_latents(autoencoder, scale)
        after = autoencoder.encode(pixels).latent_dist
        torch.testing.assert_close(after.mean.square().mean(dim=(0, 2, 3)), torch.ones(8), rtol=0, atol=1e-4)
        torch.testing.assert_close(after.std / after.mean.abs(), before.std / before.mean.abs(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(autoencoder.decode(after.mean).sample, reconstruction, rtol=1e-3, atol=1e-4)
    assert autoencoder.config.scaling_factor == 1.0
    assert not torch.allclose(scale, torch.ones(8), atol=0.1)


def test_an_upscalers_latents_are_scaled_for_its_pipeline_before_the_layer_that_reads_them():
    autoencoder = build_upscaler_start().eval()
    pixels = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        before = autoencoder.encode(pixels).latent_dist
        reconstruction = autoencoder.decode(before.mean).sample
        scale = before.mean.square().mean(dim=(0, 2, 3)).sqrt()
        rescale_latents(autoencoder, scale * 0.08333, 0.08333)
        after = autoencoder.encode(pixels).latent_dist
        torch.testing.assert_close(
            (0.08333 * after.mean).square().mean(dim=(0, 2, 3)), torch.ones(48), rtol=0, atol=1e-4
        )
        torch.testing.assert_close(autoencoder.decode(after.mean).sample, reconstruction, rtol=1e-3, atol=1e-4)
    assert autoencoder.config.scaling_factor == 0.08333


def test_the_mean_square_is_that_of_pictures_of_every_size(tmp_path):
    sizes = (64, 128, 64)
    pictures = [Image.effect_noise((size, size), 90).convert("RGB") for size in sizes]
    write_parquet([row(str(n), picture) for n, picture in enumerate(pictures)], tmp_path, shards=2, seed=0)
    autoencoder = build_upscaler_start()
    with torch.no_grad():
        arrays = [torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] for picture in pictures]
        latents = [autoencoder.encode(array.float() / 127.5 - 1).latent_dist.mean for array in arrays]
    expected = torch.stack([latent.square().mean(dim=(0, 2, 3)) for latent in latents]).mean(0)
    torch.testing.assert_close(mean_square(autoencoder, tmp_path), expected, rtol=1e-4, atol=0)


def row(name: str, picture: Image.Image) -> dict:
    return {"id": name, "image": png_bytes(picture), "caption": name}
