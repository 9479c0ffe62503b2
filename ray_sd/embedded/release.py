"""From trained adapters to what ships in this package, in half precision.

    python -m ray_sd.embedded.release vae runs/finish_vae_emoji/adapter
    python -m ray_sd.embedded.release pipeline runs/pretrain_emoji/adapter

The autoencoder's latents are rescaled so that every channel has a mean square of one over the training pictures; its
scaling factor is then 1, and no channel drowns in the noise before the others do.
"""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL
from PIL import Image

from ray_sd.adapter import read_manifest
from ray_sd.config import ExperimentConfig
from ray_sd.config.load import validate
from ray_sd.methods import load_adapter
from ray_sd.methods.weights import save_component
from ray_sd.models import load_model

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "emoji"
PICTURES = Path("runs/data/emoji")
BATCH = 128


def release_autoencoder(adapter: Path, pictures: Path = PICTURES) -> None:
    """Write `vae/`, rescaled by the statistics of Parquet `pictures`."""
    autoencoder = AutoencoderKL.from_pretrained(adapter / "vae").eval()
    rescale_latents(autoencoder, mean_square(autoencoder, pictures).sqrt())
    save_component(autoencoder.half(), FOLDER / "vae")


def release_pipeline(adapter: Path) -> None:
    """Write `unet/`, `text_encoder/`, `scheduler/` and `model_index.json`."""
    config = validate(read_manifest(adapter).config, ExperimentConfig)
    model = load_model(config.model)
    load_adapter(model, adapter)
    for name in ("unet", "text_encoder"):
        save_component(getattr(model, name).half(), FOLDER / name)
    pipeline = model.pipeline()
    pipeline.scheduler.save_pretrained(FOLDER / "scheduler")
    pipeline.save_config(FOLDER)


@torch.no_grad()
def mean_square(autoencoder: AutoencoderKL, pictures: Path) -> torch.Tensor:
    """Mean square of each latent channel, [C]."""
    total, count = torch.zeros(autoencoder.config.latent_channels), 0
    for pixels in _batches(pictures):
        latents = autoencoder.encode(pixels).latent_dist.mean
        total += latents.square().mean(dim=(2, 3)).sum(dim=0)
        count += len(pixels)
    return total / count


@torch.no_grad()
def rescale_latents(autoencoder: AutoencoderKL, scale: torch.Tensor) -> None:
    """Divide the latents' channels by `scale` [C] in the encoder's last layer, and multiply in the decoder's first.

    Reconstructions stay the same, for both layers are linear and the decoder's first pads with zeros.
    """
    channels = len(scale)
    encoder, decoder = autoencoder.quant_conv, autoencoder.decoder.conv_in
    encoder.weight[:channels] /= scale.view(-1, 1, 1, 1)
    encoder.bias[:channels] /= scale
    encoder.bias[channels:] -= 2 * scale.log()
    decoder.weight *= scale.view(1, -1, 1, 1)
    autoencoder.register_to_config(scaling_factor=1.0)


def _batches(pictures: Path) -> Iterator[torch.Tensor]:
    for path in sorted(pictures.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(BATCH, columns=["image"]):
            arrays = [np.asarray(Image.open(data.as_buffer())) for data in batch["image"]]
            yield torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


if __name__ == "__main__":
    {"vae": release_autoencoder, "pipeline": release_pipeline}[sys.argv[1]](Path(sys.argv[2]))
