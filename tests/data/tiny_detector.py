"""A tiny object-detection model that knows two things: what is red is a cat, what is blue is a dog.

`python tests/data/tiny_detector.py` trains it anew, for a minute. It is kept, since what is learnt depends on the processor.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import YolosConfig, YolosForObjectDetection
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

FOLDER = Path(__file__).parent / "red_cats_blue_dogs"
SIDE = 32
COLOURS = np.array([[1, -1, -1], [-1, -1, 1]], np.float32)
SETTINGS = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": [SIDE, SIDE],
    "patch_size": 8,
    "use_mid_position_embeddings": False,
    "initializer_range": 0.1,
    "id2label": {0: "cat", 1: "dog"},
    "label2id": {"cat": 0, "dog": 1},
}


def train_detector(folder: Path, steps: int = 4000) -> Path:
    """A YOLOS that has learnt to box a coloured rectangle, saved with its preprocessing by transformers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = YolosForObjectDetection(YolosConfig(num_detection_tokens=1, **SETTINGS)).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 50) * (1 - step / steps))
    random = np.random.default_rng(0)
    for _ in range(steps):
        pixels, labels = _batch(random)
        optimizer.zero_grad()
        model(pixel_values=pixels, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    _processor({"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def save_random_detector(folder: Path) -> Path:
    """A YOLOS of random weights with several detections a picture, which keeps the shape of pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = YolosForObjectDetection(YolosConfig(num_detection_tokens=5, **SETTINGS))
        # They begin as zeros, so that all five would detect the same.
        torch.nn.init.normal_(model.vit.embeddings.detection_tokens)
    model.save_pretrained(folder)
    _processor({"shortest_edge": SIDE, "longest_edge": 2 * SIDE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def detector() -> str:
    """A model that knows red cats and blue dogs."""
    return str(FOLDER)


@pytest.fixture(scope="session")
def random_detector(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_random_detector(tmp_path_factory.mktemp("random")))


def _processor(size: dict[str, int]) -> YolosImageProcessorPil:
    return YolosImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def _batch(random: np.random.Generator) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """16 pictures of noise around grey with one rectangle each."""
    pixels = random.normal(0, 0.1, (16, 3, SIDE, SIDE)).astype(np.float32)
    labels = []
    for picture in pixels:
        number = int(random.integers(2))
        width, height = random.integers(8, 20, 2)
        left, top = random.integers(0, SIDE - width), random.integers(0, SIDE - height)
        picture[:, top : top + height, left : left + width] = COLOURS[number][:, None, None]
        box = np.array([left + width / 2, top + height / 2, width, height], np.float32) / SIDE
        labels.append({"class_labels": torch.tensor([number]), "boxes": torch.tensor(box)[None]})
    return torch.from_numpy(pixels), labels


if __name__ == "__main__":
    train_detector(FOLDER)
