"""From command lines to configurations."""

import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_sd.config import ExperimentConfig, GenerateConfig, SweepConfig
from ray_sd.config.load import load_config, run_job, to_dict, to_yaml, validate
from ray_sd.config.logs import LOG
from ray_sd.errors import ConfigError, DataError

DEMO = ["experiment=demo"]


def problems(*arguments: str, schema: type = ExperimentConfig) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments, schema)
    return str(caught.value).splitlines()


def test_experiment_chooses_presets_and_sets_values():
    config = load_config(DEMO)
    assert config.model.base == "embedded/emoji"
    assert config.method.name == "lora"
    assert config.trainer.num_workers == 2  # of the trainer preset
    assert config.trainer.schedule.name == "cosine"  # of the experiment


def test_command_line_wins_over_the_experiment():
    config = load_config([*DEMO, "method=full", "trainer=cpu", "trainer.max_steps=17", "name=mine"])
    assert (config.method.name, config.trainer.num_workers, config.trainer.max_steps) == ("full", 1, 17)
    assert config.name == "mine"


def test_no_experiment_leaves_all_to_those_who_choose_the_rest():
    chosen = ["dataset=emoji", "model=emoji", "model/vae=emoji", "method=full"]
    for sweep in ("learning_rate", "tokens"):
        config = load_config([f"sweep={sweep}", "experiment=null", *chosen], SweepConfig)
        assert config.method.name == "full"
        assert config.trainer.max_steps == load_config([*chosen, "name=mine"]).trainer.max_steps
    assert load_config([*chosen, "name=mine", "experiment=null"]) == load_config([*chosen, "name=mine"])
    missing = problems("sweep=learning_rate", "experiment=null", schema=SweepConfig)
    assert [line.split(":")[0] for line in missing] == ["dataset.source", "model", "method"]


def test_settings_win_over_presets_wherever_they_stand():
    assert load_config(["method.rank=3", "experiment=demo"]) == load_config(["experiment=demo", "method.rank=3"])


def test_component_groups_apply_to_any_model():
    config = load_config([*DEMO, "model/scheduler=euler", "model/vae=sd15_mse", "model/text_encoder=tiny_random"])
    assert config.model.scheduler.sampler == "euler"
    assert config.model.vae.path == "stabilityai/sd-vae-ft-mse"
    assert config.model.text_encoder.architecture["hidden_size"] == 32
    assert config.model.unet is None


def test_component_group_applies_to_a_model_that_lists_no_groups(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: mine\nbase: some/folder\n")
    config = load_config([*DEMO, "--config-dir", str(tmp_path), "model=mine", "model/scheduler=unipc"])
    assert (config.model.base, config.model.scheduler.sampler) == ("some/folder", "unipc")


@pytest.mark.parametrize("choice", ["[tensorboard,wandb]", "tensorboard,wandb", "[tensorboard, wandb]"])
def test_several_trackers_go_together(choice: str):
    tracker = load_config([*DEMO, f"tracker={choice}"]).tracker
    assert tracker.tensorboard is not None
    assert tracker.wandb is not None
    assert tracker.mlflow is None


@pytest.mark.parametrize("choice", ["none", "[]", "[none]"])
def test_no_tracker_can_be_chosen(choice: str):
    assert not any(to_dict(load_config([*DEMO, f"tracker={choice}"]).tracker).values())


def test_config_dir_adds_presets_and_replaces_those_of_the_same_name(tmp_path: Path):
    mine = tmp_path / "it's mine, [really]"
    (mine / "experiment").mkdir(parents=True)
    (mine / "method").mkdir()
    (mine / "method" / "lora.yaml").write_text("name: lora\nrank: 2\n")
    (mine / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - demo\n  - override /method: lora\n  - _self_\nname: mine\n"
    )
    config = load_config([f"--config-dir={mine}", "experiment=mine"])
    assert (config.name, config.method.rank, config.model.name) == ("mine", 2, "emoji")


def test_last_of_several_config_dirs_wins(tmp_path: Path):
    for name, rank in (("first", 1), ("second", 2)):
        (tmp_path / name / "method").mkdir(parents=True)
        (tmp_path / name / "method" / "lora_linear.yaml").write_text(f"name: lora\nrank: {rank}\n")
    folders = ["--config-dir", str(tmp_path / "first"), "--config-dir", str(tmp_path / "second")]
    assert load_config([*folders, *DEMO]).method.rank == 2


def test_missing_config_dir_is_an_error(tmp_path: Path):
    assert problems("--config-dir", str(tmp_path / "no"), *DEMO) == [f"--config-dir: no folder '{tmp_path / 'no'}'"]


def test_broken_preset_is_an_error_in_words(tmp_path: Path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "bad.yaml").write_text("name: [lora\n")
    (line,) = problems("--config-dir", str(tmp_path), *DEMO, "method=bad")
    assert line.startswith("the presets do not compose: ")


def test_preset_that_overrides_an_unknown_group_is_an_error_in_words(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "bad.yaml").write_text("# @package _global_\ndefaults:\n  - override /metod: lora\n")
    (line,) = problems("--config-dir", str(tmp_path), "experiment=bad")
    assert "metod" in line


def test_generate_is_composed_from_its_own_root():
    config = load_config(["prompt=a cat face on a blue background"], GenerateConfig)
    assert config.model.name == "emoji"
    assert config.prompt == "a cat face on a blue background"


def test_a_group_of_another_root_is_no_group_here():
    assert problems("prompt=a cat", "method=lora", schema=GenerateConfig)[0].startswith("method: no such setting")


def test_print_config_prints_yaml_that_reads_back_and_stops(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        load_config([*DEMO, "--print-config", "trainer.validation.prompts=ü: it's <cat>"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["validation"]["prompts"] == ["ü: it's <cat>"]
    assert validate(printed, ExperimentConfig) == load_config([*DEMO, "trainer.validation.prompts=ü: it's <cat>"])


def test_print_config_of_a_wrong_configuration_is_an_error():
    assert problems(*DEMO, "--print-config", "trainer.max_steps=0")


def test_help_names_groups_and_presets(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        load_config(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "model/scheduler" in printed
    assert "lora_dora" in printed
    assert "--print-config" in printed


def test_stored_configuration_reads_back():
    config = load_config([*DEMO, "dataset.resolution=[64,128]", "model.vae=some/vae"])
    assert validate(to_dict(config), ExperimentConfig) == config
    assert validate(yaml.safe_load(to_yaml(config)), ExperimentConfig) == config


def test_configuration_imports_neither_torch_nor_ray():
    program = (
        "import sys; from ray_sd.config.load import load_config; load_config(['experiment=demo']);"
        "assert not {'torch', 'ray'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# errors


def test_unknown_preset_is_answered_with_the_nearest():
    (line,) = problems("model=tiny_randon")
    assert line.startswith("model: no preset 'tiny_randon'; did you mean 'tiny_random'? the presets are: emoji, ")


def test_unknown_group_is_answered_with_the_nearest():
    (line,) = problems(*DEMO, "model/sheduler=euler")
    assert line.startswith("model/sheduler: no group 'model/sheduler'; did you mean 'model/scheduler'?")


def test_argument_without_value_is_an_error():
    assert problems(*DEMO, "resume") == ["resume: settings are written key=value"]


def test_unknown_option_is_an_error():
    (line,) = problems(*DEMO, "--dry-run")
    assert "--dry-run" in line


def test_what_no_preset_gives_is_asked_for_by_group():
    lines = problems("name=x", "model=emoji", "method=lora")
    assert lines == [line for line in lines if line.startswith("dataset: required; choose one with dataset=PRESET: ")]
    assert "image_folder" in lines[0]


# run_job


def test_job_returns_0(capsys: pytest.CaptureFixture[str]):
    seen = []
    assert run_job(seen.append, ["a=b"]) == 0
    assert seen == [["a=b"]]


def test_job_prints_a_line_a_problem_and_returns_2(capsys: pytest.CaptureFixture[str]):
    assert run_job(load_config, [*DEMO, "trainer.max_steps=ten", "method.rnk=2"]) == 2
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "error: method.rnk: no such setting; did you mean 'rank'?",
        "error: trainer.max_steps: 'ten' is no whole number",
    ]


def test_a_comparison_of_settings_that_are_none_ends_before_anything_runs(capsys: pytest.CaptureFixture[str]):
    assert run_job(load_config, [*DEMO, "tracker.compare=[seed, trainer.learning_rat]"]) == 2
    assert capsys.readouterr().err == (
        "error: tracker.compare: trainer.learning_rat: no such setting; did you mean 'learning_rate'?\n"
    )


def test_settings_of_kinds_that_were_not_chosen_can_be_compared():
    """Runs of a group may differ in which kind they have."""
    paths = (
        "trainer.schedule",
        "trainer.schedule.num_cycles",
        "method.num_vectors",
        "model.unet.architecture.sample_size",
    )
    assert load_config([*DEMO, f"tracker.compare=[{', '.join(paths)}]"]).tracker.compare == paths


def test_job_returns_1_for_other_errors_in_words(capsys: pytest.CaptureFixture[str]):
    def main(arguments: object) -> None:
        raise DataError("photos: no pictures")

    assert run_job(main, []) == 1
    assert capsys.readouterr().err == "error: photos: no pictures\n"


def test_job_prints_the_words_of_an_error_that_crossed_ray(capsys: pytest.CaptureFixture[str]):
    class WrappedError(DataError):  # like ray.exceptions.RayTaskError.as_instanceof_cause()
        cause = DataError("photos: no pictures")

    def main(arguments: object) -> None:
        raise WrappedError("Traceback (most recent call last): …")

    assert run_job(main, []) == 1
    assert capsys.readouterr().err == "error: photos: no pictures\n"


@pytest.mark.parametrize(("asked", "level"), [(None, logging.NOTSET), ("", logging.NOTSET), ("debug", logging.DEBUG)])
def test_a_job_tells_all_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch, asked: str | None, level: int):
    if asked is None:
        monkeypatch.delenv(LOG, raising=False)
    else:
        monkeypatch.setenv(LOG, asked)
    ours = logging.getLogger("ray_sd")
    before = ours.level
    assert run_job(lambda _: None, []) == 0
    found = ours.level
    ours.setLevel(before)
    assert found == level


def test_a_wrong_word_for_how_much_is_told_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv(LOG, "verbose")
    assert run_job(lambda _: pytest.fail("it ran"), []) == 2
    assert capsys.readouterr().err.startswith("error: RAY_SD_LOG: 'verbose' is not known; RAY_SD_LOG=debug shows")


def test_interrupted_job_returns_130():
    def main(arguments: object) -> None:
        raise KeyboardInterrupt

    assert run_job(main, []) == 130


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
def test_what_ends_a_service_interrupts_as_ctrl_c_does_even_in_a_shells_background(
    ctrl_c: Any, capsys: pytest.CaptureFixture[str]
):
    def main(arguments: Sequence[str]) -> None:
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("it went on")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, ctrl_c)
    try:
        assert run_job(main, []) == 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err == "error: interrupted\n"


def test_defect_keeps_its_traceback():
    def main(arguments: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_job(main, [])
