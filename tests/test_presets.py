"""Every preset that ships."""

from typing import Any

import av
import pytest
from pydantic import TypeAdapter

from ray_sd.config import ExperimentConfig, GenerateConfig, SweepConfig
from ray_sd.config.compose import PRESETS, compose_presets, preset_groups
from ray_sd.config.documentation import preset_description
from ray_sd.config.load import ROOTS, load_config, validate
from ray_sd.config.method import CLIP_METHODS
from ray_sd.config.settings import below
from ray_sd.embedded.autoencoder import LATENT_CHANNELS
from ray_sd.errors import ConfigError
from ray_sd.tune.space import Space

GROUPS = preset_groups("train")
ALL = [(group, name) for group, names in GROUPS.items() for name in names]
CHAINS = [("chain", name) for name in preset_groups("text_to_video")["chain"]]
SWEEPS = [("sweep", name) for name in preset_groups("sweep")["sweep"]]
SERVED = [("serve", name) for name in preset_groups("serve")["serve"]]


def names(group: str) -> list[str]:
    return GROUPS[group]


def test_every_file_belongs_to_a_group():
    known = {PRESETS / group / f"{name}.yaml" for group, name in [*ALL, *CHAINS, *SWEEPS, *SERVED]}
    assert set(PRESETS.rglob("*.yaml")) == known | {PRESETS / f"{root}.yaml" for root in ROOTS.values()}


@pytest.mark.parametrize(("group", "name"), [*ALL, *CHAINS, *SWEEPS, *SERVED])
def test_preset_says_what_it_is(group: str, name: str):
    assert preset_description(PRESETS / group / f"{name}.yaml").endswith((".", "?"))


@pytest.mark.parametrize("name", names("experiment"))
def test_experiment_is_a_configuration(name: str):
    composed = compose_presets("train", {"experiment": name})
    composed["dataset"]["source"].setdefault("path", "photos")
    assert validate(composed, ExperimentConfig).name == name


@pytest.mark.parametrize("name", [name for _, name in SWEEPS])
def test_a_sweep_can_be_tried_on_an_experiment_that_ships(name: str):
    experiment = {"tokens": "textual_inversion", "svd_temporal": "svd_temporal"}.get(name, "demo")
    config = load_config([f"sweep={name}", f"experiment={experiment}"], SweepConfig)
    assert config.trainer.max_steps == load_config([f"experiment={experiment}"]).trainer.max_steps
    Space(config).check()


@pytest.mark.parametrize(
    ("name", "experiment"),
    [
        ("learning_rate", "demo_short"),
        ("lora", "demo_short"),
        ("schedule", "demo_short"),
        ("svd_temporal", "svd_temporal"),
        ("tokens", "textual_inversion_short"),
    ],
)
def test_a_sweep_has_an_experiment_where_none_is_named(name: str, experiment: str):
    config = load_config([f"sweep={name}"], SweepConfig)
    Space(config).check()
    own = load_config([f"experiment={experiment}"])
    assert (config.method, config.trainer.max_steps) == (own.method, own.trainer.max_steps)


@pytest.mark.parametrize(("group", "name"), [pair for pair in ALL if pair[0] != "experiment"])
def test_preset_fits_its_schema(group: str, name: str):
    """Alone, so that no experiment covers for what it lacks or gets wrong."""
    settings = compose_presets(
        "train", {group: name} if group in ("tracker", "trainer") else {**_model(group), group: name}
    )
    annotation: Any = ExperimentConfig
    value: Any = settings
    for key in group.split("/"):
        annotation, value = below(annotation, value, key), value.get(key, {})
    if group == "dataset":
        value["source"].setdefault("path", "photos")
        if name == "frame_folder":  # which nobody but the user knows the rate of
            value["source"]["fps"] = 24
    if group in ("model/vae", "model/scheduler", "model/text_encoder"):
        assert value, "an empty preset changes nothing"
    TypeAdapter(annotation).validate_python(value if "name" in value or group != "method" else {"name": name, **value})


def _model(group: str) -> dict[str, str]:
    return {"model": "emoji"} if group.startswith("model/") else {}


@pytest.mark.parametrize("name", names("model"))
def test_model_draws_from_a_prompt_or_says_why_not(name: str):
    command = [f"model={name}", "prompt=a cat"]
    if not any(kind in name for kind in ("svd", "video", "interpolation", "upscale")):
        assert load_config(command, GenerateConfig).model.name
        return
    with pytest.raises(ConfigError, match=r"jobs/text_to_video.py"):
        load_config(command, GenerateConfig)


@pytest.fixture(scope="module")
def trainers() -> dict[str, Any]:
    """What each trainer's preset makes of the settings of that group, which are all that it may touch."""
    plain = compose_presets("train", {})
    composed = {name: compose_presets("train", {"trainer": name}) for name in names("trainer")}
    assert all(one | {"trainer": plain["trainer"]} == plain for one in composed.values())
    return {name: one["trainer"] for name, one in composed.items()}


@pytest.mark.parametrize("method", names("method"))
def test_methods_go_with_trainers(method: str, trainers: dict[str, Any]):
    """Each method is composed once, since trainers touch nothing of it."""
    rows = {"model": "emoji", "dataset": "owl"}
    composed = compose_presets("train", {**rows, "method": method})
    if composed["method"]["name"] in CLIP_METHODS:
        composed = compose_presets("train", {"model": "tiny_random_video", "dataset": "spin", "method": method})
    for trainer in trainers.values():
        validate(composed | {"name": "x", "trainer": trainer}, ExperimentConfig)


@pytest.mark.parametrize("name", [name for name in names("experiment") if name.startswith("svd_")])
def test_no_experiment_asks_for_more_frames_a_second_than_its_shipped_clips_have(name: str):
    config = load_config([f"experiment={name}", "dataset.source.path=embedded/clips/spin"])
    clip = next((PRESETS.parent / "embedded" / "clips" / "spin").glob("*.mp4"))
    with av.open(str(clip)) as container:
        assert config.dataset.video.fps <= container.streams.video[0].average_rate


def test_zero_snr_schedule_turns_a_model_to_v_prediction():
    noise = load_config(["experiment=smoke", "model/scheduler=zero_snr"]).model.scheduler.noise
    assert (noise.prediction_type, noise.rescale_betas_zero_snr, noise.timestep_spacing) == (
        "v_prediction",
        True,
        "trailing",
    )


def test_tiny_random_v_differs_in_its_prediction_only():
    epsilon, v = (load_config(["experiment=smoke", f"model={name}"]).model for name in ("tiny_random", "tiny_random_v"))
    assert (epsilon.scheduler.noise.prediction_type, v.scheduler.noise.prediction_type) == ("epsilon", "v_prediction")
    assert (epsilon.unet, epsilon.vae, epsilon.text_encoder) == (v.unet, v.vae, v.text_encoder)


def test_pretraining_starts_from_random_weights_but_for_the_autoencoder():
    config = load_config(["experiment=pretrain_emoji"])
    assert config.model.base is None
    assert config.model.unet.architecture is not None
    assert config.model.text_encoder.architecture is not None
    assert config.model.vae.path == "embedded/emoji"
    assert config.model.scheduler.noise.prediction_type == "v_prediction"


def test_pretrained_parts_fit_together():
    model = load_config(["experiment=pretrain_emoji"]).model
    unet, text = model.unet.architecture, model.text_encoder.architecture
    assert unet["in_channels"] == unet["out_channels"] == LATENT_CHANNELS
    assert unet["cross_attention_dim"] == text["hidden_size"]
    assert unet["use_linear_projection"]
