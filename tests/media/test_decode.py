import re

import numpy as np
import pytest
from PIL import Image
from sample_pictures import bomb_png, encoded, noise_png

from ray_sd.config import DatasetConfig
from ray_sd.media.decode import LARGEST, RejectedError, decode, decode_layers


def pixels(data: bytes, background: str = "#ffffff") -> np.ndarray:
    picture = decode(data, background=background, max_pixels=10_000)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def test_a_picture_is_turned_upright_by_its_exif_orientation():
    picture = Image.new("RGB", (4, 2), "blue")
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned right by 90 degrees
    upright = pixels(encoded(picture, exif=exif))
    assert upright.shape == (4, 2, 3)
    assert upright[0, 1].tolist() == [255, 0, 0]


def test_transparency_shows_the_background():
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (10, 20, 30, 255))
    assert pixels(encoded(picture), "#ff8000").tolist() == [[[255, 128, 0], [10, 20, 30]]]


def test_transparency_is_kept_beside_the_picture_and_turned_with_it():
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (10, 20, 30, 200))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned right by 90 degrees
    layers = decode_layers(encoded(picture, exif=exif), background="#ffffff", max_pixels=10)
    assert np.asarray(layers.alpha).tolist() == [[0], [200]]
    opaque = encoded(Image.new("RGBA", (2, 1), "red"))
    assert decode_layers(opaque, background="#ffffff", max_pixels=10).alpha is None


def test_a_transparent_palette_entry_shows_the_background():
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    assert pixels(encoded(picture, transparency=1), "#ff0000").tolist() == [[[10, 20, 30], [255, 0, 0]]]


def test_sixteen_bit_grey_is_scaled_rather_than_clipped():
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    assert pixels(encoded(Image.fromarray(values)))[0, :, 0].tolist() == [0, 100, 255]


def test_cmyk_becomes_rgb():
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    red, green, blue = pixels(encoded(cyan, "jpeg"))[4, 4].tolist()
    assert red < 40
    assert green > 150
    assert blue > 150


def test_a_single_pixel_is_a_picture():
    assert pixels(noise_png(0, (1, 1))).shape == (1, 1, 3)


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    data = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert pixels(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"no picture at all", "cannot be decoded: "),
        (encoded(Image.new("RGB", (64, 64), "red"), "jpeg")[:400], "cannot be decoded: "),
        (noise_png(0)[:200], "cannot be decoded: "),
        (noise_png(0, (101, 100)), "101x100 pixels are more than dataset.max_pixels=10000"),
    ],
    ids=["empty", "text", "truncated JPEG", "truncated PNG", "too large"],
)
def test_what_is_no_picture_is_rejected_with_the_reason(data: bytes, reason: str):
    with pytest.raises(RejectedError, match=reason):
        pixels(data)


def test_a_bomb_inside_an_icon_is_not_opened():
    """An icon's header names sizes that are not those of the pictures in it."""
    small = encoded(Image.new("RGB", (16, 16)), "ico")
    inner = bomb_png()
    entry = 6 + 8
    icon = small[:entry] + len(inner).to_bytes(4, "little") + (22).to_bytes(4, "little") + inner
    with pytest.raises(RejectedError, match="cannot be decoded: cannot identify image file"):
        decode(icon, background="#ffffff", max_pixels=100_000_000)


def refusal(data: bytes) -> str:
    with pytest.raises(RejectedError) as refused:
        decode(data, background="#ffffff", max_pixels=100_000_000)
    return str(refused.value)


@pytest.mark.parametrize(("width", "height"), [(60_000, 50_000), (12_000, 10_000)], ids=["no", "with a warning"])
def test_a_decompression_bomb_is_rejected_by_its_header_whether_pillow_would_open_it_or_not(width: int, height: int):
    bomb = bomb_png(width, height)
    assert len(bomb) < 1000
    assert refusal(bomb) == f"{width}x{height} pixels are more than dataset.max_pixels=100000000; not decoded"


@pytest.mark.parametrize(
    ("kind", "header", "words"),
    [
        ("bmp", (18, (60_000).to_bytes(4, "little") + (50_000).to_bytes(4, "little")), "60000x50000 pixels"),
        ("gif", (6, (60_000).to_bytes(2, "little") + (50_000).to_bytes(2, "little")), "60000x50000 pixels"),
        # Some versions of its reader refuse by themselves.
        ("webp", (24, (16_382).to_bytes(3, "little") * 2), "(over 178956970|16383x16383) pixels"),
    ],
)
def test_a_bomb_of_any_format_is_rejected_with_its_size_where_that_can_be_had(
    kind: str, header: tuple[int, bytes], words: str
):
    """header: where it says the size, and what it says."""
    small = encoded(Image.new("RGBA", (16, 16), (1, 2, 3, 4)), kind)
    place, size = header
    assert re.match(words, refusal(small[:place] + size + small[place + len(size) :]))


def test_the_bound_of_the_configuration_is_that_of_pillow():
    assert 2 * Image.MAX_IMAGE_PIXELS == LARGEST  # which holds for whoever else opens pictures in this process
    source = {"name": "image_folder", "path": "pictures"}
    assert DatasetConfig(source=source, max_pixels=LARGEST).max_pixels == LARGEST
    with pytest.raises(ValueError, match=f"less than or equal to {LARGEST}"):
        DatasetConfig(source=source, max_pixels=LARGEST + 1)
