"""Adapters over HTTP, with two replicas of a model: listed, loaded, unloaded, refused, and drawn with where they are."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve
from safetensors.torch import load_file, save_file
from serving import serving
from tiny_models import export_adapter
from waiting import wait_for

from ray_sd.serve.app import build
from ray_sd.serve.gate import hash_of

pytestmark = pytest.mark.slow

GENERATIONS = "/v1/images/generations"
LONG = {"prompt": "leaves", "num_inference_steps": 900, "size": "256x256", "stream": True}
"""Takes far longer than a test does anything with it."""


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    export_adapter(tiny, folder / "pet", {"name": "lora", "rank": 4}, name="tiny_served")
    word = {"name": "textual_inversion", "placeholder_token": "<cat>"}
    export_adapter(tiny, folder / "word", word, name="tiny_served")
    dora = {"name": "lora", "rank": 4, "use_dora": True}
    export_adapter(tiny, folder / "my-run" / "adapter", dora, name="tiny_served")
    export_adapter(tiny, folder / "strange", {"name": "lora", "rank": 4}, name="another")
    file = folder / "pet" / "kohya" / "lora.safetensors"
    shutil.copy(file, folder / "file.safetensors")
    shutil.copy(folder / "word" / "a1111" / "cat.safetensors", folder / "cat.safetensors")
    (folder / "cut.safetensors").write_bytes(file.read_bytes()[:100])
    wide = {
        name: tensor.repeat_interleave(2, -1) if tensor.ndim else tensor for name, tensor in load_file(file).items()
    }
    save_file(wide, folder / "larger.safetensors")
    tells_nothing = {name: tensor for name, tensor in wide.items() if "attn2" not in name}
    save_file(tells_nothing, folder / "large.safetensors")
    shutil.copytree(folder / "pet", folder / "damaged")
    (folder / "damaged" / "pytorch_lora_weights.safetensors").write_bytes(file.read_bytes())
    (folder / "pickled.bin").write_bytes(b"cos")
    (folder / "out").symlink_to(tiny)
    return folder


@pytest.fixture(scope="module")
def server(tiny: Path, folder: Path, ray_cluster: None) -> Iterator[str]:
    settings = [f"model.base={tiny}", "model.name=tiny_served"]
    arguments = {
        "models": {"tiny": {"settings": settings, "threads": 1, "replicas": {"min": 2}, "batching": {"max_rows": 4}}},
        "adapters": str(folder),
        "keys": {"ann": {"sha256": hash_of("sd-ann"), "role": "admin"}, "bob": hash_of("sd-bob")},
        "limits": {"max_steps": 900},
        "defaults": {"num_inference_steps": 2},
    }
    with serving(build(arguments)) as address:
        yield address


def client_of(server: str, name: str) -> httpx.Client:
    return httpx.Client(base_url=server, timeout=120, headers={"Authorization": f"Bearer sd-{name}"})


@pytest.fixture
def user(server: str) -> httpx.Client:
    return client_of(server, "bob")


@pytest.fixture
def admin(server: str) -> httpx.Client:
    return client_of(server, "ann")


def listed(client: httpx.Client) -> dict[str, dict[str, Any]]:
    return {card["name"]: card for card in client.get("/v1/adapters").json()["data"]}


def test_all_adapters_are_listed_and_the_broken_ones_say_why(user: httpx.Client, folder: Path):
    cards = listed(user)
    assert set(cards) == {
        *("pet", "word", "my-run", "strange", "file", "cat", "cut", "large", "larger", "damaged", "pickled.bin", "out")
    }
    pet = cards["pet"]
    assert (pet["kind"], pet["base"], pet["loaded"], pet["problem"]) == ("lora", "tiny", 0, None)
    assert pet["bytes"] == sum(file.stat().st_size for file in (folder / "pet").rglob("*") if file.is_file())
    assert pet["created"] == int((folder / "pet").stat().st_mtime)
    assert (cards["word"]["tokens"], cards["cat"]["tokens"]) == (["<cat>"], ["cat"])
    assert cards["strange"]["problem"] == "adapter 'strange' is for the base 'another', which is not served"
    assert "cannot be read as .safetensors" in cards["cut"]["problem"]
    assert "pickled weights are not read" in cards["pickled.bin"]["problem"]
    assert "a link that leads out of the folder" in cards["out"]["problem"]
    assert cards["out"]["bytes"] == 0


def test_an_admin_loads_into_all_replicas_and_unloads_from_them(admin: httpx.Client, user: httpx.Client, folder: Path):
    loaded = admin.post("/v1/adapters", json={"name": "word"})
    assert loaded.status_code == 200
    assert loaded.json() == listed(user)["word"]
    assert loaded.json()["loaded"] == 2
    assert admin.post("/v1/adapters").json() == user.get("/v1/adapters").json()
    told = {"name": "word", "object": "adapter.unloaded", "replicas": 2}
    assert admin.delete("/v1/adapters/word").json() == told
    assert listed(user)["word"]["loaded"] == 0
    assert (folder / "word").is_dir()
    assert admin.delete("/v1/adapters/word").json() == told | {"replicas": 0}


def test_what_failed_is_listed_until_it_is_mended(admin: httpx.Client, user: httpx.Client, folder: Path):
    shutil.copytree(folder / "damaged", folder / "mended")
    refused = admin.post("/v1/adapters", json={"name": "mended"})
    assert refused.status_code == 400
    assert "is damaged: its content is not what manifest.json lists" in listed(user)["mended"]["problem"]
    shutil.copytree(folder / "pet", folder / "mended", dirs_exist_ok=True)
    assert admin.post("/v1/adapters", json={"name": "mended"}).json()["loaded"] == 2
    assert listed(user)["mended"]["problem"] is None
    shutil.rmtree(folder / "mended")
    assert admin.delete("/v1/adapters/mended").json()["replicas"] == 2
    assert admin.delete("/v1/adapters/mended").status_code == 404


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/adapters"), ("DELETE", "/v1/adapters/pet")])
def test_a_user_loads_and_unloads_nothing(server: str, user: httpx.Client, method: str, path: str):
    refused = user.request(method, path, **({"json": {"name": "pet"}} if method == "POST" else {}))
    assert refused.status_code == 403
    assert refused.json()["error"]["type"] == "permission_error"
    assert httpx.request(method, f"{server}{path}").status_code == 401


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"name": "cow"}, 404, "no adapter 'cow'; there are "),
        ({"name": ".."}, 404, "no adapter '..'"),
        ({"name": "a/b"}, 404, "no adapter 'a/b'"),
        ({"name": "cut"}, 400, "adapter 'cut' cannot be used: cut.safetensors cannot be read"),
        ({"name": "large"}, 400, "adapter 'large' cannot be used: large.safetensors: "),
        ({"name": "larger"}, 400, "is for a base that reads texts of 64 numbers a token, which is not served"),
        ({"name": "strange"}, 400, "is for the base 'another', which is not served"),
        ({"names": ["pet"]}, 400, "names: no such field"),
    ],
)
def test_what_cannot_be_loaded_is_told(admin: httpx.Client, body: dict, status: int, words: str):
    refused = admin.post("/v1/adapters", json=body)
    assert refused.status_code == status
    assert words in refused.json()["error"]["message"]
    assert refused.json()["error"]["param"] == next(iter(body))


@pytest.mark.parametrize("name", ["cow", "%2e%2e", "a%2Fb"])
def test_what_is_not_there_cannot_be_unloaded(admin: httpx.Client, name: str):
    assert admin.delete(f"/v1/adapters/{name}").status_code == 404


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("cut", 400, "cannot be read as .safetensors"),
        ("large", 400, "it was made for another base"),
        ("damaged", 400, "is damaged: its content is not what manifest.json lists"),
        ("pickled.bin", 400, "pickled weights are not read"),
        ("out", 400, "a link that leads out of the folder"),
        ("..", 404, "no model 'of that name'"),
        ("a/b", 404, "no model 'of that name'"),
    ],
)
def test_a_broken_adapter_is_told_to_who_asks_for_it(
    user: httpx.Client, tiny: Path, name: str, status: int, words: str
):
    for param, body in {"model": {"model": name}, "adapters": {"adapters": [name]}}.items():
        refused = user.post(GENERATIONS, json={"prompt": "a cat"} | body)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (status, param)
        assert words in error["message"]
        assert (f"adapter '{name}' cannot be used" in error["message"]) == (status == 400)
        assert str(folder) not in error["message"]
    if name == "damaged":
        streamed = user.post(GENERATIONS, json={"prompt": "a cat", "model": name, "stream": True}).text
        assert '"param": "model"' in streamed
        assert words in streamed
    assert user.post(GENERATIONS, json={"prompt": "a cat", "model": "pet"}).status_code == 200


def test_what_pictures_need_is_not_unloaded(admin: httpx.Client, user: httpx.Client):
    with user.stream("POST", GENERATIONS, json=LONG | {"model": "file"}) as response:
        lines = response.iter_lines()
        assert any('"step": 1' in line for line in lines)
        refused = admin.delete("/v1/adapters/file")
        assert refused.status_code == 409
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "adapter_in_use"
        assert "pictures under way in 1 of the 1 replicas" in refused.json()["error"]["message"]
    assert wait_for(lambda: (answer := admin.delete("/v1/adapters/file")).status_code == 200 and answer.json())


def test_an_adapters_requests_go_to_one_replica_and_others_to_both(admin: httpx.Client, user: httpx.Client):
    handle = serve.get_deployment_handle("model-tiny", "ray_sd")

    def figures(name: str) -> list[Any]:
        return [told[name] for told in handle.broadcast("figures").results()]

    for name in ("pet", "word"):
        admin.delete(f"/v1/adapters/{name}")
        before = figures("pictures")
        for seed in range(6):
            assert user.post(GENERATIONS, json={"prompt": "a", "model": name, "seed": seed}).status_code == 200
        drawn = [after - count for after, count in zip(figures("pictures"), before, strict=True)]
        assert sorted(drawn) == [0, 6]
        assert [name in names for names in figures("adapters")] == [count == 6 for count in drawn]
        assert listed(user)[name]["loaded"] == 1
    before = figures("pictures")
    for seed in range(16):
        assert user.post(GENERATIONS, json={"prompt": "b", "seed": seed}).status_code == 200
    assert all(after > count for after, count in zip(figures("pictures"), before, strict=True))


def test_a_replica_with_a_batch_to_draw_gives_an_adapters_requests_to_the_other(
    admin: httpx.Client, user: httpx.Client
):
    admin.delete("/v1/adapters/file")
    with ExitStack() as streams:
        for seed in range(2):
            response = streams.enter_context(
                user.stream("POST", GENERATIONS, json=LONG | {"model": "file", "seed": seed})
            )
            lines = response.iter_lines()
            streams.callback(lines.close)  # kept until then: an iterator that is let go closes its connection
            assert any('"step": 1' in line for line in lines)
            assert listed(admin)["file"]["loaded"] == 1
        assert user.post(GENERATIONS, json={"prompt": "a", "model": "file"}).status_code == 200
        assert listed(admin)["file"]["loaded"] == 2
        assert admin.delete("/v1/adapters/file").status_code == 409
        assert listed(admin)["file"]["loaded"] == 1  # where no picture needs it, it is gone


def test_an_answer_says_what_was_drawn_alone_because_it_does_not_stack(user: httpx.Client):
    request = {"prompt": "a cat", "seed": 1}
    for body in (request | {"model": "my-run"}, request | {"adapters": ["my-run", "pet"]}):
        assert [data["alone"] for data in user.post(GENERATIONS, json=body | {"n": 2}).json()["data"]] == [True] * 2
    for body in (request, request | {"adapters": ["pet", "cat"]}):
        assert user.post(GENERATIONS, json=body).json()["data"][0]["alone"] is False
    for adapter, alone in (("my-run", "true"), ("pet", "false")):
        streamed = user.post(GENERATIONS, json=request | {"model": adapter, "stream": True}).text
        assert f'"alone": {alone}' in streamed


def test_every_field_is_in_the_openapi_document(server: str):
    document = httpx.get(f"{server}/openapi.json").json()
    assert {"get", "post"} == set(document["paths"]["/v1/adapters"])
    assert {"401", "403", "404", "409"} <= set(document["paths"]["/v1/adapters/{name}"]["delete"]["responses"])
    schemas = document["components"]["schemas"]
    assert "loaded" in schemas["AdapterCard"]["properties"]
    assert "does not stack" in schemas["ImageData"]["properties"]["alone"]["description"]
