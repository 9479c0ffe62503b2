import io
import re
import struct
import zlib
from importlib import import_module

import numpy as np
import pytest
from PIL import Image, ImageOps
from sample_pictures import bomb_png, encoded, noise_png, wide_gamut, with_chunk

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


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
def test_every_orientation_is_what_pillow_makes_of_it(kind: str):
    colours = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 10
    options = {"lossless": True, "exact": True} if kind == "webp" else {}
    for number in range(1, 10):
        exif = Image.Exif()
        exif[0x0112] = number
        data = encoded(Image.fromarray(colours), kind, exif=exif, **options)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert np.array_equal(pixels(data), np.asarray(expected))
        assert pixels(data).shape == ((3, 2, 3) if number in (5, 6, 7, 8) else (2, 3, 3))


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
        (b"", "is empty"),
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
    with pytest.raises(RejectedError, match="cannot be decoded: it is no picture of a format that is read"):
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


COMPRESSED = b"workflow\0\0" + zlib.compress(b"{}" * 2**20)


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"], ids=["before the pixels", "after them"])
@pytest.mark.parametrize("name", [b"zTXt", b"iTXt"])
def test_texts_in_a_png_do_not_decide_about_its_pixels(name: bytes, before: bytes):
    content = COMPRESSED if name == b"zTXt" else b"workflow\0\1\0\0\0" + zlib.compress(b"{}" * 2**20)
    plain = noise_png(0)
    assert np.array_equal(pixels(with_chunk(plain, name, content, before)), pixels(plain))


def test_a_png_is_upright_by_its_orientation_whatever_else_it_says():
    exif = Image.Exif()
    exif[0x0112] = 6
    png = with_chunk(encoded(Image.new("RGB", (4, 2)), exif=exif), b"zTXt", COMPRESSED, b"IDAT")
    assert pixels(png).shape == (4, 2, 3)


def test_damaged_tags_beside_a_readable_orientation_do_not_matter():
    fields = struct.pack(">HHIHxx", 0x0112, 3, 1, 6) + struct.pack(">HHII", 0x011A, 7, 1, 38)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + fields + bytes(4) + struct.pack(">II", 1, 2)
    assert pixels(encoded(Image.new("RGB", (8, 16)), "jpeg", exif=exif)).shape == (8, 16, 3)
    assert pixels(encoded(Image.new("RGB", (8, 16)), "jpeg", exif=b"Exif\0\0MM\0*\xff\xff")).shape == (16, 8, 3)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff", "avif"])
def test_colours_are_those_that_a_viewer_shows(kind: str):
    # (219, 0, 0) of this profile is as red as sRGB can be.
    inks = {(219, 0, 0): (255, 0, 0), (255, 255, 255): (255, 255, 255), (128, 128, 128): (128, 128, 128)}
    for stored, shown in inks.items():
        picture = Image.new("RGB", (16, 16), stored)
        options = {"lossless": True} if kind == "webp" else {"quality": 100} if kind == "jpeg" else {}
        data = encoded(picture, kind, icc_profile=wide_gamut(), **options)
        assert np.abs(pixels(data)[8, 8].astype(int) - shown).max() <= 3


def test_transparency_and_palettes_keep_their_profile():
    stored = Image.new("RGBA", (2, 1), (219, 0, 0, 255))
    stored.putpixel((1, 0), (0, 0, 0, 0))
    layers = decode_layers(encoded(stored, icc_profile=wide_gamut()), background="#0000ff", max_pixels=10)
    assert np.abs(np.asarray(layers.picture).astype(int) - [[[255, 0, 0], [0, 0, 255]]]).max() <= 3
    assert np.asarray(layers.alpha).tolist() == [[255, 0]]
    palette = Image.new("P", (1, 1))
    palette.putpalette([219, 0, 0])
    assert pixels(encoded(palette, icc_profile=wide_gamut()))[0, 0].tolist() == pytest.approx([255, 0, 0], abs=3)


@pytest.mark.parametrize("profile", [b"no profile", wide_gamut()[:200]])
def test_a_profile_that_cannot_be_used_is_told_and_the_numbers_are_taken(profile: bytes):
    red = Image.new("RGB", (2, 2), (219, 0, 0))
    layers = decode_layers(encoded(red, icc_profile=profile), background="#ffffff", max_pixels=10)
    assert layers.picture.getpixel((0, 0)) == (219, 0, 0)
    assert "its colour profile cannot be used: " in layers.profile_error
    assert decode_layers(encoded(red), background="#ffffff", max_pixels=10).profile_error is None


def test_a_profile_of_megabytes_counts():
    profile = wide_gamut()
    profile = (len(profile) + 2**21).to_bytes(4) + profile[4:] + bytes(2**21)
    red = encoded(Image.new("RGB", (2, 2), (219, 0, 0)), icc_profile=profile)
    assert pixels(red)[0, 0].tolist() == pytest.approx([255, 0, 0], abs=3)


def test_a_damaged_chunk_of_a_profile_is_told():
    red = Image.new("RGB", (2, 2), (219, 0, 0))
    png = with_chunk(encoded(red), b"iCCP", b"name\0\0not compressed", b"IDAT")
    jpeg = encoded(red, "jpeg", quality=100, icc_profile=wide_gamut()).replace(
        b"ICC_PROFILE\0\1\1", b"ICC_PROFILE\0\1\2"
    )
    for data in (png, jpeg):
        layers = decode_layers(data, background="#ffffff", max_pixels=10)
        assert layers.picture.getpixel((0, 0))[0] == pytest.approx(219, abs=2)
        assert "its colour profile cannot be used: " in layers.profile_error


@pytest.mark.parametrize(("kind", "plugin"), [("heif", "pillow_heif"), ("jxl", "pillow_jxl")])
def test_pictures_of_phones_are_read_where_their_readers_are_installed(
    kind: str, plugin: str, monkeypatch: pytest.MonkeyPatch
):
    import_module({"heif": "pillow_heif.HeifImagePlugin", "jxl": "pillow_jxl.JpegXLImagePlugin"}[kind])
    data = encoded(Image.new("RGB", (64, 32), (200, 30, 40)), kind)
    assert np.abs(pixels(data)[16, 32].astype(int) - (200, 30, 40)).max() <= 8
    monkeypatch.setattr("ray_sd.media.decode.find_spec", lambda name: None if name == plugin else pytest.fail(name))
    words = rf"is a picture in {kind.upper()}, which is read after: pip install 'ray-sd\[formats\]'"
    with pytest.raises(RejectedError, match=words):
        pixels(data)


def test_the_bound_of_the_configuration_is_that_of_pillow():
    assert 2 * Image.MAX_IMAGE_PIXELS == LARGEST  # which holds for whoever else opens pictures in this process
    source = {"name": "image_folder", "path": "pictures"}
    assert DatasetConfig(source=source, max_pixels=LARGEST).max_pixels == LARGEST
    with pytest.raises(ValueError, match=f"less than or equal to {LARGEST}"):
        DatasetConfig(source=source, max_pixels=LARGEST + 1)
