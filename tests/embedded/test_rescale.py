import torch

from ray_sd.embedded.autoencoder import build_start, build_upscaler_start, rescale_latents


def test_rescaled_latents_have_unit_scale_and_decode_to_the_same_pictures():
    autoencoder = build_start(latent_channels=8).eval()
    pixels = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        before = autoencoder.encode(pixels).latent_dist
        reconstruction = autoencoder.decode(before.mean).sample
        scale = before.mean.square().mean(dim=(0, 2, 3)).sqrt()
        rescale_latents(autoencoder, scale)
        after = autoencoder.encode(pixels).latent_dist
        torch.testing.assert_close(after.mean.square().mean(dim=(0, 2, 3)), torch.ones(8))
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
        torch.testing.assert_close((0.08333 * after.mean).square().mean(dim=(0, 2, 3)), torch.ones(8))
        torch.testing.assert_close(autoencoder.decode(after.mean).sample, reconstruction, rtol=1e-3, atol=1e-4)
    assert autoencoder.config.scaling_factor == 0.08333
