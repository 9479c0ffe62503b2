"""Prompts whose words have weights, in compel's syntax: `a (red)1.5 cat`, `a red++ cat`, `a (small)0.5 cat`."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pyparsing
import torch
from torch import Tensor

from ray_sd.errors import RequestError
from ray_sd.models.base import DiffusionModel


def encode_weighted_text(model: DiffusionModel, prompts: Sequence[str]) -> dict[str, Tensor]:
    """What `model.encode_text` gives, with words drawn away from or towards the empty prompt by their weights.

    A prompt without weights is encoded as always. The pooled embedding, where there is one, knows of no weights.
    Raises RequestError for what is more than weights.
    """
    words = [_words(prompt) for prompt in prompts]
    device = next(model.text_encoders()["text_encoder"][0].parameters()).device
    encoded = model.encode_text({name: ids.to(device) for name, ids in model.tokenize(words).items()})
    weighted = [place for place, prompt in enumerate(prompts) if _has_weights(prompt)]
    if weighted:
        providers = _providers(model)
        text = encoded["text_embeds"].clone()
        for place in weighted:
            parts = [_encode(model, provider, prompts[place]) for provider in providers]
            text[place] = torch.cat(parts, dim=-1).to(text)
        encoded |= {"text_embeds": text}
    return encoded


def _providers(model: DiffusionModel) -> list[Any]:
    """For one call: they remember the empty prompt, which the next one's adapters may read in another way."""
    library = _compel()
    return [
        library.Compel(
            tokenizer,
            encoder,
            textual_inversion_manager=_Placeholders(model.placeholders, tokenizer) if model.placeholders else None,
            truncate_long_prompts=False,
            split_long_text_mode=library.SplitLongTextMode.BRUTAL,
            returned_embeddings_type=library.ReturnedEmbeddingsType[model.hidden_states],
        )
        for encoder, tokenizer in model.text_encoders().values()
    ]


def _encode(model: DiffusionModel, provider: Any, prompt: str) -> Tensor:
    """[L, D] of one text encoder, cut or filled with empty chunks to the model's length."""
    with torch.no_grad():
        text = provider.build_conditioning_tensor_for_conjunction(_parsed(prompt))[0][0]
        length = provider.conditioning_provider.max_token_count
        missing = max(0, model.config.prompt_chunks - len(text) // length)
        text = torch.cat([text, *[provider.conditioning_provider.empty_z[0].to(text)] * missing])
    return text[: model.config.prompt_chunks * length]


class _Placeholders:
    """Tells compel which ids stand for several vectors."""

    def __init__(self, placeholders: dict[str, int], tokenizer: Any) -> None:
        firsts = {tokenizer.convert_tokens_to_ids(token): count for token, count in placeholders.items()}
        self._ids = {first: list(range(first, first + count)) for first, count in firsts.items()}

    def expand_textual_inversion_token_ids_if_necessary(self, token_ids: list[int]) -> list[int]:
        return [expanded for token_id in token_ids for expanded in self._ids.get(token_id, [token_id])]


def _words(prompt: str) -> str:
    """The prompt without its weights."""
    return " ".join(fragment.text for fragment in _fragments(prompt))


def _has_weights(prompt: str) -> bool:
    return any(fragment.weight != 1 for fragment in _fragments(prompt))


def _fragments(prompt: str) -> Sequence[Any]:
    """Parts of a prompt, each with `text` and `weight`."""
    return _parsed(prompt).prompts[0].children


@lru_cache(maxsize=1024)  # it takes tens of milliseconds, far more than the encoder of a small model
def _parsed(prompt: str) -> Any:
    """A prompt as compel reads it: of one part, in fragments."""
    try:
        parsed = _compel().Compel.parse_prompt_string(prompt)
    except Exception as error:
        raise RequestError(
            f"the weights of the prompt '{prompt}' cannot be read: {str(error).splitlines()[0]}"
        ) from error
    parts = parsed.prompts
    fragments = parts[0].children if len(parts) == 1 and type(parts[0]).__name__ == "FlattenedPrompt" else ()
    if not fragments or any(type(fragment).__name__ != "Fragment" for fragment in fragments):
        raise RequestError(
            f"the prompt '{prompt}' asks for more than weights; understood are (red)1.5, red++, (red)0.5 and red--, "
            "not .blend(), .and() or .swap()"
        )
    return parsed


def _compel() -> Any:
    import compel.compel as library  # slow: it imports every pipeline of diffusers

    pyparsing.ParserElement.enable_packrat()  # without which each parenthesis within others trebles the time
    return library
