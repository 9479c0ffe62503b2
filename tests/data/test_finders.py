import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps
from sample_pictures import noise_png
from subject_pictures import GREY, find, overlap, photograph, rectangle

from ray_sd.data.finders.base import is_strip
from ray_sd.data.windows import Box


def holds(box: Box, *points: tuple[float, float]) -> bool:
    return all(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in points)


def test_a_cut_out_is_found_by_its_transparency():
    picture = Image.new("RGBA", (200, 100), (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((100, 20, 179, 89), fill=(10, 20, 30, 60))  # its shadow
    draw.ellipse((90, 10, 149, 69), fill=(200, 100, 0, 255))
    (subject,) = find({}, picture)
    assert (subject.box, subject.label) == ((90, 10, 150, 70), "cut-out")


def test_an_empty_cut_out_has_no_subject():
    assert find({}, Image.new("RGBA", (200, 100), (10, 10, 10, 0))) == [None]


@pytest.mark.parametrize("ground", ["grass.png", "brick.png", "gravel.png"])
def test_what_stands_out_is_found_on_a_photographed_ground(ground: str):
    picture = photograph(ground).resize((512, 384))
    ImageDraw.Draw(picture).ellipse((300, 100, 449, 279), fill=(230, 140, 30))
    (subject,) = find({}, picture)
    assert subject.label == "foreground"
    assert overlap(subject.box, (300, 100, 450, 280)) > 0.85


def test_what_the_lower_border_cuts_off_is_found_whole():
    (subject,) = find({}, rectangle((150, 120, 250, 300), (20, 90, 20)))
    assert overlap(subject.box, (150, 120, 250, 300)) > 0.9
    assert subject.box[3] == 300


def test_what_reaches_the_other_borders_is_followed_to_them():
    picture = rectangle((0, 60, 200, 200), (20, 90, 20))
    ImageDraw.Draw(picture).rectangle((0, 60, 19, 200), fill=(220, 190, 60))
    (subject,) = find({}, picture)
    assert subject.box[0] == 0


@pytest.mark.parametrize(
    "picture",
    [
        Image.new("RGB", (300, 200), "red"),
        Image.new("RGB", (1, 1)),
        Image.new("RGB", (5000, 3)),
        Image.open(io.BytesIO(noise_png(0, (200, 200)))),
    ],
    ids=["one colour", "one pixel", "a line", "noise"],
)
@pytest.mark.parametrize("finder", ["foreground", "cascade"])
def test_where_nothing_stands_out_nothing_is_found(finder: str, picture: Image.Image):
    assert find({"finder": finder}, picture) == [None]


def test_areas_of_one_colour_are_cut_out_with_some_grain(monkeypatch: pytest.MonkeyPatch):
    """Without it GrabCut would take eight seconds for this picture, and a minute for an empty white page."""
    halves = Image.new("RGB", (300, 200), "white")
    ImageDraw.Draw(halves).rectangle((0, 0, 149, 199), fill=(200, 30, 30))
    seen = []
    grab_cut = cv2.grabCut
    monkeypatch.setattr(cv2, "grabCut", lambda pixels, *rest: seen.append(pixels.copy()) or grab_cut(pixels, *rest))
    find({}, halves)
    [pixels] = seen
    for half in np.array_split(pixels.astype(float), 2, axis=1):
        deviations = np.delete(half, 0, axis=1)[:, :-1].std(axis=(0, 1))
        assert 1 < deviations.min() <= deviations.max() < 3


def test_the_foreground_of_a_picture_is_always_the_same():
    coffee, rocket = photograph("coffee.png"), photograph("rocket.jpg")
    first = find({}, coffee)
    assert find({}, rocket, coffee)[1:] == first


@pytest.mark.parametrize(
    ("scale", "mirrored"),
    [pytest.param(0.5, True, marks=pytest.mark.slow), (1.0, False), pytest.param(3.0, True, marks=pytest.mark.slow)],
)
def test_the_face_of_a_cat_is_found(scale: float, mirrored: bool):
    cat = photograph("chelsea.png")
    eyes_and_nose = [(175, 96), (315, 130), (262, 228)]
    if mirrored:
        cat = cat.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        eyes_and_nose = [(cat.width - x, y) for x, y in eyes_and_nose]
    (subject,) = find({"finder": "cascade"}, cat.resize((round(cat.width * scale), round(cat.height * scale))))
    assert subject.label == "cat face"
    assert holds(subject.box, *((x * scale, y * scale) for x, y in eyes_and_nose))


@pytest.mark.slow
def test_the_face_of_a_person_is_found():
    (subject,) = find({"finder": "cascade"}, photograph("astronaut.png"))
    assert subject.label == "face"
    assert holds(subject.box, (205, 110), (245, 108), (226, 150))
    assert overlap(subject.box, (175, 65, 275, 165)) > 0.7


@pytest.mark.slow
def test_only_the_faces_that_were_asked_for_count():
    both = Image.new("RGB", (800, 300), GREY)
    both.paste(photograph("chelsea.png"))
    both.paste(photograph("astronaut.png").crop((120, 0, 345, 225)).resize((300, 300)), (480, 0))
    (cat,) = find({"finder": "cascade", "labels": ["cat face"]}, both)
    (face,) = find({"finder": "cascade", "labels": ["face"]}, both)
    assert cat.box[2] < 480 < face.box[0]


@pytest.mark.parametrize(
    "name",
    [
        "coffee.png",
        "rocket.jpg",
        pytest.param("brick.png", marks=pytest.mark.slow),
        pytest.param("motorcycle_left.png", marks=pytest.mark.slow),
    ],
)
def test_no_face_is_seen_in_pictures_without_one(name: str):
    assert find({"finder": "cascade"}, photograph(name)) == [None]


def on_a_blanket(side: str = "bottom", part: Box = (60, 20, 380, 260)) -> Image.Image:
    """A part of a cat's photograph, which fills the picture but for a strip of a blanket along a border."""
    cat = photograph("chelsea.png").crop(part).resize((256, 192))
    blanket = ImageOps.colorize(photograph("brick.png").resize((256, 256)).convert("L"), (10, 20, 60), (70, 100, 200))
    cat.paste(blanket, {"bottom": (0, 141), "top": (0, 51 - 256), "right": (188, 0)}[side])
    return cat


@pytest.mark.parametrize("part", [(60, 20, 380, 260), (20, 0, 400, 285)])
def test_a_strip_along_an_edge_is_not_what_a_picture_is_of(part: Box):
    assert find({}, on_a_blanket(part=part)) == [None]


@pytest.mark.parametrize("side", ["top", "right"])
def test_what_holds_the_middle_is_found_where_another_border_has_the_strip(side: str):
    (subject,) = find({}, on_a_blanket(side))
    assert holds(subject.box, (128, 96))
    assert not holds(subject.box, (128, 20) if side == "top" else (230, 96))


def test_a_strip_is_left_out_beside_what_holds_the_middle():
    picture = rectangle((120, 60, 280, 200), (200, 30, 30))
    ImageDraw.Draw(picture).rectangle((0, 260, 400, 300), fill=(30, 30, 160))
    (subject,) = find({}, picture)
    assert overlap(subject.box, (120, 60, 280, 200)) > 0.9


def test_what_a_strip_is():
    def strip(*box: float, size: tuple[int, int] = (300, 200)) -> bool:
        return is_strip(box, *size)

    assert strip(0, 150, 300, 200)
    assert strip(20, 2, 280, 40)
    assert strip(0, 0, 60, 200)
    assert strip(250, 30, 298, 200)
    assert not strip(0, 100, 300, 200)  # half of the picture
    assert not strip(0, 130, 300, 180)  # not at the edge
    assert not strip(60, 150, 200, 200)  # an animal that the lower border cuts off
    assert not strip(0, 140, 60, 200)  # a corner
    assert not strip(0, 20, 90, 190)  # someone in the left third
    assert not strip(600, 10, 900, 300, size=(900, 300))  # a face at the end of a panorama
