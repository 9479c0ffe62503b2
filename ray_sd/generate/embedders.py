"""Models that embed pictures, and texts, so that these can be compared: CLIP, and vision transformers such as DINO's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPModel, CLIPTokenizer

import ray_sd.embedded
from ray_sd.config.paths import EMBEDDED
from ray_sd.errors import ConfigError, first_line
from ray_sd.finite import check_finite
from ray_sd.headers import what_is_there
from ray_sd.models.components import is_hub_id, no_progress_bar, snapshot

BATCH_SIZE = 16
FILES, VARIANTS = ("*.json", "*.txt", "*.safetensors"), "*.*.safetensors"
CLASS_TOKEN = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
"""Vision transformers of transformers whose first place is the class token."""


class Clip:
    """A CLIP of transformers, both towers, in fp32. Raises ConfigError for what is none."""

    def __init__(self, source: str, device: torch.device | str, setting: str) -> None:
        config, self._processor, self._tokenizer = _clip_parts(source, setting)
        self._length = config.text_config.max_position_embeddings
        # Many configurations say 2, with which the token of the highest number is pooled, whatever it is.
        config.text_config.eos_token_id = self._tokenizer.eos_token_id
        self._model = _load(CLIPModel, source, config, setting).to(device)

    @staticmethod
    def check(source: str, setting: str) -> None:
        """Raise ConfigError for what is no CLIP, without loading it."""
        _clip_parts(source, setting)

    @torch.inference_mode()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """float64 [N, D] of length one, on the CPU."""
        return _in_batches(pictures, self._embed_pictures)

    def _embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([_pixels(self._processor, picture) for picture in pictures]).to(self._model.device)
        return self._model.visual_projection(self._model.vision_model(pixels).pooler_output)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """float64 [N, D] of length one, on the CPU; texts that are too long are cut."""
        return _in_batches(texts, self._embed_texts)

    def _embed_texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        ).to(self._model.device)
        pooled = self._model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return self._model.text_projection(pooled)


class Dino:
    """A vision transformer of transformers, in fp32; its class token is the embedding. Raises ConfigError for another."""

    def __init__(self, source: str, device: torch.device | str, setting: str) -> None:
        config, self._processor = _dino_parts(source, setting)
        self._model = _load(AutoModel, source, config, setting).to(device)

    @staticmethod
    def check(source: str, setting: str) -> None:
        """Raise ConfigError for what is no such transformer, without loading it."""
        _dino_parts(source, setting)

    @torch.inference_mode()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """float64 [N, D] of length one, on the CPU."""
        return _in_batches(pictures, self._embed_pictures)

    def _embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([_pixels(self._processor, picture) for picture in pictures]).to(self._model.device)
        return self._model(pixels).last_hidden_state[:, 0]


def _pixels(processor: Any, picture: Image.Image) -> Tensor:
    """What a model is given of a picture: [3, H, W].

    Pictures smaller than that are enlarged as Stable Video Diffusion's pipeline does it, which is how the embedded CLIP saw
    its own; larger ones as the model's image processor does.
    """
    picture = picture.convert("RGB")
    side = processor.size.get("shortest_edge") or min(processor.size["height"], processor.size["width"])
    if min(picture.size) >= side:
        return processor(images=picture, return_tensors="pt").pixel_values[0]
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    scale = side / min(picture.size)
    size = (round(picture.height * scale), round(picture.width * scale))
    large = F.interpolate(pixels, size, mode="bicubic", align_corners=True)[0].numpy()
    return processor(
        images=large,
        do_convert_rgb=False,
        do_resize=False,
        do_rescale=False,
        input_data_format="channels_first",
        return_tensors="pt",
    ).pixel_values[0]


def _in_batches(items: Sequence[Any], embed: Any) -> Tensor:
    # Convolutions in TF32 would make an embedding depend on the GPU.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        rows = [embed(items[first : first + BATCH_SIZE]) for first in range(0, len(items), BATCH_SIZE)]
    return F.normalize(torch.cat(rows).double(), dim=-1).cpu()


def _clip_parts(source: str, setting: str) -> tuple[Any, Any, CLIPTokenizer]:
    """Configuration, image processor and tokenizer."""
    folder = _folder(source, setting)
    config = _read_config(folder, setting)
    if config.model_type != "clip":
        raise ConfigError(
            f"{setting}: {source} holds a '{config.model_type}' model; it must be a whole CLIP of transformers, such as "
            "openai/clip-vit-large-patch14"
        )
    processor = _read_processor(folder, setting)
    # Where neither is there, transformers makes a tokenizer without words.
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ConfigError(f"{setting}: {folder} has no tokenizer (no tokenizer.json and no vocab.json)")
    try:
        return config, processor, CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare exceptions for damaged files
        raise ConfigError(f"{setting}: cannot read the tokenizer in {folder}: {first_line(error)}") from error


def _dino_parts(source: str, setting: str) -> tuple[Any, Any]:
    """Configuration and image processor."""
    folder = _folder(source, setting)
    config = _read_config(folder, setting)
    if config.model_type not in CLASS_TOKEN:
        raise ConfigError(
            f"{setting}: {source} holds a '{config.model_type}' model; it must be a vision transformer with a class token, such "
            "as facebook/dinov2-small"
        )
    return config, _read_processor(folder, setting)


def _folder(source: str, setting: str) -> Path:
    """The local folder of a model with safetensors weights, fetched from the hub if need be."""
    if source.startswith(EMBEDDED):
        folder = Path(ray_sd.embedded.__path__[0]) / source.removeprefix(EMBEDDED)
    else:
        folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _fetch(source, setting)
    if not any(folder.glob("*.safetensors")):
        there = what_is_there(file.name for file in folder.iterdir())
        raise ConfigError(f"{setting}: no .safetensors weights in {folder} {there}")
    return folder


def _fetch(source: str, setting: str) -> Path:
    if not is_hub_id(source):
        raise ConfigError(f"{setting}: there is no folder {source}")
    try:
        return snapshot(source, None, FILES, VARIANTS)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{setting}: cannot fetch '{source}' from the Hugging Face hub ({first_line(error)}), and no local folder has that "
            "name; download it elsewhere and give its folder"
        ) from error


def _read_config(folder: Path, setting: str) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever a damaged or unknown configuration leads to
        raise ConfigError(f"{setting}: cannot read the model in {folder}: {first_line(error)}") from error


def _read_processor(folder: Path, setting: str) -> Any:
    try:
        # In Pillow, so that a picture looks the same to the model wherever torchvision is installed or not.
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except Exception as error:  # as above
        raise ConfigError(f"{setting}: cannot read the preprocessing in {folder}: {first_line(error)}") from error


def _load(cls: Any, source: str, config: Any, setting: str) -> Any:
    """A model in fp32, from safetensors only."""
    folder = _folder(source, setting)
    try:
        with no_progress_bar():
            model, info = cls.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        check_finite(model.state_dict(), "its weights")
    except Exception as error:  # as above
        raise ConfigError(f"{setting}: cannot load the model in {folder}: {first_line(error)}") from error
    # A pooler is no part of what DINO learnt, and is not read.
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ConfigError(f"{setting}: the model in {folder} lacks {len(missing)} of its weights, such as {missing[0]}")
    return model.eval().requires_grad_(False)
