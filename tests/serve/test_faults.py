"""A server under load whose replica is killed, one that is deployed anew, and others whose state changes while they serve."""

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import AF_INET
from typing import Any

import httpx
import openai
import psutil
import pytest
from ray import serve
from serving import deploy, deploying, log_of
from waiting import wait_for

from ray_sd.serve.gate import hash_of

pytestmark = pytest.mark.slow

LOAD = 3
"""Clients that ask for one picture after another."""
PATH = "/v1/images/generations"


@pytest.fixture
def arguments(tiny: Path) -> dict[str, Any]:
    settings = [f"model.base={tiny}", "model.name=tiny_served"]
    return {"models": {"tiny": {"settings": settings, "threads": 1}}, "defaults": {"num_inference_steps": 4}}


@contextmanager
def load(address: str) -> Iterator[list[httpx.Response]]:
    """What clients are answered meanwhile."""
    answers: list[httpx.Response] = []
    ended = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=300) as client:
            while not ended.is_set():
                answers.append(client.post(f"{address}{PATH}", json={"prompt": "a cat"}))

    with ThreadPoolExecutor(LOAD) as clients:
        asking = [clients.submit(ask) for _ in range(LOAD)]
        try:
            yield answers
        finally:
            ended.set()
    for one in asking:
        one.result()  # raises where a connection broke


def replicas(deployment: str = "model-tiny") -> list[psutil.Process]:
    """Processes of a deployment's replicas, in the Ray that these tests have started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if f"ServeReplica:ray_sd:{deployment}" in process.name():
                found.append(process)
    return found


def drawn(answers: list[httpx.Response]) -> int:
    return sum(answer.status_code == 200 for answer in answers)


def test_a_killed_replica_comes_back_and_who_asked_is_told_to_ask_again(arguments: dict[str, Any], ray_cluster: None):
    with deploying({"args": arguments}) as address, load(address) as answers:
        wait_for(lambda: drawn(answers) > 3)
        for deployment in ("model-tiny", "api"):
            [killed] = replicas(deployment)
            killed.kill()
            wait_for(lambda deployment=deployment, pid=killed.pid: {one.pid for one in replicas(deployment)} - {pid})
            before = drawn(answers)
            wait_for(lambda before=before: drawn(answers) > before + LOAD)
    client = openai.OpenAI(api_key="none")
    assert all(answer.status_code == 200 or client._should_retry(answer) for answer in answers)
    by_proxy = [answer for answer in answers if answer.status_code == 500]  # of what the HTTP side had under way
    assert not any("Traceback" in answer.text for answer in by_proxy), by_proxy[0].text
    for answer in answers:
        if answer.status_code != 200 and answer not in by_proxy:
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
            assert int(answer.headers["retry-after"]) >= 1


def test_a_change_is_deployed_without_a_failed_request(arguments: dict[str, Any], ray_cluster: None):
    with deploying({"args": arguments}) as address, load(address) as answers:
        wait_for(lambda: drawn(answers) > 3)
        before = {one.pid for one in replicas()}
        deploy({"args": arguments | {"defaults": {"num_inference_steps": 2}}})
        wait_for(lambda: before.isdisjoint(one.pid for one in replicas()))
        since = drawn(answers)
        wait_for(lambda: drawn(answers) > since + LOAD)
    assert {answer.status_code for answer in answers} == {200}


def test_limits_and_the_sharing_of_steps_change_without_a_restart(arguments: dict[str, Any], ray_cluster: None):
    body = {"prompt": "a cat", "num_inference_steps": 3}
    live = [
        {"name": "api", "user_config": {"limits": {"max_steps": 2}, "keys": {"ann": hash_of("sd-ann")}}},
        {"name": "model-tiny", "user_config": {"batching": {"max_rows": 4}}},
    ]
    with deploying({"args": arguments}) as address:
        assert httpx.get(f"{address}/ready", timeout=60).json() == {"status": "ready"}
        answer = httpx.post(f"{address}{PATH}", json=body, timeout=60)
        assert answer.status_code == 200
        line = rf"{answer.headers['x-request-id']} -- -: POST '{PATH}' 200 +[\d.]+ s$"
        wait_for(lambda: re.search(line, log_of("api"), re.MULTILINE))
        before = {one.pid for one in replicas()}
        deploy({"args": arguments, "deployments": live})
        assert httpx.post(f"{address}{PATH}", json=body, timeout=60).status_code == 401
        header = {"Authorization": "Bearer sd-ann"}
        answer = httpx.post(f"{address}{PATH}", json=body, headers=header, timeout=60)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "num_inference_steps")
        assert {one.pid for one in replicas()} == before
        wrong = [
            {"name": "api", "user_config": {"limits": {"max_step": 900}}},
            {"name": "model-tiny", "user_config": {"batching": {"max_row": 4}}},
        ]
        deploy({"args": arguments, "deployments": wrong})
        wait_for(lambda: "goes on as it was: limits.max_step: no such setting; did you mean" in log_of("api"))
        wait_for(lambda: "goes on as it was: batching.max_row: no such setting; did you mean" in log_of("model-tiny"))
        assert httpx.post(f"{address}{PATH}", json=body, timeout=60).status_code == 401
        again = httpx.post(f"{address}{PATH}", json=body, headers=header, timeout=60)
        assert (again.status_code, again.json()) == (answer.status_code, answer.json())
        assert {one.pid for one in replicas()} == before


def test_a_server_is_ready_while_every_model_has_a_replica_that_answers(arguments: dict[str, Any], ray_cluster: None):
    models = arguments["models"]
    with deploying({"args": arguments | {"models": models | {"other": models["tiny"]}}}) as address:
        assert httpx.get(f"{address}/ready", timeout=60).json() == {"status": "ready"}
        [stopped] = replicas("model-other")
        stopped.suspend()
        try:
            answer = httpx.get(f"{address}/ready", timeout=60)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
            assert answer.json()["error"]["message"] == "no replica of other answers"
            assert int(answer.headers["retry-after"]) >= 1
            assert httpx.get(f"{address}/health", timeout=60).status_code == 200
        finally:
            stopped.resume()
        wait_for(lambda: httpx.get(f"{address}/ready", timeout=60).status_code == 200)


def test_without_keys_only_this_machine_may_ask_wherever_serve_listens(arguments: dict[str, Any], ray_cluster: None):
    elsewhere = {"X-Forwarded-For": "192.0.2.9"}  # as a proxy on this machine tells of another one
    addresses = [one.address for found in psutil.net_if_addrs().values() for one in found if one.family == AF_INET]
    with deploying({"args": arguments}, host="0.0.0.0") as address:
        assert httpx.get(f"{address}/v1/models").status_code == 200
        asked = {one: httpx.get(f"{address.replace('127.0.0.1', one)}/v1/models") for one in addresses}
        asked["a proxy"] = httpx.get(f"{address}/v1/models", headers=elsewhere)
        assert {one: answer.status_code for one, answer in asked.items()} == {
            one: 200 if one.startswith("127.") else 403 for one in asked
        }
        assert "python -m ray_sd.serve.gate makes a key" in asked["a proxy"].json()["error"]["message"]
        deploy(
            {"args": arguments, "deployments": [{"name": "api", "user_config": {"keys": {"ann": hash_of("sd-ann")}}}]}
        )
        with_key = {"Authorization": "Bearer sd-ann"}
        assert httpx.get(f"{address}/v1/models", headers=elsewhere | with_key).status_code == 200


def test_replicas_come_with_the_steps_that_are_queued_and_go_again(arguments: dict[str, Any], ray_cluster: None):
    growing = {"min": 1, "max": 2, "steps": 1, "upscale_delay": 0, "downscale_delay": 1}
    models = {"tiny": arguments["models"]["tiny"] | {"replicas": growing}}

    def pictures() -> list[int]:
        """That each replica has drawn."""
        told = serve.get_deployment_handle("model-tiny", "ray_sd").broadcast("figures").results()
        return sorted(figures["pictures"] for figures in told)

    with deploying({"args": arguments | {"models": models}}) as address:
        assert pictures() == [0]
        with load(address) as answers:
            wait_for(lambda: len(drawn_by := pictures()) == 2 and drawn_by[0] > 0)
        wait_for(lambda: len(replicas()) == 1)
        assert httpx.post(f"{address}{PATH}", json={"prompt": "a dog"}, timeout=60).status_code == 200
    assert {answer.status_code for answer in answers} == {200}
