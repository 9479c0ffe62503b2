"""What a file holds beside a LoRA, or in its place, by the names of its tensors."""

import re
from collections.abc import Collection
from typing import NamedTuple

from ray_sd.headers import EMB_PARAMS, OLD_PARAMS

TAKEN = "LoRA and DoRA are read"
OTHER_KINDS: dict[str, tuple[str, str]] = {
    r"\.hada_": ("a LoHa", TAKEN),
    r"\.lokr_": ("a LoKr", TAKEN),
    r"\.b?oft_": ("an OFT", TAKEN),
    r"\.on_input$": ("an (IA)³", TAKEN),
    r"\.[ab][12]\.weight$": ("a GLoRA", TAKEN),
    r"\.[wb]_norm$": ("norms, trained whole", f"{TAKEN}; train it again without them (train_norm)"),
    r"\.diff(_b)?$": ("full differences of weights", f"{TAKEN}; fuse it into its base with the tool that made it"),
    r"\.lora_(B|up)\.bias$": ("biases of layers", f"{TAKEN}; train it again without them (lora_bias)"),
    rf"^({EMB_PARAMS}|{OLD_PARAMS})": ("an embedding beside other tensors", f"leave {EMB_PARAMS} alone in the file"),
    r"^text_encoders_\d$": (
        "embeddings of which it does not tell the words",
        "save each as clip_l and clip_g in its file",
    ),
    r"motion_modules[._]": ("motion modules (AnimateDiff)", TAKEN),
    r"^base_model\.model\.": ("a LoRA of PEFT", "give its folder, in which adapter_config.json tells its strength"),
    r"^(ip_adapter|image_proj)\.": ("an IP-Adapter", TAKEN),
    r"^(control_model\.|controlnet_|lora_controlnet)": ("a ControlNet", TAKEN),
    r"^(model\.diffusion_model|cond_stage_model|conditioner\.embedders)\.": (
        "a whole model",
        "give it as the base: model.base=PATH",
    ),
    r"^(first_stage_model|(encoder|decoder)\.(conv_in|conv_out|down|mid|up)[^.]*|(post_)?quant_conv)\.": (
        "an autoencoder",
        "give it as a part of the model: model.vae=PATH",
    ),
}
"""What tensors are that match a pattern, and what to do."""
ANY_BASE = {
    r"single_transformer_blocks|single_blocks[._]|double_blocks[._]": "Flux or another transformer of its kind",
    r"joint_blocks[._]|^lora_te3_|^text_encoder_3\.|\.attn\.add_[qkv]_proj": "Stable Diffusion 3",
    r"^((diffusion_model|transformer|lora_unet|lora_transformer)[._])?blocks[._]\d": "Wan or another video transformer",
    r"^lora_prior_": "Stable Cascade",
    r"^(transformer|lora_transformer|diffusion_model)[._](?!input_|middle_|output_|down_|mid_|up_)": "a diffusion transformer",
}
NOT_1 = {
    r"^lora_te2_|^text_encoder_2\.|[._]transformer_blocks[._][1-9]|label_emb[._]|add_embedding[._]": "Stable Diffusion XL",
    r"[._]encoder[._]layers[._](1[2-9]|2\d)[._]": "Stable Diffusion 2",
}
NOT_XL = {
    r"down_blocks[._](0[._]attentions|3)|up_blocks[._](2[._]attentions|3)|input_blocks[._][12][._]1[._]": (
        "Stable Diffusion 1 or 2"
    )
}
"""Bases by layers that they have and this one lacks: any, Stable Diffusion 1 and 2, and XL."""


class Kind(NamedTuple):
    what: str
    advice: str
    keys: list[str]


def other_kind(keys: Collection[str]) -> Kind | None:
    """What is no LoRA among tensors."""
    for pattern, (what, advice) in OTHER_KINDS.items():
        found = sorted(key for key in keys if re.search(pattern, key))
        if found:
            return Kind(what, advice, found)
    return None


def other_base(layers: Collection[str], base_is_xl: bool) -> tuple[str, str] | None:
    """The base that layers belong to which this one lacks, and one that says so."""
    for pattern, base in (ANY_BASE | (NOT_XL if base_is_xl else NOT_1)).items():
        found = [key for key in layers if re.search(pattern, key)]
        if found:
            return base, min(found)
    return None
