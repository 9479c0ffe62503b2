"""What the charts of a sweep's report show, and what is computed for them."""

import numpy as np
import pytest
from drawn_sweep import ANSWER, LOSS, RATE, drawn_sweep
from pages import NAN, page_of, sweep_of, trial
from scipy import stats

from ray_sd.tune.report.charts import curves, front
from ray_sd.tune.report.grid import axes, ranked
from ray_sd.tune.report.importance import _shares, importance
from ray_sd.tune.report.parallel import parallel
from ray_sd.tune.report.seeds import seed_intervals
from ray_sd.tune.report.words import short_names
from ray_sd.tune.results import Sweep, Trial


def test_importance_finds_the_setting_that_matters_and_the_same_each_time():
    sweep = drawn_sweep(80)
    told = importance(sweep, LOSS)
    assert next(iter(told.shares)) == RATE
    assert told.shares[RATE] > 0.5
    assert sum(told.shares.values()) == pytest.approx(1)
    assert set(told.shares) == set(sweep.paths)
    _shares.cache_clear()
    assert importance(sweep, LOSS) == told


def test_one_trial_that_diverged_does_not_hide_which_setting_matters():
    random = np.random.default_rng(0)
    drawn = [(float(random.uniform()), float(random.uniform())) for _ in range(30)]
    trials = [trial(n, {"a.x": x, "b.y": y}, x + 0.01 * y) for n, (x, y) in enumerate(drawn)]
    trials[7].reports[-1]["validation_loss"] = 1e6
    assert importance(sweep_of(*trials), LOSS).shares["a.x"] > 0.8


def test_importance_compares_trials_where_they_were_equally_long():
    """What goes on gains, whatever its settings: by their last values the later of these steps would decide, not x."""
    stopped = [trial(n, {"a.x": n % 4, "b.y": n // 6}, 5.0 + n % 4, status="stopped") for n in range(6)]
    finished = [trial(n, {"a.x": n % 4, "b.y": n // 6}, 5.0 + n % 4, 3.0, 1.0) for n in range(6, 9)]
    told = importance(sweep_of(*stopped, *finished), LOSS)
    assert (told.trials, told.step) == (9, 10)
    assert told.shares["a.x"] > 0.8
    assert "9 trials at step 10" in page_of(sweep_of(*stopped, *finished)).text


def test_importance_takes_texts_lists_and_settings_that_do_not_always_apply():
    kinds = ["lora", None, ["to_q"], True]
    trials = [
        trial(n, {"a.x": kinds[n % 4]} | ({"b.y": 0.1 * (n % 3)} if n % 2 else {}), float(n % 4)) for n in range(16)
    ]
    told = importance(sweep_of(*trials), LOSS)
    assert next(iter(told.shares)) == "a.x"


@pytest.mark.parametrize(
    ("trials", "reason"),
    [
        ([trial(n, {"a.x": n}, 1.0 * n) for n in range(3)], "4 trials with a value are needed, and there are 3"),
        ([trial(n, {"a.x": n}, NAN) for n in range(6)], "and there are 0"),
        ([trial(n, {"a.x": 1}, 1.0 * n) for n in range(6)], "the same settings"),
        ([trial(n, {"a.x": n}, 1.0) for n in range(6)], "the same value"),
    ],
)
def test_where_importance_cannot_be_told_the_page_says_why(trials: list[Trial], reason: str):
    sweep = sweep_of(*trials)
    assert importance(sweep, LOSS).shares == {}
    assert "validation_loss it cannot be told: " in page_of(sweep).text
    assert reason in page_of(sweep).text


def test_the_front_is_drawn_through_the_trials_that_nothing_beats():
    sweep = drawn_sweep(30, objectives=(LOSS, ANSWER))
    figure = front(sweep, short_names(sweep.paths))
    line = next(trace for trace in figure.data if trace.mode == "lines")
    expected = [(one.last("validation_loss"), one.last("clip_score")) for one in sweep.front()]
    assert list(zip(line.x, line.y, strict=True)) == expected
    assert len(expected) > 1
    names = {trace.name for trace in figure.data}
    assert {"front", "winner", "base"} <= names
    text = page_of(sweep).text
    assert "What is traded" in text
    assert ", ".join(one.id for one in sweep.front()) in text
    assert "What is traded" not in page_of(drawn_sweep(30)).text


def test_seeds_make_means_with_students_interval():
    values = {1e-4: [0.3, 0.34, 0.29], 1e-3: [0.5, 0.9], 1e-2: [0.4]}
    trials = [
        trial(10 * place + seed, {RATE: rate}, value, seed=seed)
        for place, (rate, of_rate) in enumerate(values.items())
        for seed, value in enumerate(of_rate)
    ]
    trials[0].is_base = True
    sweep = sweep_of(*trials, trial(99, {RATE: 1e-3}, 0.1, status="stopped", seed=7), paths=(RATE,))
    intervals = seed_intervals(sweep, LOSS)
    assert [one.settings[RATE] for one in intervals] == [1e-4, 1e-2, 1e-3]
    assert [one.is_base for one in intervals] == [True, False, False]
    for one in intervals:
        expected = values[one.settings[RATE]]
        assert one.values == tuple(expected)
        assert one.mean == pytest.approx(np.mean(expected))
        if len(expected) < 2:
            assert one.half_width is None
        else:
            low, high = stats.t.interval(0.95, len(expected) - 1, loc=np.mean(expected), scale=stats.sem(expected))
            assert (one.mean - one.half_width, one.mean + one.half_width) == pytest.approx((low, high))
    text = page_of(sweep).text
    assert "Luck or merit" in text
    assert "Over its 3 seeds validation_loss is 0.31 ± 0.066" in text
    assert "Luck or merit" not in page_of(drawn_sweep(6)).text


def test_a_best_mean_whose_runs_are_beaten_in_both_is_not_said_to_be_unbeaten():
    found = {("lucky", 0): (0.1, 0.9), ("lucky", 1): (0.9, 0.1), ("good", 0): (0.3, 0.5), ("good", 1): (0.2, 0.4)}
    trials = []
    for place, ((name, seed), (loss, answer)) in enumerate(found.items()):
        trials.append(trial(place, {"a.x": name}, loss, seed=seed))
        trials[-1].reports[-1][ANSWER.metric] = answer
    sweep = Sweep("odd", (LOSS, ANSWER), ("a.x",), (), 100, (), trials, finished=True)
    best = sweep.best()
    assert (best.id, [one.id for one in sweep.front()]) == ("00003", ["00000"])
    text = page_of(sweep).text
    assert "Trial 00003 wins with validation_loss 0.2 and clip_score 0.4" in text
    assert "Over its 2 seeds validation_loss is 0.25 " in text
    assert "It is the best" not in text
    assert "No trial beats it" not in text
    best.reports[-1]["validation_loss"] = 0.09
    assert "It is the best in validation_loss of those that no trial beats in both" in page_of(sweep).text


def test_many_values_are_binned_on_their_own_scale_and_few_are_not():
    rates = [10 ** (-6 + 4 * n / 59) for n in range(60)]
    trials = [trial(n, {"a.x": rate, "b.y": [16, 4, 8][n % 3]}, 1.0) for n, rate in enumerate(rates)]
    x, y = axes(sweep_of(*trials, log_paths=("a.x",)))
    assert len(x.columns) == 8  # the root of 60, rounded up
    assert x.columns[0] == "1e-6 … 3.2e-6"
    assert x.columns[-1] == "0.0032 … 0.01"
    assert list(x.places) == sorted(x.places)
    assert {x.places.count(place) for place in range(8)} <= {7, 8}
    assert y.columns == ("4", "8", "16")
    assert y.places[:3] == (2, 0, 1)


def test_columns_tell_values_apart_and_put_what_does_not_apply_last():
    values = [0.000321, 0.00032149, None, True, "lora", [1, 2]]
    trials = [trial(n, {"a.x": value}, 1.0) for n, value in enumerate(values)]
    (axis,) = axes(sweep_of(*trials, trial(9, {}, 1.0), paths=("a.x",)))
    assert axis.columns == ("0.000321", "0.0003215", "[1, 2]", "lora", "null", "true", "–")
    assert [axis.columns[place] for place in axis.places] == [
        "0.000321",
        "0.0003215",
        "null",
        "true",
        "lora",
        "[1, 2]",
        "–",
    ]


def test_a_single_swept_setting_makes_one_row_in_the_order_of_its_values():
    trials = [trial(n, {RATE: rate}, 1.0) for n, rate in enumerate((1e-3, 1e-5, 0.00032, 1e-4))]
    (axis,) = axes(sweep_of(*trials, paths=(RATE,)))
    assert axis.columns == ("1e-5", "1e-4", "0.00032", "0.001")
    assert axis.places == (3, 0, 2, 1)


def test_seeds_are_an_axis_where_there_are_several():
    assert [axis.path for axis in axes(drawn_sweep(6, num_seeds=3))][-1] == "seed"
    assert "seed" not in [axis.path for axis in axes(drawn_sweep(6))]


def test_a_cell_shows_its_best_trial_the_winner_before_all():
    sweep = drawn_sweep(30, objectives=(ANSWER, LOSS))
    order = ranked(sweep)
    assert order[0] is sweep.best()
    finished = [one.last("clip_score") for one in order if one.status == "finished"]
    assert finished == sorted(finished, reverse=True)
    assert [one.last("clip_score") is None for one in order] == sorted(one.last("clip_score") is None for one in order)


def test_curves_of_stopped_trials_are_dashed():
    sweep = drawn_sweep(12)
    lines = curves(sweep, LOSS, short_names(sweep.paths)).data
    dashed = {line.meta[0] for line in lines if line.line.dash == "dash"}
    assert dashed == {row for row, one in enumerate(sweep.trials) if one.status == "stopped"} != set()


def test_far_outliers_do_not_flatten_the_curves():
    trials = [trial(n, {"a.x": n}, 0.5, 0.3 + 0.01 * n) for n in range(10)]
    sweep = sweep_of(*trials, trial(10, {"a.x": 10}, 0.5, 900.0))
    figure = curves(sweep, LOSS, short_names(sweep.paths))
    assert figure.layout.yaxis.range[1] < 1
    assert "1 trial far outside" in figure.layout.annotations[0].text
    assert curves(sweep_of(*trials), LOSS, short_names(sweep.paths)).layout.yaxis.range is None


def test_a_value_that_is_no_number_leaves_a_gap_and_one_without_values_no_line():
    sweep = sweep_of(trial(0, {"a.x": 1}, 1.0, NAN, 3.0), trial(1, {"a.x": 2}, NAN), trial(2, {"a.x": 3}))
    (line,) = curves(sweep, LOSS, short_names(sweep.paths)).data
    assert list(line.x) == [10, 30]
    assert list(line.y) == [1.0, 3.0]


def test_parallel_axes_are_logarithmic_where_drawn_so_and_name_categories():
    sweep = drawn_sweep(30)
    (lines,) = parallel(sweep, short_names(sweep.paths)).data
    axis = {dimension.label: dimension for dimension in lines.dimensions}
    known = [one for one in sweep.trials if one.last("validation_loss") is not None]
    assert len(axis["learning_rate"].values) == len(known)
    assert sorted(axis["learning_rate"].values) == pytest.approx(
        sorted(np.log10([one.settings[RATE] for one in known]))
    )
    assert axis["learning_rate"].ticktext[-1] == "0.01"
    assert axis["rank"].ticktext == ("1", "4", "8", "16", "32")
    assert "<owl>" in axis["initializer_token"].ticktext
    assert axis["dropout"].ticktext[0] == "–"  # of trials without it
    assert "validation_loss" in axis
    told = parallel(sweep, short_names(sweep.paths)).layout.meta
    assert sorted(told["rows"]) == list(range(30))  # also those that have no line
    (rates,) = [one["places"] for one in told["axes"] if one["name"] == "learning_rate"]
    assert rates == pytest.approx([np.log10(sweep.trials[row].settings[RATE]) for row in told["rows"]])
    best = len(known) - 1
    assert axis["learning_rate"].values[best] == pytest.approx(np.log10(sweep.best().settings[RATE]))
