"""Put trained adapters into the package, in half precision: `python jobs/release_emoji.py runs/pretrain_emoji/adapter`.

An autoencoder becomes `ray_sd/embedded/emoji/vae`. Its latents are rescaled so that every channel has a mean square of
one over the training pictures: the scaling factor is then 1, and no channel drowns in noise before the others do.
A U-Net and its text encoder, trained on that autoencoder, become the rest of the pipeline. What belongs to the upscaler
becomes `ray_sd/embedded/emoji_upscaler`; its largest latents have the mean square that its pipeline's scaling factor asks for.
What belongs to the video model becomes `ray_sd/embedded/emoji_video`, and a U-Net that draws frames between key frames
`ray_sd/embedded/emoji_interpolation`; the video autoencoder's latents are the image model's and stay as they are.
An adapter of the image model becomes `ray_sd/embedded/adapters/NAME`, by the name of its run or a second argument.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ray_sd.adapter import MANIFEST, read_manifest
from ray_sd.config import ExperimentConfig
from ray_sd.config.load import run_job, validate
from ray_sd.errors import ConfigError

FOLDER = Path("ray_sd/embedded/emoji")
UPSCALER = Path("ray_sd/embedded/emoji_upscaler")
VIDEO = Path("ray_sd/embedded/emoji_video")
INTERPOLATION = Path("ray_sd/embedded/emoji_interpolation")
ADAPTERS = Path("ray_sd/embedded/adapters")
PICTURES = Path("runs/data/emoji")
LARGE_PICTURES = Path("runs/data/emoji_large")
HELD_OUT = "embedded/clips/spin"
"""Clips of a motion that no embedded model may have seen, since fine-tunes of them are to teach it."""


def main(argv: Sequence[str]) -> None:
    if len(argv) not in (1, 2):
        raise ConfigError(
            "give one adapter folder, as in runs/pretrain_emoji/adapter, and maybe the name of an adapter"
        )
    adapter = Path(argv[0])
    manifest = read_manifest(adapter)
    config = validate(manifest.config, ExperimentConfig)
    release = {"autoencoder": release_autoencoder, "full": release_pipeline}.get(manifest.kind)
    if config.dataset.source.path.rstrip("/").endswith(HELD_OUT):
        raise ConfigError(
            f"{adapter} was trained on {config.dataset.source.path}, which no embedded model may have seen; "
            "release a run on other clips, such as dataset=emoji_clips"
        )
    if config.model.makes_videos:
        release_video(adapter, config)
    elif release is None:
        release_adapter(adapter, ADAPTERS / (argv[1] if len(argv) == 2 else config.name))
    else:
        release(adapter, config)


def release_autoencoder(adapter: Path, config: ExperimentConfig) -> None:
    from diffusers import AutoencoderKL

    from ray_sd.embedded.autoencoder import UPSCALER_SCALE, mean_square, rescale_latents
    from ray_sd.methods.weights import save_component

    autoencoder = AutoencoderKL.from_pretrained(adapter / "vae").eval()
    if config.model.upscales:
        pictures, folder, scaling_factor = LARGE_PICTURES, UPSCALER, UPSCALER_SCALE
    else:
        pictures, folder, scaling_factor = PICTURES, FOLDER, 1.0
    scale = mean_square(autoencoder, pictures).sqrt()
    if config.model.upscales:
        # Differences of neighbours stay as small as they are: no U-Net can guess most of them, and made as large as colours
        # they would be most of what it learns from.
        scale = scale.max().expand_as(scale)
    rescale_latents(autoencoder, scale * scaling_factor, scaling_factor)
    save_component(autoencoder.half(), folder / "vae")


def release_pipeline(adapter: Path, config: ExperimentConfig) -> None:
    import torch

    from ray_sd.export.whole_model import save_folder
    from ray_sd.methods import load_adapter
    from ray_sd.methods.weights import save_component
    from ray_sd.models import load_model

    model = load_model(config.model)
    load_adapter(model, adapter)
    if config.model.upscales:
        save_folder(model, UPSCALER, torch.float16)
        return
    for name in ("unet", "text_encoder"):
        save_component(getattr(model, name).half(), FOLDER / name)
    pipeline = model.pipeline()
    pipeline.scheduler.save_pretrained(FOLDER / "scheduler")
    pipeline.save_config(FOLDER)


def release_video(adapter: Path, config: ExperimentConfig) -> None:
    import torch

    from ray_sd.export.whole_model import save_folder
    from ray_sd.methods import load_adapter
    from ray_sd.methods.weights import save_component
    from ray_sd.models import load_model

    of_pixels = config.method.name in ("autoencoder", "temporal_decoder")
    model = load_model(config.model, ("vae",) if of_pixels else None)
    # An autoencoder is whole, and what goes with it is released after it.
    load_adapter(model, adapter, allow_other_base=of_pixels)
    if of_pixels:
        save_component(model.vae, VIDEO / "vae", dtype=torch.float16)
    elif config.method.name == "interpolation":
        save_component(model.unet, INTERPOLATION / "unet", dtype=torch.float16)
    else:
        save_folder(model, VIDEO, torch.float16)


def release_adapter(adapter: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(adapter, folder)
    content = json.loads((folder / MANIFEST).read_text())
    content["config"]["storage_path"] = "runs"  # wherever the run was
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_job(main))
