"""Embeddings of new tokens, learnt with everything else frozen."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_sd.config import TrainerConfig
from ray_sd.config.method import PlaceholderTokens, TextualInversionMethod
from ray_sd.config.rows import RowSpec
from ray_sd.errors import ArtifactError, ConfigError
from ray_sd.methods.base import DenoiserMethod, enable_gradient_checkpointing
from ray_sd.methods.embeddings import Embedding, read_embeddings, write_embeddings
from ray_sd.models import DiffusionModel
from ray_sd.models.tokens import SplicedEmbedding, check_placeholder, initial_rows, splice


class TextualInversion(DenoiserMethod):
    config: TextualInversionMethod

    @property
    def reads_tokens(self) -> bool:
        return True

    def rows(self) -> RowSpec:
        return RowSpec(
            images="latents",
            text="tokens",
            caption_dropout=self.config.caption_dropout,
            templates=self.config.prompts(),
            placeholders=tuple(self.config.placeholders().items()),
        )

    def prepare(self, model: DiffusionModel, trainer: TrainerConfig) -> None:
        model.requires_grad_(False)
        model.train()
        add_tokens(model, self.config)
        if trainer.gradient_checkpointing:
            enable_gradient_checkpointing(model)

    def parameter_groups(self, model: DiffusionModel, trainer: TrainerConfig) -> list[dict[str, Any]]:
        return [token_group(model, trainer)]

    def exported(self) -> tuple[str, ...]:
        return ("text_encoder", "tokenizer")

    def relies_on(self) -> tuple[str, ...]:
        return ("text_encoder",)

    def export(self, model: DiffusionModel, folder: Path) -> None:
        write_embeddings(folder, learnt_tokens(model))

    def attach(self, model: DiffusionModel, folder: Path, scale: float) -> int:
        if scale != 1:
            raise ArtifactError(f"{folder} holds embeddings, which have no strength; use adapter_scale=1")
        embeddings = read_embeddings(folder)
        attach_tokens(model, embeddings)
        return len(embeddings)


def add_tokens(model: DiffusionModel, config: PlaceholderTokens) -> None:
    """Give a model the placeholders and, in each of its text encoders, rows that train.

    Raises ConfigError for a placeholder that exists, and for an initializer of more tokens than it has vectors.
    """
    starts = {
        name: {token: _initializer_ids(tokenizer, config, token) for token in config.placeholder_token}
        for name, (_, tokenizer) in model.text_encoders().items()
    }
    first_ids = {name: len(tokenizer) for name, (_, tokenizer) in model.text_encoders().items()}
    for token, num_vectors in config.placeholders().items():
        model.add_placeholder(token, num_vectors)
    for name, (encoder, _) in model.text_encoders().items():
        vocabulary = encoder.get_input_embeddings().weight
        rows = [initial_rows(vocabulary, starts[name][token], n) for token, n in config.placeholders().items()]
        splice(encoder, first_ids[name], torch.cat(rows), _median_norm(vocabulary) if config.norm_control else None)


def token_group(model: DiffusionModel, trainer: TrainerConfig) -> dict[str, Any]:
    """The optimizer group of the rows that `add_tokens` made; without weight decay, which would pull them to nothing."""
    rows = [encoder.get_input_embeddings().rows for encoder, _ in model.text_encoders().values()]
    rate = trainer.token_learning_rate or trainer.learning_rate
    return {"name": "tokens", "params": rows, "lr": rate, "weight_decay": 0.0}


def learnt_tokens(model: DiffusionModel) -> dict[str, Embedding]:
    """The embedding of each placeholder."""
    learnt: dict[str, Embedding] = {token: {} for token in model.placeholders}
    for name, (encoder, tokenizer) in model.text_encoders().items():
        embedding: SplicedEmbedding = encoder.get_input_embeddings()
        vectors = embedding.vectors()
        for token, num_vectors in model.placeholders.items():
            first = tokenizer.convert_tokens_to_ids(token) - embedding.first_id
            learnt[token][name] = vectors[first : first + num_vectors]
    return learnt


def attach_tokens(model: DiffusionModel, embeddings: dict[str, Embedding]) -> None:
    """Give a model frozen tokens."""
    for token, embedding in embeddings.items():
        check_embedding(model, token, embedding)
    for token, embedding in embeddings.items():
        first_ids = {name: len(tokenizer) for name, (_, tokenizer) in model.text_encoders().items()}
        model.add_placeholder(token, len(embedding["text_encoder"]))
        for name, (encoder, _) in model.text_encoders().items():
            splice(encoder, first_ids[name], embedding[name].to(encoder.dtype)).requires_grad_(False)


def check_embedding(model: DiffusionModel, token: str, embedding: Embedding) -> None:
    """Raise ArtifactError for vectors that a model or its skeleton cannot take, ConfigError for a word it cannot."""
    encoders = model.text_encoders()
    if set(embedding) != set(encoders):
        raise ArtifactError(
            f"the token '{token}' has vectors for {' and '.join(sorted(embedding))}, the base has "
            f"{' and '.join(sorted(encoders))}; it was made for another base"
        )
    for name, (encoder, _) in encoders.items():
        found, width = embedding[name].shape[1], encoder.config.hidden_size
        if found != width:
            raise ArtifactError(
                f"the token '{token}' has vectors of {found} numbers, the base's {name} takes {width}; "
                "it was made for another base"
            )
    if len({len(vectors) for vectors in embedding.values()}) > 1:
        raise ArtifactError(f"the token '{token}' has not as many vectors for one text encoder as for the other")
    for name, (_, tokenizer) in encoders.items():
        check_placeholder(tokenizer, token, len(embedding[name]))


def _initializer_ids(tokenizer: Any, config: PlaceholderTokens, token: str) -> list[int] | None:
    phrase = config.initializers()[token]
    if phrase is None:
        return None
    ids = tokenizer(phrase, add_special_tokens=False).input_ids
    num_vectors = config.placeholders()[token]
    if not ids:
        raise ConfigError("initializer_token: an empty text initializes nothing; leave it out")
    if len(ids) > num_vectors:
        raise ConfigError(
            f"initializer_token: '{phrase}' is {len(ids)} tokens and '{token}' has {num_vectors} vectors; "
            f"set num_vectors={len(ids)} or take a shorter one"
        )
    return ids


def _median_norm(vocabulary: Tensor) -> float:
    return 1.0 if vocabulary.is_meta else float(vocabulary.norm(dim=-1).median())
