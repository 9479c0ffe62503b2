"""`/v1/adapters`: the adapters of the folder, and which of them replicas have in memory."""

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from fastapi import Depends, FastAPI
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from ray_sd.serve.adapter_folder import AdapterEntry, AdapterError, BrokenEntry
from ray_sd.serve.catalog import Catalog, not_served
from ray_sd.serve.document import errors
from ray_sd.serve.errors import (
    NOT_FOUND,
    SOON,
    ApiError,
    BadRequestError,
    ConflictError,
    NotFoundError,
    of_adapter,
    of_failure,
)
from ray_sd.serve.gate import only_admins
from ray_sd.serve.messages import AdaptersTold, Unloaded
from ray_sd.serve.wire import AdapterCard, AdapterList, AdapterToLoad, AdapterUnloaded

logger = logging.getLogger(__name__)

PATH = "/v1/adapters"
T = TypeVar("T")


class AdapterRoutes:
    def __init__(self, catalog: Catalog, handles: dict[str, DeploymentHandle]) -> None:
        """handles: of the served models."""
        self._folder = catalog.folder
        self._bases_of = catalog.bases_of
        self._handles = handles

    def add_to(self, app: FastAPI) -> None:
        guarded: dict[str, Any] = {"dependencies": [Depends(only_admins)]}
        app.get(PATH, responses=errors(401, 403, 503))(self.list_adapters)
        app.post(PATH, **guarded, responses=errors(400, 401, 403, 404, 409, 429, 500, 503))(self.load_adapter)
        app.delete(f"{PATH}/{{name}}", **guarded, responses=errors(401, 403, 404, 409, 503))(self.unload_adapter)

    async def list_adapters(self) -> AdapterList:
        """All adapters of the folder as it is now, those that cannot be used with the reason."""
        told = [answer for base in self._handles for answer in await self._ask(base, "adapters")]
        entries = await self._look_up(lambda: list(self._folder.survey()))
        return AdapterList(data=[self._card(entry, told) for entry in entries])

    async def load_adapter(self, body: AdapterToLoad | None = None) -> AdapterCard | AdapterList:
        """Load an adapter into every replica of its base, before a picture asks for it; of each base that it may be for.

        Without a name nothing is loaded: the folder is listed, which is read anew whenever anything is asked.
        """
        if body is None or body.name is None:
            return await self.list_adapters()
        entry = await self._look_up(partial(self._folder.find, body.name), "name")
        bases = self._bases_of(entry)
        if not bases:
            raise BadRequestError(not_served(entry), "name")
        told = [await self._ask(base, "load_adapter", entry.name) for base in bases]
        # Where nothing tells whose it is, it is the base's that takes it.
        failures = min(filter(None, told), key=lambda one: len(one) - one.count(None), default=None)
        if failures is None:
            message = f"no replica of {' or '.join(bases)} is there now; a request for a picture starts one"
            raise ApiError(503, message, "server_error", code="no_replica", retry_after=SOON)
        for failure in failures:
            if failure is not None:
                raise of_failure(failure, param="name")
        return self._card(entry, [answer for base in bases for answer in await self._ask(base, "adapters")])

    async def unload_adapter(self, name: str) -> AdapterUnloaded:
        """Forget an adapter in all replicas. It stays in the folder, and is loaded again when it is asked for."""
        answers: list[Unloaded] = []
        for base in self._handles:
            answers += await self._ask(base, "unload_adapter", name)
        having = [answer for answer in answers if answer.forgotten or answer.in_use]
        in_use = [answer for answer in having if answer.in_use]
        if in_use:
            message = (
                f"pictures under way in {len(in_use)} of the {len(having)} replicas that have it need adapter '{name}'"
            )
            rest = ", the others have forgotten it" if len(having) > len(in_use) else ""
            raise ConflictError(f"{message}{rest}; try again", "adapter_in_use", max(one.retry_after for one in in_use))
        if not having and name not in await self._look_up(lambda: self._folder.names):
            raise NotFoundError("no adapter of that name is loaded, nor in the folder", "name", NOT_FOUND)
        return AdapterUnloaded(name=name, replicas=len(having))

    async def _look_up(self, work: Callable[[], T], param: str | None = None) -> T:
        """What the folder says; param: the field that names an adapter. Raises ApiError."""
        try:
            return await self._folder.ask(work)
        except AdapterError as error:
            raise of_adapter(str(error), error.code, param) from None

    async def _ask(self, base: str, method: str, *arguments: Any) -> list[Any]:
        """What each replica of a model answers; one that dies meanwhile has nothing to say."""
        try:
            answers = self._handles[base].broadcast(method, *arguments)
            results = await answers.results_async(return_exceptions=True)
        except DeploymentUnavailableError:
            return []
        for result in results:
            if isinstance(result, RayActorError):
                logger.warning("a replica of %s did not answer: %s", base, result)
            elif isinstance(result, BaseException):
                raise result
        return [result for result in results if not isinstance(result, RayActorError)]

    def _card(self, entry: AdapterEntry | BrokenEntry, told: list[AdaptersTold]) -> AdapterCard:
        about: dict[str, Any] = {"name": entry.name, "bytes": entry.found.bytes, "created": entry.found.created}
        if isinstance(entry, BrokenEntry):
            return AdapterCard(**about, problem=entry.reason)
        bases = self._bases_of(entry)
        failures = [answer.failures[entry.key] for answer in told if entry.key in answer.failures]
        loaded = Counter(key for answer in told for key in answer.loaded)[entry.key]
        problem = next(iter(failures), None) if bases else not_served(entry)
        return AdapterCard(
            **about,
            kind=entry.kind,
            base=next(iter(bases), None),
            tokens=list(entry.tokens),
            version=entry.version,
            loaded=loaded,
            problem=None if loaded and len(bases) > 1 else problem,
        )
