"""The first step of a LoRA in plain diffusers and PEFT, which `first_step.py` compares with.

`python benchmarks/bare_lora.py MODEL PICTURES BATCH_SIZE`: no Ray, no DeepSpeed, no cache, no checks. Prints when it had imported
and when it had taken the step, in seconds since the epoch.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

RANK = 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def main(model: str, pictures: str, batch_size: int) -> None:
    imported = time.time()
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder").float()
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").float()
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").float().requires_grad_(False)
    scheduler = DDIMScheduler.from_pretrained(model, subfolder="scheduler")
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-4)

    paths = sorted(Path(pictures).glob("*.png"))[:batch_size]
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths])).permute(0, 3, 1, 2)
    captions = [path.with_suffix(".txt").read_text() for path in paths]
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        latents = vae.encode(pixels.float() / 127.5 - 1).latent_dist.sample() * vae.config.scaling_factor
        text = text_encoder(tokens.input_ids)[0]
    noise = torch.randn_like(latents)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch_size,))
    predicted = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, text).sample
    torch.nn.functional.mse_loss(predicted, scheduler.get_velocity(latents, noise, timesteps)).backward()
    optimizer.step()
    print(imported, time.time())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
