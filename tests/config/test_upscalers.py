import pytest

from ray_sd.config import GenerateConfig
from ray_sd.config.load import load_config
from ray_sd.errors import ConfigError

UPSCALER = ["experiment=smoke", "model=tiny_random_upscale", "dataset.resolution=64"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["trainer.validation.prompts=a cat"], "trainer.validation: 1 prompts for 0 images; an upscaler draws from"),
        (["method=dreambooth", "method.class_prompt=a cat"], "method.class_prompt: .* cannot draw class pictures"),
    ],
)
def test_what_needs_pictures_from_prompts_is_refused(settings: list[str], words: str):
    with pytest.raises(ConfigError, match=words):
        load_config([*UPSCALER, *settings])


@pytest.mark.parametrize("method", ["full", "lora", "oft", "autoencoder", "dreambooth"])
def test_methods_of_image_models_train_it(method: str):
    assert load_config([*UPSCALER, f"method={method}"]).model.upscales


@pytest.mark.parametrize("prompts", [[], ["trainer.validation.prompts=[a cat, a dog]"]])
def test_it_shows_pictures_enlarged_while_it_trains(prompts: list[str]):
    config = load_config([*UPSCALER, "trainer.validation.images=[cat.png, dog.png]", *prompts])
    assert config.trainer.validation.images == ("cat.png", "dog.png")


def test_it_draws_nothing_from_a_prompt():
    with pytest.raises(ConfigError, match="makes pictures larger, and draws none from a prompt"):
        load_config(["model=x4_upscaler", "prompt=a cat"], GenerateConfig)
