import io

import numpy as np
import pytest
from drawn_sprites import disc, flag
from PIL import Image

from ray_sd.embedded.large import SIZE, WINDOW, WINDOWS, large_rows


def pictures(rows: list[dict]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(row["image"])) for row in rows]


def test_every_sprite_has_one_whole_picture_and_windows():
    rows = list(large_rows([flag(), disc()], seed=0))
    assert [row["id"] for row in rows] == [f"{code}-{n}" for code in ("f1a6", "d15c") for n in range(1 + WINDOWS)]
    sizes = [picture.size for picture in pictures(rows)]
    assert sizes == ([(SIZE, SIZE)] + [(WINDOW, WINDOW)] * WINDOWS) * 2
    assert all(row["caption"].startswith("a flag on a ") for row in rows[: 1 + WINDOWS])
    assert rows == list(large_rows([flag(), disc()], seed=0))
    assert rows != list(large_rows([flag(), disc()], seed=1))


def test_a_row_does_not_depend_on_what_else_there_is():
    assert list(large_rows([disc()], seed=0)) == list(large_rows([flag(), disc()], seed=0))[1 + WINDOWS :]


@pytest.mark.slow
def test_sprites_are_whole_within_pictures_and_in_many_places():
    whole = pictures([next(iter(large_rows([disc()], seed))) for seed in range(40)])  # windows come behind it
    found = []
    for picture in whole:
        pixels = np.asarray(picture).astype(int)
        red = (pixels[..., 0] > 240) & (pixels[..., 1] < 15) & (pixels[..., 2] < 15)
        rows, columns = np.nonzero(red)
        width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
        assert abs(width - height) <= 3  # nothing of it is cut off
        found.append((width, columns.mean(), rows.mean()))
    widths, x, y = np.array(found).T
    assert widths.min() < 0.5 * SIZE < 0.75 * SIZE < widths.max()
    assert min(np.ptp(x), np.ptp(y)) > 0.2 * SIZE


def test_windows_have_the_resolution_of_the_sprites():
    """A disc's edge is as sharp in a window as in the whole picture: a pixel or two from colour to colour."""
    for row in large_rows([disc()], seed=3):
        pixels = np.asarray(Image.open(io.BytesIO(row["image"]))).astype(int)
        steps = np.abs(np.diff(pixels, axis=1)).sum(axis=-1)
        if steps.max() > 0:
            assert steps.max() > 60
