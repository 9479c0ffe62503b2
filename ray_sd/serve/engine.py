"""One model drawing many pictures at once: they enter and leave between denoising steps, each with its own settings.

Three threads share the work. One prepares pictures: it loads adapters, encodes prompts and draws first noise. One takes steps:
of all that are ready it chooses who takes the next together. One decodes those that are done, and those that want to be seen on
their way. So a picture under way waits for none of a new one's preparations.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from math import inf
from typing import Any

import torch
from cachetools import LRUCache
from PIL import Image

from ray_sd.config.serve import BatchingConfig
from ray_sd.errors import RequestError
from ray_sd.generate import Batch
from ray_sd.generate.start import start_picture
from ray_sd.models import DiffusionModel
from ray_sd.serve.adapters import AdaptersInUseError, LoadedAdapters
from ray_sd.serve.decoding import Decoder, Undecoded
from ray_sd.serve.figures import EngineFigures
from ray_sd.serve.order import (
    DeadlineError,
    EngineBusyError,
    Failed,
    Listener,
    Order,
    Queued,
    Stepped,
    StoppedError,
    Ticket,
)
from ray_sd.serve.prompts import EncodedPrompts
from ray_sd.serve.turns import Picture, Turns
from ray_sd.serve.waiting import WaitingOrder, WaitingOrders

logger = logging.getLogger(__name__)


class Engine:
    """Draws pictures of one model. `order` and tickets are for any thread; listeners are called from the engine's own."""

    def __init__(
        self,
        model: DiffusionModel,
        adapters: LoadedAdapters,
        batching: BatchingConfig | None = None,
        rows_that_fit: float = inf,
    ) -> None:
        """rows_that_fit: of a step at the model's own size, which memory has room for."""
        self.model = model.eval().requires_grad_(False)
        self.adapters = adapters
        self.figures = EngineFigures()
        self._changed = threading.Condition()
        self._waiting = WaitingOrders()
        """Orders that are not begun, and the one that is being prepared."""
        self._errands: deque[tuple[Callable[[], Any], Future]] = deque()
        """What else the thread that prepares pictures has to do."""
        self._pictures: list[Picture] = []
        """Ready for a step, or at one."""
        self._batches: dict[tuple[int, ...], Batch] = {}
        """By shape of the latents; for the thread that takes steps alone."""
        self._under_way: dict[Hashable, Picture] = {}
        self._results: LRUCache[Hashable, Image.Image]
        self._closing = False
        self._rows_that_fit = rows_that_fit
        own = self.model.unet.config.sample_size
        self._own_area = own * own if isinstance(own, int) else own[0] * own[1]
        self._prompts = EncodedPrompts(model, adapters, self.figures)
        self._decoder = Decoder(model, self._own_area, self.figures, self._show, self._left_out)
        self.reconfigure(batching or BatchingConfig())
        self._threads = [
            threading.Thread(target=self._run, args=(work, threads), name=f"engine-{name}", daemon=True)
            for name, work, threads in (
                ("prepare", self._prepare, 1),
                ("step", self._step, torch.get_num_threads()),
                ("decode", self._decoder.work, 1),
            )
        ]
        self._broken: BaseException | None = None
        for thread in self._threads:
            thread.start()

    def reconfigure(self, batching: BatchingConfig) -> None:
        """Share steps in another way from the next one on. What is under way stays, what caches held does not."""
        with self._changed:
            self.batching = batching
            self._max_rows = min(batching.max_rows, self._rows_that_fit)
            self._turns = Turns(batching.policy, batching.patience, self._own_area)
            self._results = LRUCache(batching.result_cache * 2**20, _image_bytes)
            self._prompts.keep(batching.prompt_cache * 2**20)
            self._decoder.at_once = batching.decoded_at_once

    @property
    def healthy(self) -> bool:
        return self._broken is None and all(thread.is_alive() for thread in self._threads)

    @property
    def waiting(self) -> int:
        """Pictures that have taken no step yet."""
        return len(self._waiting) + sum(not picture.drawing.taken for picture in list(self._pictures))

    @property
    def steps_left(self) -> int:
        """Steps still to be taken, of each row of each picture."""
        waiting = sum(
            ticket.order.request.steps_taken * len(ticket.order.request.prompts) for ticket in self._waiting.tickets
        )
        return waiting + sum(
            (picture.drawing.steps - picture.drawing.taken) * picture.drawing.rows for picture in list(self._pictures)
        )

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._pictures or self._decoder.waiting)

    def order(self, order: Order, listener: Listener) -> Ticket:
        """Ask for a picture. Raises EngineBusyError where too many wait, and StoppedError where nothing is drawn any more."""
        ticket = Ticket(order, listener)
        with self._changed:
            if self._closing:
                raise StoppedError
            waiting = self.waiting
            if waiting >= self.batching.max_waiting:
                raise EngineBusyError(waiting, self.seconds_for(waiting))
            self._waiting.add(ticket)
            self._changed.notify_all()
        ticket.tell(Queued(waiting))
        return ticket

    def load(self, name: str) -> Future[None]:
        """Have an adapter in memory before a picture asks for it. Fails as `LoadedAdapters.acquire` does."""
        return self._send(lambda: self.adapters.release(self.adapters.acquire(((name, 1.0),))))

    def unload(self, name: str) -> Future[tuple[int, int]]:
        """`LoadedAdapters.forget`"""
        return self._send(lambda: self.adapters.forget(name))

    def close(self) -> None:
        """Stop; what is under way fails."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._decoder.close()
        for thread in self._threads:
            thread.join()
        if self._broken is None:
            self._fail_all()

    def seconds_for(self, pictures: int) -> float:
        """How long so many pictures take, by what the last took; a second where nothing is known."""
        if not self.figures.pictures:
            return 1.0
        return max(1.0, self.figures.stepping_seconds / self.figures.pictures * pictures)

    def _run(self, work: Callable[[], None], threads: int) -> None:
        if self.model.device.type == "cpu":
            torch.set_num_threads(threads)  # of this thread: the three share the cores
        # Adapters add to layers by hooks, which come and go: compiled blocks have to see that. Said by each thread for itself.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        try:
            with torch.inference_mode():
                while not self._closing:
                    work()
        except BaseException as error:
            self._broken = error
            logger.exception("the engine of %s has stopped", self.model.config.name)
            self._fail_all()
            raise

    # Preparing

    def _send(self, work: Callable[[], Any]) -> Future:
        """Have something done by the thread that prepares pictures, before the next one."""
        future: Future = Future()
        with self._changed:
            self._errands.append((work, future))
            self._changed.notify_all()
        if self._closing:
            self._fail_errands()
        return future

    def _run_errand(self, work: Callable[[], Any], future: Future) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001  told to who waits for it
            future.set_exception(error)

    def _fail_errands(self) -> None:
        with self._changed:
            errands = list(self._errands)
            self._errands.clear()
        for _, future in errands:
            if future.set_running_or_notify_cancel():
                future.set_exception(StoppedError())

    def _prepare(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._errands or self._next())
            if self._closing:
                return
            errand = self._errands.popleft() if self._errands else None
            order = self._next() if errand is None else None
            if order is not None:
                order.tried_at = self._waiting.releases
        if errand is not None:
            self._run_errand(*errand)
        elif order is not None:
            self._begin(order)

    def _next(self) -> WaitingOrder | None:
        """Who is prepared next. What is set aside is left out as it is cancelled or late with the next step of others."""
        return self._waiting.next(self._turns, self.batching.patience, self.figures.steps)

    def _begin(self, order: WaitingOrder) -> None:
        ticket, picture = order.ticket, None
        if ticket.cancelled:
            self.figures.cancelled += 1
        elif ticket.late:
            self._fail([ticket], _too_late(ticket))
        else:
            try:
                picture = self._picture(order.number, ticket)
            except AdaptersInUseError:
                if order.aside_since is None:
                    order.aside_since = self.figures.steps
                return
            except RequestError as error:
                self._fail([ticket], error)
            except Exception as error:
                logger.exception("a picture could not be begun")
                self._fail([ticket], error)
        with self._changed:
            self._waiting.remove(order)
            if picture is not None:
                self._pictures.append(picture)
                self._changed.notify_all()

    def _picture(self, number: int, ticket: Ticket) -> Picture | None:
        """The picture that is ordered, begun; None where it is there, or under way already."""
        order = ticket.order
        adapters = self.adapters.acquire(order.request.adapters)
        try:
            ticket.alone = any(one.alone for one in adapters)
            versions = tuple(one.key for one in adapters)
            key = (order.key, versions)
            if self._join(key, ticket):
                self.adapters.release(adapters)
                return None
            pairs = list(zip(adapters, (weight for _, weight in order.request.adapters), strict=True))
            mix = tuple((one.key, weight) for one, weight in pairs)
            alone = next(((one, weight) for one, weight in pairs if one.alone), None)
            conditions = self._prompts.conditions(order.request, mix, alone)
            drawing = start_picture(self.model, replace(order.request, adapters=mix), conditions)
        except BaseException:
            self.adapters.release(adapters)
            raise
        picture = Picture([ticket], key, adapters, alone, drawing, number)
        self._under_way[key] = picture
        return picture

    def _join(self, key: Hashable, ticket: Ticket) -> bool:
        """Whether the same picture is there or comes anyway."""
        with self._changed:
            image = self._results.get(key)
            if image is None:
                under_way = self._under_way.get(key)
                if under_way is None or not under_way.wanted:
                    return False
                under_way.tickets.append(ticket)
            self.figures.results_found += 1
        if image is not None:
            ticket.finish(image)
        return True

    # Stepping

    def _step(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._pictures)
            if self._closing:
                return
            self._leave_out()
            if not self._pictures:
                return
            chosen = self._turns.choose(self._pictures, self._max_rows)
        began = time.perf_counter()
        rows = sum(picture.drawing.rows for picture in chosen)
        alone = chosen[0].alone
        batch = self._batch(chosen)
        try:
            with ExitStack() as swaps:
                if alone is not None:
                    swaps.enter_context(alone[0].put_in("unet", self.model.unet, alone[1]))
                batch.advance([picture.drawing for picture in chosen])
        except torch.OutOfMemoryError as error:
            if rows > 2:
                of_own_size = rows * chosen[0].area / self._own_area
                self._max_rows = self._rows_that_fit = max(2, of_own_size // 2)
                logger.warning("out of memory with %d rows; half as many from now on", rows)
                return
            self._drop(chosen, error)
            return
        except Exception as error:
            if len(chosen) > 1:  # who it was is seen when each takes its step alone
                logger.warning("a step of %d pictures failed: %s", len(chosen), error)
                for picture in chosen:
                    picture.suspected = True
            else:
                logger.exception("a step failed")
                self._drop(chosen, error)
            return
        self.figures.steps += 1
        self.figures.rows += rows
        self.figures.stepping_seconds += time.perf_counter() - began
        self._after_step(chosen, batch)

    def _batch(self, chosen: Sequence[Picture]) -> Batch:
        """The batch of pictures of one shape, which they have joined; those that it has lost have left."""
        shape = chosen[0].drawing.shape
        batch = self._batches.get(shape)
        if batch is None:
            batch = self._batches[shape] = Batch(self.model, self.adapters.stacked)
        batch.join([picture.drawing for picture in chosen if picture.drawing not in batch])
        return batch

    def _leave_out(self) -> None:
        """Drop what nobody wants any more, and what comes too late."""
        for picture in list(self._pictures):
            late = [ticket for ticket in picture.tickets if ticket.late]
            for ticket in late:
                self._fail([ticket], _too_late(ticket))
                picture.tickets.remove(ticket)
            if not picture.wanted:
                self.figures.cancelled += len(picture.tickets)
                self._pictures.remove(picture)
                self._forget(picture)
        there = {picture.drawing for picture in self._pictures}
        for shape, batch in list(self._batches.items()):
            for drawing in batch.drawings:
                if drawing not in there:
                    batch.leave(drawing)
            if not len(batch):
                del self._batches[shape]

    def _after_step(self, chosen: Sequence[Picture], batch: Batch) -> None:
        to_decode: list[Undecoded] = []
        for picture in chosen:
            drawing = picture.drawing
            picture.suspected = False
            self.figures.unwanted_steps += not picture.wanted
            for ticket in picture.tickets:
                ticket.step_taken()
                ticket.tell(Stepped(drawing.taken, drawing.steps))
            if drawing.done:
                to_decode.append(Undecoded(picture, drawing.latents, None))
            elif onlookers := picture.onlookers:
                to_decode.append(Undecoded(picture, batch.preview([drawing])[0], onlookers))
        self._decoder.add(to_decode)
        with self._changed:
            done = {one.picture for one in to_decode if one.onlookers is None}
            self._pictures = [picture for picture in self._pictures if picture not in done]
            self._changed.notify_all()

    # Decoded

    def _show(self, one: Undecoded, image: Image.Image) -> None:
        """Tell who wants a picture what it looks like by now, or in the end."""
        picture = one.picture
        if one.onlookers is not None:
            for ticket in one.onlookers:
                ticket.show(image)
            return
        with self._changed:
            self._forget(picture)
            _keep(self._results, picture.key, image)
        self.figures.pictures += 1
        for ticket in picture.tickets:
            ticket.finish(image)

    def _left_out(self, one: Undecoded, error: Exception | None) -> None:
        """What was not decoded, since nobody wants it, or since it went wrong. A look that is missing is missed by nobody."""
        if one.onlookers is not None:
            return
        if error is not None:
            self._drop([one.picture], error)
        else:
            self.figures.cancelled += len(one.picture.tickets)
            self._forget(one.picture)

    # Ending

    def _forget(self, picture: Picture) -> None:
        """Let go of what a picture holds."""
        if self._under_way.get(picture.key) is picture:
            del self._under_way[picture.key]
        self.adapters.release(picture.adapters)
        with self._changed:
            self._waiting.releases += 1
            self._changed.notify_all()

    def _drop(self, pictures: Iterable[Picture], error: Exception) -> None:
        for picture in pictures:
            with self._changed:
                if picture in self._pictures:
                    self._pictures.remove(picture)
                self._forget(picture)
            self._fail(picture.tickets, error)

    def _fail(self, tickets: Sequence[Ticket], error: Exception) -> None:
        self.figures.failed += len(tickets)
        for ticket in tickets:
            ticket.tell(Failed(error))

    def _fail_all(self) -> None:
        with self._changed:
            self._closing = True
            waiting = self._waiting.tickets
            pictures = {id(picture): picture for picture in self._pictures}
            self._changed.notify_all()
        pictures |= {id(picture): picture for picture in self._decoder.waiting}
        self._decoder.close()
        self._fail(waiting + [ticket for picture in pictures.values() for ticket in picture.tickets], StoppedError())
        self._fail_errands()


def _too_late(ticket: Ticket) -> DeadlineError:
    return DeadlineError("the picture was not done before its deadline")


def _keep(cache: LRUCache, key: Hashable, value: Any) -> None:
    """What is larger than the whole cache is not kept."""
    if cache.getsizeof(value) <= cache.maxsize:
        cache[key] = value


def _image_bytes(image: Image.Image) -> int:
    return image.width * image.height * len(image.getbands())
