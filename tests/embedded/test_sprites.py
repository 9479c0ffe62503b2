import io
import json
import tarfile
from itertools import combinations
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

import ray_sd.embedded
from ray_sd.embedded.prepare import PrepareConfig, prepare
from ray_sd.embedded.sprites import (
    catalogue,
    compose,
    plain_name,
    read_sprites,
    select,
    unseen_sprites,
)
from ray_sd.errors import DataError

# code points, label, group number of emojibase
EMOJIS = [
    ("1F431", "cat face", 3),
    ("1F989", "owl", 3),
    ("1F351", "peach", 4),
    ("2603-FE0F", "snowman", 5),
    ("26C4", "snowman without snow", 5),
    ("1F680", "rocket", 5),
    ("1F47B", "ghost", 0),
    ("1F600", "grinning face with big eyes", 0),
    ("1FA85", "Piñata", 6),
    ("1F1F5-1F1EA", "flag: Peru", 9),
    *((f"1F5{number:02X}", f"vehicle {number}", 5) for number in range(30)),
]
BLUE = (72, 140, 232)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The two npm packages in small: red discs instead of emoji; one picture has no name, one name no picture."""
    folder = tmp_path_factory.mktemp("packages")
    listed = [{"hexcode": code, "label": label, "group": group} for code, label, group in EMOJIS]
    listed += [{"hexcode": "1F9FF", "label": "unpictured", "group": 7}, {"hexcode": "1F1E6", "label": "letter a"}]
    emojibase = {"package/en/data.json": json.dumps(listed).encode()}
    pictures = {f"package/assets/{code.lower()}.webp": disc() for code, _, _ in EMOJIS}
    pictures |= {"package/assets/1f1e6.webp": disc(), "package/package.json": b"{}"}
    pack(folder / "emojibase-data-17.0.0.tgz", emojibase)
    pack(folder / "lobehub-fluent-emoji-3d-1.1.0.tgz", pictures)
    return folder


def disc() -> bytes:
    rows, columns = np.ogrid[:256, :256]
    inside = (rows - 127.5) ** 2 + (columns - 127.5) ** 2 < 112**2
    pixels = np.zeros((256, 256, 4), np.uint8)
    pixels[inside] = (255, 0, 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def pack(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def read_rows(folder):
    return pq.read_table(folder).to_pylist()


def test_pictures_and_names_meet_whatever_their_variation_selectors(packages):
    names = [sprite.name for sprite in read_sprites(packages)]
    assert "snowman" in names
    assert "pinata" in names
    assert "flag peru" in names
    assert "unpictured" not in names
    assert "letter a" not in names


def test_no_selection_holds_a_held_out_sprite_or_a_variant_of_one(packages):
    sprites = read_sprites(packages)
    for selection in ("two_core", "all", "autoencoder"):
        names = {sprite.name for sprite in select(sprites, selection)}
        assert names.isdisjoint({"owl", "snowman", "snowman without snow", "rocket"})


def test_two_cores_learn_nature_food_and_the_listed_others(packages):
    names = {sprite.name for sprite in select(read_sprites(packages), "two_core")}
    assert names == {"cat face", "peach", "ghost"}


def test_the_autoencoder_is_measured_on_what_no_data_set_for_it_holds(packages):
    sprites = read_sprites(packages)
    unseen = {sprite.name for sprite in unseen_sprites(sprites)}
    seen = {sprite.name for sprite in select(sprites, "autoencoder")}
    assert unseen.isdisjoint(seen)
    assert unseen | seen == {sprite.name for sprite in sprites}
    assert unseen.isdisjoint(sprite.name for sprite in select(sprites, "two_core"))
    assert "owl" in unseen
    assert len(unseen) == 4 + 24
    assert {sprite.name for sprite in unseen_sprites(sprites)} == unseen


def test_rows_are_captioned_png_pictures_on_every_background(packages, tmp_path):
    words = prepare(PrepareConfig(out=tmp_path / "emoji", packages=packages, shards=2))
    rows = {row["id"]: row for row in read_rows(tmp_path / "emoji")}
    assert len(rows) == 3 * 8
    assert words == "24 pictures"
    assert len(list((tmp_path / "emoji").iterdir())) == 2
    peach = rows["1f351-blue"]
    assert peach["caption"] == "a peach on a blue background"
    picture = Image.open(io.BytesIO(peach["image"]))
    assert picture.format == "PNG"
    assert picture.size == (64, 64)
    assert picture.mode == "RGB"
    assert picture.getpixel((0, 0)) == BLUE
    assert picture.getpixel((32, 32)) == (255, 0, 0)
    assert (tmp_path / "emoji.names.txt").read_text().splitlines() == ["cat face", "peach", "ghost"]


def test_preparing_again_writes_the_same_rows_and_leaves_no_stale_shard(packages, tmp_path):
    prepare(PrepareConfig(out=tmp_path, packages=packages, shards=3))
    first = read_rows(tmp_path)
    prepare(PrepareConfig(out=tmp_path, packages=packages, shards=2))
    assert len(list(tmp_path.glob("*.parquet"))) == 2
    assert sorted(map(str, read_rows(tmp_path))) == sorted(map(str, first))


def test_every_selection_is_written_where_its_preset_reads_and_none_over_another():
    selections = get_args(PrepareConfig.model_fields["selection"].annotation)
    folders = {selection: str(PrepareConfig(selection=selection).folder) for selection in selections}
    assert len(set(folders.values())) == len(selections)
    presets = {"two_core": "emoji", "autoencoder": "emoji_vae", "large": "emoji_large", "clips": "emoji_clips"}
    for selection, preset in presets.items():
        file = Path(ray_sd.__file__).parent / "presets" / "dataset" / f"{preset}.yaml"
        assert yaml.safe_load(file.read_text())["source"]["path"] == folders[selection]


def test_the_autoencoder_also_sees_backgrounds_of_any_colour(packages, tmp_path):
    prepare(PrepareConfig(selection="autoencoder", out=tmp_path, packages=packages))
    backgrounds = [row["id"].rpartition("-")[2] for row in read_rows(tmp_path) if row["id"].startswith("1f351-")]
    named = set(backgrounds) & set(catalogue().colours)
    assert len(named) == 4
    assert len(backgrounds) == 6


def test_edges_are_antialiased_and_take_nothing_from_the_clear_pixels():
    # clear pixels are black underneath; a careless resize darkens the rim of a white disc
    disc_on_black = Image.open(io.BytesIO(disc())).convert("RGBA")
    white = Image.composite(Image.new("RGBA", (256, 256), "white"), disc_on_black, disc_on_black.getchannel("A"))
    pixels = np.asarray(compose(white, (255, 255, 255)))
    assert pixels.min() >= 250


def test_named_colours_are_far_apart():
    for one, other in combinations(catalogue().colours.values(), 2):
        assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 80


def test_pictures_of_a_held_out_subject_vary_and_carry_their_captions(packages, tmp_path):
    prepare(PrepareConfig(selection="pictures", subject="owl", out=tmp_path, packages=packages))
    pictures = sorted(tmp_path.glob("*.png"))
    assert 6 <= len(pictures) <= 8
    assert len({path.read_bytes() for path in pictures}) == len(pictures)
    assert (tmp_path / "owl-1.txt").read_text() == "a owl on a blue background\n"


def test_upright_pictures_differ_in_their_backgrounds_only(packages, tmp_path):
    heights = {"upright": [], "varied": []}
    for poses, found in heights.items():
        prepare(PrepareConfig(selection="pictures", poses=poses, out=tmp_path / poses, packages=packages))
        for path in sorted((tmp_path / poses).glob("*.png")):
            from_red = np.abs(np.asarray(Image.open(path).convert("RGB")).astype(int) - (255, 0, 0)).sum(axis=-1)
            found.append(np.ptp(np.nonzero(from_red < 60)[0]))
    assert len(heights["upright"]) == 8
    assert np.ptp(heights["upright"]) <= 1
    assert np.ptp(heights["varied"]) > 5


def test_a_subject_that_is_trained_on_is_refused_with_the_ones_that_are_not(packages, tmp_path):
    with pytest.raises(DataError, match="no held-out sprite is named 'peach'; they are: owl, "):
        prepare(PrepareConfig(selection="pictures", subject="peach", out=tmp_path, packages=packages))


def test_missing_npm_is_said_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match=r"npm is not installed .* pass packages="):
        read_sprites(tmp_path)


def test_a_failing_npm_is_quoted(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho npm error no network >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(DataError, match=r"could not fetch @lobehub/fluent-emoji-3d@1\.1\.0: npm error no network"):
        read_sprites(tmp_path / "packages")


def test_a_damaged_package_is_named_with_the_remedy(packages, tmp_path):
    for path in packages.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"\.tgz is no whole archive .* fetch it again"):
        read_sprites(tmp_path)


def test_labels_become_plain_lower_case():
    assert plain_name("Cocktail “Piñata”") == "cocktail pinata"
    assert plain_name("woman’s hat") == "woman's hat"


def test_shipped_pictures_are_of_a_held_out_subject_and_match_their_captions():
    folder = Path(ray_sd.embedded.__file__).parent / "pictures" / "owl"
    for path in folder.glob("*.png"):
        colour = path.with_suffix(".txt").read_text().split()[4]
        assert Image.open(path).getpixel((0, 0)) == catalogue().colours[colour]
    assert len(list(folder.glob("*.png"))) == 8
