import numpy as np
import pytest
from PIL import Image, ImageFont

from ray_sd.media.sheets import FONT_SIZE, GAP, clips_sheet, contact_sheet, frame_sheet, window_pair, wrap

COLOURS = ["red", "green", "blue", "yellow", "purple"]


def pictures(count: int, size: tuple[int, int] = (64, 64)) -> list[Image.Image]:
    return [Image.new("RGB", size, COLOURS[number]) for number in range(count)]


def test_a_sheet_shows_every_picture_in_order():
    sheet = np.asarray(contact_sheet(pictures(5), columns=3))
    cell = (sheet.shape[1] - 8) // 3
    for number, colour in enumerate(COLOURS):
        centre = (8 + number // 3 * cell + cell // 2, 8 + number % 3 * cell + cell // 2)
        assert tuple(sheet[centre]) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    assert contact_sheet(pictures(5)).size == contact_sheet(pictures(5), columns=3).size
    assert contact_sheet(pictures(2), columns=10).size == contact_sheet(pictures(2), columns=2).size


def test_labels_are_drawn_below_their_pictures_in_letters_that_can_be_read():
    plain, labelled = contact_sheet(pictures(2)), contact_sheet(pictures(2), ["a cat", ""])
    assert labelled.width == plain.width
    assert labelled.height > plain.height
    below = np.asarray(labelled.convert("L"))[plain.height - 8 :]
    half = below.shape[1] // 2
    ink = np.flatnonzero((below[:, :half] < 128).any(axis=1))
    assert ink.max() - ink.min() >= FONT_SIZE // 2
    assert (below[:, half:] > 128).all()


def test_small_pictures_are_enlarged_by_whole_pixels():
    small = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    sheet = np.asarray(contact_sheet([small]))
    assert np.array_equal(sheet[8:168:5, 8:168:5], np.asarray(small))
    assert contact_sheet(pictures(1, (512, 512))).size == (528, 528)


def test_a_long_label_is_wrapped_within_its_picture_and_cut_after_three_lines():
    font = ImageFont.load_default(FONT_SIZE)
    for label in ("a tiger face on a blue background " * 5, "W" * 90, "iiii " * 60):
        lines = wrap(label, font, 160).split("\n")
        assert len(lines) <= 3
        assert all(font.getlength(line) <= 160 for line in lines)
        assert lines[-1].endswith("…")
    assert wrap("a cat", font, 160) == "a cat"


def test_a_sheet_needs_pictures_and_a_label_each():
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([])
    with pytest.raises(ValueError, match="1 labels for 2 pictures"):
        contact_sheet(pictures(2), ["one"])


def test_a_sheet_shows_the_frames_with_their_numbers():
    frames = pictures(5)
    sheet = frame_sheet(frames, columns=3)
    assert sheet.tobytes() == contact_sheet(frames, ["0", "1", "2", "3", "4"], columns=3).tobytes()


def test_a_sheet_of_clips_counts_the_frames_of_each():
    frames = pictures(3)
    sheet = clips_sheet([frames, frames[::-1]])
    expected = contact_sheet([*frames, *frames[::-1]], ["0", "1", "2", "0", "1", "2"], columns=3)
    assert sheet.tobytes() == expected.tobytes()


def test_large_frames_are_smaller_on_sheets():
    assert frame_sheet(pictures(2, (1200, 600)), columns=2).width == 2 * 320 + 3 * 8


def test_a_window_is_shown_beside_the_picture_with_its_subject():
    picture = Image.new("RGB", (400, 300), "gray")
    picture.paste("red", (40, 30, 140, 180))
    window, subject = (0.0, 10.0, 200.0, 210.0), (40.0, 30.0, 140.0, 180.0)
    pair = np.asarray(window_pair(picture, window, (16, 16), subject)).astype(int)
    assert pair.shape == (180, 240 + GAP + 180, 3)
    scale = 180 / 300
    left, top = (round(edge * scale) for edge in subject[:2])
    assert pair[top + 20, left].tolist() == [255, 255, 0]
    end, middle = round(window[2] * scale), round((window[1] + window[3]) / 2 * scale)
    assert pair[middle, 0].tolist() == [255, 255, 255]
    assert pair[middle, end + 10].max() < 70 < pair[middle, end - 10].max()  # dim outside of the window
    crop = pair[:, 240 + GAP :]
    assert abs(crop[90, 90] - (255, 0, 0)).max() < 5
    assert abs(crop[5, 5] - 128).max() < 30


def test_a_picture_without_a_subject_has_its_window_marked_alone():
    pair = np.asarray(window_pair(Image.new("RGB", (400, 300), "gray"), (50.0, 0.0, 350.0, 300.0), (16, 16)))
    assert not (pair == (255, 255, 0)).all(axis=2).any()
    assert (pair[:, 30] == 255).all(axis=1).any()
