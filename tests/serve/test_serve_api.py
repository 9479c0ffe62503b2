"""The HTTP side with a real Ray Serve, by the unmodified OpenAI client."""

import base64
import http.client
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import ray
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from ray import serve
from serving import serving
from tiny_models import difference, export_adapter, tiny_config
from waiting import wait_for

from ray_sd import __version__
from ray_sd.generate import ImageRequest, generate
from ray_sd.media.pictures import read_parameters
from ray_sd.methods import load_adapter
from ray_sd.models import load_model
from ray_sd.serve.app import build

LIMITS = {
    "max_pixels": 256 * 256,
    "max_steps": 900,
    "max_images": 3,
    "max_adapters": 2,
    "max_upload_bytes": 100_000,
    "deadline": 600,
}
PATIENCE = 10_000
"""More than the steps of any picture, so that of those that take their steps alone the first takes all of its own."""
LONG = {"prompt": "leaves", "num_inference_steps": 900, "size": "256x256"}
"""Takes far longer than a test does anything with it."""
PATH = "/v1/images/generations"
SAME = 1
"""Of 255: sums in another order, as other batches and processors have them, may end at the other side of a rounding."""


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    export_adapter(tiny, folder / "pet", {"name": "lora", "rank": 4}, name="tiny_served")
    export_adapter(
        tiny, folder / "word", {"name": "textual_inversion", "placeholder_token": "<cat>"}, name="tiny_served"
    )
    shutil.copytree(folder / "pet", folder / "twin")
    export_adapter(tiny, folder / "strange", {"name": "lora", "rank": 4}, name="another")
    return folder


@pytest.fixture(scope="module")
def server(tiny: Path, folder: Path, ray_cluster: None) -> Iterator[str]:
    """Address of a server of the tiny model."""
    settings = [f"model.base={tiny}", "model.name=tiny_served", "model.scheduler.sampler=ddim"]
    arguments = {
        "models": {"tiny": {"settings": settings, "threads": 1, "batching": {"max_waiting": 8, "patience": PATIENCE}}},
        "adapters": str(folder),
        "limits": LIMITS,
        "defaults": {"num_inference_steps": 4, "guidance_scale": 3.0},
    }
    with serving(build(arguments)) as address:
        yield address


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120)


def plain(tiny: Path, prompt: str, seed: int, adapter: Path | None = None, steps: int = 4) -> Image.Image:
    model = load_model(tiny_config(tiny, scheduler={"sampler": "ddim"}))
    if adapter is not None:
        load_adapter(model, adapter)
    pipeline = model.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipeline(prompt, num_inference_steps=steps, guidance_scale=3.0, generator=generator).images[0]


def opened(text: str | None) -> Image.Image:
    assert text is not None
    return Image.open(io.BytesIO(base64.b64decode(text)))


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def photo(side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))


def test_pictures_are_those_of_the_plain_pipeline(client: openai.OpenAI, tiny: Path):
    response = client.images.generate(prompt="a cat", n=2, extra_body={"seed": 5})
    assert response.size == "64x64"
    for number, data in enumerate(response.data):
        picture = opened(data.b64_json)
        assert difference(picture, plain(tiny, "a cat", 5 + number)) <= SAME
        parameters = read_parameters(io.BytesIO(base64.b64decode(data.b64_json)))
        assert parameters == {
            "model": "tiny_served",
            "base": tiny.name,
            "served_model": "tiny",
            "ray_sd": __version__,
            "prompt": "a cat",
            "negative_prompt": "",
            "prompt_weighting": False,
            "seed": 5 + number,
            "num_inference_steps": 4,
            "guidance_scale": 3.0,
            "scheduler": None,
            "sampler": "ddim",
            "height": 64,
            "width": 64,
            "adapters": [],
        }


@pytest.mark.parametrize("format", ["webp", "jpeg"])
def test_other_formats_carry_parameters_too(client: openai.OpenAI, format: str):
    response = client.images.generate(
        prompt="a ü cat", output_format=format, output_compression=80, size="64x96", extra_body={"seed": 1}
    )
    content = base64.b64decode(response.data[0].b64_json)
    picture = Image.open(io.BytesIO(content))
    assert (picture.format, picture.size) == (format.upper(), (64, 96))
    assert read_parameters(io.BytesIO(content))["prompt"] == "a ü cat"


def test_an_adapter_is_a_model_or_a_choice(client: openai.OpenAI, tiny: Path, folder: Path):
    as_model = client.images.generate(prompt="a cat", model="pet", extra_body={"seed": 5})
    chosen = client.images.generate(prompt="a cat", extra_body={"seed": 5, "adapters": ["pet"]})
    expected = plain(tiny, "a cat", 5, folder / "pet")
    for response in (as_model, chosen):
        assert difference(opened(response.data[0].b64_json), expected) <= SAME
    mixed = {"seed": 5, "adapters": [{"name": "pet", "weight": 0.5}, {"name": "word"}]}
    response = client.images.generate(prompt="a <cat>", extra_body=mixed)
    assert difference(opened(response.data[0].b64_json), expected) > 10 * SAME
    assert read_parameters(io.BytesIO(base64.b64decode(response.data[0].b64_json)))["adapters"] == [
        {"name": "pet", "weight": 0.5},
        {"name": "word", "weight": 1.0},
    ]


def test_weights_of_words_are_read_where_they_are_asked_for(client: openai.OpenAI, tiny: Path):
    prompt = "a (red)1.8 cat"
    model = load_model(tiny_config(tiny, scheduler={"sampler": "ddim"}))
    drawn = []
    for weighted in (True, False):
        settings = {"seed": 5, "prompt_weighting": weighted}
        drawn.append(opened(client.images.generate(prompt=prompt, extra_body=settings).data[0].b64_json))
        request = ImageRequest(prompt, num_inference_steps=4, guidance_scale=3.0, **settings)
        assert difference(drawn[-1], generate(model, [request])[0]) <= SAME
    assert difference(*drawn) > 10 * SAME


def test_models_are_listed(client: openai.OpenAI):
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"tiny", "pet", "twin", "word", "strange"}
    assert models["pet"].base == "tiny"
    assert models["word"].tokens == ["<cat>"]
    assert models["strange"].base is None
    assert client.models.retrieve("tiny").kind == "base"
    with pytest.raises(openai.NotFoundError, match="no model 'cow'"):
        client.models.retrieve("cow")


def test_a_stream_shows_the_picture_on_its_way(client: openai.OpenAI, tiny: Path):
    events = list(
        client.images.generate(
            prompt="a cat", stream=True, partial_images=2, extra_body={"seed": 5, "num_inference_steps": 9}
        )
    )
    shown = [event for event in events if event.type != "image_generation.progress"]
    assert [event.type for event in shown] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in shown[:2]] == [0, 1]
    pictures = [opened(event.b64_json) for event in shown]
    assert difference(pictures[-1], plain(tiny, "a cat", 5, steps=9)) <= SAME
    assert difference(pictures[0], pictures[-1]) > 2 * SAME


def test_a_stream_tells_place_and_steps(client: openai.OpenAI):
    stream = client.images.generate(prompt="a cat", stream=True, extra_body={"num_inference_steps": 3})
    progress = [event.model_extra for event in stream if event.type == "image_generation.progress"]
    assert progress[0] == {"image_index": 0, "position": 0}
    assert progress[1:] == [{"image_index": 0, "step": step, "steps": 3} for step in (1, 2, 3)]


def test_edits_draw_over_a_picture_and_within_a_mask(client: openai.OpenAI):
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (32, 0, 64, 64))
    settings = {"seed": 3, "num_inference_steps": 6, "strength": 0.9}
    whole = client.images.edit(image=png(photo()), prompt="a cat", extra_body=settings)
    masked = client.images.edit(
        image=("photo.png", png(photo())),
        mask=("mask.png", png(mask)),
        prompt="a cat",
        extra_body=settings | {"adapters": json.dumps([{"name": "pet", "weight": 0.5}])},
    )
    for response, is_masked in ((whole, False), (masked, True)):
        parameters = read_parameters(io.BytesIO(base64.b64decode(response.data[0].b64_json)))
        assert (parameters["strength"], parameters["mask"]) == (0.9, is_masked)
        assert "image" not in parameters
    sizes = {opened(response.data[0].b64_json).size for response in (whole, masked)}
    assert sizes == {(64, 64)}
    assert difference(opened(whole.data[0].b64_json), opened(masked.data[0].b64_json)) > 10 * SAME
    events = list(
        client.images.edit(image=png(photo(72)), prompt="a cat", stream=True, partial_images=1, extra_body=settings)
    )
    assert sorted({event.type for event in events}) == [
        "image_edit.completed",
        "image_edit.partial_image",
        "image_edit.progress",
    ]
    assert opened(events[-1].b64_json).size == (72, 72)


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({}, 400, "prompt", "prompt: is missing"),
        ({"prompt": "a", "promt": "b"}, 400, "promt", "promt: no such field"),
        ({"prompt": "a", "n": 0}, 400, "n", "n: "),
        ({"prompt": "a", "n": 4}, 400, "n", "n: 4 is more than the 3"),
        ({"prompt": "a", "size": "big"}, 400, "size", "WIDTHxHEIGHT"),
        ({"prompt": "a", "size": "60x64"}, 400, "size", "multiples of 8"),
        ({"prompt": "a", "size": "512x512"}, 400, "size", "more than 65536 pixels"),
        ({"prompt": "a", "num_inference_steps": 901}, 400, "num_inference_steps", "more than the 900"),
        ({"prompt": "a" * 2001}, 400, "prompt", "2001 is more than the 2000"),
        ({"prompt": "a", "scheduler": "magic"}, 400, "scheduler", "scheduler: "),
        ({"prompt": "a", "model": "cow"}, 404, "model", "no model 'cow'; there are tiny"),
        ({"prompt": "a", "model": "../pet"}, 404, "model", "no model 'of that name'"),
        ({"prompt": "a", "adapters": ["pet", "pet"]}, 400, "adapters", "each may be named once"),
        ({"prompt": "a", "adapters": ["pet", "twin", "word"]}, 400, "adapters", "adapters: 3 is more than the 2"),
        ({"prompt": "a", "adapters": ["strange"]}, 400, "adapters", "is for the base 'another', not for 'tiny'"),
        ({"prompt": "a", "adapters": ["word"], "model": "word"}, 400, "adapters", "each may be named once"),
        (
            {"prompt": "a", "adapters": [{"name": "word", "weight": 0.5}]},
            400,
            "adapters",
            "is a word, which has no strength",
        ),
        ({"prompt": "a", "response_format": "file"}, 400, "response_format", "b64_json"),
        ({"prompt": "(a", "prompt_weighting": True, "seed": 2**63}, 400, "seed", "seed: "),
        ({"prompt": "a", "scheduler": "lcm", "num_inference_steps": 51}, 400, "num_inference_steps", "cannot take 51"),
        ({"prompt": '("a", "b").blend(1, 2)', "prompt_weighting": True}, 400, "prompt", "more than weights"),
    ],
)
def test_bad_requests_are_told_in_openais_words(server: str, body: dict, status: int, param: str | None, words: str):
    response = httpx.post(f"{server}/v1/images/generations", json=body, timeout=60)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_what_is_no_json_no_route_and_no_picture_is_told(server: str, client: openai.OpenAI):
    response = httpx.post(f"{server}/v1/images/generations", content=b"{", timeout=60)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
    response = httpx.get(f"{server}/v1/nothing")
    assert (response.status_code, response.json()["error"]["type"]) == (404, "invalid_request_error")
    assert response.json()["error"]["message"] == "there is nothing at this path; /docs lists all that there are"
    with pytest.raises(openai.BadRequestError, match="it is no picture of a format that is read; PNG, JPEG, WEBP are"):
        client.images.edit(image=b"GIF89a", prompt="a cat")
    with pytest.raises(openai.APIStatusError, match="a request has at most 100000 bytes") as caught:
        client.images.edit(image=b"0" * 100_001, prompt="a cat")
    assert caught.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="image: one is drawn with, and several were sent"):
        client.images.edit(image=[png(photo()), png(photo())], prompt="a cat")
    response = httpx.post(f"{server}/v1/images/edits", data={"prompt": "a"}, timeout=60)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "image")


def test_an_edit_that_leaves_no_step_names_strength(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="strength 0.1 of 4 steps leaves none") as caught:
        client.images.edit(image=png(photo()), prompt="a cat", extra_body={"strength": 0.1})
    assert caught.value.param == "strength"


def test_too_many_are_sent_away_with_a_time(server: str):
    body = LONG | {"n": 3}
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(timeout=300))
        # Of nine pictures one takes its steps, which makes eight that wait.
        for signs in ('"step": 1', '"position"', '"position"'):
            stream = stack.enter_context(client.stream("POST", f"{server}{PATH}", json=body | {"stream": True}))
            assert stream.status_code == 200
            lines = stream.iter_lines()
            stack.callback(lines.close)  # kept until then: an iterator that is let go closes its connection
            assert any(signs in line for line in lines)
        answer = client.post(f"{server}{PATH}", json=body)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["type"] == "rate_limit_error"


def figures() -> dict[str, Any]:
    """What the engine has done so far."""
    return serve.get_deployment_handle("model-tiny", "ray_sd").figures.remote().result()


def samples(name: str, **labels: str) -> list[Sample]:
    """What Prometheus would read of all processes."""
    port = ray.nodes()[0]["MetricsExportPort"]
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return [one for one in found if one.name == name and labels.items() <= one.labels.items()]


def scraped(name: str, **labels: str) -> float:
    return sum(one.value for one in samples(name, **labels))


def told_by(name: str, value: float, **labels: str) -> str | None:
    """The process that says so."""
    return next((one.labels["WorkerId"] for one in samples(name, **labels) if one.value == value), None)


def test_prometheus_sees_what_was_drawn_and_why_others_were_refused(server: str, client: openai.OpenAI):
    wait_for(lambda: not figures()["busy"])
    client.images.generate(prompt="a cat", n=2)
    list(client.images.generate(prompt="a cat", stream=True, partial_images=1))
    httpx.post(f"{server}{PATH}", json={"prompt": "a", "model": "cow"}, timeout=60)
    wait_for(lambda: not figures()["busy"])
    done = figures()
    serve.get_deployment_handle("model-tiny", "ray_sd").check_health.remote().result()  # which Serve does by and by
    # Replicas of servers before this one are still told of for a while.
    replica = wait_for(lambda: told_by("ray_sd_steps_total", done["steps"], model="tiny"))
    for name in ("rows", "pictures", "decodes", "prompts_found", "prompts_encoded"):
        assert scraped(f"ray_sd_{name}_total", WorkerId=replica) == done[name]
    wait_for(lambda: scraped("ray_sd_requests_total", route=PATH, status="404", reason="model_not_found") >= 1)
    assert scraped("ray_sd_queue_seconds_count", WorkerId=replica) >= 3
    assert scraped("ray_sd_first_look_seconds_count", WorkerId=replica) >= 1
    assert scraped("ray_sd_request_seconds_count", route=PATH) >= 3
    assert scraped("ray_sd_waiting", WorkerId=replica) == 0


def test_who_leaves_a_stream_is_drawn_for_no_further(server: str):
    wait_for(lambda: not figures()["busy"])
    before = figures()
    with httpx.stream("POST", f"{server}{PATH}", json=LONG | {"stream": True}, timeout=300) as response:
        assert any('"step": 5' in line for line in response.iter_lines())
    wait_for(lambda: not figures()["busy"])
    after = figures()
    assert after["cancelled"] == before["cancelled"] + 1
    assert 5 <= after["steps"] - before["steps"] < LONG["num_inference_steps"]
    assert after["unwanted_steps"] - before["unwanted_steps"] <= 1  # the one that was under way


def test_who_leaves_before_an_answer_is_drawn_for_no_further(server: str):
    wait_for(lambda: not figures()["busy"])
    before = figures()
    connection = http.client.HTTPConnection(server.removeprefix("http://"))
    body = json.dumps(LONG | {"n": 3})
    connection.request("POST", PATH, body, {"Content-Type": "application/json"})
    wait_for(lambda: figures()["steps"] >= before["steps"] + 5)
    connection.close()
    wait_for(lambda: not figures()["busy"])
    after = figures()
    assert after["cancelled"] == before["cancelled"] + 3
    assert after["steps"] - before["steps"] < LONG["num_inference_steps"]
    assert after["unwanted_steps"] - before["unwanted_steps"] <= 3  # no more than one of each picture
