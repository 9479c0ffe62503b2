"""Placeholder tokens: new words of the tokenizer, each of one or more vectors, embedded by rows of their own.

The rows lie beside the vocabulary's and are spliced in at the look-up, so that nothing else of it can move.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ray_sd.errors import ConfigError


def vector_names(token: str, num_vectors: int) -> list[str]:
    """The tokenizer's words of a placeholder, as diffusers names them: `<cat>`, `<cat>_1`, …"""
    return [token, *(f"{token}_{i}" for i in range(1, num_vectors))]


def add_placeholder(tokenizer: Any, token: str, num_vectors: int) -> None:
    """Make a tokenizer know a placeholder's words. Raises ConfigError for one that is no new word."""
    check_placeholder(tokenizer, token, num_vectors)
    tokenizer.add_tokens(vector_names(token, num_vectors))


def check_placeholder(tokenizer: Any | None, token: str, num_vectors: int) -> None:
    """Raise ConfigError for a placeholder that is no new word; without a tokenizer, for one that is no single word."""
    if not token or token.split() != [token]:
        raise ConfigError(f"the placeholder token '{token}' must be one word without spaces, such as <my-cat>")
    if tokenizer is None:
        return
    for name in vector_names(token, num_vectors):
        if name in tokenizer.get_added_vocab() or len(tokenizer.tokenize(name)) == 1:
            raise ConfigError(f"the placeholder token '{name}' is already a word of the tokenizer; choose another")


def expand(text: str, placeholders: Mapping[str, int]) -> str:
    """Write every placeholder of several vectors as all of its words, as diffusers does. placeholders: token -> vectors."""
    long = sorted((token for token, count in placeholders.items() if count > 1), key=len, reverse=True)
    if not long:
        return text
    pattern = "|".join(map(re.escape, long))
    return re.sub(pattern, lambda found: " ".join(vector_names(found[0], placeholders[found[0]])), text)


class SplicedEmbedding(nn.Module):
    """A token embedding whose ids from `first_id` on look up `rows` [N, D], the rest `vocabulary`.

    norm: length that rows have at the look-up, whatever they are; None leaves theirs.
    """

    def __init__(self, vocabulary: nn.Embedding, first_id: int, rows: Tensor, norm: float | None = None) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.first_id = first_id
        self.norm = norm
        self.rows = nn.Parameter(rows)

    def forward(self, input_ids: Tensor) -> Tensor:
        known = self.vocabulary(input_ids.clamp(max=self.first_id - 1))
        new = functional.embedding((input_ids - self.first_id).clamp(min=0), self.vectors())
        return torch.where((input_ids >= self.first_id).unsqueeze(-1), new.to(known.dtype), known)

    def vectors(self) -> Tensor:
        """The rows as the look-up gives them, fp32 [N, D]."""
        return self.rows if self.norm is None else self.norm * functional.normalize(self.rows, dim=-1)


def splice(encoder: Any, first_id: int, rows: Tensor, norm: float | None = None) -> SplicedEmbedding:
    """Give a text encoder embeddings for the ids from `first_id` on; rows that it has already are kept before them."""
    embedding = encoder.get_input_embeddings()
    if isinstance(embedding, SplicedEmbedding):
        rows = torch.cat([embedding.vectors().detach(), rows.to(embedding.rows)])
        embedding = SplicedEmbedding(embedding.vocabulary, embedding.first_id, rows)
    else:
        embedding = SplicedEmbedding(embedding, first_id, rows, norm)
    encoder.set_input_embeddings(embedding)
    return embedding


def take_out(encoder: Any) -> None:
    """Undo `splice`: leave a text encoder the vocabulary that it came with."""
    embedding = encoder.get_input_embeddings()
    if isinstance(embedding, SplicedEmbedding):
        encoder.set_input_embeddings(embedding.vocabulary)


def parameters_without_words(module: nn.Module) -> dict[str, nn.Parameter]:
    """A component's parameters by the names that they had before `splice`, without the rows of words."""
    added = {f"{name}.rows" for name, part in module.named_modules() if isinstance(part, SplicedEmbedding)}
    named = {name: parameter for name, parameter in module.named_parameters() if name not in added}
    for name in added:
        embedding = name.removesuffix(".rows")
        named[f"{embedding}.weight"] = named.pop(f"{embedding}.vocabulary.weight")
    return named


def set_end_of_text(encoder: Any, tokenizer: Any) -> None:
    """Tell a text encoder the end-of-text id, by which it finds the pooled embedding.

    Many CLIP configurations carry 2, and the largest id is taken for it then: a new word's, once there is one.
    """
    for module in (encoder, getattr(encoder, "text_model", encoder)):
        module.config.eos_token_id = tokenizer.eos_token_id
        module.eos_token_id = tokenizer.eos_token_id


def initial_rows(vocabulary: Tensor, initializer_ids: Sequence[int] | None, num_vectors: int) -> Tensor:
    """fp32 [num_vectors, D]: the initializer's rows in turn, or draws with the vocabulary's mean and deviation."""
    vocabulary = vocabulary.detach().float()
    if initializer_ids is not None:
        return vocabulary[[initializer_ids[i % len(initializer_ids)] for i in range(num_vectors)]].clone()
    draws = torch.randn(num_vectors, vocabulary.shape[1]).to(vocabulary.device)
    return vocabulary.mean(dim=0) + draws * vocabulary.std(dim=0)
