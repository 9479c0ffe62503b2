"""What a trial is given."""

from ray_sd.tune.search import SEED, SETTINGS
from ray_sd.tune.trial import TrialJob

DRAWN = {SETTINGS: {"trainer.learning_rate": 0.5}, SEED: 0}


def test_trackers_are_told_the_sweep_and_what_it_tries(configure):
    trial = TrialJob(configure(), "trials", preparer=None, threads=1).configure(DRAWN, "first-0", resume=False)
    assert trial.trainer.learning_rate == 0.5
    assert trial.tracker.group == "learning_rate"
    assert trial.tracker.compare == ("trainer.learning_rate",)


def test_a_group_of_ones_own_stays(configure):
    mine = configure("tracker.group=mine", "tracker.compare=[seed]")
    trial = TrialJob(mine, "trials", preparer=None, threads=1).configure(DRAWN, "first-0", resume=False)
    assert (trial.tracker.group, trial.tracker.compare) == ("mine", ("seed",))
