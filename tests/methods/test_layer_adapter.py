"""LoHa, LoKr and OFT, alone and in DreamBooth."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from pydantic import TypeAdapter
from tiny_models import difference, draw, random_batch, tiny_config
from transformers import CLIPTextModel

from ray_sd import config
from ray_sd.config import TrainerConfig
from ray_sd.errors import ArtifactError, ConfigError
from ray_sd.methods import Method, build_method
from ray_sd.models import DiffusionModel, load_model

SETTINGS = {
    "loha": {"rank": 4, "alpha": 8},
    "lokr": {"rank": 4, "factor": 4},
    "oft": {"block_size": 8},
    "loha with text": {"text_encoder": True, "target_modules": ["to_q", "conv1", "proj_in"]},
    "lokr with text": {"text_encoder": True, "target_modules": ["to_q", "ff.net.0.proj"]},
    "oft with text": {"text_encoder": True, "block_size": 16},
}


def trained_on(folder: Path, name: str, **settings: object) -> tuple[Method, DiffusionModel]:
    values = {"name": name.split()[0], **SETTINGS[name], **settings}
    method = build_method(TypeAdapter(config.Method).validate_python(values))
    model = load_model(tiny_config(folder), method.components())
    torch.manual_seed(0)
    method.prepare(model, TrainerConfig())
    optimizer = torch.optim.AdamW(method.parameter_groups(model, TrainerConfig(learning_rate=0.1)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(4):
        optimizer.zero_grad()
        method.objective(model, random_batch(text=method.rows().text, seed=step)).backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad} != set()
    return method, model.eval()


@pytest.mark.parametrize("name", SETTINGS)
def test_an_export_draws_alike_in_training_in_plain_diffusers_and_here(tiny: Path, tmp_path: Path, name: str):
    method, trained = trained_on(tiny, name)
    method.export(trained, tmp_path)
    model = load_model(tiny_config(tiny))
    before = draw(model.pipeline())
    model.unet, model.text_encoder = trained.unet, trained.text_encoder or model.text_encoder
    expected = draw(model.pipeline())
    assert difference(before, expected) > 5

    ours = load_model(tiny_config(tiny))
    assert method.attach(ours, tmp_path, 1.0) > 0
    assert difference(draw(ours.pipeline()), expected) <= 1

    parts = {"unet": UNet2DConditionModel.from_pretrained(tmp_path / "unet")}
    if "text" in name:
        parts["text_encoder"] = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    plain = load_model(tiny_config(tiny)).pipeline()
    plain = StableDiffusionPipeline(**{**plain.components, **parts}, requires_safety_checker=False)
    assert difference(draw(plain), expected) <= 1

    alone = load_model(tiny_config(tiny))
    if "text" not in name:
        alone.unet = PeftModel.from_pretrained(alone.unet, tmp_path / "peft/unet").base_model.model
        assert difference(draw(alone.pipeline()), expected) <= 1


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_strength_is_between_the_base_and_the_adapter(tiny: Path, tmp_path: Path, name: str):
    method, trained = trained_on(tiny, name)
    method.export(trained, tmp_path)
    models = []
    for scale in (0.0, 0.5, 1.0):
        model = load_model(tiny_config(tiny))
        method.attach(model, tmp_path, scale)
        models.append(draw(model.pipeline()))
    assert difference(models[0], draw(load_model(tiny_config(tiny)).pipeline())) <= 1
    assert difference(models[0], models[1]) > 1
    assert difference(models[1], models[2]) > 1


def test_rotations_have_no_strength(tiny: Path, tmp_path: Path):
    method, trained = trained_on(tiny, "oft")
    method.export(trained, tmp_path)
    with pytest.raises(ArtifactError, match="rotates weights, which has no strength; use adapter_scale=1"):
        method.attach(load_model(tiny_config(tiny)), tmp_path, 0.5)


def test_blocks_that_do_not_divide_a_layer_are_refused(tiny: Path):
    method = build_method(TypeAdapter(config.Method).validate_python({"name": "oft", "block_size": 7}))
    with pytest.raises(ConfigError, match=r"method.block_size: 7 does not divide the \d+ inputs of .*to_q; try"):
        method.prepare(load_model(tiny_config(tiny), method.components()), TrainerConfig())


def test_an_adapter_of_other_layers_is_refused(tiny: Path, tmp_path: Path):
    method, trained = trained_on(tiny, "loha")
    method.export(trained, tmp_path)
    file = tmp_path / "peft/unet/adapter_config.json"
    file.write_text(file.read_text().replace('"to_v"', '"proj_in"'))
    with pytest.raises(ArtifactError, match="does not fit the base, for example .*; it was made for another base"):
        method.attach(load_model(tiny_config(tiny)), tmp_path, 1.0)
    file.write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read as an adapter of PEFT"):
        method.attach(load_model(tiny_config(tiny)), tmp_path, 1.0)


def test_dreambooth_takes_them(tiny: Path, tmp_path: Path):
    values = {"name": "dreambooth", "adapter": {"name": "lokr", "rank": 4}}
    method = build_method(TypeAdapter(config.Method).validate_python(values))
    model = load_model(tiny_config(tiny), method.components())
    method.prepare(model, TrainerConfig())
    method.export(model, tmp_path)
    assert method.attach(load_model(tiny_config(tiny)), tmp_path, 1.0) > 0
