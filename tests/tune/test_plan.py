"""What is told of a sweep before it begins."""

import pytest
import yaml
from formula_trial import RATE

from jobs.sweep import main
from ray_sd.config import SweepConfig
from ray_sd.config.load import load_config, validate
from ray_sd.errors import ConfigError
from ray_sd.tune.plan import check_plan, plan
from ray_sd.tune.record import new_record
from ray_sd.tune.search import SETTINGS, SettingsSearch
from ray_sd.tune.space import Space

SIMILARITY = (
    "trainer.validation.prompts=an owl on a red background",
    "trainer.validation.metrics=[{name: subject_similarity, model: embedded/emoji_clip, references: embedded/pictures/owl}]",
)


def print_config(*settings: str) -> None:
    load_config(["sweep=learning_rate", "--print-config", *settings], SweepConfig, plan)


def test_print_config_shows_ranges_and_the_first_trials(capsys: pytest.CaptureFixture[str]):
    config = load_config(["sweep=learning_rate"], SweepConfig)
    with pytest.raises(SystemExit) as stopped:
        print_config()
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert validate(yaml.safe_load(printed), SweepConfig) == config
    search = SettingsSearch(Space(config), config, None)
    drawn = [search.suggest(str(number))[SETTINGS][RATE] for number in range(4)]
    assert [line for line in printed.splitlines() if line.startswith("#")] == [
        "# what is tried:",
        "#   trainer.learning_rate: loguniform 6.66667e-05, 0.06",
        "# the first of 8 trials:",
        "#   1: trainer.learning_rate=0.002 (the experiment)",
        *(f"#   {number}: trainer.learning_rate={rate:g}" for number, rate in enumerate(drawn[1:], start=2)),
    ]


def test_print_config_shows_each_setting_once_of_those_that_run_with_several_seeds(capsys: pytest.CaptureFixture[str]):
    conditional = (
        "sweep.space={method: {choice: [lora, oft]}, method.rank: {choice: [4, 8], when: {method.name: [lora]}}}"
    )
    with pytest.raises(SystemExit):
        print_config(conditional, "sweep.num_seeds=3", "sweep.scheduler=none", "sweep.include_base=false")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    assert told[1:3] == [
        "#   method: choice lora, oft",
        "#   method.rank: choice 4, 8, when method.name is ['lora']",
    ]
    assert sorted(line.partition(": ")[2] for line in told[4:]) == [
        "method=lora method.rank=4",
        "method=lora method.rank=8",
        "method=oft",
    ]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("sweep.space.trainer.learning_rat={choice: [1, 2]}", "sweep.space: trainer.learning_rat: no such setting"),
        ("sweep.metric=validation_los", "sweep.metric: no metric 'validation_los'; did you mean 'validation_loss'?"),
    ],
)
def test_print_config_makes_the_checks_of_a_start(setting: str, words: str):
    with pytest.raises(ConfigError) as caught:
        print_config(setting)
    assert str(caught.value).startswith(words)


def test_the_command_has_a_plan(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["sweep=learning_rate", "--print-config"])
    assert "# the first of 8 trials:" in capsys.readouterr().out


def test_what_is_measured_on_pictures_counts_with_or_without_its_prefix(configure):
    for name in ("subject_similarity", "val/subject_similarity"):
        config = configure(*SIMILARITY, f"sweep.metric={name}")
        check_plan(config)
        record = new_record(config, Space(config))
        assert [(goal.metric, goal.mode) for goal in record.objectives] == [("val/subject_similarity", "max")]
        assert SettingsSearch(Space(config), config, None).metric == "val/subject_similarity"


def test_a_loss_is_that_of_training_whatever_is_labelled_so(configure):
    labelled = SIMILARITY[1].replace("{name", "{label: loss, name")
    assert configure(SIMILARITY[0], labelled, "sweep.metric=loss").metrics == ("loss",)
    assert configure(SIMILARITY[0], labelled, "sweep.metric=val/loss").metrics == ("val/loss",)
    with pytest.raises(ConfigError, match="sweep.metric: no metric 'subject_similarity'"):
        check_plan(configure(SIMILARITY[0], labelled, "sweep.metric=subject_similarity"))
