"""What each optimizer is built with and keeps; how they train is in test_engine.py."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from bitsandbytes import functional
from checkpoints import write_checkpoint
from diffusers import UNet2DConditionModel
from pydantic import TypeAdapter
from torch import nn

from ray_sd.config.load import load_config
from ray_sd.config.optimizer import Optimizer
from ray_sd.errors import ArtifactError, ConfigError
from ray_sd.train.blockwise import quantize
from ray_sd.train.engine import check_compiler
from ray_sd.train.optimizers import RULES, UpdateRule, build_rule
from ray_sd.train.run import fit

ROOT = Path(__file__).parents[2]


def rule(**settings: object) -> UpdateRule:
    return build_rule(TypeAdapter(Optimizer).validate_python(settings))


def built(**settings: object) -> dict:
    """The first group of an optimizer."""
    return rule(**settings).build([{"params": [nn.Parameter(torch.ones(2, 2))], "lr": 0.5}]).param_groups[0]


def test_adamw_is_taken_where_settings_have_no_name(tmp_path: Path):
    mine = tmp_path / "trainer" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text("optimizer:\n  eps: 1e-7\n")
    arguments = ["experiment=smoke", f"--config-dir={tmp_path}", "trainer=mine"]
    assert load_config(arguments).trainer.optimizer.model_dump(exclude_unset=True) == {"name": "adamw", "eps": 1e-7}
    changed = load_config([*arguments, "trainer.optimizer.betas=[0.5, 0.75]"]).trainer.optimizer
    assert (changed.name, changed.eps, changed.betas) == ("adamw", 1e-7, (0.5, 0.75))


@pytest.mark.parametrize("name", RULES)
def test_the_stage_suits_the_optimizer_unless_it_is_set(name: str):
    chosen = ["experiment=smoke", f"trainer.optimizer={name}", "trainer.learning_rate=1"]
    assert load_config(chosen).trainer.zero_stage == (0 if name in ("adafactor", "prodigy") else 1)
    assert load_config([*chosen, "trainer.zero.stage=0"]).trainer.zero_stage == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["trainer.optimizer=adafactor", "trainer.zero.stage=2"], "adafactor needs every parameter whole, and zero.stage=2"),
        (["trainer/optimizer=prodigy", "trainer=deepspeed_zero3"], "prodigy needs every parameter whole, and zero.stage=3"),
        (["trainer.optimizer=lion", "trainer=zero3_offload"], "there is no such lion; set optimizer.name=adamw"),
        (["trainer.optimizer=prodigy", "trainer.zero.offload=true"], "there is no such prodigy"),
        (["trainer.optimizer=prodigy", "trainer.learning_rate=1e-4"], "prodigy multiplies learning_rate 0.0001 by"),
        (
            ["trainer/optimizer=prodigy", "method.text_encoder=true", "trainer.text_encoder_learning_rate=0.5"],
            "one rate for all that trains, and text_encoder_learning_rate 0.5 differs from learning_rate 1",
        ),
        (["trainer.optimizer=adam"], "no optimizer 'adam'; did you mean 'adamw'?"),
        (["trainer.optimizer.betas=[1, 0.9]"], r"trainer.optimizer.betas\[0\]: '1' is out of range"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_in_one_line(settings: list[str], words: str):
    with pytest.raises(ConfigError, match=words) as refused:
        load_config(["experiment=smoke", *settings])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["adamw_8bit", "lion", "prodigy"])
def test_a_missing_package_is_told_before_ray_starts(configure, monkeypatch, name: str):
    monkeypatch.setitem(sys.modules, RULES[name].package, None)
    monkeypatch.setattr("ray_sd.train.run.connect", lambda: pytest.fail("Ray was started"))
    with pytest.raises(
        ConfigError, match=rf"trainer.optimizer.name={name}: the package .* `pip install 'ray-sd\[optimizers\]'`"
    ):
        fit(configure(f"trainer/optimizer={name}"))


@pytest.mark.parametrize("name", RULES)
def test_settings_reach_the_library(name: str):
    settings = {
        "adamw": {"betas": (0.5, 0.6), "eps": 0.1, "weight_decay": 0.2},
        "adamw_8bit": {"betas": (0.5, 0.6), "eps": 0.1, "weight_decay": 0.2},
        "adafactor": {"eps": (0.1, 0.2), "clip_threshold": 2.0, "beta1": 0.3, "weight_decay": 0.4, "scale_parameter": True},
        "lion": {"betas": (0.5, 0.6), "weight_decay": 0.2},
        "prodigy": {
            "betas": (0.5, 0.6), "beta3": 0.7, "eps": 0.1, "weight_decay": 0.2, "d0": 0.3, "d_coef": 0.4, "slice_p": 2,
            "growth_rate": 1.5, "use_bias_correction": False, "safeguard_warmup": False,
        },
    }[name]  # fmt: skip
    assert built(name=name, **settings).items() >= settings.items()


def test_adafactor_follows_the_learning_rate_and_the_papers_decay():
    group = built(name="adafactor", decay_rate=0.7)
    assert (group["lr"], group["relative_step"], group["decay_rate"]) == (0.5, False, -0.7)


def test_groups_keep_rates_and_decays_of_their_own():
    parameters = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    for name in RULES:
        groups = [{"params": parameters[:1], "lr": 0.5}, {"params": parameters[1:], "lr": 0.25, "weight_decay": 0.0}]
        first, second = rule(name=name).build(groups).param_groups
        assert (first["lr"], second["lr"], second["weight_decay"]) == (0.5, 0.25, 0.0)


@pytest.mark.parametrize("signed", [True, False])
def test_what_was_read_from_8_bits_gives_the_same_8_bits(signed: bool):
    torch.manual_seed(0)
    values = torch.randn(256 * 4000 + 77) * torch.logspace(-8, 1, 256 * 4000 + 77)
    values[:256] = 0
    values = values if signed else values.square()
    levels = functional.create_dynamic_map(signed=signed)
    codes, state = functional.quantize_blockwise(values, code=levels, blocksize=256)
    read = functional.dequantize_blockwise(codes, absmax=state.absmax, code=levels, blocksize=256)
    again, absmax = quantize(read, levels)
    assert torch.equal(again[256:], codes[256:])
    torch.testing.assert_close(absmax, state.absmax, rtol=2e-7, atol=0)


@pytest.mark.slow
def test_the_documents_tell_what_each_keeps():
    table = (ROOT / "docs" / "training.md").read_text()
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            json.loads((ROOT / "ray_sd/models/layouts/sd15/unet/config.json").read_text())
        )
    for name in RULES:
        row = re.search(rf"^\| `{name}` \| ([^|]*) \|", table, re.MULTILINE)
        assert row is not None
        assert float(re.match(r"[\d.]+", row[1])[0]) == round(_kept(unet, name=name), 2)
    assert f"with `slice_p=11` {_kept(unet, name='prodigy', slice_p=11):.2f}" in table


def _kept(module: nn.Module, **settings: object) -> float:
    """Bytes a parameter, without the levels that all blocks of 8 bits share."""
    parameters = list(module.parameters())
    optimizer = rule(**settings).build([{"params": parameters, "lr": 1.0}])
    for parameter in parameters:
        rule(**settings).initialize(optimizer, parameter)
    kept = [value for state in optimizer.state.values() for key, value in state.items() if not key.startswith("qmap")]
    return sum(value.nbytes for value in kept if torch.is_tensor(value)) / sum(p.numel() for p in parameters)


def test_a_run_does_not_go_on_with_another_optimizer(configure, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("ray_sd.train.run.connect", lambda: pytest.fail("Ray was started"))
    run = tmp_path / "runs" / "young"
    checkpoint = write_checkpoint(run, step=2)
    (run / "config.yaml").write_text(yaml.safe_dump(configure("name=young").model_dump(mode="json")))
    with pytest.raises(ConfigError, match="resume: trainer.optimizer.name was adamw and is lion"):
        fit(configure("name=young", "resume=true", "trainer.optimizer=lion"))
    with pytest.raises(ArtifactError, match="holds the state of optimizer adamw, this run has prodigy, slice_p 3"):
        fit(configure("name=other", f"resume={checkpoint}", "trainer/optimizer=prodigy", "trainer.optimizer.slice_p=3"))


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("CXX", "no-such-compiler", "this machine has no no-such-compiler"),
        ("PATH", "/nowhere", r"has no c\+\+ and no ninja"),
    ],
)
def test_an_optimizer_that_cannot_be_compiled_is_told(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"trainer.zero.offload: .*{words}.*ray-sd.offload"):
        check_compiler()
