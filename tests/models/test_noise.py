import pytest
import torch
from diffusers import DDPMScheduler

from ray_sd.models import noise

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
TIMESTEPS = torch.tensor([0, 1, 500, 999])


def alpha_bar() -> torch.Tensor:
    return noise.at_timesteps(SCHEDULER.alphas_cumprod, TIMESTEPS)


def test_noising_equals_the_schedulers():
    x0, eps = torch.randn(2, 4, 4, 8, 8)
    expected = SCHEDULER.add_noise(x0, eps, TIMESTEPS)
    torch.testing.assert_close(noise.add_noise(x0, eps, alpha_bar()), expected)


def test_the_velocity_equals_the_schedulers():
    x0, eps = torch.randn(2, 4, 4, 8, 8)
    torch.testing.assert_close(
        noise.target("v_prediction", x0, eps, alpha_bar()), SCHEDULER.get_velocity(x0, eps, TIMESTEPS)
    )


def test_the_target_of_epsilon_is_the_noise_and_of_sample_the_latents():
    x0, eps = torch.randn(2, 4, 4, 8, 8)
    assert noise.target("epsilon", x0, eps, alpha_bar()) is eps
    assert noise.target("sample", x0, eps, alpha_bar()) is x0


@pytest.mark.parametrize(
    ("ratio", "epsilon_weight", "v_weight", "sample_weight"),
    [(0.25, 1.0, 0.2, 0.25), (5.0, 1.0, 5 / 6, 5.0), (20.0, 0.25, 5 / 21, 5.0)],
)
def test_min_snr_weights_by_hand(ratio: float, epsilon_weight: float, v_weight: float, sample_weight: float):
    alpha = torch.tensor(ratio / (1 + ratio), dtype=torch.float64)  # SNR = ᾱ / (1 − ᾱ)
    assert noise.snr(alpha).item() == pytest.approx(ratio)
    assert noise.min_snr_weights("epsilon", alpha, 5.0).item() == pytest.approx(epsilon_weight)
    assert noise.min_snr_weights("v_prediction", alpha, 5.0).item() == pytest.approx(v_weight)
    assert noise.min_snr_weights("sample", alpha, 5.0).item() == pytest.approx(sample_weight)


def test_v_weights_stay_finite_at_zero_terminal_snr():
    assert noise.min_snr_weights("v_prediction", torch.zeros(1), 5.0).item() == 0


def test_a_rows_draws_do_not_depend_on_the_other_rows():
    together = noise.draw_rows(torch.tensor([5, 2**62 + 1, 7]), (4, 8, 8), 1000)
    alone = noise.draw_rows(torch.tensor([2**62 + 1]), (4, 8, 8), 1000)
    swapped = noise.draw_rows(torch.tensor([2**62 + 1, 5]), (4, 8, 8), 1000)
    for name, values in vars(together).items():
        assert torch.equal(values[1], getattr(alone, name)[0]), name
        assert torch.equal(values[1], getattr(swapped, name)[0]), name


def test_rows_and_their_draws_differ():
    draws = noise.draw_rows(torch.arange(64), (4, 8, 8), 1000)
    assert len(draws.timesteps.unique()) > 50
    assert 0 <= draws.timesteps.min() <= draws.timesteps.max() < 1000
    for values in (draws.noise, draws.posterior):
        assert values.flatten(1).unique(dim=0).shape[0] == 64
        assert values.mean().abs() < 0.03
        assert (values.std() - 1).abs() < 0.03
    assert not torch.equal(draws.noise, draws.posterior)


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    noise.draw_rows(torch.tensor([1, 2]), (4, 8, 8), 1000)
    after = torch.randn(4)
    torch.manual_seed(3)
    assert torch.equal(after, torch.randn(4))
