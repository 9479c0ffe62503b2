"""How near drawn pictures are to a subject, to their prompts, and to what the untrained base draws."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from ray_sd.config.metrics import OF_BASE, OF_REFERENCES, PictureMetric, PromptSimilarity
from ray_sd.generate.embedders import Clip, Dino
from ray_sd.generate.lpips import PerceptualDistance


class Compared(NamedTuple):
    """What a metric looks at; what it does not need is empty."""

    pictures: list[Image.Image]
    prompts: list[str]
    references: Sequence[Image.Image]
    base: list[Image.Image]
    """What the untrained base draws of each prompt."""


class PictureMetrics:
    """Metrics with their models, each loaded once however many metrics use it."""

    def __init__(
        self,
        metrics: Sequence[PictureMetric],
        references: Mapping[str, Sequence[Image.Image]],
        device: torch.device | str = "cpu",
    ) -> None:
        """references: of metrics that compare with pictures of a subject, by their `key`.

        Raises ConfigError for a model that cannot be loaded, or is of another kind.
        """
        self._metrics = tuple(metrics)
        self._references = references
        self._models: dict[tuple[type, str], Any] = {}
        for metric in self._metrics:
            kind, source = MEASURES[metric.name].model, source_of(metric)
            if (kind, source) not in self._models:
                self._models[kind, source] = kind(source, device, metric.setting)

    def measure(
        self,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
        base: Mapping[int, Image.Image] | None = None,
    ) -> dict[str, float]:
        """Every metric by its `key`, of pictures and their prompts.

        base: what the untrained base draws, by the number of the prompt, of those that `prompts_of_base` names; None leaves out
        the metrics that compare with it.
        """
        found = {}
        for metric in self._metrics:
            if base is None and isinstance(metric, OF_BASE):
                continue
            chosen = [number for number, prompt in enumerate(prompts) if metric.counts(prompt)]
            compared = Compared(
                [pictures[number] for number in chosen],
                [prompts[number] for number in chosen],
                self._references[metric.key] if isinstance(metric, OF_REFERENCES) else (),
                [base[number] for number in chosen] if base is not None and isinstance(metric, OF_BASE) else [],
            )
            measure = MEASURES[metric.name]
            found[metric.key] = measure.of(metric, self._models[measure.model, source_of(metric)], compared)
        return found


def prompts_of_base(metrics: Sequence[PictureMetric], prompts: Sequence[str]) -> list[int]:
    """Numbers of the prompts that the untrained base has to draw, too."""
    return [
        number
        for number, prompt in enumerate(prompts)
        if any(isinstance(metric, OF_BASE) and metric.counts(prompt) for metric in metrics)
    ]


def check_model(metric: PictureMetric) -> None:
    """Raise ConfigError for a metric's model that cannot be used, as far as its files show; of the hub, they are fetched."""
    MEASURES[metric.name].model.check(source_of(metric), metric.setting)


def source_of(metric: PictureMetric) -> str:
    """Where a metric's model is."""
    return metric.weights if metric.name == "lpips" else metric.model


def reference_similarity(metric: PictureMetric, model: Clip | Dino, compared: Compared) -> float:
    """Mean cosine over all pairs of a picture and a reference."""
    pictures, references = (model.embed_pictures(group) for group in (compared.pictures, compared.references))
    return float((pictures @ references.T).mean())


def prompt_similarity(metric: PromptSimilarity, model: Clip, compared: Compared) -> float:
    """Mean cosine of each picture and its prompt."""
    texts = model.embed_texts([metric.wording(prompt) for prompt in compared.prompts])
    return float((model.embed_pictures(compared.pictures) * texts).sum(dim=1).mean())


def base_drift(metric: PictureMetric, model: Clip, compared: Compared) -> float:
    """1 less the mean cosine of each picture and the base's; of equal pictures 0."""
    pictures, base = (model.embed_pictures(group) for group in (compared.pictures, compared.base))
    return float(1 - (pictures * base).sum(dim=1).mean())


def lpips(metric: PictureMetric, model: PerceptualDistance, compared: Compared) -> float:
    """Mean distance of each picture and the base's."""
    return float(model.distances(compared.pictures, compared.base).mean())


class Measure(NamedTuple):
    model: Any
    """What it measures by: a class that takes the model's source, a device, and the setting's name for errors."""
    of: Callable[..., float]
    """Takes the metric's settings, that model, and what is compared."""


MEASURES: dict[str, Measure] = {
    "subject_similarity": Measure(Clip, reference_similarity),
    "dino_similarity": Measure(Dino, reference_similarity),
    "prompt_similarity": Measure(Clip, prompt_similarity),
    "base_drift": Measure(Clip, base_drift),
    "lpips": Measure(PerceptualDistance, lpips),
}
"""By the metric's name."""
