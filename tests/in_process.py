"""What stands in for Ray where a test is about rows, pictures or frames: the same stages, one call after the other, here.

What Ray itself has to do (processes, order, blocks, other working folders) is shown by tests with `ray_cluster`.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch

from ray_sd import data
from ray_sd.config import ExperimentConfig
from ray_sd.config.rows import RowSpec
from ray_sd.data import PreparedData
from ray_sd.data.sources import Listing


def prepare(config: ExperimentConfig, rows: RowSpec, listing: Listing | None = None) -> PreparedData:
    """`ray_sd.data.prepare` in this process."""
    with in_process():
        return data.prepare(config, rows, listing)


def training_batches(*arguments: Any) -> Iterator[dict[str, torch.Tensor]]:
    """All batches of `ray_sd.data.training_batches`, read in this process."""
    with in_process():
        return iter(list(data.training_batches(*arguments)))


@contextmanager
def in_process() -> Iterator[None]:
    """Ray Data's part of preparing, reading and drawing is done here, and Ray is not started."""
    threads = torch.get_num_threads()  # encoders take a share of the cores, as they should in processes of their own
    with pytest.MonkeyPatch.context() as patch:
        for module in ("data.pipeline", "draw.generation"):
            patch.setattr(f"ray_sd.{module}.connect", lambda: None)
        for module in ("data.passes", "draw.generation"):
            patch.setattr(f"ray_sd.{module}.has_gpus", lambda: False)
        patch.setattr("ray_sd.data.passes.is_one_machine", lambda: False)  # as where actors encode
        for module in ("passes", "lanes"):
            patch.setattr(f"ray_sd.data.{module}.ordered_dataset", lambda blocks, **_: Tables(blocks))
        patch.setattr("ray_sd.data.passes.actor_restarts", dict)
        patch.setattr(ray.data, "from_items", lambda rows, **_: Rows(rows))
        patch.setattr(ray, "put", lambda value: value)
        patch.setattr(ray, "get", lambda value: value)
        yield
    torch.set_num_threads(threads)


class Tables:
    """A Ray Data set of Arrow tables, whose stages see what came through a pickle, as they do in other processes."""

    def __init__(self, blocks: Sequence[pa.Table]) -> None:
        self._blocks = blocks

    def map_batches(
        self,
        function: Any,
        *,
        batch_size: int | None,
        batch_format: str,
        fn_kwargs: dict[str, Any] | None = None,
        fn_constructor_args: tuple[Any, ...] = (),
        **_: Any,
    ) -> "Tables":
        assert batch_format == "pyarrow"
        function, arguments, settings = pickled((function, fn_constructor_args, fn_kwargs or {}))
        call = function(*arguments) if isinstance(function, type) else function
        made = [call(batch, **settings) for batch in self.iter_batches(batch_size=batch_size)]
        return Tables([block for blocks in made for block in ([blocks] if isinstance(blocks, pa.Table) else blocks)])

    def iter_batches(self, *, batch_size: int | None, **_: Any) -> Iterator[pa.Table]:
        if batch_size is None:
            yield from self._blocks
            return
        whole = pa.concat_tables(self._blocks)
        for first in range(0, len(whole), batch_size):
            yield whole.slice(first, batch_size)


class Rows:
    """A Ray Data set of dictionaries."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def map_batches(self, actor: Any, *, fn_constructor_kwargs: dict[str, Any], batch_size: int, **_: Any) -> "Rows":
        call, made = actor(**pickled(fn_constructor_kwargs)), []
        for first in range(0, len(self._rows), batch_size):
            part = self._rows[first : first + batch_size]
            columns = call({name: [row[name] for row in part] for name in part[0]})
            made += [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return Rows(made)

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)


def pickled(value: Any) -> Any:
    return ray.cloudpickle.loads(ray.cloudpickle.dumps(value))


class Actors:
    """Ray's actors: calls wait until what they return is asked for, and those of one actor are done in their order."""

    def __init__(self) -> None:
        self.asked: dict[str, dict[str, float]] = {}
        """What each class of actor asks for."""

    @contextmanager
    def instead_of_ray(self, **resources: float) -> Iterator[None]:
        """Stages of videos are these actors, on a machine with so many GPUs."""
        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ray_sd.draw.text_to_video.connect", lambda: None)
            patch.setattr("ray_sd.draw.stages.possible_resources", lambda: resources)
            patch.setattr(ray, "remote", self._remote)
            patch.setattr(ray, "put", lambda value: value)
            patch.setattr(ray, "get", value_of)
            patch.setattr(ray, "wait", lambda calls, **_: (calls, []))
            yield
        torch.set_num_threads(threads)

    def _remote(self, **resources: float) -> Callable[[type], "ActorClass"]:
        def wrap(kind: type) -> ActorClass:
            self.asked[kind.__name__] = resources
            return ActorClass(kind)

        return wrap


class ActorClass:
    def __init__(self, kind: type) -> None:
        self._kind = kind

    def remote(self, *arguments: Any) -> "Actor":
        return Actor(self._kind(*arguments))


class Actor:
    def __init__(self, instance: Any) -> None:
        self._instance = instance
        self._waiting: deque[Call] = deque()

    def __getattr__(self, name: str) -> "Method":
        return Method(getattr(self._instance, name), self._waiting)


class Method:
    def __init__(self, function: Callable[..., Any], waiting: "deque[Call]", num_returns: int = 1) -> None:
        self._function, self._waiting, self._num_returns = function, waiting, num_returns

    def options(self, *, num_returns: int) -> "Method":
        return Method(self._function, self._waiting, num_returns)

    def remote(self, *arguments: Any) -> Any:
        call = Call(self._function, arguments, self._waiting)
        self._waiting.append(call)
        if self._num_returns == 1:
            return call
        return [Call(lambda place=place: call.get()[place], (), deque()) for place in range(self._num_returns)]


class Call:
    """A reference to what a call returns."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], waiting: "deque[Call]") -> None:
        self._function, self._arguments, self._waiting = function, arguments, waiting
        self.done = False
        self._value: Any = None

    def get(self) -> Any:
        while self._waiting and not self.done:
            self._waiting.popleft()._run()
        if not self.done:
            self._run()
        return self._value

    def _run(self) -> None:
        self._value = self._function(*map(value_of, self._arguments))
        self.done = True


def value_of(reference: Any) -> Any:
    if isinstance(reference, list):
        return [value_of(part) for part in reference]
    return reference.get() if isinstance(reference, Call) else reference
