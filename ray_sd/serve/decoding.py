"""Pictures that are done, and looks at those on their way: decoded in groups, beside the steps of others."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ray_sd.generate.decoding import decode_pictures
from ray_sd.models import DiffusionModel
from ray_sd.serve.figures import EngineFigures
from ray_sd.serve.order import Ticket
from ray_sd.serve.turns import Picture

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Undecoded:
    """A picture that is done, or one on its way that is to be seen."""

    picture: Picture
    latents: Tensor
    onlookers: Sequence[Ticket] | None
    """Who is to see it on its way; None where it is done."""


class Decoder:
    """Decodes what waits for it, as many of one shape at once as are wanted. `add` is for any thread, `work` for one."""

    def __init__(
        self,
        model: DiffusionModel,
        own_area: int,
        figures: EngineFigures,
        shown: Callable[[Undecoded, Image.Image], None],
        left_out: Callable[[Undecoded, Exception | None], None],
    ) -> None:
        """own_area: latents of a picture of the model's own size.

        shown: told what each looks like; left_out: told of what nobody wants any more, or what went wrong with it.
        """
        self.at_once = 1
        """Pictures of the model's own size that are decoded together."""
        self._model = model
        self._own_area = own_area
        self._figures = figures
        self._shown = shown
        self._left_out = left_out
        self._changed = threading.Condition()
        self._waiting: list[Undecoded] = []
        """Or at it."""
        self._closing = False

    @property
    def waiting(self) -> list[Picture]:
        """Pictures of which something is not decoded yet."""
        with self._changed:
            return [one.picture for one in self._waiting]

    def add(self, undecoded: Sequence[Undecoded]) -> None:
        with self._changed:
            self._waiting.extend(undecoded)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def work(self) -> None:
        """Decode what waits longest, and what is of its shape. Waits for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting)
            if self._closing:
                return
            shape = self._waiting[0].latents.shape
            alike = [one for one in self._waiting if one.latents.shape == shape]
            together = alike[: max(1, self.at_once * self._own_area // (shape[-2] * shape[-1]))]
        self._decode(together)
        with self._changed:
            self._waiting = [one for one in self._waiting if one not in together]

    def _decode(self, together: Sequence[Undecoded]) -> None:
        wanted = [one for one in together if one.picture.wanted]
        for one in together:
            if one not in wanted:
                self._left_out(one, None)
        if not wanted:
            return
        try:
            images = decode_pictures(self._model, torch.stack([one.latents for one in wanted]))
        except Exception as error:
            if len(wanted) > 1:  # who it was is seen when each is decoded alone
                logger.warning("%d pictures could not be decoded together: %s", len(wanted), error)
                for one in wanted:
                    self._decode([one])
                return
            logger.exception("a picture could not be decoded")
            self._left_out(wanted[0], error)
            return
        self._figures.decodes += 1
        for one, image in zip(wanted, images, strict=True):
            self._shown(one, image)
