"""Keys and values of texts, which are the same in all steps of a drawing: its first step computes them."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from ray_sd.generate.bank import only_rows


class KeptTexts:
    """What the layers of a U-Net have made of a batch's texts, adapters included."""

    def __init__(self, texts: Tensor, rows: Sequence[Hashable], before: "KeptTexts | None" = None) -> None:
        """texts: [R, T, C]; rows: whose they are; before: what was kept until now, which is taken over for those who stay."""
        self.texts = texts
        self._rows = rows
        self._made: dict[nn.Module, Tensor] = {}
        self._before: dict[nn.Module, Tensor] = {}
        if before is not None and before.texts.shape[1:] == texts.shape[1:]:
            places = {row: place for place, row in enumerate(before._rows)}
            new = [place for place, row in enumerate(rows) if row not in places]
            if len(new) < len(rows):
                self._before = before._made
                self._new = torch.tensor(new, device=texts.device)
                self._places = torch.tensor([places.get(row, 0) for row in rows], device=texts.device)

    def of(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """The layer, asked once for each row."""

        def project(texts: Tensor) -> Tensor:
            if layer not in self._made:
                before = self._before.pop(layer, None)
                self._made[layer] = layer(texts) if before is None else self._take_over(before, layer)
            return self._made[layer]

        return project

    def _take_over(self, before: Tensor, layer: nn.Module) -> Tensor:
        made = before.index_select(0, self._places)
        if len(self._new):
            with only_rows(self._new):
                made.index_copy_(0, self._new, layer(self.texts[self._new]))
        return made


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
