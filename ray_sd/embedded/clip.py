"""The embedded CLIP, trained from nothing: `python -m ray_sd.embedded.clip`.

It embeds a clip's first frame for the video model, and tells how well a picture answers a prompt. Frames of 64 pixels are
made 224 wide, as Stable Video Diffusion's pipeline does it for its own.
"""

import logging
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from ray_sd.config.base import Schema
from ray_sd.config.load import load_settings, run_job
from ray_sd.embedded.clips import moving_sprites, paste, sprite_square
from ray_sd.embedded.motion import Pose
from ray_sd.embedded.sprites import IMAGE_SIZE, Sprite, caption, catalogue, read_sprites
from ray_sd.embedded.tokenizer import build_tokenizer

logger = logging.getLogger(__name__)

WIDTH = 128
HEADS = 4
VISION_LAYERS, TEXT_LAYERS = 4, 2
PATCH = 28  # eight pixels of a frame
INPUT_SIZE = 224
SPRITE_WIDTH = 72
SIZES = (0.4, 1.0)  # of a sprite, in widths
TILT = 25.0  # degrees; a fine-tune's first frames need not stand upright
HIGHEST_LOGIT_SCALE = math.log(100)
WEIGHT_DECAY = 0.05


class ClipTrainingConfig(Schema):
    """How to train, and where to write."""

    out: Path = Path(__file__).with_name("emoji_clip")
    """The folder to write the model, its tokenizer and its image processor to."""
    packages: Path = Path("runs/packages")
    """Where the two npm packages lie as tarballs; what is missing is fetched there by `npm pack`."""
    steps: int = Field(2500, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(96, ge=2)
    """Pictures and captions that are told apart at a time."""
    learning_rate: float = Field(1e-3, gt=0)
    """The highest, after warm-up; it falls to zero along a cosine."""
    threads: int = Field(2, ge=1)
    """Threads of the one process that trains."""
    seed: int = 0
    """Weights and pictures."""


def train(config: ClipTrainingConfig) -> None:
    torch.set_num_threads(config.threads)
    scenes = Scenes(moving_sprites(read_sprites(config.packages)), config.seed)
    tokenizer = build_tokenizer()
    model = build_clip(tokenizer, config.seed)
    fit(model, tokenizer, scenes, config)
    save(model.half(), tokenizer, config.out)
    names, colours = retrieval(CLIPModel.from_pretrained(config.out).float(), tokenizer, scenes.each())
    logger.info("of new pictures %.1f %% find their name and %.1f %% their colour", 100 * names, 100 * colours)
    logger.info("wrote %s", config.out)


def fit(model: CLIPModel, tokenizer: CLIPTokenizer, scenes: "Scenes", config: ClipTrainingConfig) -> None:
    names = Names(scenes.names, config.seed)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": [*others, *names.parameters()]}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0)
    warmup = min(100, config.steps // 3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / (warmup + 1), 0.5 * (1 + math.cos(math.pi * step / config.steps))),
    )
    losses = []
    for step in tqdm(range(1, config.steps + 1), "training"):
        examples = scenes.draw(config.batch_size)
        with torch.autocast("cpu", torch.bfloat16):
            pictures = embed_pictures(model, [example.picture for example in examples])
            captions = embed_captions(model, tokenizer, [example.caption for example in examples])
        scale = model.logit_scale.exp()
        loss = contrastive_loss(scale, pictures, captions, examples) + names.loss(scale, pictures, examples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=HIGHEST_LOGIT_SCALE)
        losses.append(float(loss.detach()))
        if step % 100 == 0 or step == config.steps:
            logger.info("step %d of %d, loss %.3f", step, config.steps, np.mean(losses[-100:]))


def build_clip(tokenizer: CLIPTokenizer, seed: int = 0) -> CLIPModel:
    """The same seed gives the same weights."""
    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": HEADS,
        "projection_dim": WIDTH,  # for towers that are loaded alone
    }
    text = shared | {
        "num_hidden_layers": TEXT_LAYERS,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = shared | {"num_hidden_layers": VISION_LAYERS, "image_size": INPUT_SIZE, "patch_size": PATCH}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


@dataclass(frozen=True)
class Example:
    name: str
    colour: str
    picture: Image.Image

    @property
    def caption(self) -> str:
        return caption(self.name, self.colour)


class Scenes:
    """Random pictures of sprites on the named backgrounds."""

    def __init__(self, sprites: Sequence[Sprite], seed: int) -> None:
        self._squares = [
            (sprite.name, [sprite_square(sprite, mirrored, SPRITE_WIDTH) for mirrored in (False, True)])
            for sprite in sprites
        ]
        self._draw = random.Random(seed)

    @property
    def names(self) -> list[str]:
        return sorted({name for name, _ in self._squares})

    def draw(self, count: int) -> list[Example]:
        return [self.compose(*self._draw.choice(self._squares)) for _ in range(count)]

    def each(self) -> list[Example]:
        return [self.compose(*square) for square in self._squares]

    def compose(self, name: str, squares: Sequence[Image.Image]) -> Example:
        draw = self._draw
        colour = draw.choice(list(catalogue().colours))
        canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), catalogue().colours[colour])
        size = draw.uniform(*SIZES)
        room = max(0.0, 1 - size) / 2
        x, y = (0.5 + draw.uniform(-room, room) for _ in range(2))
        paste(canvas, draw.choice(squares), Pose(x, y, size, draw.uniform(-TILT, TILT)))
        return Example(name, colour, canvas)


def contrastive_loss(scale: Tensor, pictures: Tensor, captions: Tensor, examples: Sequence[Example]) -> Tensor:
    """Each picture finds its caption and each caption its picture (arXiv:2103.00020), of embeddings [N, D]; two examples of
    one sprite are not told apart, since each other's name is right."""
    logits = scale * pictures @ captions.T
    names = [example.name for example in examples]
    alike = torch.tensor([[one == other for other in names] for one in names]).fill_diagonal_(False)
    logits = logits.masked_fill(alike, -torch.inf)
    own = torch.arange(len(examples))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class Names(nn.Module):
    """An embedding of each name, of training only: among all of them a picture's own is harder to find than in its batch."""

    def __init__(self, names: Sequence[str], seed: int) -> None:
        super().__init__()
        self._index = {name: number for number, name in enumerate(names)}
        start = torch.randn(len(names), WIDTH, generator=torch.Generator().manual_seed(seed))
        self.embeddings = nn.Parameter(0.1 * start)

    def loss(self, scale: Tensor, pictures: Tensor, examples: Sequence[Example]) -> Tensor:
        own = torch.tensor([self._index[example.name] for example in examples])
        return F.cross_entropy(scale * pictures @ F.normalize(self.embeddings, dim=-1).T, own)


def embed_pictures(model: CLIPModel, pictures: Sequence[Image.Image]) -> Tensor:
    """[N, D] of length one."""
    processor = image_processor()
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    resize = _resize_matrix(pixels.shape[-1])
    with torch.autocast("cpu", enabled=False):
        large = resize @ pixels @ resize.T
    return F.normalize(model.visual_projection(model.vision_model((large - mean) / std).pooler_output).float(), dim=-1)


def embed_captions(model: CLIPModel, tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """[N, D] of length one."""
    tokens = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    return F.normalize(model.text_projection(model.text_model(**tokens).pooler_output).float(), dim=-1)


@lru_cache(1)
def _resize_matrix(size: int) -> Tensor:
    """[INPUT_SIZE, size], which enlarges a column of pixels bicubically; four times as fast as enlarging rows and columns at
    once."""
    return F.interpolate(torch.eye(size)[None, None], (INPUT_SIZE, size), mode="bicubic", align_corners=True)[0, 0]


@torch.no_grad()
def retrieval(model: CLIPModel, tokenizer: CLIPTokenizer, examples: Sequence[Example]) -> tuple[float, float]:
    """How many pictures find their own name among those of all examples, and their own colour among all colours."""
    names = sorted({example.name for example in examples})
    colours = list(catalogue().colours)
    pictures = embed_pictures(model, [example.picture for example in examples])
    right_names = right_colours = 0
    of_colour = {
        colour: embed_captions(model, tokenizer, [caption(name, colour) for name in names]) for colour in colours
    }
    for example, picture in zip(examples, pictures, strict=True):
        right_names += names[int((of_colour[example.colour] @ picture).argmax())] == example.name
        own = torch.stack([of_colour[colour][names.index(example.name)] for colour in colours])
        right_colours += colours[int((own @ picture).argmax())] == example.colour
    return right_names / len(examples), right_colours / len(examples)


def image_processor() -> CLIPImageProcessor:
    """CLIP's own mean and standard deviation."""
    return CLIPImageProcessor(size={"shortest_edge": INPUT_SIZE}, crop_size=INPUT_SIZE)


def save(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor().save_pretrained(folder)


def main(argv: Sequence[str]) -> None:
    train(load_settings(argv, ClipTrainingConfig))


if __name__ == "__main__":
    sys.exit(run_job(main))
