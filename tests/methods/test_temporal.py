from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from diffusers.models.attention import TemporalBasicTransformerBlock
from diffusers.models.resnet import SpatioTemporalResBlock
from tiny_models import UNET_VIDEO, random_clips, tiny_video_config

from ray_sd.config import TrainerConfig
from ray_sd.config.method import InterpolationMethod, TemporalMethod
from ray_sd.errors import ArtifactError
from ray_sd.methods import build_method
from ray_sd.methods.temporal import is_temporal
from ray_sd.models import VideoLoss, load_model

FULL_SIZE = {"num_attention_heads": (5, 10, 20, 20), "cross_attention_dim": 1024}


def prepared(folder: Path, settings: object, **trainer: object):
    """Method and model of a run that is to begin."""
    method = build_method(settings)
    model = load_model(tiny_video_config(folder), method.components())
    torch.manual_seed(0)
    method.prepare(model, TrainerConfig(**trainer))
    return method, model


def train(method, model, steps: int = 3, condition_frames: int = 1) -> None:
    [group] = method.parameter_groups(model, TrainerConfig())
    optimizer = torch.optim.AdamW(group["params"], lr=1e-2)
    for step in range(steps):
        method.objective(model, random_clips(condition_frames=condition_frames, seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_names(model) -> set[str]:
    return {name for name, parameter in model.unet.named_parameters() if parameter.requires_grad}


def test_only_temporal_layers_and_mixing_factors_train_and_all_else_stays_bit_for_bit(tiny_video: Path):
    method, model = prepared(tiny_video, TemporalMethod())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(method, model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("unet.") and is_temporal(name) for name in changed)
    mixers = {f"unet.{name}" for name in trained_names(model) if name.endswith("mix_factor")}
    assert mixers
    assert mixers <= changed
    frozen = [p for name, p in model.named_parameters() if not is_temporal(name.removeprefix("unet."))]
    assert all(parameter.grad is None for parameter in frozen)


def test_the_names_that_train_in_the_full_size_unet():
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel(**FULL_SIZE)
    names = [name for name, _ in unet.named_parameters() if is_temporal(name)]
    kinds = {next(part for part in name.split(".") if part.startswith(("temporal", "time"))) for name in names}
    assert kinds == {"temporal_transformer_blocks", "temporal_res_block", "time_pos_embed", "time_mixer"}
    # 22 resnets and 16 transformers: 2 norms, 2 convolutions and a projection each, or 38 parameters of a block and 4.
    assert sum(name.endswith("mix_factor") for name in names) == 22 + 16
    assert sum(".temporal_res_block." in name for name in names) == 22 * 10
    assert sum(".time_pos_embed." in name for name in names) == 16 * 4
    left = {name.split(".")[0] for name, _ in unet.named_parameters() if not is_temporal(name)}
    assert {"time_embedding", "add_embedding", "conv_in", "conv_out", "conv_norm_out"} <= left


def test_all_layers_train_by_switch(tiny_video: Path):
    _, model = prepared(tiny_video, TemporalMethod(layers="all"))
    assert trained_names(model) == {name for name, _ in model.unet.named_parameters()}
    assert not any(parameter.requires_grad for parameter in model.vae.parameters())


def test_an_export_loads_in_the_plain_pipeline(tiny_video: Path, tmp_path: Path):
    method, model = prepared(tiny_video, TemporalMethod())
    train(method, model)
    method.export(model, tmp_path)
    unet = UNetSpatioTemporalConditionModel.from_pretrained(tmp_path / "unet", use_safetensors=True)
    pipeline = StableVideoDiffusionPipeline.from_pretrained(tiny_video, unet=unet)
    batch = random_clips()
    expected = model.unet(*unet_inputs()).sample
    fresh = load_model(tiny_video_config(tiny_video))
    learnt = (fresh.unet(*unet_inputs()).sample - expected).abs().max()
    assert (pipeline.unet(*unet_inputs()).sample - expected).abs().max() < 1e-3 * learnt
    assert not torch.allclose(fresh.loss(batch), model.loss(batch), rtol=1e-2)
    assert method.attach(fresh, tmp_path, 1.0) == len(model.unet.state_dict())
    torch.testing.assert_close(fresh.loss(batch), model.loss(batch), rtol=1e-4, atol=1e-5)
    with pytest.raises(ArtifactError, match="no strength"):
        method.attach(fresh, tmp_path, 0.5)


def unet_inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(1, 4, 8, 8, 8, generator=generator)
    embeds = torch.randn(1, 1, 32, generator=generator)
    return sample, torch.tensor(0.5), embeds, torch.tensor([[6.0, 127.0, 0.02]])


def test_a_lora_trains_temporal_layers_only_and_is_exported_fused(tiny_video: Path, tmp_path: Path):
    method, model = prepared(tiny_video, TemporalMethod(lora={"rank": 4}))
    names = trained_names(model)
    assert names
    assert all("temporal_transformer_blocks" in name and ".lora_" in name for name in names)
    assert not any("attn2.to_q" in name or "attn2.to_k" in name for name in names)
    before = load_model(tiny_video_config(tiny_video)).unet(*unet_inputs()).sample
    train(method, model)
    method.export(model, tmp_path)
    plain = UNetSpatioTemporalConditionModel.from_pretrained(tmp_path / "unet", use_safetensors=True)
    found = plain(*unet_inputs()).sample
    expected = model.unet(*unet_inputs()).sample
    assert (found - expected).abs().max() < 1e-2 * (before - expected).abs().max()
    assert set(plain.state_dict()) == set(UNetSpatioTemporalConditionModel(**UNET_VIDEO).state_dict())


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (8, 2.0)])
def test_alpha_scales_a_loras_updates(tiny_video: Path, alpha: float | None, scale: float):
    _, model = prepared(tiny_video, TemporalMethod(lora={"rank": 4, "alpha": alpha}))
    layers = [module for module in model.unet.modules() if hasattr(module, "scaling")]
    assert layers
    assert {value for layer in layers for value in layer.scaling.values()} == {scale}


def test_queries_and_keys_of_cross_attention_to_one_token_get_no_gradient(tiny_video: Path):
    method, model = prepared(tiny_video, TemporalMethod())
    method.objective(model, random_clips()).backward()
    gradients = {name: p.grad.abs().max().item() for name, p in model.unet.named_parameters() if p.requires_grad}
    dead = {name for name in gradients if ".attn2.to_q." in name or ".attn2.to_k." in name}
    assert dead
    assert max(gradients[name] for name in dead) < 1e-5 * max(gradients.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_recomputes_every_block_with_the_same_gradients(tiny_video: Path, checkpointing: bool):
    method, model = prepared(tiny_video, TemporalMethod(), gradient_checkpointing=checkpointing)
    calls: Counter[str] = Counter()
    inner = {TemporalBasicTransformerBlock: "ff_in", SpatioTemporalResBlock: "spatial_res_block"}
    blocks = [
        f"{name}.{inner[type(block)]}" for name, block in model.unet.named_modules() if isinstance(block, tuple(inner))
    ]
    for name in blocks:
        model.unet.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    batch = random_clips()
    method.objective(model, batch).backward()
    assert "mid_block.resnets.0.spatial_res_block" in blocks
    assert calls == dict.fromkeys(blocks, 2 if checkpointing else 1)
    plain_method, plain = prepared(tiny_video, TemporalMethod())
    plain_method.objective(plain, batch).backward()
    gradients = {name: p.grad for name, p in plain.unet.named_parameters() if p.grad is not None}
    for name, parameter in model.unet.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name])
    calls.clear()
    with torch.no_grad():
        method.validation_losses(model, batch)
    assert calls == dict.fromkeys(blocks, 1)


def test_settings_of_the_noise_reach_the_loss_and_validation_drops_nothing(tiny_video: Path):
    settings = TemporalMethod(
        sigma_mean=-1, sigma_std=0.5, augmentation_mean=-2, augmentation_std=0.25, conditioning_dropout=0.3
    )
    method, model = prepared(tiny_video, settings)
    batch = random_clips()
    asked = {"sigma_mean": -1.0, "sigma_std": 0.5, "augmentation_mean": -2.0, "augmentation_std": 0.25}
    torch.testing.assert_close(method.row_losses(model, batch), model.loss(batch, VideoLoss(**asked, dropout=0.3)))
    torch.testing.assert_close(method.validation_losses(model, batch), model.loss(batch, VideoLoss(**asked)))


def test_interpolation_is_conditioned_on_key_frames_at_their_places(tiny_video: Path):
    method, model = prepared(tiny_video, InterpolationMethod(key_frames=(0, 2, -1)))
    assert method.rows().condition_frames == (0, 2, -1)
    batch = random_clips(condition_frames=3)
    expected = model.loss(batch, VideoLoss(dropout=0.1, key_frames=(0, 2, -1)))
    torch.testing.assert_close(method.row_losses(model, batch), expected)
    assert trained_names(model) == {name for name, _ in model.unet.named_parameters() if is_temporal(name)}
    train(method, model, condition_frames=3)


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="lora adapts temporal layers only"):
        TemporalMethod(layers="all", lora={})
    with pytest.raises(ValueError, match="key_frames names none"):
        InterpolationMethod(key_frames=())
