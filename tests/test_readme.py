"""The commands in the documents compose, and the errors that they show are the errors that are printed."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from ray_sd.config import ExperimentConfig, GenerateConfig, ServeConfig, SweepConfig, TextToVideoConfig
from ray_sd.config.export import EXPORTS
from ray_sd.config.load import load_config, run_job

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SCHEMAS = {"train.py": ExperimentConfig, "encode.py": ExperimentConfig, "generate.py": GenerateConfig}
SCHEMAS |= {"text_to_video.py": TextToVideoConfig, "sweep.py": SweepConfig, "serve.py": ServeConfig}
SCHEMAS |= {f"export.py {verb}": schema for verb, schema in EXPORTS.items()}
DOCUMENTS = [*ROOT.glob("*.md"), ROOT / "Makefile", *(ROOT / "docs").rglob("*.md")]
TEXT = "\n".join(file.read_text() for file in DOCUMENTS).replace("\\\n", " ").replace(" $(ARGS)", "")
COMMAND = (
    r"python jobs/(train\.py|encode\.py(?! list| prune)|generate\.py|sweep\.py|text_to_video\.py|serve\.py|export\.py \w+)"
    r" ([^\n`#]+)"
)
"""The cache's verbs compose nothing."""
SHOWN_ERROR = re.compile(rf"\$ {COMMAND}\n\s*error: ([^\n]*)")

WRONG = SHOWN_ERROR.findall(TEXT)
RIGHT = sorted(set(re.findall(COMMAND, SHOWN_ERROR.sub("", TEXT))))


@pytest.mark.parametrize(("job", "arguments"), RIGHT)
def test_command_in_the_documents_composes(
    job: str, arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    for preset in ("my_presets/experiment/mine.yaml", "runs/sweeps/learning_rate/experiment/best.yaml"):
        (tmp_path / preset).parent.mkdir(parents=True)
        (tmp_path / preset).write_text("# @package _global_\ndefaults: [demo, _self_]\nname: mine\n")
    with pytest.raises(SystemExit) as stopped:
        load_config([*shlex.split(arguments), "--print-config"], SCHEMAS[job])
    assert stopped.value.code == 0


@pytest.mark.parametrize(("job", "arguments", "error"), WRONG)
def test_error_in_the_documents_is_the_error_that_is_printed(
    job: str, arguments: str, error: str, capsys: pytest.CaptureFixture[str]
):
    assert run_job(lambda argv: load_config(argv, SCHEMAS[job]), shlex.split(arguments)) == 2
    beginning, _, _ = error.partition("…")
    assert capsys.readouterr().err.startswith(f"error: {beginning}")


def test_what_the_recipe_of_the_embedded_models_releases_was_trained_before():
    trained = {"runs"}
    for line in (ROOT / "Makefile").read_text().partition("\nembedded:")[2].splitlines():
        if "jobs/train.py" in line:
            config = load_config(shlex.split(line)[2:], ExperimentConfig)
            trained.add(f"{config.storage_path}/{config.name}/adapter")
        elif "jobs/release_emoji.py" in line:
            assert line.split()[-1] in trained


def test_documents_show_commands_and_errors():
    assert len(RIGHT) > 5
    assert len(WRONG) > 1


def test_documents_name_presets_that_exist():
    for group, names in re.findall(r"^\| `(\w+)=` \| (.*) \|$", README, re.MULTILINE):
        presets = {file.stem for file in (ROOT / "ray_sd" / "presets" / group).glob("*.yaml")}
        named = {name for name in re.findall(r"`(\w+)`", names) if "=" not in name}
        assert named <= presets, group


def test_memory_in_the_readme_follows_from_the_number_of_parameters():
    with torch.device("meta"):
        sd15 = UNet2DConditionModel.from_config(ROOT / "ray_sd" / "models" / "layouts" / "sd15" / "unet")
        sdxl = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    small, large = sd15.num_parameters(), sdxl.num_parameters()
    words = " ".join(README.split())
    assert f"({small / 1e6:.0f} M parameters) thus starts at {2 * small / 1e9:.1f} GB" in words
    assert f"({large / 1e9:.1f} B) at {2 * large / 1e9:.1f} GB" in words
    assert f"all weights start at {16 * small / 1e9:.0f} GB and {16 * large / 1e9:.0f} GB" in words
