"""Tiny real models: random weights, every part small, saved by diffusers and transformers themselves."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ray_sd.adapter import AdapterManifest, write_manifest
from ray_sd.config import ExperimentConfig, ModelConfig, TrainerConfig
from ray_sd.methods import build_method
from ray_sd.models import fingerprint, load_model

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
UNET_XL = UNET | {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
    "cross_attention_dim": 32 + 48,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
VAE = {
    "sample_size": 64,
    "latent_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": [8, 8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
}
TEXT_ENCODER = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 512,
    "eos_token_id": 513,
    "pad_token_id": 513,
}
TEXT_ENCODER_2 = TEXT_ENCODER | {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "projection_dim": 24,
    "pad_token_id": 0,
    "eos_token_id": 2,  # as in the published model, whose tokenizer has another
    "hidden_act": "gelu",
}
UNET_VIDEO = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"],
    "up_block_types": ["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"],
    "num_attention_heads": [2, 4],
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
    "num_frames": 4,
}
VAE_VIDEO = {
    "sample_size": 64,
    "latent_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": [32, 32, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "scaling_factor": 0.5,
}
IMAGE_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 224,
    "patch_size": 56,
    "projection_dim": 32,
}
SCHEDULER_VIDEO = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_type": "continuous",
    "timestep_spacing": "leading",
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 700.0,
    "steps_offset": 1,
}
UNET_UPSCALE = UNET | {"sample_size": 16, "in_channels": 7, "num_class_embeds": 400, "use_linear_projection": True}
VAE_UPSCALE = VAE | {
    "block_out_channels": [8, 8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "scaling_factor": 0.08333,
}
SCHEDULER_UPSCALE = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SCHEDULER_LOW_RES = {"beta_start": 0.0002, "beta_end": 0.03, "beta_schedule": "linear"}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def save_tokenizer(folder: Path, **settings: str) -> Path:
    """A CLIP tokenizer with one token a byte: 512 of them, then start and end."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = [chr(code) for code in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = [*characters, *(character + "</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder, model_max_length=16, **settings).save_pretrained(folder)
    return folder


def save_tiny_model(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """A Stable Diffusion folder in the diffusers layout, with values of its own for the scheduler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        UNet2DConditionModel(**UNET).save_pretrained(folder / "unet")
        AutoencoderKL(**VAE).save_pretrained(folder / "vae")
        CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)).save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "tokenizer")
    PNDMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    settings = folder / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | scheduler))
    return folder


def save_tiny_xl_model(folder: Path, seed: int = 0, **index: object) -> Path:
    """A Stable Diffusion XL folder in the diffusers layout, with values of its own for the pipeline."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(
            unet=UNet2DConditionModel(**UNET_XL),
            vae=AutoencoderKL(**VAE, force_upcast=True),
            text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_ENCODER_2)),
            tokenizer=CLIPTokenizer.from_pretrained(save_tokenizer(folder / "tokenizer")),
            tokenizer_2=CLIPTokenizer.from_pretrained(save_tokenizer(folder / "tokenizer_2", pad_token="!")),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
            ),
            **index,
        )
    pipeline.save_pretrained(folder)
    return folder


def save_tiny_video_model(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """A Stable Video Diffusion folder in the diffusers layout, with values of its own for the scheduler.

    Mixing factors and temporal layers differ from what they start as.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableVideoDiffusionPipeline(
            unet=UNetSpatioTemporalConditionModel(**UNET_VIDEO),
            vae=AutoencoderKLTemporalDecoder(**VAE_VIDEO),
            image_encoder=CLIPVisionModelWithProjection(CLIPVisionConfig(**IMAGE_ENCODER)),
            feature_extractor=CLIPImageProcessor(),
            scheduler=EulerDiscreteScheduler(**SCHEDULER_VIDEO | scheduler),
        )
    pipeline.save_pretrained(folder)
    return folder


def save_tiny_upscale_model(folder: Path, seed: int = 0, **index: object) -> Path:
    """An upscaler's folder in the diffusers layout, with values of its own for the pipeline."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionUpscalePipeline(
            unet=UNet2DConditionModel(**UNET_UPSCALE),
            vae=AutoencoderKL(**VAE_UPSCALE),
            text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)),
            tokenizer=CLIPTokenizer.from_pretrained(save_tokenizer(folder / "tokenizer")),
            low_res_scheduler=DDPMScheduler(**SCHEDULER_LOW_RES),
            scheduler=DDIMScheduler(**SCHEDULER_UPSCALE),
            **index,
        )
    pipeline.save_pretrained(folder)
    return folder


def tiny_upscale_config(folder: Path, **settings: object) -> ModelConfig:
    family = {"family": "stable_diffusion_upscale"}
    return ModelConfig.model_validate({"name": "tiny_upscale", "base": str(folder), **family, **settings})


@pytest.fixture(scope="session")
def tiny_upscale(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole tiny upscaler; not to be written to."""
    return save_tiny_upscale_model(tmp_path_factory.mktemp("models") / "tiny_upscale", max_noise_level=300)


def random_upscale_batch(rows: int = 3, text: str = "embeddings", seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch that fits the tiny upscaler."""
    generator = torch.Generator().manual_seed(seed + 2000)
    return random_batch(rows, text, seed) | {
        "latent_mean": 12 * torch.randn(rows, 4, 16, 16, generator=generator),
        "latent_std": torch.rand(rows, 4, 16, 16, generator=generator),
        "low_res_pixels": torch.randint(256, (rows, 3, 16, 16), generator=generator, dtype=torch.uint8),
    }


def tiny_video_config(folder: Path, **settings: object) -> ModelConfig:
    family = {"family": "stable_video_diffusion", "scheduler": {"sampler": "euler"}}
    return ModelConfig.model_validate({"name": "tiny_video", "base": str(folder), **family, **settings})


@pytest.fixture(scope="session")
def tiny_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole tiny Stable Video Diffusion; not to be written to."""
    return save_tiny_video_model(tmp_path_factory.mktemp("models") / "tiny_video")


def random_clips(
    rows: int = 3, num_frames: int = 4, condition_frames: int = 1, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A batch that fits the tiny Stable Video Diffusion."""
    generator = torch.Generator().manual_seed(seed)
    latents = (rows, num_frames, 4, 8, 8)
    return {
        "latent_mean": torch.randn(latents, generator=generator),
        "latent_std": torch.rand(latents, generator=generator),
        "condition_pixels": torch.randint(
            256, (rows, condition_frames, 3, 64, 64), generator=generator, dtype=torch.uint8
        ),
        "image_embeds": torch.randn(rows, 1, 32, generator=generator),
        "fps": torch.randint(5, 30, (rows,), generator=generator).float(),
        "motion_bucket_id": torch.randint(1, 255, (rows,), generator=generator).float(),
        "row_seed": torch.randint(2**63 - 1, (rows,), generator=generator),
    }


def tiny_xl_config(folder: Path, **settings: object) -> ModelConfig:
    family = {"family": "stable_diffusion_xl", "scheduler": {"sampler": "euler"}}
    return ModelConfig.model_validate({"name": "tiny_xl", "base": str(folder), **family, **settings})


def tiny_config(folder: Path, **settings: object) -> ModelConfig:
    return ModelConfig.model_validate({"name": "tiny", "base": str(folder), **settings})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole tiny model that predicts the noise; not to be written to."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole tiny Stable Diffusion XL; not to be written to."""
    return save_tiny_xl_model(tmp_path_factory.mktemp("models") / "tiny_xl")


def random_xl_batch(rows: int = 3, text: str = "embeddings", seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch that fits the tiny Stable Diffusion XL."""
    generator = torch.Generator().manual_seed(seed + 1000)
    batch = random_batch(rows, text, seed)
    batch["add_time_ids"] = torch.randint(1, 2000, (rows, 6), generator=generator).float()
    if text == "embeddings":
        batch["text_embeds"] = torch.randn(rows, 16, 80, generator=generator)
        batch["pooled_text_embeds"] = torch.randn(rows, 24, generator=generator)
    else:
        batch["input_ids_2"] = batch["input_ids"].clone()
    return batch


def random_batch(rows: int = 3, text: str = "embeddings", seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch that fits the tiny model."""
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "latent_mean": torch.randn(rows, 4, 8, 8, generator=generator),
        "latent_std": torch.rand(rows, 4, 8, 8, generator=generator),
        "row_seed": torch.randint(2**63 - 1, (rows,), generator=generator),
    }
    if text == "embeddings":
        batch["text_embeds"] = torch.randn(rows, 16, 32, generator=generator)
    else:
        batch["input_ids"] = torch.randint(512, (rows, 16), generator=generator)
    return batch


def difference(one: Image.Image, other: Image.Image) -> int:
    """Largest difference of two pictures' pixels, of 255.

    Two ways to one picture may be 1 apart: batches of other sizes, and weights that lie otherwise in memory, are rounded
    otherwise in the last bit by many a processor, which may tip a pixel.
    """
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


def all_tensors() -> list[torch.Tensor]:
    """Those of this process."""
    gc.collect()
    return [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]


def bytes_beside(tensors: list[torch.Tensor]) -> int:
    """What all tensors of this process take beside those."""
    found, others = (
        {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in some}
        for some in (all_tensors(), tensors)
    )
    return sum(nbytes for place, nbytes in found.items() if place not in others)


def draw(pipeline: DiffusionPipeline, prompt: str = "a cat", seed: int = 1, **settings: object) -> Image.Image:
    """What a plain diffusers pipeline draws, in three steps unless told otherwise."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipeline(prompt, generator=generator, **{"num_inference_steps": 3, **settings}).images[0]


def export_adapter(base: Path, folder: Path, method: dict, **model: object) -> AdapterManifest:
    """An adapter as a run leaves it, after three large steps."""
    config = ExperimentConfig.model_validate(
        {
            "name": "run",
            "dataset": {"source": {"name": "image_folder", "path": "pictures"}},
            "model": tiny_config(base, **model).model_dump(),
            "method": method,
        }
    )
    torch.manual_seed(0)
    verbs = build_method(config.method)
    trained = load_model(config.model, verbs.components())
    verbs.prepare(trained, TrainerConfig())
    optimizer = torch.optim.AdamW(verbs.parameter_groups(trained, TrainerConfig(learning_rate=0.05)))
    rows = verbs.rows()
    for step in range(3):
        batch = random_batch(text=rows.text, seed=step)
        if rows.placeholders:
            batch |= trained.tokenize([" ".join(["a", *(token for token, _ in rows.placeholders)])] * 3)
        if rows.images == "pixels":
            batch["pixels"] = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
        verbs.objective(trained, batch).backward()
        optimizer.step()
    verbs.export(trained, folder)
    fingerprints = {component: fingerprint(config.model, component) for component in verbs.relies_on()}
    return write_manifest(
        folder, config=config, step=3, fingerprints=fingerprints, data_fingerprint="d1", metrics={"loss": 0.5}
    )
