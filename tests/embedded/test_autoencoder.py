import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from ray_sd.embedded.autoencoder import build_start, build_upscaler_start, build_video_start


@pytest.fixture(scope="module")
def start():
    return build_start()


@pytest.fixture(scope="module")
def video_start():
    return build_video_start()


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
def test_the_upscalers_start_is_the_small_picture_and_what_it_lacks():
    start = build_upscaler_start()
    assert all(torch.equal(*pair) for pair in zip(start.parameters(), build_upscaler_start().parameters(), strict=True))
    assert start.config.scaling_factor == 0.08333
    pictures = torch.cat([pixels(seed) for seed in range(4)])
    posterior = start.encode(pictures).latent_dist
    assert posterior.mean.shape == (16, 48, 16, 16)
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, 0.0498), atol=1e-4, rtol=0)
    small = F.avg_pool2d(pictures, 4)
    torch.testing.assert_close(posterior.mean[:, :3], 3 * small, atol=0.15, rtol=0)
    half = F.avg_pool2d(pictures, 2)
    across = half[..., ::2, ::2] - half[..., ::2, 1::2] + half[..., 1::2, ::2] - half[..., 1::2, 1::2]
    torch.testing.assert_close(posterior.mean[:, 3:6], 3 * across, atol=0.15, rtol=0)
    smooth = F.interpolate(small, scale_factor=4, mode="bilinear")
    assert F.mse_loss(start.decode(posterior.mean).sample, smooth) < 0.1 * smooth.var()


def test_the_video_start_decodes_each_frame_as_if_it_were_alone(video_start):
    latents = torch.randn(2 * 4, 24, 8, 8, generator=torch.Generator().manual_seed(0))
    frames = video_start.decode(latents, num_frames=4).sample
    assert frames.shape == (8, 3, 64, 64)
    assert frames.std() > 0.1
    alone = torch.cat([video_start.decode(frame[None], num_frames=1).sample for frame in latents])
    torch.testing.assert_close(frames, alone, atol=1e-4, rtol=0)


@torch.no_grad()
def test_training_on_single_frames_leaves_a_still_still():
    """Single frames train only the weights on the frame itself; those on its neighbours are to add nothing meanwhile."""
    decoder = build_video_start()
    for name, module in decoder.decoder.named_modules():
        if name.endswith("temporal_res_block.conv2"):
            torch.nn.init.normal_(module.weight[:, :, 1], std=0.05)
    frame = torch.randn(1, 24, 8, 8, generator=torch.Generator().manual_seed(0))
    frames = decoder.decode(frame.expand(5, -1, -1, -1), num_frames=5).sample
    torch.testing.assert_close(frames, decoder.decode(frame, num_frames=1).sample.expand_as(frames), atol=1e-4, rtol=0)


def test_layers_over_time_of_the_video_start_learn_at_once(video_start):
    latents = torch.randn(4, 24, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        video_start.decode(latents, num_frames=4).sample.square().mean().backward()
    silent = [
        module for name, module in video_start.decoder.named_modules() if name.endswith("temporal_res_block.conv2")
    ]
    assert silent
    assert all(module.weight.count_nonzero() == 0 and module.weight.grad.count_nonzero() > 0 for module in silent)
    video_start.zero_grad()


@torch.no_grad()
def test_the_video_start_has_latents_like_those_of_pictures(start, video_start):
    posterior = video_start.encode(pixels(0)).latent_dist
    assert posterior.mean.shape == start.encode(pixels(0)).latent_dist.mean.shape
    assert posterior.mean.std() > 4 * 0.1353
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, 0.1353), atol=1e-4, rtol=0)
    assert video_start.config.scaling_factor == 1.0


def test_the_same_seed_gives_the_same_video_start(video_start):
    again = build_video_start()
    assert all(torch.equal(a, b) for a, b in zip(video_start.parameters(), again.parameters(), strict=True))
