"""What a step of a batch costs beside the U-Net: `python benchmarks/batch_step.py`.

The embedded model, drawings of mixed samplers, numbers of steps and guidance, on one thread. Ways take turns within one run, and
the median of each counts.

- `step_over_bare_N`: a step of a batch of N rows of the U-Net over the bare U-Net's time for as many rows; bar 1.05 at 16;
- `adapters_over_plain_8`: a step of eight rows, each with a LoRA of its own, over one of the same rows without; bar 1.15;
- `table_over_schedulers_16`: all of a step of sixteen drawings but the U-Net, over what diffusers' schedulers take to scale and
  to step the same drawings one by one, twenty steps in a turn; bar 0.1;
- `table_over_schedulers_16_after_unet`: the same where each step follows a pass of the U-Net, which leaves nothing of either in
  the processor's caches.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from report import print_table, write_result

from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config
from ray_sd.generate import Batch, ImageRequest, start
from ray_sd.generate.adapters import Adapters
from ray_sd.methods.contents import Contents
from ray_sd.methods.lora_names import LoraNames
from ray_sd.methods.low_rank import LowRank
from ray_sd.models import DiffusionModel, load_model
from ray_sd.models.schedulers import SAMPLERS

AT_MOST = {"step_over_bare_16": 1.05, "adapters_over_plain_8": 1.15, "table_over_schedulers_16": 0.1}
MOST_STEPS = 50
"""LCM takes no more."""
STEPS_IN_A_TURN = 20


@dataclass(frozen=True)
class Way:
    """One of those that are compared."""

    step: Callable[[], Any]
    begin: Callable[[], None] = lambda: None
    """Called at first, and again before its drawings end."""


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    model = load_model(load_config(["experiment=demo"], ExperimentConfig).model).eval().requires_grad_(False)
    figures: dict[str, float] = {}
    rows = []
    with torch.inference_mode():
        for count in (1, 4, 16):
            times = medians(options.repeats, step_and_bare(model, count))
            figures[f"step_over_bare_{count}"] = ratio(times, "step", "bare")
            rows.append(table_row(f"step of {count} rows / bare U-Net", times, "step", "bare"))
        times = medians(options.repeats, with_and_without_adapters(model, 8))
        figures["adapters_over_plain_8"] = ratio(times, "adapters", "plain")
        rows.append(table_row("step of 8 rows with 8 LoRAs / without", times, "adapters", "plain"))
        for name, turn, unet in (
            ("", STEPS_IN_A_TURN, None),
            ("_after_unet", 1, bare_unet(model, mixed(16, guided=False))),
        ):
            times = medians(options.repeats, table_and_schedulers(model, 16), turn, unet)
            figures[f"table_over_schedulers_16{name}"] = ratio(times, "table", "schedulers")
            what = f"16 drawings, all but the U-Net / diffusers' schedulers{name.replace('_', ' ')}"
            rows.append(table_row(what, times, "table", "schedulers"))
    title = f"Embedded model, one thread, median of {options.repeats} (milliseconds)"
    print_table(title, ["what / what it is compared with", "first", "second", "ratio"], rows)
    write_result("batch_step", figures, at_most=AT_MOST, settings={"repeats": options.repeats})


def mixed(count: int, guided: bool = True) -> list[ImageRequest]:
    """Requests that differ in everything; a third of them, from the second on, are guided."""
    samplers = list(SAMPLERS)
    return [
        ImageRequest(
            f"a tiger face on a blue background {number}",
            seed=number,
            num_inference_steps=MOST_STEPS - number % 5,
            guidance_scale=5.0 if guided and number % 3 == 1 else 1.0,
            scheduler=samplers[number % len(samplers)],
        )
        for number in range(count)
    ]


def of_rows(rows: int) -> list[ImageRequest]:
    """Mixed requests that take so many rows of the U-Net."""
    requests = mixed(rows)
    while sum(2 if request.guided else 1 for request in requests) > rows:
        requests.pop()
    missing = rows - sum(2 if request.guided else 1 for request in requests)
    return requests + mixed(missing, guided=False)


def stepping(model: DiffusionModel, requests: list[ImageRequest], adapters: Adapters | None = None) -> Way:
    """A step of all requests."""
    batch = Batch(model, adapters)

    def begin() -> None:
        for drawing in batch.drawings:
            batch.leave(drawing)
        batch.join(start(model, requests, adapters))

    return Way(batch.advance, begin)


def step_and_bare(model: DiffusionModel, rows: int) -> dict[str, Way]:
    requests = of_rows(rows)
    return {"step": stepping(model, requests), "bare": Way(bare_unet(model, requests))}


def bare_unet(model: DiffusionModel, requests: list[ImageRequest]) -> Callable[[], Any]:
    """A pass of the U-Net for the rows that the requests take."""
    drawings = start(model, requests)
    conditions = {
        name: torch.cat([drawing.conditions[name] for drawing in drawings]) for name in drawings[0].conditions
    }
    rows = sum(drawing.rows for drawing in drawings)
    latents, timesteps = torch.randn(rows, *drawings[0].shape), torch.full((rows,), 500.0)
    return lambda: model.denoise(latents, timesteps, conditions)


def with_and_without_adapters(model: DiffusionModel, rows: int) -> dict[str, Way]:
    plain = mixed(rows, guided=False)
    adapters = Adapters(model)
    for number in range(rows):
        adapters.add(f"lora{number}", random_lora(model, rank=8, seed=number))
    own = [ImageRequest(**vars(one) | {"adapters": ((f"lora{number}", 1.0),)}) for number, one in enumerate(plain)]
    return {"adapters": stepping(model, own, adapters), "plain": stepping(model, plain, adapters)}


def random_lora(model: DiffusionModel, rank: int, seed: int, scale: float = 0.01) -> Contents:
    """A LoRA on the attention layers of the U-Net, as the default of method=lora has them. scale: of both its factors."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: scale * torch.randn(shape, generator=generator)  # noqa: E731
    updates = {
        name: LowRank(draw(rank, layer.weight.shape[1]), draw(len(layer.weight), rank), float(rank))
        for (component, name), layer in LoraNames(model).layers.items()
        if component == "unet" and name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    }
    return Contents(updates={"unet": updates})


def table_and_schedulers(model: DiffusionModel, count: int) -> dict[str, Way]:
    requests = mixed(count, guided=False)
    said = torch.randn(count, *start(model, requests[:1])[0].shape)
    steppers: list[Callable[[], None]] = []

    def begin() -> None:
        steppers[:] = [scheduler_step(model, request, said[:1]) for request in requests]

    def step() -> None:
        for step_one in steppers:
            step_one()

    silent = stepping(_Said(model, said), requests)  # stands in for the model
    return {"table": silent, "schedulers": Way(step, begin)}


class _Said:
    """The model, whose U-Net says the same at once."""

    def __init__(self, model: DiffusionModel, said: torch.Tensor) -> None:
        self._model, self._said = model, said

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(self, *_: Any) -> torch.Tensor:
        return self._said


def scheduler_step(model: DiffusionModel, request: ImageRequest, said: torch.Tensor) -> Callable[[], None]:
    scheduler = model.sampler(request.scheduler)
    scheduler.set_timesteps(request.num_inference_steps)
    takes_noise = "generator" in signature(scheduler.step).parameters
    own = {"generator": torch.Generator().manual_seed(request.seed)} if takes_noise else {}
    latents, timesteps = said.clone(), iter(scheduler.timesteps)

    def step() -> None:
        nonlocal latents
        timestep = next(timesteps)
        scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(said, timestep, latents, return_dict=False, **own)[0]

    return step


def medians(
    repeats: int, ways: Mapping[str, Way], turn: int = 1, between: Callable[[], Any] | None = None
) -> dict[str, float]:
    """Seconds of a step of each way. They take turns of `turn` steps; `between` is called before each step, and not timed."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        if repeat * turn % (MOST_STEPS - 10) < turn:
            for way in ways.values():
                way.begin()
                way.step()  # warm
        for name, way in ways.items():
            for _ in range(turn):
                if between is not None:
                    between()
                began = time.perf_counter()
                way.step()
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in times.items()}


def ratio(times: dict[str, float], first: str, second: str) -> float:
    return round(times[first] / times[second], 3)


def table_row(what: str, times: dict[str, float], first: str, second: str) -> list[str]:
    return [what, f"{1e3 * times[first]:.2f}", f"{1e3 * times[second]:.2f}", f"{ratio(times, first, second):.3f}"]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=100)
    return parser.parse_args()


if __name__ == "__main__":
    main()
