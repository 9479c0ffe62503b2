"""From an image model to a video model: spatial weights copied, temporal layers that begin as the identity, all trained.

Training everything first is needed: the half of `conv_in` that reads condition frames is new, cross-attention was learnt on
text and is given an image embedding, and the time embedding may be told noise levels in another form.
"""

import re

import torch
from diffusers import UNet2DConditionModel, UNetSpatioTemporalConditionModel
from diffusers.models.attention import TemporalBasicTransformerBlock
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


class Inflate(ClipMethod):
    config: InflateMethod

    def prepare(self, model: DiffusionModel, trainer: TrainerConfig) -> None:
        image_model = ModelConfig(name="image_model", base=self.config.image_model)
        skeleton = next(model.unet.parameters()).is_meta
        inflate(model.unet, load_model(image_model, {"unet"}, skeleton=skeleton).unet)
        model.requires_grad_(False)
        model.train()
        model.unet.requires_grad_(True)
        if trainer.gradient_checkpointing:
            checkpoint_clips(model)


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
