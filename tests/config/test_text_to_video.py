import pytest

from ray_sd.config import TextToVideoConfig
from ray_sd.config.compose import compose_presets, preset_groups
from ray_sd.config.load import load_config, to_dict, validate
from ray_sd.errors import ConfigError

STAGES = ("image.model", "video.model", "interpolation.model", "upscale.model")


def load(*settings: str) -> TextToVideoConfig:
    return load_config(settings, TextToVideoConfig)


def test_every_stage_chooses_among_the_presets_of_models():
    groups, plain = preset_groups("text_to_video"), preset_groups("train")
    for stage in STAGES:
        assert groups[stage] == plain["model"]
        assert groups[f"{stage}/scheduler"] == plain["model/scheduler"]
    stages = {f"{stage}{below}" for stage in STAGES for below in ("", "/scheduler", "/text_encoder", "/vae")}
    assert set(groups) == stages | {"chain"}


def test_a_chain_names_a_model_for_each_stage_and_choices_win_over_it():
    config = load("prompt=a cat", "chain=svd", "video.model=svd_xt")
    models = [
        stage and stage.model.name for stage in (config.image, config.video, config.interpolation, config.upscale)
    ]
    assert models == ["sd21", "svd_xt", None, "x4_upscaler"]


def test_without_a_choice_the_embedded_models_make_the_video():
    config = load("prompt=a tiger face on a blue background")
    stages = (config.image, config.video, config.interpolation, config.upscale)
    assert [stage.model.name for stage in stages] == ["emoji", "emoji_video", "emoji_interpolation", "emoji_upscaler"]


@pytest.mark.parametrize("stage", ["image", "video", "interpolation", "upscale"])
def test_steps_suit_the_model_that_is_chosen_and_not_the_chain(stage: str):
    published = {"image": "sd21", "video": "svd", "interpolation": "svd", "upscale": "x4_upscaler"}[stage]
    chosen, embedded = (getattr(load("prompt=a cat", *more), stage) for more in ([f"{stage}.model={published}"], []))
    assert chosen.num_inference_steps == type(chosen).model_fields["num_inference_steps"].default
    assert embedded.num_inference_steps < chosen.num_inference_steps
    assert getattr(load("prompt=a cat", f"{stage}.num_inference_steps=17"), stage).num_inference_steps == 17


def test_stages_are_chosen_apart():
    config = load(
        "prompt=a cat",
        "image.model=sd15",
        "image.model/scheduler=euler",
        "video.model=svd_xt",
        "interpolation.model=tiny_random_video",
        "upscale.model=tiny_random_upscale",
        "upscale.model/text_encoder=emoji_scratch",
        "video.model.base=elsewhere",
    )
    assert (config.image.model.name, config.image.model.scheduler.sampler) == ("sd15", "euler")
    assert (config.video.model.name, config.video.model.base) == ("svd_xt", "elsewhere")
    assert config.interpolation.model.name == "tiny_random_video"
    assert config.upscale.model.text_encoder.architecture["hidden_size"] == 128
    assert config.image.model.text_encoder is None


def test_stages_can_be_left_out():
    config = load("prompt=a cat", "upscale=null", "interpolation=null")
    assert (config.upscale, config.interpolation) == (None, None)
    assert load("picture=cat.png", "image=null").image is None
    assert load("prompt=a cat", "chain=svd", "video=null").video is None
    assert [load("prompt=a cat", decode).chunk_size for decode in ("decode=null", "decode.chunk_size=3")] == [1, 3]


def test_a_configuration_survives_a_round_trip():
    config = load("prompt=a cat", "video.fps=4", "decode.chunk_size=3")
    assert validate(to_dict(config), TextToVideoConfig) == config


def test_a_preset_of_ones_own_serves_every_stage(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: mine\nbase: some/folder\n")
    composed = compose_presets("text_to_video", {"image.model": "mine"}, [tmp_path])
    assert composed["image"]["model"] == {"name": "mine", "base": "some/folder"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "nothing to show; give prompt="),
        (["prompt=a cat", "image=null"], "image: without this stage there is nothing to begin with; give picture=FILE"),
        (["prompt=a cat", "picture=cat.png"], "picture: stage 'image' draws the first picture; leave one out"),
        (
            ["prompt=a cat", "video=null", "interpolation=null", "upscale=null"],
            "video: without this stage and 'upscale' a picture is all",
        ),
        (
            ["prompt=a cat", "video=null", "interpolation.model=svd"],
            "interpolation: without stage 'video' there are no key frames to draw between",
        ),
        (
            ["chain=svd", "prompt=a cat", "video=null", "decode.adapter=x"],
            "decode.adapter: without stage 'video' there is nothing to decode",
        ),
        (
            ["chain=svd", "prompt=a cat", "interpolation.num_frames=5"],
            "interpolation.model: required; choose one with interpolation.model=",
        ),
        (["prompt=a cat", "image.model=svd"], "image.model: 'svd' is of family stable_video_diffusion; this stage takes"),
        (["prompt=a cat", "video.model=sd15"], "video.model: 'sd15' is of family stable_diffusion; this stage takes"),
        (["prompt=a cat", "interpolation.model=sd15"], "interpolation.model: 'sd15' is of family"),
        (["prompt=a cat", "upscale.model=sdxl"], "upscale.model: 'sdxl' is of family stable_diffusion_xl; this stage"),
        (["prompt=a cat", "video.model=sdv"], "video.model: no preset 'sdv'; did you mean 'svd'?"),
        (["prompt=a cat", "video.model/vea=x"], "video.model/vea: no group 'video.model/vea'; did you mean 'video.model/vae'?"),
        (["prompt=a cat", "video.model=null"], "video.model: null is no choice here"),
        (["prompt=a cat", "model=sd15"], "model: no such setting; did you mean 'image.model'?"),
        (["prompt=a cat", "height=100"], "height: '100': input should be a multiple of 8"),
        (["prompt=a cat", "interpolation.model=svd", "interpolation.num_frames=2"], "interpolation.num_frames: '2' is out of"),
        (["prompt=a cat", "video.fps=0"], "video.fps: '0' is out of range"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_one_line(settings: list[str], words: str):
    with pytest.raises(ConfigError) as caught:
        load(*settings)
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)
