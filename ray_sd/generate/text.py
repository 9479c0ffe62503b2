"""Conditions of text: what the U-Net is given of prompts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ray_sd.generate.adapters import Adapters
from ray_sd.models import DiffusionModel
from ray_sd.models.prompt_weights import encode_weighted_text
from ray_sd.requests import Mix, Prompt, TextRequest


def encode_prompts(
    model: DiffusionModel, requests: Sequence[TextRequest], adapters: Adapters | None = None
) -> list[dict[str, Tensor]]:
    """Text conditions of each request, by its adapters: [2, …] (negative prompt, prompt) with guidance, else [1, …].

    Raises RequestError for adapters that are not there, or do not go together.
    """
    encoded: dict[Mix, dict[Prompt, dict[str, Tensor]]] = {}
    for mix in dict.fromkeys(request.adapters for request in requests):
        prompts = {prompt: prompt for request in requests if request.adapters == mix for prompt in request.prompts}
        if adapters is not None:
            adapters.check(mix)
            prompts = {prompt: Prompt(adapters.spell(prompt.text, mix), prompt.weighted) for prompt in prompts}
            for name in model.text_encoders():
                adapters.choose(name, [mix])
        spelled = encode(model, list(dict.fromkeys(prompts.values())))
        encoded[mix] = {prompt: spelled[other] for prompt, other in prompts.items()}
    return [stack([encoded[request.adapters][prompt] for prompt in request.prompts]) for request in requests]


def stack(conditions: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Conditions of several rows, or drawings, as one batch's [B, …]."""
    return {name: torch.cat([rows[name] for rows in conditions]) for name in conditions[0]}


@torch.no_grad()
def encode(model: DiffusionModel, prompts: Sequence[Prompt]) -> dict[Prompt, dict[str, Tensor]]:
    """Text conditions [1, …] of each prompt."""
    encoded = {}
    for weighted in (False, True):
        texts = [prompt.text for prompt in prompts if prompt.weighted is weighted]
        if not texts:
            continue
        if weighted:
            conditions = encode_weighted_text(model, texts)
        else:
            tokens = {name: ids.to(model.device) for name, ids in model.tokenize(texts).items()}
            conditions = model.encode_text(tokens)
        for place, text in enumerate(texts):
            encoded[Prompt(text, weighted)] = {name: rows[place : place + 1] for name, rows in conditions.items()}
    return encoded
