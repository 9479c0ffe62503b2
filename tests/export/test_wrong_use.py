"""What `jobs/export.py` refuses, in one line and without leaving anything behind."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import export_adapter

from jobs.export import main


def test_what_exists_is_not_written_over(adapters: dict[str, Path], refusal: Callable, tmp_path: Path):
    (tmp_path / "x.safetensors").write_text("precious")
    words = refusal("convert", f"adapter={adapters['lora']}", "output=x.safetensors")
    assert words == "error: output: x.safetensors exists; give another name, or move it away"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "full exists" in refusal("fuse", f"adapters={adapters['lora']}", "output=full")
    (tmp_path / "y-embeddings").mkdir()
    (tmp_path / "y-embeddings" / "file").touch()
    words = refusal("convert", f"adapter={adapters['pivotal']}", "layout=kohya", "output=y.safetensors")
    assert "y-embeddings exists" in words
    assert (tmp_path / "x.safetensors").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge", "adapters=[{lora}, {full}]"], "full holds whole weights .unet., of which there is one"),
        (["merge", "adapters=[{lora}, {dora}]"], "dora is a DoRA, and DoRAs do not add up"),
        (["merge", "adapters=[{tokens}, {pivotal}]"], "both hold the token <cat>; give one of them"),
        (["merge", "adapters=[{tokens}, {lora}]", "weights=[0.5, 1]"], "have no strength; give it weight 1"),
        (["merge", "adapters=[{lora}, {lora}]", "weights=[1]"], "2 adapters and 1 weights; give a weight for each"),
        (["merge", "adapters=[{lora}]", "rank=0"], "rank: '0' is out of range"),
        (["fuse", "adapters=[{full}]", "weights=[0.5]"], "full holds whole weights, which have no strength"),
        (["fuse", "adapters=[{full}, {full}]"], "both hold all weights of the unet; give one of them"),
        (["fuse", "adapters={lora}", "output=model.safetensors"], "block_out_channels .32, 64., and layout 'sd15'"),
        (["fuse", "adapters={lora}", "layout=kohya"], "layout: no such setting"),
        (["convert", "adapter={full}"], "whole weights .unet. have one layout; jobs/export.py fuse"),
        (["convert", "adapter={lora}", "layout=kohya"], "layout kohya is one file; output must end in .safetensors"),
        (["convert", "adapter={lora}", "layout=peft", "output=x.safetensors"], "output must be a folder"),
        (["convert", "adapter={tokens}", "layout=kohya", "output=x.safetensors"], "kohya-ss reads embeddings in"),
        (["convert", "adapter={tokens}", "layout=peft"], "layout peft is a LoRA's"),
        (["convert", "adapter={lora}", "layout=a1111", "output=x.safetensors"], "A1111 reads a LoRA in layout kohya"),
        (["convert", "adapter={lora}", "token=<cat>"], "token is the word of an embedding's file"),
        (["convert", "adapter={lora}", "output=s3://bucket/x"], "is no path of this machine; write here"),
        (["convert", "adapter={lora}", "output=~nobody-here/x"], "is in the home of a user that is not there"),
        (["convert", "adapter=nowhere"], "no file or folder .*nowhere"),
        (["extract", "tuned={lora}"], "holds no whole weights to extract from; it is an adapter already"),
        (["extract", "tuned={base}"], "is the model 'sd15' itself: no layer of it differs by more than 0.002"),
        (["extract", "tuned=embedded/emoji"], "was not tuned from 'sd15': its unet.* is .*, the base's "),
        (["extract", "tuned={base}", "layout=a1111", "output=x.safetensors"], "a LoRA is extracted to diffusers"),
        (["export", "adapter={lora}"], "no verb 'export'; .*the verbs are: convert, extract, fuse, merge"),
    ],
)
def test_wrong_use_is_refused_in_words(
    tiny: Path,
    adapters: dict[str, Path],
    refusal: Callable,
    arguments: list[str],
    words: str,
):
    paths = {**{name: str(path) for name, path in adapters.items()}, "base": str(tiny)}
    output = [] if any(argument.startswith("output=") for argument in arguments) else ["output=out"]
    line = refusal(*(argument.format(**paths) for argument in arguments), *output)
    assert re.search(words, line), line


@pytest.mark.parametrize("verb", ["merge", "fuse"])
def test_words_that_no_file_can_tell_apart_are_refused(refusal: Callable, tmp_path: Path, verb: str):
    for word, name in (("<cat>", "one"), ("cat_", "other")):
        save_file({word: torch.ones(1, 32)}, tmp_path / f"{name}.safetensors")
    line = refusal(verb, "adapters=[one.safetensors, other.safetensors]", "output=out")
    assert "the tokens <cat> and cat_ would have one file, cat.safetensors; give one of them another word" in line


@pytest.mark.parametrize("verb", ["convert", "merge", "fuse"])
def test_words_that_the_base_cannot_take_are_refused(refusal: Callable, tmp_path: Path, verb: str):
    save_file({"<cat>": torch.ones(1, 48)}, tmp_path / "wide.safetensors")
    save_file({"emb_params": torch.ones(1, 32)}, tmp_path / "my cat.safetensors")
    save_file({"clip_l": torch.ones(1, 32), "clip_g": torch.ones(1, 48)}, tmp_path / "pair.safetensors")
    for file, words in (
        ("wide", "'<cat>' has vectors of 48 numbers, the base's text_encoder takes 32"),
        ("my cat", "'my cat' must be one word without spaces"),
        ("pair", "has vectors for text_encoder and text_encoder_2, the base has text_encoder"),
    ):
        setting = "adapter" if verb == "convert" else "adapters"
        assert words in refusal(verb, f"{setting}={file}.safetensors", "output=out")


def test_a_file_for_several_words_is_refused_with_what_works(
    tiny: Path, refusal: Callable, job: Callable, tmp_path: Path
):
    export_adapter(tiny, tmp_path / "two", {"name": "textual_inversion", "placeholder_token": ["<cat>", "<mat>"]})
    for layout in ("a1111", "diffusers"):
        words = refusal("convert", "adapter=two", f"layout={layout}", "output=x.safetensors")
        assert "a file holds one token, and there are <cat>, <mat>; layout=diffusers with a folder as output" in words
    job("convert", "adapter=two", "layout=diffusers", "output=each")
    assert {path.name for path in Path("each/a1111").iterdir()} == {"cat.safetensors", "mat.safetensors"}


def test_each_verb_shows_its_settings(capsys: pytest.CaptureFixture[str]):
    main(["--help"])
    assert "python jobs/export.py merge" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    assert "Strength of each adapter" in capsys.readouterr().out
