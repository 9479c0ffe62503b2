"""Keys and values of texts, which are the same in every step of a batch: its first step computes them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn


class KeptTexts:
    """What the layers of a U-Net have made of a batch's texts, adapters included."""

    def __init__(self, texts: Tensor) -> None:
        self.texts = texts
        self._made: dict[nn.Module, Tensor] = {}

    def of(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """The layer, asked once."""

        def project(texts: Tensor) -> Tensor:
            if layer not in self._made:
                self._made[layer] = layer(texts)
            return self._made[layer]

        return project


_kept: ContextVar[KeptTexts | None] = ContextVar("kept_texts", default=None)


@contextmanager
def keeping(kept: KeptTexts | None) -> Iterator[None]:
    """Within, and in this thread, attention to `kept.texts` asks no layer twice."""
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)


class TextAttnProcessor(AttnProcessor2_0):
    """Attention as it is, but to what is kept."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        kept = _kept.get()
        layers = attn if kept is None or encoder_hidden_states is not kept.texts else _ToKept(attn, kept)
        return super().__call__(layers, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)


class _ToKept:
    """An attention block whose keys and values are kept."""

    def __init__(self, attn: Attention, kept: KeptTexts) -> None:
        self._attn = attn
        self.to_k, self.to_v = kept.of(attn.to_k), kept.of(attn.to_v)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)


def let_keep(unet: nn.Module) -> None:
    """Let attention of a U-Net take what is kept, where it is diffusers' usual one, and not compiled: that has no such thing."""
    modules = list(unet.modules())
    if any(module._compiled_call_impl is not None for module in modules):
        return
    for block in modules:
        if isinstance(block, Attention) and block.is_cross_attention and type(block.processor) is AttnProcessor2_0:
            block.set_processor(TextAttnProcessor())
