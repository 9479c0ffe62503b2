import numpy as np
import pytest
from PIL import Image

from ray_sd.config import DatasetConfig
from ray_sd.data.crops import Variant, cut, variants

SOURCE = {"name": "image_folder", "path": "x"}


def gradient(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.zeros_like(red)], axis=-1).astype(np.uint8))


def test_the_centre_crop_keeps_the_middle_at_the_target_shape():
    pixels, box = cut(gradient(300, 100), Variant("center", 0, False), height=50, width=50, seed="a")
    assert pixels.shape == (50, 50, 3)
    assert box == (100, 0, 200, 100)
    assert abs(int(pixels[25, 25, 0]) - 128) < 4


def test_shapes_other_than_squares_are_cut_to_their_own_ratio():
    pixels, box = cut(gradient(100, 100), Variant("center", 0, False), height=16, width=32, seed="a")
    assert pixels.shape == (16, 32, 3)
    assert box == (0, 25, 100, 75)


def test_a_window_that_fills_an_axis_stays_within_the_picture():
    """448 * (900 / 448) is a little more than 900."""
    pixels, box = cut(gradient(900, 1200), Variant("center", 0, False), height=448, width=448, seed="a")
    assert pixels.shape == (448, 448, 3)
    assert box == pytest.approx((0, 150, 900, 1050))


def test_scaling_down_averages_instead_of_skipping_pixels():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels, _ = cut(Image.fromarray(stripes), Variant("center", 0, False), height=8, width=8, seed="a")
    assert pixels.min() > 100
    assert pixels.max() < 155


def test_random_windows_depend_on_the_picture_and_their_number_only():
    picture = gradient(200, 50)
    boxes = [cut(picture, Variant("random", i, False), height=8, width=8, seed="a")[1] for i in range(4)]
    again = [cut(picture, Variant("random", i, False), height=8, width=8, seed="a")[1] for i in range(4)]
    other = [cut(picture, Variant("random", i, False), height=8, width=8, seed="b")[1] for i in range(4)]
    assert boxes == again
    assert len(set(boxes)) == 4
    assert not set(boxes) & set(other)
    assert all(box[0] >= 0 and box[2] <= 200 and (box[1], box[3]) == (0, 50) for box in boxes)


def test_a_flip_is_the_mirrored_window():
    plain, box = cut(gradient(200, 50), Variant("random", 1, False), height=8, width=8, seed="a")
    flipped, flipped_box = cut(gradient(200, 50), Variant("random", 1, True), height=8, width=8, seed="a")
    assert flipped_box == box
    assert (flipped == plain[:, ::-1]).all()
    assert not (flipped == plain).all()


def test_flips_double_the_windows():
    config = DatasetConfig(source=SOURCE, crop={"name": "random", "num_variants": 3}, flip=True)
    names = [str(variant) for variant in variants(config)]
    assert names == ["random-0", "random-1", "random-2", "random-0-flip", "random-1-flip", "random-2-flip"]


def test_a_single_pixel_is_enlarged():
    pixels, _ = cut(Image.new("RGB", (1, 1), "red"), Variant("center", 0, False), height=8, width=16, seed="a")
    assert (pixels == [255, 0, 0]).all()
