"""How many replicas of a model there are: by the denoising steps that are still to be taken, not by the requests."""

import math
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from ray_sd.config.serve import Replicas

QUEUED_STEPS = "queued_steps"
"""What replicas tell: steps still to be taken of all their pictures, a picture with guidance counting twice."""

LOOK_BACK = 15.0
"""Seconds over which the steps are averaged; replicas tell them every ten."""


class StepsPolicy:
    """As many replicas as keep the steps of each near a number. Serve itself keeps the bounds and the delays."""

    def __init__(self, steps: int) -> None:
        """steps: that a replica may have before it; more start another."""
        self._steps = steps

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        queued = sum((context.aggregated_metrics or {}).get(QUEUED_STEPS, {}).values())
        return math.ceil(queued / self._steps), {}


def replica_options(replicas: Replicas) -> dict[str, Any]:
    """What a deployment is made with: a number of replicas, or what lets it grow and shrink between two."""
    if replicas.most == replicas.min:
        return {"num_replicas": replicas.min}
    policy = f"{StepsPolicy.__module__}:{StepsPolicy.__name__}"
    config = AutoscalingConfig(
        min_replicas=replicas.min,
        max_replicas=replicas.most,
        policy=AutoscalingPolicy(policy_function=policy, policy_kwargs={"steps": replicas.steps}),
        upscale_delay_s=replicas.upscale_delay,
        downscale_delay_s=replicas.downscale_delay,
        look_back_period_s=LOOK_BACK,
    )
    return {"autoscaling_config": config}
