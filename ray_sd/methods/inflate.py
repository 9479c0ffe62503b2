"""From an image model to a video model: spatial weights copied, temporal layers that begin as the identity, all trained.

Training everything first is needed: the half of `conv_in` that reads condition frames is new, cross-attention was learnt on
text and is given an image embedding, and the time embedding may be told noise levels in another form.
"""

import re

import torch
from diffusers import UNet2DConditionModel, UNetSpatioTemporalConditionModel
from diffusers.models.attention import TemporalBasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import TemporalResnetBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import nn

from ray_sd.config import ModelConfig, TrainerConfig
from ray_sd.config.method import InflateMethod
from ray_sd.errors import ConfigError
from ray_sd.methods.temporal import ClipMethod, checkpoint_clips, is_temporal
from ray_sd.models import DiffusionModel, load_model

CONDITION_EMBEDDING = "add_embedding."
"""Begins the names of what only a video U-Net has besides temporal layers."""
FIXED: dict[str, object] = {
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "act_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "time_embedding_type": "positional",
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "center_input_sample": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
}
"""What no shape of an image U-Net tells, and a video U-Net has no setting for."""


class Inflate(ClipMethod):
    config: InflateMethod

    def prepare(self, model: DiffusionModel, trainer: TrainerConfig) -> None:
        image_model = ModelConfig(name="image_model", base=self.config.image_model)
        skeleton = next(model.unet.parameters()).is_meta
        image = load_model(image_model, {"unet", "scheduler"}, skeleton=skeleton)
        predicts, wanted = (own.noise_scheduler.config.prediction_type for own in (image, model))
        if predicts != wanted:
            raise ConfigError(
                f"method.image_model: it predicts '{predicts}', the video model '{wanted}'; take an image model that predicts "
                f"'{wanted}'"
            )
        inflate(model.unet, image.unet)
        self.prepare_export(model, trainer)
        if trainer.gradient_checkpointing:
            checkpoint_clips(model)

    def prepare_export(self, model: DiffusionModel, trainer: TrainerConfig) -> None:
        model.requires_grad_(False)
        model.train()
        model.unet.requires_grad_(True)


@torch.no_grad()
def inflate(video: UNetSpatioTemporalConditionModel, image: UNet2DConditionModel) -> None:
    """Make `video` compute on each frame what `image` does, whatever its condition frames are.

    Raises ConfigError where the layers do not fit.
    """
    own = video.state_dict()
    copied = {_video_name(name): tensor for name, tensor in image.state_dict().items()}
    new = {name for name in own if not (is_temporal(name) or name.startswith(CONDITION_EMBEDDING))}
    for names, which in ((copied.keys() - own.keys(), "more"), (new - copied.keys(), "fewer")):
        if names:
            raise ConfigError(f"method.image_model: its U-Net has {which} layers than the video model's: {min(names)}")
    _check_settings(video, image)
    for name, tensor in copied.items():
        target = own[name]
        if name == "conv_in.weight":
            target = target[:, : tensor.shape[1]]
        if target.shape != tensor.shape:
            raise ConfigError(
                f"method.image_model: its U-Net's {name} has the shape {tuple(tensor.shape)}, the video model's "
                f"{tuple(target.shape)}"
            )
        target.copy_(tensor)
    own["conv_in.weight"][:, image.config.in_channels :] = 0
    silence_temporal(video)


def _check_settings(video: UNetSpatioTemporalConditionModel, image: UNet2DConditionModel) -> None:
    """Raise ConfigError for an image U-Net whose layers compute something else than those of a video U-Net of their shapes."""
    for name, fixed in FIXED.items():
        if image.config[name] != fixed:
            raise ConfigError(
                f"method.image_model: its U-Net has {name} {image.config[name]}, and that of a video model always {fixed}"
            )
    for layer, module in image.named_modules():
        if isinstance(module, Attention) and module.heads != video.get_submodule(layer).heads:
            raise ConfigError(
                f"method.image_model: its U-Net has {module.heads} attention heads in {layer}, the video model's "
                f"{video.get_submodule(layer).heads}"
            )


def silence_temporal(unet: UNetSpatioTemporalConditionModel) -> None:
    """Let temporal layers and time conditions add nothing yet.

    Their last projections are zero; mixing factors would have to be infinite to do the same.
    """
    last: list[nn.Module] = [unet.add_embedding.linear_2]
    for module in unet.modules():
        match module:
            case TemporalResnetBlock():
                last.append(module.conv2)
            case TemporalBasicTransformerBlock():
                last += [module.ff_in.net[2], module.attn1.to_out[0], module.attn2.to_out[0], module.ff.net[2]]
            case TransformerSpatioTemporalModel():
                last.append(module.time_pos_embed.linear_2)
    for layer in last:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def _video_name(name: str) -> str:
    """A parameter of an image U-Net as the video U-Net has it."""
    return re.sub(r"\b(resnets\.\d+)\.", r"\1.spatial_res_block.", name)
