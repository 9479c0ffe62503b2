"""The engine's pictures, against diffusers' own pipelines, and against themselves in other company."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from orders import PLENTY, SAME, Client, draw, plain
from PIL import Image
from tiny_models import difference, tiny_config

from ray_sd.config.serve import BatchingConfig
from ray_sd.generate import EditRequest, ImageRequest
from ray_sd.models import load_model
from ray_sd.models.schedulers import SAMPLERS
from ray_sd.serve.adapter_folder import AdapterFolder
from ray_sd.serve.adapters import LoadedAdapters
from ray_sd.serve.engine import Engine
from ray_sd.serve.order import Order

MIXED = [
    Order(ImageRequest("a cat", seed=1, num_inference_steps=3)),
    Order(ImageRequest("a dog", "bad", seed=2, num_inference_steps=4, guidance_scale=3.0, scheduler="euler")),
    Order(ImageRequest("an owl", seed=3, num_inference_steps=2, guidance_scale=1.0, scheduler="dpmpp_2m")),
    Order(ImageRequest("an owl", seed=3, num_inference_steps=3, scheduler="unipc", height=64, width=96)),
    Order(ImageRequest("a cat", seed=4, num_inference_steps=3, adapters=(("lora", 1.0),))),
    Order(ImageRequest("a cat", seed=4, num_inference_steps=4, adapters=(("wide", 0.6), ("lora", -0.5)))),
    Order(
        ImageRequest("a cat", seed=4, num_inference_steps=3, scheduler="euler_ancestral", adapters=(("reads", 1.0),))
    ),
    Order(ImageRequest("a <cat> here", seed=5, num_inference_steps=3, adapters=(("word", 1.0),))),
    Order(ImageRequest("a <cat> here", seed=5, num_inference_steps=3, adapters=(("other-word", 1.0), ("lora", 0.7)))),
    Order(ImageRequest("a cat", seed=6, num_inference_steps=3, adapters=(("dora", 0.8),))),
    Order(ImageRequest("a cat", seed=6, num_inference_steps=3, adapters=(("loha", 1.0),))),
    Order(ImageRequest("a cat", seed=6, num_inference_steps=2, adapters=(("oft", 1.0), ("lora", 1.0)))),
]


@pytest.fixture(scope="module")
def mixed_engine(tiny: Path, adapter_folder: Path) -> Iterator[Engine]:
    model = load_model(tiny_config(tiny))
    engine = Engine(model, LoadedAdapters(model, AdapterFolder(adapter_folder), PLENTY), BatchingConfig(result_cache=0))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def mixed_pictures(mixed_engine: Engine) -> list[Image.Image]:
    """All of MIXED, drawn together."""
    return draw(mixed_engine, MIXED)


@pytest.mark.parametrize("number", range(len(MIXED)))
def test_a_picture_is_the_plain_pipelines_whatever_it_is_drawn_with(
    mixed_engine: Engine, mixed_pictures: list[Image.Image], tiny: Path, adapter_folder: Path, number: int
):
    order, picture = MIXED[number], mixed_pictures[number]
    [expected] = plain(tiny, adapter_folder, [order])
    assert difference(picture, expected) <= SAME
    [by_itself] = draw(mixed_engine, [order])
    assert difference(by_itself, picture) <= SAME
    for other in mixed_pictures[:number] + mixed_pictures[number + 1 :]:
        assert other.size != picture.size or difference(other, picture) > 10 * SAME


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_keeps_its_own_state(build, tiny: Path, adapter_folder: Path, sampler: str):
    orders = [
        Order(ImageRequest("a cat", seed=seed, num_inference_steps=steps, scheduler=sampler))
        for seed, steps in enumerate((3, 4, 6))
    ]
    for picture, expected in zip(draw(build(), orders), plain(tiny, adapter_folder, orders), strict=True):
        assert difference(picture, expected) <= SAME


def test_edits_are_batched_with_the_rest(build):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    orders = [
        Order(EditRequest("a cat", seed=1, num_inference_steps=6, image=photo, strength=0.5)),
        Order(EditRequest("a cat", seed=1, num_inference_steps=6, image=photo, mask=mask, strength=1.0)),
        Order(ImageRequest("a cat", seed=1, num_inference_steps=6)),
    ]
    together, engine = draw(build(), orders), build()
    for order, picture in zip(orders, together, strict=True):
        assert difference(draw(engine, [order])[0], picture) <= SAME


def test_a_single_file_of_another_tool_draws_its_word(build, adapter_folder: Path, tmp_path: Path):
    files = {"cat": "word/a1111/cat.safetensors", "word": "word/learned_embeds.safetensors"}
    for name, file in files.items():
        shutil.copy(adapter_folder / file, tmp_path / f"{name}.safetensors")
    assert {entry.name: entry.tokens for entry in AdapterFolder(tmp_path)} == {"cat": ("cat",), "word": ("<cat>",)}
    request = ImageRequest("a <cat> here", seed=5, num_inference_steps=3, adapters=(("word", 1.0),))
    [expected] = draw(build(), [Order(request)])
    other_word = replace(request, prompt="a cat here")
    drawn = draw(
        build(folder=tmp_path),
        [Order(request), Order(replace(other_word, adapters=(("cat", 1.0),))), Order(replace(other_word, adapters=()))],
    )
    assert difference(drawn[0], expected) <= SAME
    assert difference(drawn[1], expected) <= SAME
    assert difference(drawn[2], expected) > 10 * SAME


def test_what_does_not_stack_is_told_to_be_drawn_alone(build):
    client = Client(build())
    mixes = ["", "lora", "word", "dora", "loha lora", "dora"]
    for mix in mixes:
        adapters = tuple((name, 1.0) for name in mix.split())
        client.order(Order(ImageRequest("a cat", seed=6, num_inference_steps=2, adapters=adapters)))
    assert [event.alone for event in client.finish()] == [False, False, False, True, True, True]
