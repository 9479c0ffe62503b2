"""Keys and sizes, before an application that reads what it is sent."""

import asyncio
import logging

import httpx
import pytest
from ray.serve._private import constants
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from ray_sd.config.serve import ApiKey
from ray_sd.serve.errors import ApiError, answer_api_error, answer_defect, answer_http
from ray_sd.serve.gate import CLIENT, HAPROXY, Gate, hash_of, only_admins
from ray_sd.serve.links import FILES
from ray_sd.serve.metrics import RequestMetrics

KEYS = {
    "ann": ApiKey(sha256=hash_of("sd-ann")),
    "bob": ApiKey(sha256=hash_of("sd-bob")),
    "cleo": ApiKey(sha256=hash_of("sd-cleo"), role="admin"),
}


def client(
    keys: dict[str, ApiKey] | None = None,
    max_body: int = 100,
    root_path: str = "",
    seconds: float = 60,
    address: str = "127.0.0.1",
) -> httpx.AsyncClient:
    async def answer(request: Request) -> PlainTextResponse:
        body = await request.body()
        return PlainTextResponse(f"{request.scope['state'][CLIENT].name} {len(body)}")

    async def load(request: Request) -> PlainTextResponse:
        await only_admins(request)
        return PlainTextResponse("loaded")

    routes = [
        Route("/v1/draw", answer, methods=["GET", "POST"]),
        Route("/v1/load", load, methods=["POST"]),
        Route(f"{FILES}{{name}}", answer),
        Route("/health", answer),
        Route("/careless", load),
    ]
    handlers = {HTTPException: answer_http, ApiError: answer_api_error}
    inner = Starlette(routes=routes, exception_handlers=handlers)
    application = Gate(inner, KEYS if keys is None else keys, max_body, seconds)
    transport = httpx.ASGITransport(application, root_path=root_path, client=(address, 50000))
    return httpx.AsyncClient(transport=transport, base_url="http://here")


def as_(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer sd-{name}"}


async def ask(http: httpx.AsyncClient, path: str = "/v1/draw", **settings: object) -> httpx.Response:
    async with http:
        return await http.post(path, **settings)


@pytest.mark.parametrize("headers", [{}, as_("eve"), {"Authorization": "Basic sd-ann"}, {"Authorization": "sd-ann"}])
def test_who_is_not_known_is_not_let_in(headers: dict):
    response = asyncio.run(ask(client(), headers=headers))
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_a_key_is_needed_wherever_the_application_is():
    at = {"root_path": "/pictures"}
    assert asyncio.run(ask(client(**at), "/pictures/v1/draw")).status_code == 401
    assert asyncio.run(ask(client(**at), "/pictures/v1/draw", headers=as_("ann"))).text == "ann 0"


@pytest.mark.parametrize("address", ["192.0.2.1", "fd00::1", "::ffff:192.0.2.1", "", "testclient"])
def test_without_keys_other_machines_are_told_what_is_missing(address: str):
    refused = asyncio.run(ask(client(keys={}, address=address)))
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
    assert "python -m ray_sd.serve.gate makes a key" in refused.json()["error"]["message"]
    assert asyncio.run(client(keys={}, address=address).get("/health")).status_code == 200
    assert asyncio.run(ask(client(address=address), headers=as_("ann"))).text == "ann 0"


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"])
def test_without_keys_this_machine_may_ask(address: str):
    assert asyncio.run(ask(client(keys={}, address=address))).text == " 0"


def test_without_keys_nobody_may_ask_where_serve_does_not_tell_who_does(monkeypatch: pytest.MonkeyPatch):
    assert HAPROXY in vars(constants)
    monkeypatch.setenv(HAPROXY, "1")
    assert asyncio.run(ask(client(keys={}))).status_code == 403


def test_some_of_it_is_for_admins():
    refused = asyncio.run(ask(client(), "/v1/load", headers=as_("ann")))
    assert refused.status_code == 403
    assert refused.json()["error"]["type"] == "permission_error"
    assert "the key of 'ann' is a user's" in refused.json()["error"]["message"]
    assert asyncio.run(ask(client(), "/v1/load", headers=as_("cleo"))).text == "loaded"
    assert asyncio.run(ask(client(keys={}), "/v1/load")).text == "loaded"
    assert asyncio.run(client().get("/careless")).status_code == 403


@pytest.mark.parametrize(
    ("path", "headers", "told"),
    [
        ("/v1/draw", as_("ann"), ("POST", "/v1/draw", 200, "")),
        ("/v1/draw", as_("eve"), ("POST", "", 401, "invalid_api_key")),
        ("/v1/draw", as_("ann") | {"content-length": "1000"}, ("POST", "", 413, "invalid_request_error")),
        ("/nowhere/1234", {}, ("POST", "", 404, "invalid_request_error")),
    ],
)
def test_every_request_is_counted_with_why_it_was_refused(
    monkeypatch: pytest.MonkeyPatch, path: str, headers: dict, told: tuple
):
    counted = []
    monkeypatch.setattr(RequestMetrics, "tell", lambda self, *values: counted.append(values))
    asyncio.run(ask(client(), path, headers=headers))
    assert [values[:4] for values in counted] == [told]
    assert counted[0][4] > 0


def test_who_is_known_is_told_to_the_application():
    assert asyncio.run(ask(client(), headers=as_("ann"))).text == "ann 0"
    assert asyncio.run(ask(client(keys={}))).text == " 0"
    assert asyncio.run(client().get("/health")).text == " 0"
    assert asyncio.run(client().get(f"{FILES}1234.png")).text == " 0"


def test_requests_that_are_too_large_are_ended_whatever_they_say():
    async def chunks():
        for _ in range(5):
            yield b"x" * 30

    assert asyncio.run(ask(client(), headers=as_("ann"), content=b"x" * 100)).text == "ann 100"
    for content in (b"x" * 101, chunks()):
        response = asyncio.run(ask(client(), headers=as_("ann"), content=content))
        assert response.status_code == 413
        assert response.json()["error"]["message"] == "a request has at most 100 bytes"


def test_a_request_that_does_not_come_is_ended():
    async def chunks():
        yield b"x"
        await asyncio.Event().wait()

    response = asyncio.run(ask(client(seconds=0.01), headers=as_("ann"), content=chunks()))
    assert response.status_code == 408
    assert response.json()["error"]["message"] == "a request has to be sent within 0.01 s"


def test_every_answer_has_an_id_that_the_log_has(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "ray_sd.serve.gate"):
        response = asyncio.run(ask(client(), headers=as_("ann")))
        refused = asyncio.run(ask(client()))
    records = {record.request_id: record for record in caplog.records}
    assert records[response.headers["x-request-id"]].client == "ann"
    assert records[refused.headers["x-request-id"]].status == 401


def test_a_defect_is_told_without_what_it_was():
    async def fail(request: Request) -> PlainTextResponse:
        raise RuntimeError("the secret of the house")

    app = Starlette(routes=[Route("/v1/fail", fail)], exception_handlers={Exception: answer_defect})
    transport = httpx.ASGITransport(Gate(app, {}, 100, 60), raise_app_exceptions=False)
    answer = asyncio.run(httpx.AsyncClient(transport=transport, base_url="http://here").get("/v1/fail"))
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in answer.text
