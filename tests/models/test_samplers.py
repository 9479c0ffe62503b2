"""Tables of samplers, against diffusers' schedulers stepping beside them."""

from inspect import signature

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from torch import Tensor

from ray_sd.errors import RequestError
from ray_sd.models.samplers import SamplerTable, sampler_table
from ray_sd.models.schedulers import DEFAULTS, SAMPLERS, STABLE_DIFFUSION, STABLE_VIDEO_DIFFUSION

SHAPE = (1, 4, 6, 6)


def schedule(prediction_type: str = "epsilon") -> DDPMScheduler:
    return DDPMScheduler.from_config(STABLE_DIFFUSION | DEFAULTS | {"prediction_type": prediction_type})


def model(latents: Tensor) -> Tensor:
    """Something that is not linear."""
    return torch.sin(1.3 * latents) + 0.1 * latents.flip(-1)


def by_scheduler(scheduler, steps: int, first: int, replaced: Tensor | None) -> tuple[Tensor, Tensor]:
    """Latents after all steps, and as the last step but one foresaw them.

    replaced: in place of a third of the latents after every step, as where a part of a picture stays.
    """
    scheduler.set_timesteps(steps)
    if first and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    generator = torch.Generator().manual_seed(1)
    own = {"generator": generator} if "generator" in signature(scheduler.step).parameters else {}
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    foreseen = latents
    for number in range(first, len(scheduler.timesteps)):
        timestep = scheduler.timesteps[number]
        output = model(scheduler.scale_model_input(latents, timestep))
        if number == len(scheduler.timesteps) - 1:
            break
        result = scheduler.step(output, timestep, latents, **own)
        clean = getattr(result, "pred_original_sample", None)
        clean = getattr(result, "denoised", None) if clean is None else clean
        foreseen = scheduler.model_outputs[-1] if clean is None else clean
        latents = result.prev_sample
        if replaced is not None:
            latents[..., :2] = replaced
    return scheduler.step(output, timestep, latents, **own).prev_sample, foreseen


def by_table(table: SamplerTable, replaced: Tensor | None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * table.init_noise_sigma
    remembered = torch.zeros(table.remembered, *SHAPE)
    clean = latents
    for step in range(table.first, len(table)):
        if step > table.first and replaced is not None:
            latents[..., :2] = replaced
        noise = torch.randn(SHAPE, generator=generator) if table.draws[step] else torch.zeros(SHAPE)
        given = torch.stack([latents, *remembered, model(latents * table.scales[step]), noise])
        before = clean
        clean, latents, *remembered = (table.steps[step] @ given.flatten(1)).view(-1, *SHAPE)
    return latents, before


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("steps", [2, 4, 20])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_table_takes_the_schedulers_steps(name: str, prediction_type: str, steps: int, strength: float):
    scheduler = SAMPLERS[name].from_config(schedule(prediction_type).config)
    table = sampler_table(scheduler, steps, strength)
    assert (len(table), table.first) == (steps, steps - int(steps * strength))
    for replaced in (None, torch.ones(())):
        wanted = by_scheduler(type(scheduler).from_config(scheduler.config), steps, table.first, replaced)
        for found, expected in zip(by_table(table, replaced), wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler.from_config(STABLE_VIDEO_DIFFUSION),
        DPMSolverMultistepScheduler.from_config(schedule().config, use_karras_sigmas=True, solver_order=3),
        DPMSolverMultistepScheduler.from_config(schedule().config, algorithm_type="sde-dpmsolver++"),
    ],
    ids=["video", "third_order", "stochastic"],
)
def test_settings_of_a_scheduler_are_in_its_table(scheduler):
    found, _ = by_table(sampler_table(scheduler, 12), None)
    expected, _ = by_scheduler(scheduler, 12, 0, None)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_clean_latents_are_made_as_noisy_as_before_any_step(name: str):
    scheduler = SAMPLERS[name].from_config(schedule().config)
    table = sampler_table(scheduler, 8, strength=0.5)
    clean, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    for step in (4, 6):
        fresh = type(scheduler).from_config(scheduler.config)
        fresh.set_timesteps(8)
        expected = fresh.add_noise(clean, noise, fresh.timesteps[step].reshape(1))
        torch.testing.assert_close(table.noising[step, 0] * clean + table.noising[step, 1] * noise, expected)
    assert table.noising[8].tolist() == [1, 0]


def test_only_stochastic_samplers_draw_noise():
    draws = {name: sampler_table(kind.from_config(schedule().config), 5).draws for name, kind in SAMPLERS.items()}
    stochastic = {name for name, of_steps in draws.items() if any(of_steps)}
    assert stochastic == {"ddpm", "euler_ancestral", "lcm"}
    assert draws["euler_ancestral"] == draws["lcm"] == (True, True, True, True, False)


def test_a_table_is_made_once():
    scheduler = SAMPLERS["unipc"].from_config(schedule().config)
    table = sampler_table(scheduler, 7)
    assert sampler_table(SAMPLERS["unipc"].from_config(schedule().config), 7) is table
    assert sampler_table(SAMPLERS["unipc"].from_config(schedule("v_prediction").config), 7) is not table


@pytest.mark.parametrize(
    ("scheduler", "steps", "strength", "words"),
    [
        (HeunDiscreteScheduler.from_config(schedule().config), 5, 1.0, "HeunDiscreteScheduler calls the U-Net 2 times"),
        (DDPMScheduler.from_config(schedule().config, clip_sample=True), 5, 1.0, r"clips .* \(clip_sample"),
        (SAMPLERS["ddim"].from_config(schedule().config), 1001, 1.0, "cannot take 1001 steps"),
        (SAMPLERS["lcm"].from_config(schedule().config), 51, 1.0, "cannot take 51 steps"),
        (SAMPLERS["euler"].from_config(schedule().config), 5, 0.1, "strength 0.1 of 5 steps leaves none to take"),
    ],
    ids=["two_calls", "clips", "too_many", "more_than_learnt", "none_left"],
)
def test_what_no_table_holds_is_refused(scheduler, steps: int, strength: float, words: str):
    with pytest.raises(RequestError, match=words):
        sampler_table(scheduler, steps, strength)
