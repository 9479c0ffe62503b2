import torch

from ray_sd.embedded.upscaler import build_unet_start, colour_of_white


@torch.no_grad()
def test_at_first_the_u_net_gives_the_small_picture_back_whatever_the_noise():
    unet = build_unet_start(colour=1.25)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 48, 32, 32, generator=generator)
    small = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    text = torch.randn(2, 7, 128, generator=generator)
    given = torch.cat([latents, small], dim=1)
    for timestep, level in ((999, 0), (20, 50)):
        found = unet(given, timestep, encoder_hidden_states=text, class_labels=torch.tensor([level, level])).sample
        torch.testing.assert_close(found[:, :3], 1.25 * small, atol=0.2, rtol=0)
        assert (found[:, :3] - 1.25 * small).square().mean().sqrt() < 0.1
        assert found[:, 3:].abs().max() == 0


def test_all_other_weights_of_the_start_are_random_and_can_learn():
    unet = build_unet_start(colour=1.0)
    assert all(torch.equal(*pair) for pair in zip(unet.parameters(), build_unet_start(1.0).parameters(), strict=True))
    given = torch.randn(1, 51, 16, 16, generator=torch.Generator().manual_seed(0))
    out = unet(given, 500, encoder_hidden_states=torch.randn(1, 7, 128), class_labels=torch.tensor([0])).sample
    (out - 1).square().mean().backward()
    assert unet.conv_out.weight.grad[3:].abs().max() > 0


def test_latents_are_as_large_as_the_autoencoder_makes_them():
    assert 1 < colour_of_white() < 3
