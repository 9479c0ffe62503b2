import numpy as np
import pytest
from PIL import Image

from ray_sd.config import DatasetConfig
from ray_sd.config.dataset import SubjectCrop
from ray_sd.data.crops import Variant, cut, variants
from ray_sd.data.windows import Box, Focus, around

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


def place(box: Box, width: int = 400, height: int = 300, *, shape: tuple[int, int] = (50, 50), **focus: float) -> Box:
    """The window of a shape (height, width) around a box of a picture of 400x300 pixels."""
    settings = {"margin": 0.0, "max_enlargement": 10.0, **focus}
    return around(Image.new("RGB", (width, height)), Focus(box, **settings), *shape)


def test_a_window_around_a_subject_is_the_smallest_of_its_shape_that_holds_it():
    assert place((180, 100, 220, 160)) == (170, 100, 230, 160)
    assert place((180, 100, 220, 160), shape=(50, 100)) == (140, 100, 260, 160)
    assert place((180, 100, 220, 160), shape=(100, 50)) == pytest.approx((180, 90, 220, 170))


def test_a_margin_is_a_share_of_the_longer_side():
    assert place((180, 100, 220, 160), margin=0.5) == (140, 70, 260, 190)


def test_a_window_is_moved_into_the_picture():
    assert place((0, 0, 20, 60)) == (0, 0, 60, 60)
    assert place((390, 290, 400, 300), shape=(50, 100)) == (380, 290, 400, 300)


def test_a_margin_ends_where_the_picture_does():
    """Else a subject in the corner would get all of its room on the other side."""
    assert place((0, 0, 100, 100), margin=0.5) == (0, 0, 150, 150)
    assert place((0, 100, 100, 200), margin=0.5) == (0, 50, 200, 250)


def test_a_subject_too_wide_for_any_window_is_in_the_middle_of_the_largest():
    assert place((40, 100, 380, 200)) == (60, 0, 360, 300)
    assert place((0, 100, 380, 200)) == (40, 0, 340, 300)
    assert place((100, 100, 400, 200), margin=0.2) == (100, 0, 400, 300)


def test_a_small_subject_keeps_its_surroundings_rather_than_being_enlarged_further():
    assert place((198, 148, 202, 152), max_enlargement=2.0) == (187.5, 137.5, 212.5, 162.5)
    assert place((0, 0, 4, 4), width=20, height=10, max_enlargement=2.0) == (0, 0, 10, 10)


def test_windows_keep_their_shape_and_what_fits():
    random = np.random.default_rng(0)
    for _ in range(500):
        width, height, *shape = (int(side) for side in random.integers(8, 500, 4))
        x, y = (np.sort(random.uniform(0, side, 2)) for side in (width, height))
        box, margin = (x[0], y[0], x[1], y[1]), random.uniform(0, 1)
        left, top, right, bottom = place(box, width, height, shape=tuple(shape), margin=margin)
        assert left >= 0
        assert top >= 0
        assert right <= width
        assert bottom <= height
        assert (right - left) * shape[0] == pytest.approx((bottom - top) * shape[1])
        largest = right - left == pytest.approx(width) or bottom - top == pytest.approx(height)
        room = margin * max(x[1] - x[0], y[1] - y[0])
        for held, size, (start, end) in ((x, width, (left, right)), (y, height, (top, bottom))):
            wanted = max(0, held[0] - room), min(size, held[1] + room)
            assert largest or (start <= wanted[0] + 1e-6 and end >= wanted[1] - 1e-6)


def test_without_a_subject_the_middle_is_cut_out():
    picture = gradient(300, 100)
    _, box = cut(picture, Variant("subject", 0, False), height=50, width=50, seed="a")
    assert box == (100, 0, 200, 100)
    focus = Focus((20, 40, 40, 60), 0.0, 10.0)
    pixels, box = cut(picture, Variant("subject", 0, False), height=50, width=50, seed="a", focus=focus)
    assert box == (20, 40, 40, 60)
    assert abs(int(pixels[25, 25, 0]) - 30 / 299 * 255) < 3


def test_whatever_changes_a_window_changes_the_name_of_its_variant():
    crops = [
        SubjectCrop(),
        SubjectCrop(margin=0.2),
        SubjectCrop(max_enlargement=3),
        SubjectCrop(finder="cascade"),
        SubjectCrop(finder="cascade", labels=("face",)),
    ]
    names = {str(variant) for crop in crops for variant in variants(DatasetConfig(source=SOURCE, crop=crop, flip=True))}
    assert len(names) == 2 * len(crops)
    same = variants(DatasetConfig(source=SOURCE, crop=SubjectCrop(margin=0.1)))
    assert str(same[0]) == str(variants(DatasetConfig(source=SOURCE, crop="subject"))[0])
