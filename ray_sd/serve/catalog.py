"""What can be asked for by name: base models, and the adapters of a folder."""

import time
from collections.abc import Iterator
from typing import NamedTuple

from ray_sd.serve.adapter_folder import NAME, AdapterEntry, AdapterFolder, BrokenAdapterError, UnknownAdapterError
from ray_sd.serve.errors import NOT_FOUND, BadRequestError, NotFoundError, of_adapter
from ray_sd.serve.wire import ModelCard, PictureSettings

SHOWN = 20
"""Names that are told to who asks for another."""


class ServedBase(NamedTuple):
    """A base model as the HTTP side knows it."""

    name: str
    """What its adapters' manifests call it."""
    size: tuple[int, int]
    """Width and height of its pictures in pixels."""
    factor: int
    """That sizes are multiples of."""
    num_inference_steps: int
    """Steps and guidance suit it where nobody says others."""
    guidance_scale: float


class Catalog:
    def __init__(self, bases: dict[str, ServedBase], folder: AdapterFolder) -> None:
        """bases: by the names that requests ask for them by; the first is meant where a request names none."""
        self.bases = bases
        self.folder = folder
        self._since = int(time.time())

    def cards(self) -> Iterator[ModelCard]:
        """Of all base models and adapters."""
        for name in self.bases:
            yield self._base_card(name)
        for entry in self.folder:
            yield self._adapter_card(entry)

    def card(self, name: str) -> ModelCard:
        """Of one of them. Raises ApiError."""
        return self._base_card(name) if name in self.bases else self._adapter_card(self._entry(name, "model"))

    def base_of(self, entry: AdapterEntry) -> str | None:
        """The served model that an adapter was made for; the first where nothing says for which."""
        if entry.base is None:
            return next(iter(self.bases))
        return next((name for name, base in self.bases.items() if base.name == entry.base), None)

    def chosen(self, body: PictureSettings) -> tuple[str, tuple[tuple[str, float], ...]]:
        """The base and the adapters that a request means by `model` and `adapters`. Raises ApiError."""
        adapters = tuple((one.name, one.weight) for one in body.adapters)
        base = body.model
        if base is not None and base not in self.bases:
            entry = self._entry(base, "model")
            adapters = ((base, 1.0), *adapters)
            base = self.base_of(entry)
            if base is None:
                raise BadRequestError(
                    f"adapter '{entry.name}' is for the base '{entry.base}', which is not served", "model"
                )
        chosen = base or next(iter(self.bases))
        names = [name for name, _ in adapters]
        if len(set(names)) < len(names):
            raise BadRequestError("adapters: each may be named once", "adapters")
        for name in names:
            entry = self._entry(name, "adapters")
            if self.base_of(entry) != chosen:
                raise BadRequestError(
                    f"adapter '{name}' is for the base '{entry.base}', not for '{chosen}'", "adapters"
                )
        return chosen, adapters

    def _entry(self, name: str, param: str) -> AdapterEntry:
        try:
            return self.folder.find(name)
        except UnknownAdapterError:
            known = [*self.bases, *self.folder.names]
            shown = name if NAME.fullmatch(name) else "of that name"
            message = f"no model '{shown}'; there are {', '.join(known[:SHOWN])}"
            raise NotFoundError(message, param, NOT_FOUND) from None
        except BrokenAdapterError as error:
            raise of_adapter(str(error), error.code, param) from None

    def _base_card(self, name: str) -> ModelCard:
        return ModelCard(id=name, created=self._since, kind="base")

    def _adapter_card(self, entry: AdapterEntry) -> ModelCard:
        created = int(entry.path.stat().st_mtime)
        return ModelCard(
            id=entry.name, created=created, kind=entry.kind, base=self.base_of(entry), tokens=list(entry.tokens)
        )
