"""Populations, whose trials go on from each other's weights."""

import json
from pathlib import Path

import pytest
import yaml

from ray_sd.tune.run import sweep


@pytest.mark.slow
def test_bad_trials_of_a_population_go_on_from_a_good_ones_weights(configure, tmp_path: Path, ray_cluster: None):
    sweep(
        configure(
            "trainer.max_steps=12",  # so that both are at work for a while, whichever starts first
            "sweep.space.trainer.learning_rate={grid: [1e-4, 3e-2]}",
            "sweep.include_base=false",
            "sweep.scheduler={name: pbt, quantile: 0.5, resample_probability: 0}",
        )
    )
    folder = tmp_path / "sweeps" / "learning_rate" / "trials"
    copies = [run for run in folder.iterdir() if not run.name.endswith("-0")]
    assert copies
    seen = 0
    for run in copies:
        donor = Path(yaml.safe_load((run / "config.yaml").read_text())["resume"])
        assert donor.parent.name.rsplit("-", 1)[0] != run.name.rsplit("-", 1)[0]
        if not losses(run):
            continue  # it has taken over what was at its end already
        first, loss = next(iter(losses(run).items()))
        assert first == int(donor.name.removeprefix("checkpoint-")) + 1
        # Rows and noise of a step are the same in all trials: equal losses mean equal weights before it.
        if first in losses(donor.parent):
            assert loss == pytest.approx(losses(donor.parent)[first], rel=1e-5)
            seen += 1
        before = folder / f"{run.name.rsplit('-', 1)[0]}-0"
        if first in losses(before):
            assert loss != pytest.approx(losses(before)[first], rel=1e-4)
    assert seen


def losses(run: Path) -> dict[int, float]:
    """Of the steps of training."""
    file = run / "logs" / "metrics.jsonl"
    records = map(json.loads, file.read_text().splitlines() if file.exists() else [])
    return {record["step"]: record["loss"] for record in records if "loss" in record}
