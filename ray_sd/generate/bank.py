"""LoRAs of many adapters on one model, of which every row of a batch takes its own.

Updates lie in pages of a few ranks each, one stack of pages a layer. A row takes the pages of its adapters, as many as it
has: they are gathered when the batch changes, and a step then adds two batched products a layer, whatever is mixed. So a row's
result does not depend on the rows beside it.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ray_sd.methods.lora_names import Layer
from ray_sd.methods.low_rank import LowRank, Updates
from ray_sd.requests import Mix

NOTHING = 0
"""A page of zeros, for rows that have fewer pages than others."""
_only: ContextVar[Tensor | None] = ContextVar("only_rows", default=None)


@contextmanager
def only_rows(rows: Tensor) -> Iterator[None]:
    """Within, and in this thread, layers are given some of the rows that have chosen, by their numbers."""
    token = _only.set(rows)
    try:
        yield
    finally:
        _only.reset(token)


class LoraBank:
    """The adapters of a model's layers.

    One thread may add and remove adapters while another chooses rows and runs a component whose rows are chosen: pages that those
    rows took are theirs.
    """

    def __init__(self, layers: Mapping[Layer, nn.Module], page_rank: int = 8) -> None:
        self._modules = layers
        self._page_rank = page_rank
        self._banked: dict[Layer, BankedLayer] = {}
        self._pages: dict[str, list[int]] = {}
        self._touched: dict[str, list[Layer]] = {}
        self._free: list[int] = []
        self._made = 1  # the page of zeros
        self._chosen: dict[str, tuple[Mix, ...]] = {}
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._pages

    @property
    def bytes(self) -> int:
        """What the pages of all adapters take."""
        with self._lock:
            return self._bytes()

    def _bytes(self) -> int:
        return sum(layer.page_bytes for layer in self._banked.values()) * (self._made - len(self._free))

    def bytes_with(self, updates: Updates) -> int:
        """What they would take with one adapter more."""
        known = sum(layer.page_bytes for layer in self._banked.values())
        new = sum(
            BankedLayer.bytes_of_page(self._modules[component, name], self._page_rank)
            for component, of_layers in updates.items()
            for name in of_layers
            if (component, name) not in self._banked
        )
        return (known + new) * (self._made - len(self._free) + self._page_count(updates))

    def add(self, name: str, updates: Updates) -> None:
        """Keep the LoRA of an adapter. None of its updates may be a DoRA, and no adapter may have the name already."""
        with self._lock:
            while len(self._free) < self._page_count(updates):
                self._free.append(self._made)
                self._made += 1
            pages = [self._free.pop() for _ in range(self._page_count(updates))]
            layers = [(component, layer) for component, of_layers in updates.items() for layer in of_layers]
            for key in layers:
                if key not in self._banked:
                    self._banked[key] = BankedLayer(self._modules[key], self._page_rank)
            for (component, layer), banked in self._banked.items():
                banked.write(pages, updates.get(component, {}).get(layer), self._made)
            self._pages[name], self._touched[name] = pages, layers

    def remove(self, name: str) -> None:
        """Forget an adapter; layers that no other has are as they were."""
        with self._lock:
            self._free += self._pages.pop(name)
            del self._touched[name]
            self._chosen = {
                component: rows
                for component, rows in self._chosen.items()
                if all(other != name for row in rows for other, _ in row)
            }
            in_use = {layer for layers in self._touched.values() for layer in layers}
            for key in [key for key in self._banked if key not in in_use]:
                self._banked.pop(key).take_off()

    def choose(self, component: str, rows: Sequence[Mix]) -> None:
        """Give the rows of a component's next batches their adapters; one mix is for all rows of a text encoder's."""
        chosen = tuple(rows)
        with self._lock:
            if self._chosen.get(component) == chosen:
                return
            names = {name for row in chosen for name, weight in row if weight}
            touched = {layer for name in names for layer in self._touched[name]}
            pages, weights = self._table(chosen)
            self._chosen.pop(component, None)  # in case not all layers come to change
            for key, banked in self._banked.items():
                if key[0] == component:
                    banked.choose(pages if key in touched else None, weights)
            self._chosen[component] = chosen

    def _page_count(self, updates: Updates) -> int:
        highest = max((update.rank for of_layers in updates.values() for update in of_layers.values()), default=0)
        return -(-highest // self._page_rank)

    def _table(self, rows: Sequence[Mix]) -> tuple[Tensor, Tensor]:
        """Numbers of the pages that rows take, and their weights, each [B, K]."""
        of_rows = [[(page, weight) for name, weight in row if weight for page in self._pages[name]] for row in rows]
        most = max(map(len, of_rows), default=0)
        filled = [taken + [(NOTHING, 0.0)] * (most - len(taken)) for taken in of_rows]
        pages = torch.tensor([[page for page, _ in taken] for taken in filled], dtype=torch.long)
        return pages, torch.tensor([[weight for _, weight in taken] for taken in filled])


class BankedLayer:
    """The pages of one linear layer or convolution, and what they add to its output."""

    def __init__(self, module: nn.Module, page_rank: int) -> None:
        self._module = module
        self._page_rank = page_rank
        weight = module.weight
        self._down = weight.new_zeros(1, page_rank, weight[0].numel())  # [P, r, in]
        self._up = weight.new_zeros(1, page_rank, len(weight))  # [P, r, out]
        self._rows: tuple[Tensor, Tensor] | None = None  # [B, K * r, in], [B, K * r, out]
        self._hook = module.register_forward_hook(self._add)

    @property
    def page_bytes(self) -> int:
        return self.bytes_of_page(self._module, self._page_rank)

    @staticmethod
    def bytes_of_page(module: nn.Module, page_rank: int) -> int:
        weight = module.weight
        return page_rank * (weight[0].numel() + len(weight)) * weight.element_size()

    @torch.no_grad()
    def write(self, pages: Sequence[int], update: LowRank | None, made: int) -> None:
        """Fill pages with an update, and with zeros what it leaves over.

        made: pages of all adapters; rows may take any, also beside rows whose adapters change this layer.
        """
        short = made - len(self._down)
        if short > 0:
            more = max(short, len(self._down) // 4)  # so that growing is rare, and little of it lies idle
            self._down, self._up = (functional.pad(stack, (0, 0, 0, 0, 0, more)) for stack in (self._down, self._up))
        for place, page in enumerate(pages):
            self._down[page].zero_()
            self._up[page].zero_()
            ranks = slice(place * self._page_rank, (place + 1) * self._page_rank)
            if update is not None and update.rank > ranks.start:
                down = update.down.flatten(1)[ranks]
                up = (update.alpha / update.rank * update.up.float()).flatten(1).T[ranks]
                self._down[page, : len(down)] = down.to(self._down)
                self._up[page, : len(up)] = up.to(self._up)

    @torch.no_grad()
    def choose(self, pages: Tensor | None, weights: Tensor) -> None:
        """pages: [B, K] numbers of pages, or None for nothing; weights: of each [B, K]."""
        if pages is None or pages.numel() == 0:
            self._rows = None
            return
        numbers = pages.flatten().to(self._down.device)
        ups = self._up.index_select(0, numbers) * weights.flatten().to(self._up)[:, None, None]
        rows = len(pages)
        self._rows = (
            self._down.index_select(0, numbers).reshape(rows, -1, self._down.shape[-1]),
            ups.reshape(rows, -1, self._up.shape[-1]),
        )

    def take_off(self) -> None:
        self._hook.remove()

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self._rows is None:
            return None
        down, up = self._rows
        only = _only.get()
        if only is not None:
            down, up = down[only], up[only]
        if isinstance(module, nn.Conv2d):
            return _add_convolution(module, inputs[0], output, down, up)
        rows = len(down)
        lowered = torch.bmm(inputs[0].reshape(rows, -1, down.shape[-1]), down.mT)
        return output.reshape(rows, -1, up.shape[-1]).baddbmm_(lowered, up).reshape(output.shape)


def _add_convolution(module: nn.Conv2d, x: Tensor, output: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """As `module`, with a filter of its own for each row: one convolution whose groups are the rows."""
    rows, ranks = down.shape[:2]
    filters = down.reshape(rows * ranks, -1, *module.weight.shape[2:])
    lowered = functional.conv2d(
        x.reshape(1, -1, *x.shape[2:]), filters, None, module.stride, module.padding, module.dilation, groups=rows
    )
    lowered = lowered.reshape(rows, ranks, -1)
    return output.flatten(2).baddbmm_(up.mT, lowered).reshape(output.shape)
