"""The adapters that a model serves: those of a folder, loaded when a picture asks for one, and forgotten when memory is short."""

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ray_sd.adapter import read_manifest
from ray_sd.errors import ArtifactError
from ray_sd.generate.adapters import Adapters, stacks
from ray_sd.methods import check_base
from ray_sd.methods.contents import Contents, read_contents
from ray_sd.methods.layer_adapter import PEFT
from ray_sd.methods.lora_names import LoraNames
from ray_sd.methods.low_rank import LowRank
from ray_sd.methods.weights import read_weights
from ray_sd.models import DiffusionModel
from ray_sd.models.tokens import parameters_without_words
from ray_sd.requests import Mix
from ray_sd.serve.adapter_folder import AdapterEntry, AdapterError, AdapterFolder, BrokenAdapterError

logger = logging.getLogger(__name__)


COPIES = 0.25
"""Share of the memory for adapters that unused ones leave to what rows of a step copy of those in use."""


class AdaptersInUseError(Exception):
    """Memory is full of adapters that pictures under way are drawn with; some will end."""

    def __init__(self, pins: int) -> None:
        """pins: how often a picture needs an adapter, of all that are in memory."""
        super().__init__(pins)
        self.pins = pins


@dataclass
class Loaded:
    """An adapter in memory."""

    key: str
    """Name and version, as its entry's."""
    banked: bool = False
    """Whether it has a LoRA that stacks with others."""
    changes: dict[str, dict[str, Tensor | LowRank]] = field(default_factory=dict)
    """What an adapter that does not stack makes of parameters, by component: other values, or a DoRA's update."""
    bytes_alone: int = 0
    """What these take, and the values of parameters that are made of them."""
    rotates: bool = False
    pins: int = 0
    used: float = 0.0
    _values: dict[str, tuple[float, dict[str, Tensor]]] = field(default_factory=dict)
    """Of each component what it was last put in with, and at which strength."""

    @property
    def name(self) -> str:
        return self.key.partition("@")[0]

    @property
    def alone(self) -> bool:
        """Whether pictures with it are drawn by themselves, since its change does not stack."""
        return bool(self.changes)

    @contextmanager
    def put_in(self, component: str, module: nn.Module, strength: float) -> Iterator[None]:
        """A component with this adapter's values, at a strength; its own are put back after."""
        changes = self.changes.get(component, {})
        parameters = parameters_without_words(module) if changes else {}
        before = {name: parameters[name].data for name in changes}
        if component not in self._values or self._values[component][0] != strength:
            made = {name: _changed(own, changes[name], strength) for name, own in before.items()}
            self._values[component] = (strength, made)
        for name, value in self._values[component][1].items():
            parameters[name].data = value
        try:
            yield
        finally:
            for name, own in before.items():
                parameters[name].data = own


def _changed(own: Tensor, change: Tensor | LowRank, strength: float) -> Tensor:
    if isinstance(change, LowRank):
        return change.added_to(own, strength).to(own)
    return change if strength == 1 else torch.lerp(own, change, strength)


def _bytes(change: Tensor | LowRank) -> int:
    if isinstance(change, Tensor):
        return change.nbytes
    return sum(part.nbytes for part in (change.down, change.up, change.magnitude) if part is not None)


class LoadedAdapters:
    """The adapters of one model that are in memory, up to a limit.

    To make room, the least recently used of those that no picture needs is forgotten.
    """

    def __init__(self, model: DiffusionModel, folder: AdapterFolder, memory_limit: int) -> None:
        """memory_limit: bytes of all adapters together, and of what rows of a step copy of them."""
        self._model = model
        self._folder = folder
        self._limit = memory_limit
        self._names = LoraNames(model)
        self.stacked = Adapters(model)
        """Those of them that stack, and the words of all, by key."""
        self._loaded: dict[str, Loaded] = {}
        self._failures: dict[str, tuple[str, str]] = {}
        """Key and reason of what could not be loaded the last time, by name."""
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    @property
    def bytes(self) -> int:
        """What they take, with the copies that rows have of them."""
        with self._lock:
            return self._others() + self.stacked.loras.bytes + self.stacked.loras.copied_bytes

    def _others(self) -> int:
        """What all but the LoRAs that stack takes."""
        return self.stacked.words.bytes + sum(one.bytes_alone for one in self._loaded.values())

    @property
    def names(self) -> list[str]:
        """Of those in memory, the last used first."""
        with self._lock:
            ordered = sorted(self._loaded.values(), key=lambda one: -one.used)
        return [one.name for one in ordered]

    @property
    def keys(self) -> list[str]:
        """Of those in memory."""
        with self._lock:
            return list(self._loaded)

    @property
    def failures(self) -> dict[str, str]:
        """Why adapters could not be loaded, by their keys."""
        with self._lock:
            return dict(self._failures.values())

    def acquire(self, mix: Mix) -> list[Loaded]:
        """Have adapters in memory, and keep them there until they are released.

        For one thread at a time, as `forget` is. Raises AdapterError for what is not there, is broken, does not fit the model or
        memory, or cannot be mixed, and AdaptersInUseError where there is no room now.
        """
        taken: list[Loaded] = []
        try:
            for name, weight in mix:
                one = self._find(name)
                taken.append(one)
                if weight != 1 and one.rotates:
                    reason = f"adapter '{name}' rotates weights, which has no strength; give it the weight 1"
                    raise AdapterError(name, reason)
                if weight != 1 and not one.banked and not one.alone:
                    reason = f"adapter '{name}' is a word, which has no strength; give it the weight 1"
                    raise AdapterError(name, reason)
            alone = [name for (name, _), one in zip(mix, taken, strict=True) if one.alone]
            if len(alone) > 1:
                reason = f"the adapters {' and '.join(alone)} do not stack; a picture takes one of them"
                raise AdapterError(alone[-1], reason)
        except AdaptersInUseError as error:
            self.release(taken)
            if error.pins > len(taken):
                raise
            names = " and ".join(name for name, _ in mix)
            room = f"the {self._limit / 2**20:.0f} MiB of adapter_memory"
            raise AdapterError(mix[-1][0], f"the adapters {names} take more together than {room}") from None
        except BaseException:
            self.release(taken)
            raise
        return taken

    def release(self, adapters: Iterable[Loaded]) -> None:
        with self._lock:
            for one in adapters:
                one.pins -= 1
                one.used = time.monotonic()

    def forget(self, name: str) -> tuple[int, int]:
        """Forget an adapter in all its versions: how many were, and how many are not, since pictures need them.

        For the thread that acquires.
        """
        with self._lock:
            versions = [one for one in self._loaded.values() if one.name == name]
            idle = [one for one in versions if not one.pins]
            for one in idle:
                del self._loaded[one.key]
        for one in idle:
            self.stacked.remove(one.key)
            logger.info("forgot adapter %s, as was asked", one.key)
        return len(idle), len(versions) - len(idle)

    def _find(self, name: str) -> Loaded:
        entry, path = self._folder.at_hand(name)
        with self._lock:
            one = self._loaded.get(entry.key)
            if one is not None:
                one.pins += 1
                self.hits += 1
                return one
        self.misses += 1
        try:
            one = self._load(entry, path)
        except (ArtifactError, OSError) as error:
            reason = self._folder.told(error)
            with self._lock:
                self._failures[name] = (entry.key, reason)
            raise BrokenAdapterError(name, reason) from error
        one.pins = 1
        with self._lock:
            self._loaded[entry.key] = one
            self._failures.pop(name, None)
        return one

    def _load(self, entry: AdapterEntry, path: Path) -> Loaded:
        began = time.perf_counter()
        contents = self._read(path)
        key = entry.key
        one = Loaded(key, rotates=entry.rotates)
        if stacks(contents):
            one.banked = bool(contents.updates)
            self._make_room(entry.name, one, contents)
            self.stacked.add(key, contents)
        else:
            one.changes, one.bytes_alone = self._changes(contents, rotates=one.rotates)
            self._make_room(entry.name, one, contents)
            self.stacked.words.add(key, contents.embeddings)
        logger.info("loaded adapter %s in %.2f s: %s", entry.name, time.perf_counter() - began, contents.summary())
        return one

    def _read(self, path: Path) -> Contents:
        if path.is_dir():
            check_base(self._model, path, read_manifest(path), allow_other_base=False, switch=None)
        contents = read_contents(path, self._model)
        if contents.weights and not (path / PEFT).is_dir():
            parts = ", ".join(contents.weights)
            raise ArtifactError(f"it is all weights of the {parts}; serve it as a model of its own")
        return contents

    def _changes(self, contents: Contents, *, rotates: bool) -> tuple[dict[str, dict[str, Tensor | LowRank]], int]:
        """What an adapter makes of parameters, by component, and the bytes of that and of the values that come of it."""
        changes: dict[str, dict[str, Tensor | LowRank]] = {}
        taken = 0
        for component, folder in contents.weights.items():
            module = getattr(self._model, component)
            own = parameters_without_words(module)
            for name, tensor in read_weights(module, folder, own).items():
                if not torch.equal(own[name].to(tensor), tensor):
                    change = tensor.to(own[name], copy=True)  # of what is read the rest goes
                    changes.setdefault(component, {})[name] = change
                    # Of one that rotates there is no other strength, and so no other values.
                    taken += _bytes(change) + (0 if rotates else own[name].nbytes)
        for component, updates in contents.updates.items():
            for layer, update in updates.items():
                place = (component, layer)
                own = self._names.layers[place].weight
                low_rank = update.to(own.device)
                changes.setdefault(component, {})[f"{self._names.own(place)}.weight"] = low_rank
                taken += _bytes(low_rank) + own.nbytes
        return changes, taken

    def _make_room(self, name: str, one: Loaded, contents: Contents) -> None:
        """Forget adapters until there is room for one more. Raises AdaptersInUseError, or ArtifactError where it never fits."""
        loras, words = self.stacked.loras, self.stacked.words
        updates = contents.updates if one.banked else {}
        while True:
            others = self._others() + one.bytes_alone + words.bytes_of(contents.embeddings)
            needed = others + loras.bytes + loras.bytes_of(updates)
            copies = min(loras.wanted_bytes, int(COPIES * self._limit))
            with self._lock:
                idle = [other for other in self._loaded.values() if not other.pins]
                if needed <= self._limit and (not idle or needed + copies <= self._limit):
                    break
                if not idle:
                    if self._loaded:
                        raise AdaptersInUseError(sum(other.pins for other in self._loaded.values()))
                    raise ArtifactError(
                        f"it takes {needed / 2**20:.0f} MiB, more than the {self._limit / 2**20:.0f} of adapter_memory"
                    )
                victim = min(idle, key=lambda other: other.used)
                del self._loaded[victim.key]
            self.stacked.remove(victim.key)
            logger.info("forgot adapter %s to make room for %s", victim.key, name)
        loras.keep_within(self._limit - others)
