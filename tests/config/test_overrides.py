"""How values of the command line are read."""

from typing import Any

import pytest

from ray_sd.config import GenerateConfig, SweepConfig
from ray_sd.config.load import load_config
from ray_sd.errors import ConfigError

DEMO = "experiment=demo"


def value(path: str, *settings: str) -> Any:
    node: Any = load_config([DEMO, *settings])
    for key in path.split("."):
        node = node[key] if isinstance(node, dict) else getattr(node, key)
    return node


@pytest.mark.parametrize(
    "text",
    [
        "<cat>",
        "a cat, a dog",
        "it's",
        '"quoted"',
        "(blue:1.2)",
        "ü",
        "null",
        "true",
        "7",
        "[a]",
        "{a}",
        "a=b",
        "",
        " a ",
        "${x}",
        "# a",
        "a: b",
    ],
)
def test_text_stays_as_it_was_typed(text: str):
    assert load_config([f"prompt={text}", "prompts_file=x"], GenerateConfig).prompt == text


def test_null_empties_only_what_may_be_null():
    assert value("dataset.caption.template", "dataset.caption.template=null") is None
    assert value("trainer.ema_decay", "trainer.ema_decay=null") is None
    assert value("tracker.tensorboard", "tracker.tensorboard=null") is None
    with pytest.raises(ConfigError, match="trainer.max_steps: 'null' is no whole number"):
        load_config([DEMO, "trainer.max_steps=null"])


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("trainer.max_steps=1e3", 1000),
        ("trainer.learning_rate=1e-4", 1e-4),
        ("trainer.learning_rate=1", 1.0),
        ("trainer.zero.stage=2", 2),
        ("trainer.use_gpu=false", False),
        ("dataset.flip=true", True),
        ("dataset.resolution=128", 128),
        ("dataset.resolution=[64,128]", (64, 128)),
        ("trainer.optimizer.betas=[0.8, 0.99]", (0.8, 0.99)),
        ("trainer.validation.prompts=a cat, it's (blue:1.2)", ("a cat, it's (blue:1.2)",)),
        ('trainer.validation.prompts=[a cat, "a dog, asleep", 7, null]', ("a cat", "a dog, asleep", "7", "null")),
        ("trainer.validation.metrics=[]", ()),
        ("method.target_modules=to_q", ("to_q",)),
        ("resume=true", True),
        ("resume=TRUE", True),
        ("resume=runs/other/checkpoint", "runs/other/checkpoint"),
    ],
)
def test_values_are_read_by_the_type_of_the_setting(setting: str, expected: Any):
    found = value(setting.partition("=")[0], setting)
    assert found == expected
    assert type(found) is type(expected)


def test_architecture_is_open_and_typed_by_yaml():
    settings = ["model=tiny_random", "model.unet.architecture.block_out_channels=[8, 16]"]
    settings += ["model.unet.architecture.dropout=1e-1", "model.unet.architecture.act_fn=silu"]
    settings += ["model.unet.architecture.only_cross_attention=false", "model.unet.architecture.class_embed_type=null"]
    architecture = value("model.unet.architecture", *settings)
    assert architecture["block_out_channels"] == [8, 16]
    assert architecture["dropout"] == 0.1
    assert architecture["act_fn"] == "silu"
    assert architecture["only_cross_attention"] is False
    assert architecture["class_embed_type"] is None
    assert architecture["cross_attention_dim"] == 32  # the preset's


def test_bare_name_of_a_kind_takes_its_defaults():
    assert value("trainer.schedule", "trainer.schedule=linear").model_dump() == {
        "name": "linear",
        "warmup_steps": 0,
        "min_ratio": 0.0,
    }
    assert value("dataset.crop.num_variants", "dataset.crop=random", "dataset.crop.num_variants=8") == 8


def test_name_of_the_kind_is_read_before_its_settings():
    settings = ["dataset.crop.num_variants=8", "dataset.crop.name=random"]
    assert value("dataset.crop.num_variants", *settings) == 8


def test_setting_below_a_default_kind_needs_no_name():
    assert load_config(["experiment=smoke", "trainer.schedule.warmup_steps=2"]).trainer.schedule.warmup_steps == 2


def test_mapping_replaces_the_whole_value():
    source = value("dataset.source", "dataset.source={name: parquet, path: null, id_column: '7'}")
    assert (source.name, source.path, source.id_column) == ("parquet", "null", "7")


def test_setting_below_a_shorthand_keeps_it():
    vae = value("model.vae", "model.vae=some/folder", "model.vae.subfolder=vae")
    assert (vae.path, vae.subfolder) == ("some/folder", "vae")


def test_a_name_that_is_there_already_is_gone_into():
    settings = ["sweep.space.seed={randint: [1, 3]}", "sweep.space.method.rank={choice: [4, 8]}", "dataset.holdout=1"]
    config = load_config([DEMO, *settings, "sweep.space.seed.randint=[1, 9]"], SweepConfig)
    assert config.sweep.space["seed"].randint == (1, 9)
    assert set(config.sweep.space) >= {"seed", "method.rank"}


def test_later_of_two_equal_settings_wins():
    assert value("method.rank", "method.rank=2", "method.rank=3") == 3


@pytest.mark.parametrize("text", ["[1, 2", "{a: b", "[a]]"])
def test_broken_list_is_an_error_in_words(text: str):
    with pytest.raises(ConfigError, match=r"trainer.validation.prompts: .* starts like a list or mapping"):
        load_config([DEMO, f"trainer.validation.prompts={text}"])


def test_setting_below_a_value_is_an_error_in_words():
    with pytest.raises(ConfigError, match=r"trainer.max_steps.x: no such setting; trainer.max_steps is a value"):
        load_config([DEMO, "trainer.max_steps=3", "trainer.max_steps.x=1"])
