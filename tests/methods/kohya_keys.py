"""The layers in a LoRA of kohya-ss/sd-scripts, by the names in its files.

Source: what `networks/lora.py` of kohya-ss/sd-scripts (commit 48d368f, February 2026) creates on that repository's own
U-Nets and on CLIP's text encoders, with `conv_dim` for the convolutions; for Stable Diffusion XL the U-Net is that of
`library/sdxl_original_unet.py`. Blocks stand here with how many of their kind they hold.
"""

TRANSFORMER_LAYERS = (
    "attn1_to_q", "attn1_to_k", "attn1_to_v", "attn1_to_out_0",
    "attn2_to_q", "attn2_to_k", "attn2_to_v", "attn2_to_out_0",
    "ff_net_0_proj", "ff_net_2",
)  # fmt: skip
TEXT_LAYERS = (
    "self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2",
)  # fmt: skip

SD_TRANSFORMERS = {
    "down_blocks_0_attentions_0": 1, "down_blocks_0_attentions_1": 1,
    "down_blocks_1_attentions_0": 1, "down_blocks_1_attentions_1": 1,
    "down_blocks_2_attentions_0": 1, "down_blocks_2_attentions_1": 1,
    "mid_block_attentions_0": 1,
    "up_blocks_1_attentions_0": 1, "up_blocks_1_attentions_1": 1, "up_blocks_1_attentions_2": 1,
    "up_blocks_2_attentions_0": 1, "up_blocks_2_attentions_1": 1, "up_blocks_2_attentions_2": 1,
    "up_blocks_3_attentions_0": 1, "up_blocks_3_attentions_1": 1, "up_blocks_3_attentions_2": 1,
}  # fmt: skip
SDXL_TRANSFORMERS = {
    "input_blocks_4_1": 2, "input_blocks_5_1": 2, "input_blocks_7_1": 10, "input_blocks_8_1": 10,
    "middle_block_1": 10,
    "output_blocks_0_1": 10, "output_blocks_1_1": 10, "output_blocks_2_1": 10,
    "output_blocks_3_1": 2, "output_blocks_4_1": 2, "output_blocks_5_1": 2,
}  # fmt: skip

SD_CONVOLUTIONS = {
    "conv1 time_emb_proj conv2": (
        "down_blocks_0_resnets_0", "down_blocks_0_resnets_1", "down_blocks_1_resnets_1", "down_blocks_2_resnets_1",
        "down_blocks_3_resnets_0", "down_blocks_3_resnets_1", "mid_block_resnets_0", "mid_block_resnets_1",
    ),
    "conv1 time_emb_proj conv2 conv_shortcut": (
        "down_blocks_1_resnets_0", "down_blocks_2_resnets_0",
        "up_blocks_0_resnets_0", "up_blocks_0_resnets_1", "up_blocks_0_resnets_2",
        "up_blocks_1_resnets_0", "up_blocks_1_resnets_1", "up_blocks_1_resnets_2",
        "up_blocks_2_resnets_0", "up_blocks_2_resnets_1", "up_blocks_2_resnets_2",
        "up_blocks_3_resnets_0", "up_blocks_3_resnets_1", "up_blocks_3_resnets_2",
    ),
    "conv": (
        "down_blocks_0_downsamplers_0", "down_blocks_1_downsamplers_0", "down_blocks_2_downsamplers_0",
        "up_blocks_0_upsamplers_0", "up_blocks_1_upsamplers_0", "up_blocks_2_upsamplers_0",
    ),
}  # fmt: skip
SDXL_CONVOLUTIONS = {
    "in_layers_2 emb_layers_1 out_layers_3": (
        "input_blocks_1_0", "input_blocks_2_0", "input_blocks_5_0", "input_blocks_8_0",
        "middle_block_0", "middle_block_2",
    ),
    "in_layers_2 emb_layers_1 out_layers_3 skip_connection": (
        "input_blocks_4_0", "input_blocks_7_0",
        "output_blocks_0_0", "output_blocks_1_0", "output_blocks_2_0", "output_blocks_3_0", "output_blocks_4_0",
        "output_blocks_5_0", "output_blocks_6_0", "output_blocks_7_0", "output_blocks_8_0",
    ),
    "op": ("input_blocks_3_0", "input_blocks_6_0"),
    "conv": ("output_blocks_2_2", "output_blocks_5_2"),
}  # fmt: skip


def unet_keys(transformers: dict[str, int]) -> set[str]:
    keys = {f"lora_unet_{name}_{projection}" for name in transformers for projection in ("proj_in", "proj_out")}
    return keys | {
        f"lora_unet_{name}_transformer_blocks_{number}_{layer}"
        for name, blocks in transformers.items()
        for number in range(blocks)
        for layer in TRANSFORMER_LAYERS
    }


def convolution_keys(convolutions: dict[str, tuple[str, ...]]) -> set[str]:
    return {
        f"lora_unet_{block}_{layer}"
        for layers, blocks in convolutions.items()
        for block in blocks
        for layer in layers.split()
    }


def text_keys(prefix: str, layers: int) -> set[str]:
    return {f"{prefix}_text_model_encoder_layers_{number}_{layer}" for number in range(layers) for layer in TEXT_LAYERS}


PUBLISHED = {
    "sd15": unet_keys(SD_TRANSFORMERS) | text_keys("lora_te", 12),
    "sd21": unet_keys(SD_TRANSFORMERS) | text_keys("lora_te", 23),
    "sdxl": unet_keys(SDXL_TRANSFORMERS) | text_keys("lora_te1", 12) | text_keys("lora_te2", 32),
}
"""What is adapted by default: the linear layers and convolutions of one pixel in transformers."""
PUBLISHED_CONVOLUTIONS = {
    "sd15": convolution_keys(SD_CONVOLUTIONS),
    "sd21": convolution_keys(SD_CONVOLUTIONS),
    "sdxl": convolution_keys(SDXL_CONVOLUTIONS),
}
"""What comes with `conv_dim`."""
