import pytest
import torch
from diffusers import AutoencoderKL

from ray_sd.embedded.autoencoder import build_start, build_upscaler_start


@pytest.fixture(scope="module")
def start():
    return build_start()


def pixels(seed):
    """A few soft patches of colour."""
    patches = torch.rand(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(patches, size=64, mode="bilinear")


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator(start):
    before = torch.get_rng_state()
    again = build_start()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), again.parameters(), strict=True))


@torch.no_grad()
def test_residual_branches_add_nothing_at_the_start(start):
    resnet = start.decoder.mid_block.resnets[0]
    features = torch.randn(1, 128, 8, 8)
    assert torch.equal(resnet(features, None), features)
    assert torch.equal(start.encoder.mid_block.attentions[0](features), features)


@torch.no_grad()
def test_downsampling_keeps_orthogonal_projections_of_each_block(start):
    convolution = start.encoder.down_blocks[0].downsamplers[0].conv
    projections = convolution.weight[:, :, :2, :2].flatten(1)
    torch.testing.assert_close(projections @ projections.T, torch.eye(16), atol=1e-5, rtol=0)
    assert convolution.weight[:, :, 2].count_nonzero() == convolution.weight[:, :, :, 2].count_nonzero() == 0


@torch.no_grad()
def test_the_posterior_is_narrow_beside_the_latents(start):
    posterior = start.encode(pixels(0)).latent_dist
    assert posterior.mean.shape == (4, 24, 8, 8)
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, 0.1353), atol=1e-4, rtol=0)
    assert posterior.mean.std() > 4 * 0.1353


@torch.no_grad()
def test_latents_hold_more_of_the_picture_than_those_of_diffusers_own_start(start):
    pictures = torch.cat([pixels(seed) for seed in range(24)])
    blocks = torch.nn.functional.pixel_unshuffle(pictures, 8).permute(0, 2, 3, 1).flatten(0, 2)

    def share_lost(autoencoder):
        latents = autoencoder.encode(pictures).latent_dist.mean.permute(0, 2, 3, 1).flatten(0, 2)
        known = torch.cat([latents, torch.ones(len(latents), 1)], dim=1)
        fitted = known @ torch.linalg.lstsq(known, blocks).solution
        return float((blocks - fitted).square().sum() / (blocks - blocks.mean(0)).square().sum())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = AutoencoderKL.from_config(start.config)
    assert share_lost(start) < 0.5 * share_lost(plain)


def test_a_saved_start_loads(start, tmp_path):
    start.save_pretrained(tmp_path)
    assert AutoencoderKL.from_pretrained(tmp_path).config.use_post_quant_conv is False


@torch.no_grad()
def test_the_upscalers_start_halves_twice_and_is_what_its_pipeline_takes():
    start = build_upscaler_start()
    assert all(torch.equal(*pair) for pair in zip(start.parameters(), build_upscaler_start().parameters(), strict=True))
    assert start.config.scaling_factor == 0.08333
    posterior = start.encode(torch.cat([pixels(seed) for seed in range(4)])).latent_dist
    assert posterior.mean.shape == (16, 8, 16, 16)
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, 0.1353), atol=1e-4, rtol=0)
    assert posterior.mean.std() > 4 * 0.1353
    latents = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(start.post_quant_conv(latents), latents)
