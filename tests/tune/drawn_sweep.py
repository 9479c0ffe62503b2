"""Sweeps whose trials were never trained: numbers from a formula, in which mostly the learning rate matters, and pictures."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ray_sd.tune.results import Objective, Pictures, Status, Sweep, Trial

PROMPTS = ("an <owl> on a blue background", "an <owl> & a hat", 'a "sad" <owl>', "two <owl>s in the rain")
RATE, RANK, WORD, DROPOUT, WARMUP = (
    "trainer.learning_rate",
    "method.rank",
    "method.initializer_token",
    "method.dropout",
    "trainer.warmup_steps",
)
PATHS = (RATE, RANK, WORD, DROPOUT, WARMUP)
BASE = {RATE: 3e-5, RANK: 8, WORD: "bird", DROPOUT: 0.0, WARMUP: 0}
LOSS, ANSWER = Objective("validation_loss", "min"), Objective("clip_score", "max")
MAX_STEPS = 400
FAILURES = (
    "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; <unknown> in use)",
    "ConfigError: method.rank: 512 is more than the 320 columns of the smallest layer; try 256",
)


def drawn_sweep(
    count: int,
    folder: Path | None = None,
    *,
    objectives: tuple[Objective, ...] = (LOSS,),
    paths: tuple[str, ...] = PATHS,
    num_seeds: int = 1,
    size: int = 64,
    only_last: bool = False,
    running: bool = False,
) -> Sweep:
    """A sweep of so many trials, with pictures of `size` pixels at each report, or at the last, if it has a folder for them."""
    random = np.random.default_rng(0)
    sweep = Sweep(
        name="owl <sweep>",
        objectives=objectives,
        paths=paths,
        log_paths=tuple(path for path in (RATE,) if path in paths),
        max_steps=MAX_STEPS,
        prompts=PROMPTS if folder else (),
        finished=not running,
    )
    for number in range(count):
        group, seed = divmod(number, num_seeds)
        settings = _settings(np.random.default_rng(group), paths) if group else {path: BASE[path] for path in paths}
        trial = Trial(f"{number:05d}", settings, seed, is_base=group == 0, run=f"/runs/owl/trials/{number:05d}")
        _train(trial, _status(number, count, running), random)
        if folder and trial.reports:
            drawn = trial.reports[-1:] if only_last else trial.reports
            trial.pictures = [_pictures(trial, report, folder, size) for report in drawn]
        if trial.status == "finished":
            trial.adapter = f"{trial.run}/adapter"
        sweep.trials.append(trial)
    return sweep


def _settings(random: np.random.Generator, paths: tuple[str, ...]) -> dict[str, Any]:
    drawn = {
        RATE: float(10 ** random.uniform(-5.5, -2)),
        RANK: int(random.choice([1, 4, 8, 16, 32])),
        WORD: str(random.choice(["bird", "owl", "<owl>", "animal"])),
        DROPOUT: float(random.uniform(0, 0.3)),
        WARMUP: int(random.integers(0, 100)),
    }
    if drawn[RANK] == 1:  # as a conditional setting, which does not always apply
        del drawn[DROPOUT]
    return {path: drawn[path] for path in paths if path in drawn}


def _status(number: int, count: int, running: bool) -> Status:
    if running and number >= count - max(1, count // 5):
        return "pending" if number % 2 else "running"
    if number and number % 7 == 5:
        return "failed"
    return "stopped" if number % 3 == 2 else "finished"


def _train(trial: Trial, status: Status, random: np.random.Generator) -> None:
    trial.status = status
    steps = {"pending": 0, "running": 200, "finished": MAX_STEPS, "stopped": 100, "failed": 50}[status]
    quality = _quality(trial.settings)
    end = 0.08 + 0.1 * (1 - quality) + random.normal(0, 0.002)
    for step in range(50, steps + 1, 50):
        loss = end + 0.2 * np.exp(-step / 80) + random.normal(0, 0.002)
        if quality < 0.1:
            loss *= 1 + step / 50
        report = {"step": step, "loss": loss * 1.1, "validation_loss": loss}
        if step != 50:
            report["clip_score"] = 0.32 - 0.8 * (loss - 0.1) ** 2 - 0.001 * trial.settings.get(RANK, 8)
        trial.reports.append({name: float(value) for name, value in report.items()})
    trial.seconds = steps * (0.5 + trial.settings.get(RANK, 8) / 50)
    if status == "failed":
        trial.reports[-1]["validation_loss"] = float("nan")
        trial.reason = FAILURES[int(trial.id) % len(FAILURES)]
    if status == "stopped":
        trial.reason = f"others were better at step {trial.step}"


def _quality(settings: dict[str, Any]) -> float:
    """From 0 to 1; mostly of the learning rate, a little of the rank."""
    exponent = np.log10(settings.get(RATE, 1e-4))
    return float(np.exp(-((exponent + 3.6) ** 2) / 1.2) * (0.9 + 0.1 * settings.get(RANK, 8) / 32))


def _pictures(trial: Trial, report: dict[str, float], folder: Path, size: int) -> Pictures:
    """Faces on a ground, under the more noise the worse the trial and the earlier the report."""
    random = np.random.default_rng(int(trial.id))
    step = int(report["step"])
    paths = []
    for number in range(len(PROMPTS)):
        face = Image.new("RGB", (size, size), ("#5b8def", "#d8b26e", "#8a7fd0", "#6fae8f")[number])
        draw = ImageDraw.Draw(face)
        draw.ellipse([size * 0.2, size * 0.2, size * 0.8, size * 0.85], fill="#8a5a33")
        for left in (0.32, 0.54):
            draw.ellipse(
                [size * left, size * 0.33, size * (left + 0.16), size * 0.49], fill="#f7e27a", outline="#222222"
            )
        draw.polygon([(size * 0.46, size * 0.5), (size * 0.56, size * 0.5), (size * 0.51, size * 0.6)], fill="#e8912d")
        noise = random.normal(0, 90 * (1 - _quality(trial.settings) * step / MAX_STEPS), (size, size, 3))
        pixels = np.clip(np.asarray(face) + noise, 0, 255).astype(np.uint8)
        path = folder / f"{trial.id}-{step}-{number}.png"
        Image.fromarray(pixels).save(path)
        paths.append(str(path))
    return Pictures(step, paths[0], tuple(paths))
