"""Encoded prompts, of which those that were asked for before are kept."""

from collections.abc import Hashable
from contextlib import ExitStack

from cachetools import LRUCache
from torch import Tensor

from ray_sd.errors import RequestError
from ray_sd.generate import ImageRequest
from ray_sd.generate.text import encode, stack
from ray_sd.models import DiffusionModel
from ray_sd.requests import Mix, Prompt
from ray_sd.serve.adapters import Loaded, LoadedAdapters
from ray_sd.serve.figures import EngineFigures


class EncodedPrompts:
    """What text encoders say of prompts, with the adapters that these are read with. For one thread."""

    def __init__(self, model: DiffusionModel, adapters: LoadedAdapters, figures: EngineFigures) -> None:
        self._model = model
        self._stacked = adapters.stacked
        self._figures = figures
        self._cache: LRUCache[Hashable, dict[str, Tensor]] = LRUCache(0, _bytes)

    def keep(self, memory: int) -> None:
        """Keep as many bytes from now on, and nothing of what was kept so far."""
        self._cache = LRUCache(memory, _bytes)

    def conditions(self, request: ImageRequest, mix: Mix, alone: tuple[Loaded, float] | None) -> dict[str, Tensor]:
        """Text conditions of a request's rows.

        mix: its adapters as they are called in the bank; alone: the one that does not stack, and its strength. Raises
        RequestError for what cannot be read.
        """
        cache = self._cache
        by = (mix, alone and (alone[0].key, alone[1]))
        found = {prompt: cache[prompt, by] for prompt in request.prompts if (prompt, by) in cache}
        missing = [prompt for prompt in dict.fromkeys(request.prompts) if prompt not in found]
        self._figures.prompts_encoded += len(missing)
        self._figures.prompts_found += len(request.prompts) - len(missing)
        encoders = {name: encoder for name, (encoder, _) in self._model.text_encoders().items()}
        with ExitStack() as swaps:
            for name, encoder in encoders.items():
                if alone is not None:
                    swaps.enter_context(alone[0].put_in(name, encoder, alone[1]))
            for prompt in missing:  # one by one: equal texts are equal to the last bit, whoever asks beside them
                for name in encoders:
                    self._stacked.choose(name, [mix])
                spelled = Prompt(self._stacked.spell(prompt.text, mix), prompt.weighted)
                try:
                    found[prompt] = encode(self._model, [spelled])[spelled]
                except RequestError as error:
                    error.param = "prompt" if prompt == request.prompts[-1] else "negative_prompt"
                    raise
                if _bytes(found[prompt]) <= cache.maxsize:
                    cache[prompt, by] = found[prompt]
        return stack([found[prompt] for prompt in request.prompts])


def _bytes(text: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in text.values())
