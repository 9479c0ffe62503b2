from pathlib import Path

from PIL import Image

from ray_sd.media.pictures import read_parameters, save_png


def test_a_png_says_how_it_was_made(tmp_path: Path):
    parameters = {"prompt": "ein Bär, „groß“", "seed": 3, "guidance_scale": 7.5, "adapter": None}
    path = tmp_path / "new" / "picture.png"
    save_png(Image.new("RGB", (64, 64), "red"), path, parameters)
    assert read_parameters(path) == parameters
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)
