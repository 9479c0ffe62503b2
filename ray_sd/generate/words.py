"""New words of many adapters on one model. Each adapter's are its own: two may have the same word, and mean different things.

A vector of a word lies in a slot: a character of the tokenizer that no prompt has, and a row of every text encoder. Prompts
are spelled with these characters in place of their adapters' words. What is forgotten leaves its slots to others.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ray_sd.errors import RequestError
from ray_sd.methods.embeddings import Embedding
from ray_sd.models import DiffusionModel
from ray_sd.models.tokens import splice

FIRST_CHARACTER, LAST_CHARACTER = 0xF0000, 0xFFFFD
"""Unicode's supplementary private use area, whose characters mean nothing in a prompt and are left out of it."""
STRANGE = re.compile(f"[{chr(FIRST_CHARACTER)}-{chr(LAST_CHARACTER)}]")


class WordBank:
    """For one thread at a time, the one that encodes prompts."""

    def __init__(self, model: DiffusionModel) -> None:
        self._model = model
        self._spelling: dict[str, dict[str, str]] = {}
        """Of each adapter's words."""
        self._free: list[str] = []
        self._made = 0

    def __contains__(self, name: str) -> bool:
        return name in self._spelling

    @property
    def bytes(self) -> int:
        """What the vectors of all slots take, whether a word has them or not."""
        return self._made * self._slot_bytes

    def bytes_of(self, embeddings: Mapping[str, Embedding]) -> int:
        """What one adapter more takes beside the slots that are free."""
        vectors = sum(len(next(iter(embedding.values()))) for embedding in embeddings.values())
        return max(0, vectors - len(self._free)) * self._slot_bytes

    @property
    def _slot_bytes(self) -> int:
        encoders = [encoder for encoder, _ in self._model.text_encoders().values()]
        return sum(encoder.config.hidden_size * encoder.dtype.itemsize for encoder in encoders)

    @torch.no_grad()
    def add(self, name: str, embeddings: Mapping[str, Embedding]) -> None:
        """Keep an adapter's words, which fit the model. No adapter may have the name already."""
        spelling = {}
        for token, embedding in embeddings.items():
            vectors = list(zip(*(embedding[part] for part in self._model.text_encoders()), strict=True))
            spelling[token] = "".join(map(self._write, vectors))
        self._spelling[name] = spelling

    def remove(self, name: str) -> None:
        self._free += "".join(self._spelling.pop(name).values())

    def spell(self, prompt: str, names: Sequence[str]) -> str:
        """A prompt with the words of its adapters as the tokenizer knows them.

        Raises RequestError where two of the adapters have a word that the prompt has.
        """
        prompt = STRANGE.sub("", prompt)
        owners: dict[str, str] = {}
        for name in names:
            for token in self._spelling.get(name, ()):
                other = owners.setdefault(token, name)
                if other != name and token in prompt:
                    raise RequestError(
                        f"the adapters {other} and {name} both have the word {token}; take one of them",
                        param="adapters",
                    )
        if not owners:
            return prompt
        pattern = "|".join(map(re.escape, sorted(owners, key=len, reverse=True)))
        return re.sub(pattern, lambda found: self._spelling[owners[found[0]]][found[0]], prompt)

    def _write(self, vectors: Sequence[Tensor]) -> str:
        """The character of a slot that has these vectors [D], one of each text encoder."""
        reused = bool(self._free)
        character = self._free.pop() if reused else chr(FIRST_CHARACTER + self._made)
        for vector, (encoder, tokenizer) in zip(vectors, self._model.text_encoders().values(), strict=True):
            if reused:
                embedding = encoder.get_input_embeddings()
                row = tokenizer.convert_tokens_to_ids(character) - embedding.first_id
                embedding.rows[row] = vector.to(embedding.rows)
            else:
                next_id = len(tokenizer)
                tokenizer.add_tokens([character])
                splice(encoder, next_id, vector[None].to(encoder.device, encoder.dtype)).requires_grad_(False)
        self._made += not reused
        return character
