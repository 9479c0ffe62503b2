"""What a sweep may try."""

import itertools
import math
import pickle
import warnings
from collections import Counter

import pytest

from ray_sd.config import SweepConfig
from ray_sd.config.load import load_config
from ray_sd.errors import ConfigError
from ray_sd.tune.search import SEED, SETTINGS, SettingsSearch, build_scheduler
from ray_sd.tune.space import Space

SCHEDULES = (
    "sweep.space.trainer.schedule={choice: [cosine, constant]}",
    "sweep.space.trainer.schedule.num_cycles={randint: [1, 3], when: {trainer.schedule.name: cosine}}",
)


METHODS = (
    "sweep.space={method: {choice: [lora, oft]}, method.rank: {choice: [4, 8], when: {method.name: lora}}, "
    "method.block_size: {choice: [8, 16], when: {method.name: oft}}}"
)


def load(*settings: str) -> SweepConfig:
    return load_config(["sweep=learning_rate", *settings], SweepConfig)


def search(config: SweepConfig) -> SettingsSearch:
    return SettingsSearch(Space(config), config, None)


def suggestions(config: SweepConfig, count: int) -> list[dict]:
    """As many as the search gives, up to `count`."""
    searching = search(config)
    found = [searching.suggest(str(number)) for number in range(count)]
    return [one for one in found if one != "FINISHED"]


def drawn(config: SweepConfig, count: int) -> list[dict]:
    return [one[SETTINGS] for one in suggestions(config, count)]


def test_the_experiments_own_settings_come_first_and_draws_keep_to_their_ranges():
    found = suggestions(load("sweep.num_trials=8"), 20)
    assert len(found) == 8
    assert found[0][SETTINGS] == {"trainer.learning_rate": 0.002}
    rates = [one[SETTINGS]["trainer.learning_rate"] for one in found]
    assert all(0.002 / 30 <= rate <= 0.002 * 30 for rate in rates)
    assert len(set(rates)) == 8


def test_each_distribution_draws_what_it_says():
    space = (
        "sweep.space={method.dropout: {uniform: [0.1, 0.2]}, trainer.learning_rate: {loguniform: [1e-5, 1e-1]}, "
        "method.rank: {randint: [2, 4]}, trainer.schedule: {choice: [constant, cosine]}, trainer.batch_size: {grid: [4, 8]}}"
    )
    found = drawn(load(space, "sweep.num_trials=60", "sweep.include_base=false"), 60)
    assert all(0.1 <= one["method.dropout"] <= 0.2 for one in found)
    assert all(1e-5 <= one["trainer.learning_rate"] <= 1e-1 for one in found)
    assert 15 < sum(one["trainer.learning_rate"] < 1e-3 for one in found) < 45  # of a uniform one, under a hundredth
    for path, values in (("method.rank", {2, 3, 4}), ("trainer.schedule", {"constant", "cosine"})):
        assert {one[path] for one in found} == values
    assert {one["trainer.batch_size"] for one in found[:2]} == {4, 8}


def test_own_settings_that_the_space_does_not_hold_are_tried_all_the_same():
    found = suggestions(load("trainer.learning_rate=0.5", "sweep.num_trials=3"), 5)
    assert found[0][SETTINGS] == {"trainer.learning_rate": 0.5}
    assert len(found) == 3


def test_own_settings_are_those_that_are_listed_where_these_mean_the_same():
    config = load(
        "sweep.space={trainer.schedule: {choice: [constant, cosine]}, method.target_modules: {choice: [[to_q]]}}",
        "trainer.schedule=constant",
        "sweep.num_trials=4",
    )
    space = Space(config)
    base = space.base()
    assert base["trainer.schedule"] == "constant"
    assert base["method.target_modules"] == list(config.method.target_modules)
    tokens = Space(load_config(["sweep=tokens", "experiment=textual_inversion"], SweepConfig))
    assert tokens.base()["method.initializer_token"] == "eagle"
    assert tokens.holds(tokens.base())


def test_the_same_seed_draws_the_same_and_another_other_settings():
    one, same, other = (drawn(load(f"seed={seed}", "sweep.searcher=random"), 4) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_a_search_says_nothing_of_what_may_change_in_optuna():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(load())


def test_a_condition_leaves_a_setting_out_where_it_does_not_hold():
    found = drawn(load(*SCHEDULES, "sweep.num_trials=20", "sweep.include_base=false"), 20)
    kinds = Counter(one["trainer.schedule"] for one in found)
    assert set(kinds) == {"cosine", "constant"}
    assert all(("trainer.schedule.num_cycles" in one) == (one["trainer.schedule"] == "cosine") for one in found)


def test_a_conditional_setting_reaches_the_experiment():
    space = Space(load(*SCHEDULES))
    config = space.configure({"trainer.schedule": "cosine", "trainer.schedule.num_cycles": 3}, seed=5)
    assert (config.trainer.schedule.name, config.trainer.schedule.num_cycles, config.seed) == ("cosine", 3, 5)


def test_each_method_has_settings_of_its_own():
    config = load(METHODS, "sweep.include_base=false", "sweep.num_trials=8")
    space = Space(config)
    space.check()
    tried = drawn(config, 8)
    assert {tuple(one.items()) for one in tried} == {
        (("method", "lora"), ("method.rank", 4)),
        (("method", "lora"), ("method.rank", 8)),
        (("method", "oft"), ("method.block_size", 8)),
        (("method", "oft"), ("method.block_size", 16)),
    }
    assert [space.configure(one, seed=0).method.name for one in tried] == [one["method"] for one in tried]


@pytest.mark.parametrize(("experiment", "rate"), [("demo", 2e-3), ("textual_inversion", 0.3), ("lora", 1e-4)])
def test_the_preset_of_learning_rates_lies_around_that_of_the_experiment(experiment: str, rate: float):
    config = load(f"experiment={experiment}", "dataset.source.path=photos")
    space = Space(config)
    space.check()
    assert space.distributions["trainer.learning_rate"].loguniform == pytest.approx((rate / 30, rate * 30))
    assert space.log_paths == ("trainer.learning_rate",)
    rates = [one["trainer.learning_rate"] for one in drawn(config, 8)]
    assert rates[0] == rate
    assert all(rate / 30 <= one <= rate * 30 for one in rates)


def test_what_is_tried_first_of_a_single_range_is_spread_over_it():
    rates = [one["trainer.learning_rate"] for one in drawn(load("sweep.num_trials=8"), 8)]
    assert rates[:7] == [one["trainer.learning_rate"] for one in drawn(load("sweep.num_trials=7"), 7)]
    spread = [2e-3 * 30 ** (third / 3) for third in (-3, -2, -1, 1, 2, 3)]
    assert rates[0] == 2e-3
    assert rates[1:7] == pytest.approx(spread, rel=5e-3)
    assert min(spread) < rates[7] < max(spread)
    few = [one["trainer.learning_rate"] for one in drawn(load("sweep.num_trials=3"), 3)]
    assert few == pytest.approx([2e-3, spread[0], spread[-1]], rel=5e-3)
    ranks = "sweep.space={method.rank: {randint: [1, 7]}}"
    assert [one["method.rank"] for one in drawn(load(ranks, "sweep.num_trials=5"), 5)] == [16, 1, 3, 5, 7]
    odd = [one["trainer.learning_rate"] for one in drawn(load("trainer.learning_rate=0.012", "sweep.num_trials=8"), 8)]
    assert len([rate for rate in odd if 0.011 < rate < 0.013]) == 1  # the experiment's own, which lies in the middle


@pytest.mark.parametrize("best", [2e-3 / 30, 2e-3, 6e-2])
def test_the_eighth_learning_rate_lies_where_the_seven_before_were_best(best: float):
    config, rates = load(), []
    searching = search(config)
    for number in range(8):
        rates.append(searching.suggest(str(number))[SETTINGS]["trainer.learning_rate"])
        loss = abs(math.log(rates[-1] / best))
        searching.on_trial_complete(str(number), {"validation_loss": loss, "step": config.trainer.max_steps})
    assert searching.suggest("more") == "FINISHED"
    assert abs(math.log(rates[7] / best)) < math.log(30) / 3  # nearer than its neighbours of the seven
    assert min(abs(math.log(rates[7] / rate)) for rate in rates[:7]) > math.log(900) / 33  # and none of them once more


def test_what_is_like_something_tried_is_not_tried_again():
    space = "sweep.space={method.rank: {choice: [4, 8]}, trainer.learning_rate: {loguniform: [1e-5, 1e-1]}}"
    config = load(space, "sweep.searcher=random", "sweep.num_trials=40", "sweep.include_base=false")
    settings = [(one["method.rank"], math.log10(one["trainer.learning_rate"]) / 4) for one in drawn(config, 40)]
    assert len(settings) == 40
    for rank in (4, 8):
        places = sorted(place for one, place in settings if one == rank)
        assert min(after - before for before, after in itertools.pairwise(places)) > 1 / 161
    both = [place for _, place in settings]
    assert (
        min(after - before for before, after in itertools.pairwise(sorted(both))) < 1 / 161
    )  # of two ranks it may be the same


def test_what_is_tried_is_drawn_by_chance_where_that_is_asked_for_or_more_than_one_range_is_there():
    for more in ("sweep.searcher=random", "sweep.space.trainer.optimizer.weight_decay={around: 10}"):
        rates = [one["trainer.learning_rate"] for one in drawn(load(more, "sweep.num_trials=3"), 3)]
        assert rates[0] == 2e-3
        assert 2e-3 / 30 < min(rates[1:]) <= max(rates[1:]) < 0.06


def test_a_population_draws_anew_around_the_experiments_own_value():
    config = load("sweep.scheduler=pbt", "trainer.learning_rate=0.01", "sweep.space.trainer.learning_rate={around: 2}")
    domain = build_scheduler(config, Space(config))._hyperparam_mutations[SETTINGS]["trainer.learning_rate"]
    assert (domain.lower, domain.upper) == (0.005, 0.02)


def test_what_constraints_forbid_need_not_be_a_configuration():
    corner = (
        "sweep.space={trainer.num_workers: {choice: [1, 2]}, trainer.batch_size: {choice: [7, 8]}}",
        "sweep.constraints=trainer.batch_size % trainer.num_workers == 0",
    )
    Space(load(*corner)).check()
    with pytest.raises(ConfigError, match="batch_size 7 is not divisible by num_workers 2"):
        Space(load(corner[0])).check()


def test_constraints_may_hold_between_the_corners_alone():
    between = "sweep.constraints=0.001 < trainer.learning_rate < 0.01"
    Space(load(between)).check()


def test_constraints_throw_draws_away():
    constrained = load(
        "sweep.space.method.rank={choice: [4, 8, 16]}",
        "sweep.constraints=method.rank * trainer.learning_rate < 0.02",
        "sweep.include_base=false",
        "sweep.num_trials=12",
    )
    found = drawn(constrained, 12)
    assert len(found) == 12
    assert all(one["method.rank"] * one["trainer.learning_rate"] < 0.02 for one in found)
    free = drawn(constrained.model_copy(update={"sweep": constrained.sweep.model_copy(update={"constraints": ()})}), 12)
    assert not all(one["method.rank"] * one["trainer.learning_rate"] < 0.02 for one in free)


def test_grids_are_tried_whole_with_what_is_drawn_beside_them():
    config = load(
        "sweep.space.method.rank={grid: [4, 8]}",
        "sweep.space.trainer.batch_size={grid: [4, 8, 16]}",
        "sweep.include_base=false",
        "sweep.num_trials=6",
    )
    found = drawn(config, 6)
    assert Counter((one["method.rank"], one["trainer.batch_size"]) for one in found) == {
        (rank, batch): 1 for rank in (4, 8) for batch in (4, 8, 16)
    }
    assert len({one["trainer.learning_rate"] for one in found}) == 6


def test_a_search_ends_where_everything_was_tried():
    config = load("sweep.space={method.rank: {choice: [4, 8, 16]}}", "sweep.num_trials=10")
    assert sorted(one["method.rank"] for one in drawn(config, 10)) == [4, 8, 16]


def test_lists_are_choices_too():
    config = load("sweep.space={method.target_modules: {choice: [[to_q], [to_q, to_v]]}}", "sweep.include_base=false")
    assert sorted(one["method.target_modules"] for one in drawn(config, 2)) == [["to_q"], ["to_q", "to_v"]]


def test_several_seeds_run_the_same_settings_and_count_by_their_mean():
    config = load("sweep.num_seeds=3", "sweep.num_trials=2", "sweep.scheduler=none", "seed=7")
    searching = search(config)
    found = [searching.suggest(str(number)) for number in range(6)]
    assert searching.suggest("more") == "FINISHED"
    assert [one[SEED] for one in found] == [7, 8, 9, 7, 8, 9]
    assert found[0][SETTINGS] == found[2][SETTINGS] != found[3][SETTINGS]
    for number, loss in enumerate((0.1, 0.2, 0.6)):
        searching.on_trial_complete(str(number), {"validation_loss": loss, "step": config.trainer.max_steps})
    assert [trial.value for trial in searching._ot_study.trials if trial.value is not None] == [pytest.approx(0.3)]


def test_what_stopped_trials_had_reached_is_no_value_beside_those_that_ended():
    config = load("sweep.num_trials=3")
    searching = search(config)
    for name, step, loss in (("whole", config.trainer.max_steps, 0.3), ("stopped", 2, 0.5), ("failed", 1, None)):
        searching.suggest(name)
        report = None if loss is None else {"validation_loss": loss, "step": step, "training_iteration": 1}
        if report is not None:
            searching.on_trial_result(name, report)
        searching.on_trial_complete(name, report, error=report is None)
    told = searching._ot_study.trials
    assert [one.state.name for one in told] == ["COMPLETE", "PRUNED", "FAIL"]
    assert searching._ot_study.best_value == 0.3


def test_a_search_goes_on_after_pickling():
    searching = search(load("sweep.num_trials=3"))
    first = searching.suggest("a")
    again = pickle.loads(pickle.dumps(searching))
    rest = [again.suggest(name) for name in ("b", "c", "d")]
    assert first[SETTINGS] == {"trainer.learning_rate": 0.002}
    assert [one == "FINISHED" for one in rest] == [False, False, True]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["sweep.space.trainer.learning_rat={loguniform: [1e-4, 1e-2]}"],
            "sweep.space: trainer.learning_rat: no such setting; did you mean 'learning_rate'?",
        ),
        (["sweep.space.method.rank={randint: [0, 4]}"], "sweep.space: method.rank: 0 is out of range"),
        (
            ["sweep.space.trainer.batch_size={choice: [6, 7]}", "trainer.num_workers=2"],
            "sweep.space: trainer: batch_size 7 is not divisible by num_workers 2; try 6 or 8 (in a trial of",
        ),
        (
            ["sweep.space={method.rank: {loguniform: [2, 32]}}"],
            "sweep.space: method.rank: 9.159405841908152 is no whole number",  # which both ends are
        ),
        (
            ["sweep.space.method.alpha={choice: [4, 8], when: {method.nam: lora}}"],
            "sweep.space.method.alpha.when: method.nam: no such setting; did you mean 'name'?",
        ),
        (
            [METHODS.replace("method.name: lora", "method.name: lara")],
            "sweep.space.method.rank.when: no trial has method.name=lara, so that it would never be tried",
        ),
        (
            ["sweep.space.method.rank={around: 2}"],
            "sweep.space.method.rank: around: the experiment has 16 there, which is no decimal number above 0; give a range",
        ),
        (
            ["sweep.space.trainer.learning_rat={around: 2}"],
            "sweep.space: trainer.learning_rat: no such setting; did you mean 'learning_rate'?",
        ),
        (
            ["sweep.space.method.num_vectors={choice: [1, 4]}"],
            "sweep.space: method.num_vectors: no such setting; it belongs to method=textual_inversion",
        ),
        (["sweep.constraints=method.rank <"], "sweep.space: sweep.constraints: 'method.rank <' cannot be computed"),
        (["sweep.constraints=method.rink < 3"], "sweep.space: sweep.constraints: 'method.rink < 3' cannot be computed"),
        (["sweep.constraints=method.rank < 3"], "sweep.constraints: method.rank < 3 hold of no corner of the space"),
        (
            [*reversed(SCHEDULES)],
            "sweep.space.trainer.schedule.num_cycles.when: trainer.schedule.name depends on trainer.schedule, which must",
        ),
        (
            [
                "sweep.space.method.rank={choice: [4, 8]}",
                "sweep.space.method.alpha={grid: [4, 8], when: {method.rank: 8}}",
            ],
            "sweep.space.method.alpha: a grid cannot depend on method.rank, which is drawn; take choice",
        ),
    ],
)
def test_what_cannot_be_tried_is_told_before_anything_is(settings: list[str], words: str):
    # Overrides are applied in an order of their own; what is told here depends on the space's.
    config = load(*(one for one in settings if not one.startswith("sweep.space.trainer.schedule")))
    space = {
        one.partition("=")[0].removeprefix("sweep.space."): one
        for one in settings
        if one.startswith("sweep.space.trainer.schedule")
    }
    if space:
        loaded = load(*settings).sweep.space
        ordered = {path: loaded[path] for path in space}
        config = config.model_copy(update={"sweep": config.sweep.model_copy(update={"space": ordered})})
    with pytest.raises(ConfigError) as caught:
        Space(config).check()
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


def test_grids_that_do_not_fit_are_refused():
    grids = ("sweep.space={trainer.learning_rate: {grid: [1e-4, 1e-3, 1e-2]}, method.rank: {grid: [2, 4, 8]}}",)
    with pytest.raises(
        ConfigError, match="sweep.num_trials: grids of 9 combinations do not fit into 8 trials; set it to 9"
    ):
        Space(load(*grids)).check()
    Space(load(*grids, "sweep.num_trials=9")).check()
