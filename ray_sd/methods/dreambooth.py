"""A subject taught beside pictures of its class, so that the class is not forgotten; maybe with a word of its own."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_sd.config import TrainerConfig
from ray_sd.config.method import DreamBoothMethod
from ray_sd.config.rows import CLASS, PriorRows, RowSpec
from ray_sd.methods.base import DenoiserMethod
from ray_sd.methods.embeddings import read_embeddings, write_embeddings
from ray_sd.methods.full import Full
from ray_sd.methods.layer_adapter import LayerAdapter
from ray_sd.methods.lora import Lora
from ray_sd.methods.textual_inversion import add_tokens, attach_tokens, learnt_tokens, token_group
from ray_sd.models import DiffusionModel

ADAPTERS: dict[str, type[Lora | LayerAdapter | Full]] = {
    "lora": Lora,
    "loha": LayerAdapter,
    "lokr": LayerAdapter,
    "oft": LayerAdapter,
    "full": Full,
}
EMBEDDINGS = "embeddings"
"""Folder of the tokens, so that diffusers finds one file beside it."""


class DreamBooth(DenoiserMethod):
    config: DreamBoothMethod

    def __init__(self, config: DreamBoothMethod) -> None:
        super().__init__(config)
        self.adapter = ADAPTERS[config.adapter.name](config.adapter)

    @property
    def reads_tokens(self) -> bool:
        return self.config.tokens is not None or self.adapter.reads_tokens

    def rows(self) -> RowSpec:
        tokens = self.config.tokens
        return RowSpec(
            images="latents",
            text="tokens" if self.reads_tokens else "embeddings",
            caption_dropout=self.config.caption_dropout,
            templates=() if self.config.instance_prompt is None else (self.config.instance_prompt,),
            placeholders=() if tokens is None else tuple(tokens.placeholders().items()),
            prior=PriorRows(self.config.class_images, self.config.class_prompt) if self.config.class_prompt else None,
        )

    def prepare(self, model: DiffusionModel, trainer: TrainerConfig) -> None:
        self.adapter.prepare(model, trainer)
        if self.config.tokens is not None:
            add_tokens(model, self.config.tokens)

    def parameter_groups(self, model: DiffusionModel, trainer: TrainerConfig) -> list[dict[str, Any]]:
        groups = self.adapter.parameter_groups(model, trainer)
        if self.config.tokens is None:
            return groups
        tokens = token_group(model, trainer)
        ids = {id(parameter) for parameter in tokens["params"]}
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
        return [*groups, tokens]

    def objective(self, model: DiffusionModel, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of the subject's rows plus `prior_loss_weight` times that of the class rows.

        Both go through the model as one batch where they have one size and hold the same. Either way timesteps, and
        with them Min-SNR weights, stay with their rows.
        """
        subject_rows = {name: value for name, value in batch.items() if not name.startswith(CLASS)}
        if len(subject_rows) == len(batch):
            return super().objective(model, batch)
        class_rows = {name.removeprefix(CLASS): value for name, value in batch.items() if name.startswith(CLASS)}
        alike = subject_rows["latent_mean"].shape == class_rows["latent_mean"].shape
        if alike and subject_rows.keys() == class_rows.keys():
            both = {name: torch.cat([subject_rows[name], class_rows[name]]) for name in subject_rows}
            subject, prior = self.row_losses(model, both).chunk(2)
        else:
            subject, prior = self.row_losses(model, subject_rows), self.row_losses(model, class_rows)
        return subject.mean() + self.config.prior_loss_weight * prior.mean()

    def relies_on(self) -> tuple[str, ...]:
        return self.adapter.relies_on()

    def export(self, model: DiffusionModel, folder: Path) -> None:
        self.adapter.export(model, folder)
        if self.config.tokens is not None:
            write_embeddings(folder / EMBEDDINGS, learnt_tokens(model))

    def attach(self, model: DiffusionModel, folder: Path, scale: float) -> int:
        count = self.adapter.attach(model, folder, scale)
        if self.config.tokens is None:
            return count
        embeddings = read_embeddings(folder / EMBEDDINGS)
        attach_tokens(model, embeddings)
        return count + len(embeddings)
