"""Names and tensors of the original Stable Diffusion files, of a model whose parts are in the diffusers layout.

The names are those of CompVis/stable-diffusion (`ldm/modules/diffusionmodules/openaimodel.py`, `model.py`), of
Stability-AI/generative-models (`sgm/modules/diffusionmodules/openaimodel.py`) and of mlfoundations/open_clip. A U-Net's
places in its file are counted over the blocks that it has, so a table is made from the module and not from patterns.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ray_sd.models.base import DiffusionModel

UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""Within a residual block; transformers have the same names in both layouts."""
VAE_BLOCK = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
TEXT_MODEL = "text_model."


def original_weights(model: DiffusionModel) -> dict[str, Tensor]:
    """All weights of a loaded model under the names, and in the shapes, of one original file."""
    weights = unet_weights(model.unet) | vae_weights(model.vae)
    encoders = [encoder for encoder, _ in model.text_encoders().values()]
    for number, encoder in enumerate(encoders):
        prefix = f"conditioner.embedders.{number}." if len(encoders) > 1 else "cond_stage_model."
        # OpenAI's CLIP, which the original code runs by transformers, has quick_gelu; OpenCLIP's models have gelu.
        if encoder.config.hidden_act == "quick_gelu":
            weights |= clip_weights(encoder, f"{prefix}transformer.")
        else:
            weights |= open_clip_weights(encoder, f"{prefix}model.")
    return weights


def unet_weights(unet: nn.Module) -> dict[str, Tensor]:
    return _renamed(unet, unet_names(unet), "model.diffusion_model.")


def vae_weights(vae: nn.Module, prefix: str = "first_stage_model.") -> dict[str, Tensor]:
    """Attention is linear in diffusers and a convolution of one pixel in the original."""
    weights = _renamed(vae, _vae_names(vae), prefix)
    return {
        name: tensor[:, :, None, None] if ".mid.attn_1." in name and tensor.ndim == 2 else tensor
        for name, tensor in weights.items()
    }


def clip_weights(encoder: nn.Module, prefix: str = "cond_stage_model.transformer.") -> dict[str, Tensor]:
    return {f"{prefix}{TEXT_MODEL}{name}": tensor for name, tensor in _text_weights(encoder).items()}


def open_clip_weights(encoder: nn.Module, prefix: str = "cond_stage_model.model.") -> dict[str, Tensor]:
    """Query, key and value are one tensor, and the projection, where there is one, is transposed."""
    own = _text_weights(encoder)
    weights = {
        "token_embedding.weight": own["embeddings.token_embedding.weight"],
        "positional_embedding": own["embeddings.position_embedding.weight"],
        "ln_final.weight": own["final_layer_norm.weight"],
        "ln_final.bias": own["final_layer_norm.bias"],
    }
    if "text_projection.weight" in own:
        weights["text_projection"] = own["text_projection.weight"].T
    for number in range(encoder.config.num_hidden_layers):
        source, target = f"encoder.layers.{number}", f"transformer.resblocks.{number}"
        for kind in ("weight", "bias"):
            parts = [own[f"{source}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            weights[f"{target}.attn.in_proj_{kind}"] = torch.cat(parts)
            weights[f"{target}.attn.out_proj.{kind}"] = own[f"{source}.self_attn.out_proj.{kind}"]
            weights |= {f"{target}.{new}.{kind}": own[f"{source}.{old}.{kind}"] for old, new in OPEN_CLIP_LAYER.items()}
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def unet_names(unet: nn.Module) -> dict[str, str]:
    """The original name of each module of a U-Net, without the file's prefix."""
    names = dict(UNET)
    for block, original in _unet_blocks(unet):
        names |= _names_below(unet, block, original, UNET_BLOCK)
    return names


def _unet_blocks(unet: nn.Module) -> Iterator[tuple[str, str]]:
    """Residual blocks, transformers and resamplers, each with its original place."""
    place = 1  # conv_in is the first of the input blocks
    for number, block in enumerate(unet.down_blocks):
        yield from _layers(block, f"down_blocks.{number}", "input_blocks", place)
        place += len(block.resnets)
        if block.downsamplers:
            yield f"down_blocks.{number}.downsamplers.0.conv", f"input_blocks.{place}.0.op"
            place += 1

    if unet.mid_block is not None:
        yield from _middle_layers(unet.mid_block)

    place = 0
    for number, block in enumerate(unet.up_blocks):
        yield from _layers(block, f"up_blocks.{number}", "output_blocks", place)
        place += len(block.resnets)
        if block.upsamplers:
            behind = 2 if _attentions(block) else 1
            yield f"up_blocks.{number}.upsamplers.0", f"output_blocks.{place - 1}.{behind}"


def _layers(block: nn.Module, own: str, original: str, place: int) -> Iterator[tuple[str, str]]:
    for layer in range(len(block.resnets)):
        yield f"{own}.resnets.{layer}", f"{original}.{place + layer}.0"
        if _attentions(block):
            yield f"{own}.attentions.{layer}", f"{original}.{place + layer}.1"


def _middle_layers(block: nn.Module) -> Iterator[tuple[str, str]]:
    """Residual blocks with a transformer between two of them, if there are any."""
    for layer in range(len(block.resnets)):
        yield f"mid_block.resnets.{layer}", f"middle_block.{2 * layer}"
    for layer in range(len(_attentions(block))):
        yield f"mid_block.attentions.{layer}", f"middle_block.{2 * layer + 1}"


def _attentions(block: nn.Module) -> Sequence[nn.Module]:
    return getattr(block, "attentions", ())


def _vae_names(vae: nn.Module) -> dict[str, str]:
    names = {name: name for name in ("quant_conv", "post_quant_conv")}
    for side, way in (("encoder", "down"), ("decoder", "up")):
        names |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out"}
        names[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        for block, original in (("resnets.0", "block_1"), ("attentions.0", "attn_1"), ("resnets.1", "block_2")):
            names |= _names_below(vae, f"{side}.mid_block.{block}", f"{side}.mid.{original}", VAE_BLOCK)
        blocks = vae.get_submodule(f"{side}.{way}_blocks")
        for number, block in enumerate(blocks):
            # The original decoder counts from the pixels, too.
            place = f"{side}.{way}.{number if way == 'down' else len(blocks) - 1 - number}"
            own = f"{side}.{way}_blocks.{number}"
            for layer in range(len(block.resnets)):
                names |= _names_below(vae, f"{own}.resnets.{layer}", f"{place}.block.{layer}", VAE_BLOCK)
            if getattr(block, f"{way}samplers"):
                names |= _names_below(vae, f"{own}.{way}samplers.0", f"{place}.{way}sample", {})
    return names


def _names_below(root: nn.Module, block: str, original: str, renamed: Mapping[str, str]) -> dict[str, str]:
    names = {
        f"{block}.{name}": f"{original}.{renamed.get(name, name)}"
        for name, _ in root.get_submodule(block).named_modules()
        if name
    }
    return names | {block: original}


def _renamed(root: nn.Module, names: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    weights = {}
    for parameter, tensor in root.state_dict().items():
        module, _, kind = parameter.rpartition(".")
        weights[f"{prefix}{names[module]}.{kind}"] = tensor
    return weights


def _text_weights(encoder: nn.Module) -> dict[str, Tensor]:
    """Some classes and releases of transformers keep the layers under `text_model.`, others do not."""
    return {name.removeprefix(TEXT_MODEL): tensor for name, tensor in encoder.state_dict().items()}
