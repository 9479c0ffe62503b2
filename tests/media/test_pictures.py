from pathlib import Path

import pytest
from PIL import Image

from ray_sd.errors import ConfigError
from ray_sd.media import pictures
from ray_sd.media.pictures import read_parameters, read_picture, save_png


def test_a_png_says_how_it_was_made(tmp_path: Path):
    parameters = {"prompt": "ein Bär, „groß“", "seed": 3, "guidance_scale": 7.5, "adapter": None}
    path = tmp_path / "new" / "picture.png"
    save_png(Image.new("RGB", (64, 64), "red"), path, parameters)
    assert read_parameters(path) == parameters
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)


def test_a_picture_of_the_configuration_is_read_or_named_with_its_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "cat.png"
    Image.new("RGBA", (3, 2)).save(file)
    assert read_picture(str(file), "picture").getcolors() == [(6, (255, 255, 255))]
    monkeypatch.setattr(pictures, "LARGEST", 5)
    with pytest.raises(ConfigError, match="picture: .*cat.png has 3x2 pixels; at most 5 are read"):
        read_picture(str(file), "picture")
    file.write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="picture: .*cat.png cannot be read as a picture: cannot be decoded"):
        read_picture(str(file), "picture")
