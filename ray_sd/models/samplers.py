"""Samplers as tables of numbers.

A step of any sampler is linear in the latents, in what the U-Net said, in what the sampler remembers of earlier steps and in
fresh noise. The coefficients hang on the noise schedule and on the number of steps alone. So they are read off diffusers' own
scheduler once, by giving it unit vectors, and rows of a batch take their steps in one product, whatever their samplers.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ray_sd.errors import RequestError

UNITS = 8
"""Unit vectors of a probe: latents, the U-Net's output, one that stays zero, and what a sampler remembers."""
LATENTS, OUTPUT, ZERO, FIRST_REMEMBERED = range(4)
RESULTS = ("clean", "latents")


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """The arithmetic of T steps of a sampler that remembers M tensors of the latents' shape. All tensors are fp32, on the CPU."""

    first: int
    """The first step that is taken, where a drawing begins as a picture with noise."""
    timesteps: Tensor  # [T]
    scales: Tensor  # [T]
    """What the latents are multiplied by before the U-Net is given them."""
    steps: Tensor  # [T, 2 + M, 3 + M]
    """(clean latents as foreseen, latents, remembered) after a step, from (latents, remembered, output, noise) before it."""
    draws: tuple[bool, ...]
    """Whether a step takes fresh noise."""
    noising: Tensor  # [T + 1, 2]
    """What clean latents and noise are multiplied by, to be as noisy as before a step, or after the last."""
    init_noise_sigma: float
    """Standard deviation of the latents before the first step of all."""

    def __len__(self) -> int:
        return len(self.draws)

    @property
    def remembered(self) -> int:
        return self.steps.shape[1] - 2


def sampler_table(scheduler: SchedulerMixin, num_inference_steps: int, strength: float = 1.0) -> SamplerTable:
    """The table of a fresh scheduler. strength: the share of the steps that are taken, of (0, 1].

    Raises RequestError for steps that the sampler cannot take, and for samplers that clip what they foresee.
    """
    config = json.dumps(dict(scheduler.config), sort_keys=True, default=str)
    return _table(type(scheduler).__name__, config, num_inference_steps, strength)


@lru_cache(maxsize=256)
def _table(kind: str, config: str, num_inference_steps: int, strength: float) -> SamplerTable:
    scheduler = getattr(diffusers, kind).from_config(json.loads(config))
    for setting in ("clip_sample", "thresholding"):
        if scheduler.config.get(setting):
            raise RequestError(
                f"the sampler clips what it foresees ({setting} of its scheduler), which is not linear",
                param="scheduler",
            )
    if scheduler.order != 1:
        raise RequestError(
            f"{kind} calls the U-Net {scheduler.order} times a step; take another sampler", param="scheduler"
        )
    with torch.inference_mode(False), torch.no_grad():
        return _probe(scheduler, num_inference_steps, strength)


def _probe(scheduler: Any, num_inference_steps: int, strength: float) -> SamplerTable:
    _set_timesteps(scheduler, num_inference_steps)
    first = _first_step(num_inference_steps, strength, len(scheduler.timesteps))
    if first and hasattr(scheduler, "set_begin_index"):  # DDIM and DDPM find their place by the timestep
        scheduler.set_begin_index(first)

    noising = [_noising(scheduler, first)]
    scales, steps, draws = [], [], []
    slots: list[tuple[str, int | None]] = []
    for number in range(first, len(scheduler.timesteps)):
        slots += [slot for slot in _remembered(scheduler) if slot not in slots]
        scale, read, drawn = _probe_step(scheduler, scheduler.timesteps[number], slots)
        scales.append(scale)
        steps.append(read)
        draws.append(drawn)
        last = number + 1 == len(scheduler.timesteps)
        noising.append((1.0, 0.0) if last else _noising(scheduler, number + 1))

    needed = _needed(steps, slots)
    columns = [LATENTS, *(FIRST_REMEMBERED + slots.index(slot) for slot in needed), OUTPUT, ZERO]
    nothing = torch.zeros(UNITS, dtype=torch.float64)
    rows = [torch.stack([read.get(name, nothing) for name in (*RESULTS, *needed)]) for read in steps]
    whole = torch.stack(rows)[:, :, columns]
    # Steps before the first are never taken.
    return SamplerTable(
        first=first,
        timesteps=scheduler.timesteps.float(),
        scales=torch.tensor([1.0] * first + scales),
        steps=torch.cat([whole.new_zeros(first, *whole.shape[1:]), whole]).float(),
        draws=(*[False] * first, *draws),
        noising=torch.tensor([(1.0, 0.0)] * first + noising),
        init_noise_sigma=float(scheduler.init_noise_sigma),
    )


def _set_timesteps(scheduler: Any, num_inference_steps: int) -> None:
    try:
        scheduler.set_timesteps(num_inference_steps)
    except ValueError as error:
        raise RequestError(
            f"the sampler cannot take {num_inference_steps} steps: {error}", param="num_inference_steps"
        ) from error
    known = scheduler.config.num_train_timesteps
    if scheduler.timesteps.max() >= known:  # with an offset, as many steps as the model knows are one too many
        raise RequestError(
            f"the sampler cannot take {num_inference_steps} steps: the model knows {known}", param="num_inference_steps"
        )


def _first_step(num_inference_steps: int, strength: float, timesteps: int) -> int:
    """As diffusers' image-to-image pipelines have it."""
    taken = min(int(num_inference_steps * strength), num_inference_steps)
    if taken < 1:
        raise RequestError(
            f"strength {strength:g} of {num_inference_steps} steps leaves none to take; raise one of them",
            param="strength",
        )
    return min(num_inference_steps - taken, timesteps - 1)


def _unit(place: int) -> Tensor:
    return torch.eye(UNITS, dtype=torch.float64)[place : place + 1]


def _noising(scheduler: Any, number: int) -> tuple[float, float]:
    noisy = scheduler.add_noise(_unit(0), _unit(1), scheduler.timesteps[number].reshape(1))
    return float(noisy[0, 0]), float(noisy[0, 1])


def _remembered(scheduler: Any) -> dict[tuple[str, int | None], Tensor]:
    """The tensors of the latents' shape that a scheduler keeps, by attribute and place in a list."""
    found: dict[tuple[str, int | None], Tensor] = {}
    for name, value in vars(scheduler).items():
        values = enumerate(value) if isinstance(value, list) else [(None, value)]
        found |= {(name, place): one for place, one in values if isinstance(one, Tensor) and one.shape == (1, UNITS)}
    return found


def _remember(scheduler: Any, slot: tuple[str, int | None], value: Tensor) -> None:
    name, place = slot
    if place is None:
        setattr(scheduler, name, value)
    else:
        getattr(scheduler, name)[place] = value


def _probe_step(
    scheduler: Any, timestep: Tensor, slots: list[tuple[str, int | None]]
) -> tuple[float, dict[Any, Tensor], bool]:
    """The scale of what the U-Net is given, what comes of each unit [UNITS] for each result, and whether noise is drawn.

    Of the `latents`, the unit that stays zero holds what comes of noise.
    """
    if FIRST_REMEMBERED + len(slots) > UNITS:
        raise RequestError(
            f"{type(scheduler).__name__} remembers more than a table holds; take another sampler", param="scheduler"
        )
    for slot in _remembered(scheduler):
        _remember(scheduler, slot, _unit(FIRST_REMEMBERED + slots.index(slot)))
    scale = float(scheduler.scale_model_input(_unit(LATENTS), timestep)[0, LATENTS])
    takes_noise = "generator" in signature(scheduler.step).parameters
    own = {"generator": torch.Generator().manual_seed(0)} if takes_noise else {}
    result = scheduler.step(_unit(OUTPUT), timestep, _unit(LATENTS), **own)

    latents = result.prev_sample.double()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    of_noise = latents[0, ZERO] / noise[0, ZERO]
    latents = latents - of_noise * noise
    latents[0, ZERO] = of_noise
    clean = getattr(result, "pred_original_sample", None)
    if clean is None:
        clean = getattr(result, "denoised", None)
    if clean is None:  # DPM-Solver++ and UniPC keep it
        clean = scheduler.model_outputs[-1]
    kept = {slot: value[0].double() for slot, value in _remembered(scheduler).items()}
    return scale, {"clean": clean[0].double(), "latents": latents[0], **kept}, bool(of_noise != 0)


def _needed(steps: list[dict[Any, Tensor]], slots: list[tuple[str, int | None]]) -> list[tuple[str, int | None]]:
    """What is remembered and used again."""
    needed: set[Any] = set()
    while True:
        used = torch.stack([read[name] for read in steps for name in (*RESULTS, *needed) if name in read]) != 0
        found = {slot for place, slot in enumerate(slots) if used[:, FIRST_REMEMBERED + place].any()}
        if found == needed:
            return [slot for slot in slots if slot in needed]
        needed = found
