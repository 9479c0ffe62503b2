"""What every request passes first: who asks, how large it is, and how long it takes to come."""

import asyncio
import hashlib
import logging
import os
import secrets
import time
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ray_sd.config.serve import ApiKey
from ray_sd.serve.document import GUARDED
from ray_sd.serve.errors import REASON, ApiError, ForbiddenError
from ray_sd.serve.links import FILES
from ray_sd.serve.metrics import RequestMetrics

logger = logging.getLogger(__name__)

HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
"""Set to 1 where Ray Serve has it before replicas, which then see its address rather than clients'."""
REQUEST_ID = "x-request-id"
CLIENT = "client"
"""Key of the request's state that holds the client."""


@dataclass(frozen=True)
class Client:
    """Who asks."""

    name: str
    key: ApiKey


ANYBODY = Client("", ApiKey(sha256="0" * 64, role="admin"))
"""On this machine, where there are no keys."""
NOBODY = Client("", ApiKey(sha256="0" * 64))
"""On a path that no key is needed for."""


def hash_of(key: str) -> str:
    """What is kept of a key. Keys are random and long, so that no salt is needed."""
    return hashlib.sha256(key.encode()).hexdigest()


class Gate:
    """An ASGI application before another."""

    def __init__(self, app: ASGIApp, keys: dict[str, ApiKey], max_body: int, seconds: float) -> None:
        """keys: by the names of their holders; max_body: bytes of a request; seconds: in which it has to come."""
        self._app = app
        self.take(keys, max_body, seconds)
        self._metrics = RequestMetrics()

    def take(self, keys: dict[str, ApiKey], max_body: int, seconds: float) -> None:
        """Other keys and limits, for requests from now on."""
        self._clients = {key.sha256: Client(name, key) for name, key in keys.items()}
        self._max_body = max_body
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, client = time.perf_counter(), 0, None
        given = Headers(scope=scope).get(REQUEST_ID)  # by Ray Serve's proxy, which answers with it, too
        request_id = given or secrets.token_hex(8)
        scope.setdefault("state", {})

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if given is None:
                    MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            client = self._identify(scope)
            scope["state"][CLIENT] = client
            self._check_length(scope)
            await self._app(scope, self._counted(receive), send_with_id)
        except ApiError as error:
            scope["state"][REASON] = error.reason
            await JSONResponse(error.body, error.status, headers=error.headers)(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - began
            reason = scope["state"].get(REASON, "")
            self._metrics.tell(scope["method"], _route(scope), status, reason, seconds)
            name = client.name if client else None
            told = {
                "request_id": request_id,
                "client": name,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "reason": reason,
                "seconds": round(seconds, 4),
            }
            message = "%s: %s %r %d %s %.4f s"
            logger.info(message, name or "-", scope["method"], scope["path"], status, reason, seconds, extra=told)

    def _identify(self, scope: Scope) -> Client:
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # of an application that is not at /
        if not path.startswith(GUARDED) or path.startswith(FILES):
            return NOBODY
        if not self._clients:
            if not _is_of_this_machine(scope):
                raise ForbiddenError(
                    "this server has no keys, and so answers its own machine only; "
                    "python -m ray_sd.serve.gate makes a key, which goes into its configuration under keys"
                )
            return ANYBODY
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        client = self._clients.get(hash_of(key.strip())) if kind.lower() == "bearer" else None
        if client is None:
            message = "give a key, as in Authorization: Bearer KEY" if not key else "this key is not known"
            raise ApiError(401, message, "authentication_error", code="invalid_api_key")
        return client

    def _check_length(self, scope: Scope) -> None:
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_body:
            raise ApiError(413, self._too_large, "invalid_request_error")

    @property
    def _too_large(self) -> str:
        return f"a request has at most {self._max_body} bytes"

    def _counted(self, receive: Receive) -> Receive:
        """Ends a request that is larger than it said, or that does not come: each takes one of Serve's places."""
        read, whole = 0, False
        end = asyncio.get_running_loop().time() + self._seconds
        late = f"a request has to be sent within {self._seconds:g} s"

        async def counted() -> Message:
            nonlocal read, whole
            try:
                async with asyncio.timeout_at(None if whole else end):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, late) from None
            read += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if read > self._max_body:
                raise HTTPException(413, self._too_large)
            return message

        return counted


def _is_of_this_machine(scope: Scope) -> bool:
    """Whether the client is. A proxy there that names who asks it by X-Forwarded-For is not counted as the client."""
    if os.environ.get(HAPROXY) == "1":
        return False
    host, _ = scope.get("client") or ("", 0)
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None  # where a server listens at both
    return (mapped or address).is_loopback


async def only_admins(request: Request) -> None:
    """Raises ForbiddenError for who has a user's key."""
    client: Client = request.scope["state"][CLIENT]
    if client.key.role != "admin":
        raise ForbiddenError(f"the key of '{client.name}' is a user's; this is for those of an admin (role: admin)")


def _route(scope: Scope) -> str:
    """The path as the application declares it, since those that clients make up are without number."""
    return getattr(scope.get("route"), "path", "")


def main() -> None:
    """Prints a new key, and what `serve_config.yaml` takes of it: `python -m ray_sd.serve.gate`."""
    key = f"sd-{secrets.token_urlsafe(32)}"
    print(f"key:    {key}")  # noqa: T201
    print(f"sha256: {hash_of(key)}")  # noqa: T201


if __name__ == "__main__":
    main()
