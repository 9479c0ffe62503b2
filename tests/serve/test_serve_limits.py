"""What holds for all replicas of the HTTP side together, of which there are two, with a real Ray Serve."""

import base64
import http.client
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from PIL import Image
from ray import serve
from serving import deploying
from waiting import wait_for

from ray_sd.serve.gate import hash_of

pytestmark = pytest.mark.slow

PATH = "/v1/images/generations"
LONG = {"prompt": "leaves", "num_inference_steps": 900, "size": "256x256"}
"""Takes far longer than a test does anything with it."""
SHORT = {"prompt": "a cat", "num_inference_steps": 2}


@pytest.fixture(scope="module")
def server(tiny: Path, ray_cluster: None) -> Iterator[str]:
    """Address of a server with two HTTP replicas, of which each request reaches either."""
    args = {
        "models": {"tiny": {"settings": [f"model.base={tiny}", "model.name=tiny_served"], "threads": 1}},
        "limits": {"max_pixels": 256 * 256, "max_steps": 900, "max_images": 3, "max_queue": 6, "deadline": 600},
        "keys": {"ann": hash_of("sd-ann"), "bob": {"sha256": hash_of("sd-bob"), "concurrent": 2}},
    }
    with deploying({"args": args, "deployments": [{"name": "api", "num_replicas": 2}]}) as address:
        yield address


@pytest.fixture
def web(server: str) -> Iterator[httpx.Client]:
    """Ann's."""
    wait_for(lambda: not figures()["busy"])
    with httpx.Client(base_url=server, headers=key_of("ann"), timeout=300) as client:
        yield client


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="sd-ann", max_retries=0, timeout=120)


def key_of(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer sd-{name}"}


def figures() -> dict[str, Any]:
    """What the engine has done so far."""
    return serve.get_deployment_handle("model-tiny", "ray_sd").figures.remote().result()


def begin_stream(stack: ExitStack, web: httpx.Client, **body: Any) -> Iterator[dict[str, Any]]:
    """Events of a stream that goes on until the stack is closed."""
    settings = {"json": LONG | {"stream": True} | body, "headers": web.headers}
    stream = stack.enter_context(web.stream("POST", PATH, **settings))
    assert stream.status_code == 200
    lines = stream.iter_lines()
    stack.callback(lines.close)  # kept until then: an iterator that is let go closes its connection
    return (json.loads(line[6:]) for line in lines if line.startswith("data: "))


def test_a_models_queue_is_one_whoever_is_asked(web: httpx.Client):
    with ExitStack() as stack:
        for ahead in (0, 3):
            events = begin_stream(stack, web, n=3)
            places = [next(event for event in events if "position" in event) for _ in range(3)]
            assert [place["image_index"] for place in places] == [0, 1, 2]
            assert [place["position"] for place in places] == [ahead, ahead + 1, ahead + 2]
        for _ in range(4):
            answer = web.post(PATH, json=SHORT)
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
            assert error["message"].startswith("6 pictures of 'tiny' wait or are drawn already, and at most 6 may; try")
    wait_for(lambda: web.post(PATH, json=SHORT).status_code == 200, seconds=10)


def test_a_keys_requests_are_counted_whoever_is_asked(web: httpx.Client):
    web.headers.update(key_of("bob"))
    with ExitStack() as stack:
        for _ in range(2):
            next(begin_stream(stack, web))
        for _ in range(4):
            answer = web.post(PATH, json=SHORT)
            assert answer.status_code == 429
            assert answer.json()["error"]["message"] == "2 of your requests are under way, as many as may be"
        edit = {"data": {"prompt": "a cat"}, "files": {"image": b"no picture"}}
        assert web.post("/v1/images/edits", **edit).status_code == 429  # before it is read
        assert web.post("/v1/images/edits", **edit, headers={"Idempotency-Key": "edit"}).status_code == 400
        assert web.post(PATH, json={}).status_code == 400
        assert web.post(PATH, json=SHORT, headers=key_of("ann")).status_code == 200
    wait_for(lambda: web.post(PATH, json=SHORT).status_code == 200, seconds=10)


def test_a_request_that_is_made_again_is_answered_by_the_same_picture(web: httpx.Client):
    drawn = figures()["pictures"]
    repeated = {"json": SHORT | {"num_inference_steps": 100}, "headers": {"Idempotency-Key": "at once"}}
    with ThreadPoolExecutor(4) as threads:
        answers = [answer.result() for answer in [threads.submit(web.post, PATH, **repeated) for _ in range(4)]]
    answers.append(web.post(PATH, **repeated))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert figures()["pictures"] == drawn + 1
    other = web.post(PATH, json=SHORT, headers=repeated["headers"])
    error = other.json()["error"]
    assert (other.status_code, error["code"], error["param"]) == (422, "idempotency_key_reused", "Idempotency-Key")
    assert web.post(PATH, json=SHORT, headers=repeated["headers"] | key_of("bob")).status_code == 200


def test_a_form_that_is_sent_again_is_the_same_request(client: openai.OpenAI):
    content = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(content, "PNG")
    settings = {"extra_body": {"num_inference_steps": 4}, "extra_headers": {"Idempotency-Key": "a form"}}
    first, again = (client.images.edit(image=content.getvalue(), prompt="a cat", **settings) for _ in range(2))
    assert first.data[0].b64_json == again.data[0].b64_json  # whose seeds were not given
    with pytest.raises(openai.UnprocessableEntityError, match="another request was made by this Idempotency-Key"):
        client.images.edit(image=content.getvalue(), prompt="a dog", **settings)


def test_who_leaves_and_asks_again_finds_the_picture(server: str, web: httpx.Client):
    before = figures()
    headers = {"Idempotency-Key": "patient"} | key_of("ann")
    body = SHORT | {"num_inference_steps": 200}
    connection = http.client.HTTPConnection(server.removeprefix("http://"))
    connection.request("POST", PATH, json.dumps(body), {"Content-Type": "application/json"} | headers)
    wait_for(lambda: figures()["steps"] >= before["steps"] + 5)
    connection.close()
    answer = web.post(PATH, json=body, headers=headers)
    assert (answer.status_code, answer.headers["idempotent-replayed"]) == (200, "true")
    after = figures()
    assert (after["pictures"], after["cancelled"]) == (before["pictures"] + 1, before["cancelled"])
    assert after["steps"] == before["steps"] + 200


@pytest.mark.parametrize(
    ("body", "headers", "param", "words"),
    [
        ({"stream": True}, {"Idempotency-Key": "a"}, "Idempotency-Key", "a stream cannot be had again; leave out"),
        ({}, {"Idempotency-Key": "a" * 256}, "Idempotency-Key", "has 256 characters; 1 to 255 are taken"),
        (
            {"stream": True, "response_format": "url"},
            {},
            "response_format",
            "a stream sends its pictures; leave out url",
        ),
    ],
)
def test_what_cannot_be_kept_is_told(web: httpx.Client, body: dict, headers: dict, param: str, words: str):
    answer = web.post(PATH, json=SHORT | body, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert words in error["message"]


@pytest.mark.parametrize("format", ["png", "webp"])
def test_a_link_leads_to_the_picture_without_a_key(server: str, client: openai.OpenAI, format: str):
    settings = {"prompt": "a cat", "n": 2, "output_format": format, "extra_body": {"num_inference_steps": 2, "seed": 7}}
    links = client.images.generate(response_format="url", **settings).data
    pictures = client.images.generate(**settings).data
    for found, expected in zip(links, pictures, strict=True):
        assert found.b64_json is None
        assert expected.url is None
        assert found.url.startswith(f"{server}/v1/images/files/")
        assert found.url.endswith(f".{format}")
        file = httpx.get(found.url)
        assert file.content == base64.b64decode(expected.b64_json)
        assert Image.open(io.BytesIO(file.content)).size == (64, 64)
        shown = {
            "content-type": f"image/{format}",
            "cache-control": "private",
            "content-length": str(len(file.content)),
        }
        for answer in (file, httpx.head(found.url)):
            assert shown.items() <= dict(answer.headers).items()
        assert httpx.head(found.url).content == b""


def test_links_are_by_the_host_that_was_asked(web: httpx.Client):
    headers = {"Host": "pictures.example:8443", "X-Forwarded-Proto": "https"}
    answer = web.post(PATH, json=SHORT | {"response_format": "url"}, headers=headers)
    assert answer.json()["data"][0]["url"].startswith("https://pictures.example:8443/v1/images/files/")


def test_a_link_to_nothing_is_told_in_openais_words(server: str):
    answer = httpx.get(f"{server}/v1/images/files/nothing.png")
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (404, "invalid_request_error", "file_not_found")


def test_requests_go_on_without_the_admission_until_there_is_another(web: httpx.Client):
    linked = {"json": SHORT | {"response_format": "url"}}
    link = web.post(PATH, **linked).json()["data"][0]["url"]
    [actor] = [one for one in ray.util.list_named_actors(all_namespaces=True) if one["name"].endswith("admission")]
    ray.kill(ray.get_actor(**actor))
    for _ in range(4):
        assert web.post(PATH, json=SHORT).status_code == 200
    again = wait_for(lambda: (answer := web.post(PATH, **linked)).status_code == 200 and answer)
    assert httpx.get(again.json()["data"][0]["url"]).status_code == 200
    assert httpx.get(link).status_code == 404
