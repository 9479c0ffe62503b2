from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from tiny_models import UNET, difference, draw, random_batch, tiny_config
from transformers import CLIPTextModel

from ray_sd.config import TrainerConfig
from ray_sd.config.method import AutoencoderMethod, FullMethod
from ray_sd.errors import ArtifactError
from ray_sd.methods import Method, build_method
from ray_sd.models import DiffusionModel, load_model


def train(folder: Path, text_encoder: bool) -> tuple[Method, DiffusionModel]:
    method = build_method(FullMethod(text_encoder=text_encoder))
    model = load_model(tiny_config(folder), method.components())
    method.prepare(model, TrainerConfig())
    optimizer = torch.optim.AdamW(method.parameter_groups(model, TrainerConfig(learning_rate=0.01)))
    for step in range(2):
        optimizer.zero_grad()
        method.objective(model, random_batch(text=method.rows().text, seed=step)).backward()
        optimizer.step()
    model.eval()
    return method, model


@pytest.mark.parametrize("text_encoder", [False, True])
def test_an_export_draws_alike_in_plain_diffusers_and_here(tiny: Path, tmp_path: Path, text_encoder: bool):
    method, trained = train(tiny, text_encoder)
    method.export(trained, tmp_path)
    model = load_model(tiny_config(tiny))
    before = draw(model.pipeline())
    model.unet, model.text_encoder = trained.unet, trained.text_encoder or model.text_encoder
    expected = draw(model.pipeline())
    assert difference(before, expected) > 10

    parts = {"unet": UNet2DConditionModel.from_pretrained(tmp_path / "unet")}
    if text_encoder:
        parts["text_encoder"] = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    plain = load_model(tiny_config(tiny)).pipeline()
    plain = StableDiffusionPipeline(**{**plain.components, **parts}, requires_safety_checker=False)
    assert difference(draw(plain), expected) <= 1

    ours = load_model(tiny_config(tiny))
    assert method.attach(ours, tmp_path, 1.0) == sum(len(getattr(model, part).state_dict()) for part in parts)
    assert difference(draw(ours.pipeline()), expected) <= 1

    config = tiny_config(tiny, **{part: str(tmp_path / part) for part in parts})  # as the base of more training
    assert difference(draw(load_model(config).pipeline()), expected) <= 1


@pytest.mark.parametrize("method", [FullMethod(text_encoder=True), AutoencoderMethod()])
def test_an_export_does_not_tell_where_its_base_lay(tiny: Path, tmp_path: Path, method: FullMethod | AutoencoderMethod):
    verbs = build_method(method)
    verbs.export(load_model(tiny_config(tiny), verbs.components()), tmp_path)
    texts = {path: path.read_text() for path in tmp_path.rglob("*.json")}
    assert texts
    assert not [path for path, text in texts.items() if str(tiny) in text]


def test_a_text_encoder_is_saved_under_the_prefix_that_older_transformers_read(tiny: Path, tmp_path: Path):
    method, trained = train(tiny, text_encoder=True)
    method.export(trained, tmp_path)
    names = load_file(tmp_path / "text_encoder/model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in names)
    assert "text_model.embeddings.token_embedding.weight" in names


def test_everything_trains_in_the_unet_and_nothing_beside_it(tiny: Path):
    method = build_method(FullMethod())
    model = load_model(tiny_config(tiny))
    method.prepare(model, TrainerConfig())
    assert all(parameter.requires_grad for parameter in model.unet.parameters())
    assert not any(p.requires_grad for part in (model.vae, model.text_encoder) for p in part.parameters())
    groups = method.parameter_groups(model, TrainerConfig())
    assert [group["name"] for group in groups] == ["unet"]
    assert len(groups[0]["params"]) == len(list(model.unet.parameters()))


def test_what_rows_hold_follows_the_text_encoder():
    assert build_method(FullMethod()).rows().text == "embeddings"
    assert build_method(FullMethod(text_encoder=True, caption_dropout=0.1)).rows().text == "tokens"
    assert build_method(FullMethod(text_encoder=True, caption_dropout=0.1)).rows().caption_dropout == 0.1
    assert build_method(FullMethod(text_encoder=True)).components() == (
        "unet",
        "scheduler",
        "text_encoder",
        "tokenizer",
    )


def test_whole_weights_have_no_strength_and_need_their_shape(tiny: Path, tmp_path: Path):
    method, trained = train(tiny, text_encoder=False)
    method.export(trained, tmp_path)
    model = load_model(tiny_config(tiny))
    with pytest.raises(ArtifactError, match="whole weights, which have no strength"):
        method.attach(model, tmp_path, 0.5)
    wide = load_model(tiny_config(tiny, unet={"architecture": UNET | {"block_out_channels": [64, 128]}}))
    with pytest.raises(ArtifactError, match="has shape .*it was made for another base"):
        method.attach(wide, tmp_path, 1.0)
    deep = load_model(tiny_config(tiny, unet={"architecture": UNET | {"layers_per_block": 2}}))
    with pytest.raises(ArtifactError, match="lacks .* weights, such as .*it was made for another base"):
        method.attach(deep, tmp_path, 1.0)
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="unet has no diffusion_pytorch_model.safetensors"):
        method.attach(model, tmp_path, 1.0)
