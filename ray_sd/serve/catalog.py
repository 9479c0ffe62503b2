"""What can be asked for by name: base models, and the adapters of a folder."""

import logging
import time
from collections.abc import Iterator
from typing import NamedTuple

from ray_sd.serve.adapter_folder import (
    NAME,
    AdapterEntry,
    AdapterError,
    AdapterFolder,
    AdaptersUnreachableError,
    UnknownAdapterError,
)
from ray_sd.serve.errors import NOT_FOUND, BadRequestError, NotFoundError, of_adapter
from ray_sd.serve.wire import ModelCard, PictureSettings

logger = logging.getLogger(__name__)

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
    text_width: int
    """Numbers a token that its U-Net reads of texts."""

    def takes(self, entry: AdapterEntry) -> bool:
        """Whether an adapter may be for it, by what can be told without loading it."""
        if entry.base is not None:
            return entry.base == self.name
        return entry.text_width in (None, self.text_width)


class Catalog:
    def __init__(self, bases: dict[str, ServedBase], folder: AdapterFolder) -> None:
        """bases: by the names that requests ask for them by; the first is meant where a request names none."""
        self.bases = bases
        self.folder = folder
        self._since = int(time.time())

    def cards(self) -> Iterator[ModelCard]:
        """Of all base models and adapters, of a bucket's where it answers."""
        for name in self.bases:
            yield self._base_card(name)
        try:
            for entry in self.folder:
                yield self._adapter_card(entry)
        except AdaptersUnreachableError as error:
            logger.warning("models are listed without adapters: %s", error.reason)

    def card(self, name: str) -> ModelCard:
        """Of one of them. Raises ApiError."""
        return self._base_card(name) if name in self.bases else self._adapter_card(self._entry(name, "model"))

    def bases_of(self, entry: AdapterEntry) -> list[str]:
        """The served models that an adapter may be for; all of them where nothing tells."""
        return [name for name, base in self.bases.items() if base.takes(entry)]

    def base_of(self, entry: AdapterEntry) -> str | None:
        """The first of them."""
        return next(iter(self.bases_of(entry)), None)

    def names_adapters(self, body: PictureSettings) -> bool:
        """Whether what a request means has to be looked up in the folder."""
        return bool(body.adapters) or body.model not in (None, *self.bases)

    def chosen(self, body: PictureSettings) -> tuple[str, tuple[tuple[str, float], ...]]:
        """The base and the adapters that a request means by `model` and `adapters`. Raises ApiError."""
        adapters = tuple((one.name, one.weight) for one in body.adapters)
        base = body.model
        if base is not None and base not in self.bases:
            entry = self._entry(base, "model")
            adapters = ((base, 1.0), *adapters)
            base = self.base_of(entry)
            if base is None:
                raise BadRequestError(not_served(entry), "model")
        chosen = base or next(iter(self.bases))
        names = [name for name, _ in adapters]
        if len(set(names)) < len(names):
            raise BadRequestError("adapters: each may be named once", "adapters")
        for name in names:
            entry = self._entry(name, "adapters")
            if not self.bases[chosen].takes(entry):
                raise BadRequestError(f"adapter '{name}' is for {entry.made_for}, not for '{chosen}'", "adapters")
        return chosen, adapters

    def _entry(self, name: str, param: str) -> AdapterEntry:
        try:
            return self.folder.find(name)
        except UnknownAdapterError:
            known = [*self.bases, *self.folder.names]
            shown = name if NAME.fullmatch(name) else "of that name"
            message = f"no model '{shown}'; there are {', '.join(known[:SHOWN])}"
            raise NotFoundError(message, param, NOT_FOUND) from None
        except AdapterError as error:
            raise of_adapter(str(error), error.code, param) from None

    def _base_card(self, name: str) -> ModelCard:
        return ModelCard(id=name, created=self._since, kind="base")

    def _adapter_card(self, entry: AdapterEntry) -> ModelCard:
        return ModelCard(
            id=entry.name,
            created=entry.found.created,
            kind=entry.kind,
            base=self.base_of(entry),
            tokens=list(entry.tokens),
        )


def not_served(entry: AdapterEntry) -> str:
    return f"adapter '{entry.name}' is for {entry.made_for}, which is not served"
