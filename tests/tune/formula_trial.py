"""A sweep's trials without training: what they report is a formula of their learning rate and seed."""

import json
import math
import os
import time
from typing import Any

import pytest
from ray import tune

from ray_sd.errors import RaySdError
from ray_sd.train.storage import RunFolder
from ray_sd.tune import trial
from ray_sd.tune.results import STEP
from ray_sd.tune.search import SEED, SETTINGS
from ray_sd.tune.trial import TrialJob

RATE = "trainer.learning_rate"
LOST = 1.0
"""From this learning rate on a trial fails."""


def use_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sweeps run such trials."""

    # Inside, so that Ray sends it to the trials' processes, which know nothing of the tests, as a whole.
    def formula(settings: dict[str, Any], *, job: TrialJob) -> None:
        run = RunFolder(job.folder, f"{tune.get_context().get_trial_id()}-0")
        rate, seed, began = settings[SETTINGS][RATE], settings[SEED], time.monotonic()
        run.write("process", str(os.getpid()).encode())
        for step in range(2, job.config.trainer.max_steps + 1, 2):
            if rate >= LOST:
                raise RaySdError(f"the weights are lost at step {step}")
            off = abs(math.log10(rate) + 2.5)
            losses = {"validation_loss": (off + 0.1 * seed) / step, "loss": (5 - off + 0.2 * seed) / step}
            report = losses | {STEP: step, "run": run.path, "checkpoint": f"{run.path}/{step}"}
            if step == job.config.trainer.max_steps:
                run.write("adapter/manifest.json", json.dumps({"rate": rate, "seed": seed}).encode())
                run.write("adapter/peft/adapter_config.json", b"{}")
                report["adapter"] = f"{run.path}/adapter"
            trial._tell(report, began)

    monkeypatch.setattr("ray_sd.tune.run.run_trial", formula)
    monkeypatch.setattr("ray_sd.tune.run._encode", lambda *_: None)
