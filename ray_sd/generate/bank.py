"""LoRAs of many adapters on one model, of which every row of a batch takes its own.

Each layer has the updates of the adapters that change it. Copies of those that a row takes lie one after another, as one update
whose rank is the sum of theirs: they are made when the batch changes, and a step then adds two batched products a layer, whatever
is mixed. So a row's result does not depend on the rows beside it. Where memory has no room for the copies, each layer makes its
own anew in every step, and lets go of them.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ray_sd.methods.lora_names import Layer
from ray_sd.methods.low_rank import LowRank, Updates
from ray_sd.requests import Mix

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

    One thread may add adapters, and remove those that no row has any more, while another chooses rows and runs a component whose
    rows are chosen.
    """

    def __init__(self, layers: Mapping[Layer, nn.Module]) -> None:
        self._modules = layers
        self._banked: dict[Layer, BankedLayer] = {}
        self._touched: dict[str, list[Layer]] = {}
        self._chosen: dict[str, tuple[Mix, ...]] = {}
        self._room = inf
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._touched

    @property
    def bytes(self) -> int:
        """What all adapters take."""
        with self._lock:
            return sum(layer.bytes for layer in self._banked.values())

    @property
    def copied_bytes(self) -> int:
        """What the copies of rows take beside them."""
        with self._lock:
            return sum(layer.copied_bytes for layer in self._banked.values() if layer.keeps)

    @property
    def wanted_bytes(self) -> int:
        """What the copies of all rows that have chosen would take."""
        with self._lock:
            return sum(layer.copied_bytes for layer in self._banked.values())

    def bytes_of(self, updates: Updates) -> int:
        """What one adapter more takes."""
        return sum(
            (update.rank + ((component, name) not in self._banked)) * bytes_of_rank(self._modules[component, name])
            for component, of_layers in updates.items()
            for name, update in of_layers.items()
        )

    def keep_within(self, room: float) -> None:
        """Keep copies only while they and all adapters take no more bytes."""
        with self._lock:
            self._room = room
            self._keep_copies()

    def add(self, name: str, updates: Updates) -> None:
        """Keep the LoRA of an adapter. None of its updates may be a DoRA, and no adapter may have the name already."""
        with self._lock:
            self._keep_copies(self.bytes_of(updates))
            for component, of_layers in updates.items():
                for layer, update in of_layers.items():
                    key = component, layer
                    if key not in self._banked:
                        self._banked[key] = BankedLayer(self._modules[key])
                    self._banked[key].add(name, update)
                    self._touched.setdefault(name, []).append(key)

    def remove(self, name: str) -> None:
        """Forget an adapter; layers that no other has are as they were."""
        with self._lock:
            having = {part for part, rows in self._chosen.items() if any(name in dict(row) for row in rows)}
            for component in having:
                self._choose(component, ())
                del self._chosen[component]
            for key in self._touched.pop(name):
                self._banked[key].remove(name)
                if self._banked[key].idle:
                    self._banked.pop(key).take_off()

    def choose(self, component: str, rows: Sequence[Mix]) -> None:
        """Give the rows of a component's next batches their adapters; one mix is for all rows of a text encoder's."""
        chosen = tuple(rows)
        with self._lock:
            if self._chosen.get(component) == chosen:
                return
            self._chosen.pop(component, None)  # in case not all layers come to change
            self._choose(component, chosen)
            self._keep_copies()
            self._chosen[component] = chosen

    def _choose(self, component: str, rows: tuple[Mix, ...]) -> None:
        chosen = Chosen(rows)
        touched = {layer for name in chosen.names for layer in self._touched[name]}
        for key, banked in self._banked.items():
            if key[0] == component:
                banked.choose(chosen if key in touched else None)

    def _keep_copies(self, more: int = 0) -> None:
        """more: bytes that adapters are about to take."""
        layers = self._banked.values()
        keeps = sum(layer.bytes + layer.copied_bytes for layer in layers) + more <= self._room
        for layer in layers:
            layer.keep_copies(keeps)


class Chosen:
    """The adapters of rows, which all layers of a component share."""

    def __init__(self, rows: tuple[Mix, ...]) -> None:
        self.rows = rows
        self.names = list(dict.fromkeys(name for row in rows for name, weight in row if weight))
        self._tables: dict[tuple[int, ...], Table] = {}

    def table(self, ranks: tuple[int, ...], device: torch.device) -> "Table":
        """ranks: of each name in one layer, which many have in common; 0 where it leaves the layer alone."""
        if ranks not in self._tables:
            firsts = dict(zip(self.names, accumulate(ranks, initial=0), strict=False))
            lengths = dict(zip(self.names, ranks, strict=True))
            of_rows = [
                [(firsts[name] + place, weight) for name, weight in row if weight for place in range(lengths[name])]
                for row in self.rows
            ]
            most = max(map(len, of_rows))
            flat = [one for taken in of_rows for one in taken + [(sum(ranks), 1.0)] * (most - len(taken))]
            weighted = any(weight != 1 for _, weight in flat)
            numbers = torch.tensor([number for number, _ in flat], device=device)
            weights = torch.tensor([[weight] for _, weight in flat], device=device) if weighted else None
            self._tables[ranks] = Table(tuple(self.names), len(self.rows), most, numbers, weights)
        return self._tables[ranks]


class Table(NamedTuple):
    """What rows take of the updates of a layer, of which all ranks lie one after another, and then one of zeros."""

    names: tuple[str, ...]
    """Of the adapters, in their order; a layer has updates of some."""
    rows: int
    most: int
    """Ranks of the row that has most, K."""
    numbers: Tensor  # [B * K], of the ranks that rows take
    weights: Tensor | None  # [B * K, 1]; None where all are 1


class BankedLayer:
    """What adapters make of one linear layer or convolution, and what rows add of it to the layer's output."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._updates: dict[str, tuple[Tensor, Tensor]] = {}  # [r, in], [r, out]
        self._nothing = tuple(module.weight.new_zeros(1, size) for size in sizes(module))
        self._ranks: dict[str, int] = {}
        self._bytes_of_rank = bytes_of_rank(module)
        self._table: Table | None = None  # None where no row's adapters change the layer
        self._copies: tuple[Tensor, Tensor] | None = None  # [B, K, in], [B, K, out]
        self._hook = module.register_forward_hook(self._add)
        self.bytes = self._bytes_of_rank
        self.copied_bytes = 0
        """What copies for the rows that have chosen take, whether they are kept or not."""

    @property
    def keeps(self) -> bool:
        return self._copies is not None

    @property
    def idle(self) -> bool:
        """Whether no adapter changes it."""
        return not self._updates

    @torch.no_grad()
    def add(self, name: str, update: LowRank) -> None:
        up = (update.alpha / update.rank * update.up.float()).flatten(1).T
        parts = (update.down.flatten(1), up)
        self._updates[name] = tuple(part.to(self._module.weight, copy=True).contiguous() for part in parts)
        self._ranks[name] = update.rank
        self.bytes += update.rank * self._bytes_of_rank

    def remove(self, name: str) -> None:
        del self._updates[name]
        self.bytes -= self._ranks.pop(name) * self._bytes_of_rank

    def choose(self, chosen: Chosen | None) -> None:
        """chosen: None where no adapter in it changes this layer."""
        self._table, self._copies, self.copied_bytes = None, None, 0
        if chosen is not None:
            ranks = tuple(self._ranks.get(name, 0) for name in chosen.names)
            self._table = chosen.table(ranks, self._module.weight.device)
            self.copied_bytes = self._table.rows * self._table.most * self._bytes_of_rank

    def keep_copies(self, keeps: bool) -> None:
        if not keeps or self._table is None:
            self._copies = None
        elif self._copies is None:
            self._copies = self._copy(self._table)

    def take_off(self) -> None:
        self._hook.remove()

    @torch.no_grad()
    def _copy(self, table: Table) -> tuple[Tensor, Tensor]:
        """[B, K, in], [B, K, out] of what rows take."""
        updates = [self._updates[name] for name in table.names if name in self._updates]
        down, up = (
            torch.cat(parts).index_select(0, table.numbers) for parts in zip(*updates, self._nothing, strict=True)
        )
        if table.weights is not None:
            up *= table.weights.to(up)
        return down.view(table.rows, table.most, -1), up.view(table.rows, table.most, -1)

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        copies = self._copies
        if copies is None:
            if self._table is None:
                return None
            copies = self._copy(self._table)
        down, up = copies
        only = _only.get()
        if only is not None:
            down, up = down[only], up[only]
        if isinstance(module, nn.Conv2d):
            return _add_convolution(module, inputs[0], output, down, up)
        rows = len(down)
        # Of products with a side of few ranks, a CPU is two to three times as fast where that side is not the last.
        lowered = torch.bmm(down, inputs[0].reshape(rows, -1, down.shape[-1]).mT)
        return output.reshape(rows, -1, up.shape[-1]).baddbmm_(lowered.mT, up).reshape(output.shape)


def bytes_of_rank(module: nn.Module) -> int:
    """Of one rank of an update of a layer."""
    return sum(sizes(module)) * module.weight.element_size()


def sizes(module: nn.Module) -> tuple[int, int]:
    """Numbers of one rank of an update's lower and upper part."""
    return module.weight[0].numel(), len(module.weight)


def _add_convolution(module: nn.Conv2d, x: Tensor, output: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """As `module`, with a filter of its own for each row: one convolution whose groups are the rows."""
    rows, ranks = down.shape[:2]
    filters = down.reshape(rows * ranks, -1, *module.weight.shape[2:])
    lowered = functional.conv2d(
        x.reshape(1, -1, *x.shape[2:]), filters, None, module.stride, module.padding, module.dilation, groups=rows
    )
    lowered = lowered.reshape(rows, ranks, -1)
    return output.flatten(2).baddbmm_(up.mT, lowered).reshape(output.shape)
