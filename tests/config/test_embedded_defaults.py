import pytest

from ray_sd.config import GenerateConfig
from ray_sd.config.load import load_config
from ray_sd.config.serve import ServedModel
from ray_sd.serve.app import describe


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["model=emoji"], (20, 4)),
        (["model=emoji", "guidance_scale=6"], (20, 6)),
        (["model=emoji", "model.base=folder"], (30, 7.5)),
        (["model=sd15", "num_inference_steps=25"], (25, 7.5)),
    ],
)
def test_pictures_are_drawn_with_what_suits_their_model(settings: list[str], expected: tuple[int, float]):
    config = load_config(["prompt=a cat", *settings], GenerateConfig)
    assert (config.num_inference_steps, config.guidance_scale) == expected


@pytest.mark.parametrize(("model", "expected"), [("emoji", (20, 4)), ("tiny_random", (30, 7.5))])
def test_the_server_draws_with_what_suits_its_model(model: str, expected: tuple[int, float]):
    base = describe(ServedModel(settings=(f"model={model}",)))
    assert (base.num_inference_steps, base.guidance_scale) == expected
