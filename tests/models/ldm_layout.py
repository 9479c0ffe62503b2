"""Names of the original Stable Diffusion files, from the parts of a model in the diffusers layout."""

import re

import torch
from torch import Tensor, nn

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
MIDDLE = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
NUMBERED = re.compile(r"(?:(\w+)\.)?(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def unet_weights(unet: nn.Module) -> dict[str, Tensor]:
    layers = unet.config.layers_per_block
    return {f"model.diffusion_model.{_unet_name(name, layers)}": tensor for name, tensor in unet.state_dict().items()}


def vae_weights(vae: nn.Module, prefix: str = "first_stage_model.") -> dict[str, Tensor]:
    weights = {}
    for name, tensor in vae.state_dict().items():
        if "attentions" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        weights[prefix + _vae_name(name, len(vae.config.block_out_channels))] = tensor
    return weights


def clip_weights(text_encoder: nn.Module) -> dict[str, Tensor]:
    """As in Stable Diffusion 1, whose files also hold the positions."""
    weights = {
        f"cond_stage_model.transformer.text_model.{n}": tensor for n, tensor in text_encoder.state_dict().items()
    }
    positions = torch.arange(text_encoder.config.max_position_embeddings)[None]
    return weights | {"cond_stage_model.transformer.text_model.embeddings.position_ids": positions}


def open_clip_weights(text_encoder: nn.Module) -> dict[str, Tensor]:
    """As in Stable Diffusion 2: query, key and value in one tensor."""
    own = text_encoder.state_dict()
    weights = {
        "token_embedding.weight": own["embeddings.token_embedding.weight"],
        "positional_embedding": own["embeddings.position_embedding.weight"],
        "ln_final.weight": own["final_layer_norm.weight"],
        "ln_final.bias": own["final_layer_norm.bias"],
    }
    for layer in range(text_encoder.config.num_hidden_layers):
        source, target = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            parts = [own[f"{source}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            weights[f"{target}.attn.in_proj_{kind}"] = torch.cat(parts)
            weights[f"{target}.attn.out_proj.{kind}"] = own[f"{source}.self_attn.out_proj.{kind}"]
            weights |= {f"{target}.{new}.{kind}": own[f"{source}.{old}.{kind}"] for old, new in OPEN_CLIP.items()}
    return {f"cond_stage_model.model.{name}": tensor for name, tensor in weights.items()}


def _unet_name(name: str, layers: int) -> str:
    for old, new in UNET.items():
        if name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    if name.startswith("mid_block."):
        part = name.removeprefix("mid_block.")
        old = next(old for old in MIDDLE if part.startswith(f"{old}."))
        return f"middle_block.{MIDDLE[old]}.{_resnet(part.removeprefix(f'{old}.'))}"
    _, way, block, kind, number, rest = NUMBERED.fullmatch(name).groups()
    first = int(block) * (layers + 1)
    if way == "down":
        first += 1
        if kind == "downsamplers":
            return f"input_blocks.{first + layers}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{first + int(number)}.{int(kind == 'attentions')}.{_resnet(rest)}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{1 if block == '0' else 2}.{rest}"
    return f"output_blocks.{first + int(number)}.{int(kind == 'attentions')}.{_resnet(rest)}"


def _resnet(rest: str) -> str:
    part, _, kind = rest.rpartition(".")
    return f"{RESNET.get(part, part)}.{kind}"


def _vae_name(name: str, blocks: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if match := NUMBERED.fullmatch(name):
        side, way, block, kind, number, rest = match.groups()
        block = int(block) if way == "down" else blocks - 1 - int(block)
        if kind.endswith("samplers"):
            return f"{side}.{way}.{block}.{kind.removesuffix('rs')}.{rest}"
        return f"{side}.{way}.{block}.block.{number}.{rest}"
    if match := re.fullmatch(r"(\w+)\.mid_block\.resnets\.(\d)\.(.+)", name):
        return f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
    if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
        return f"{match[1]}.mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}"
    return name
