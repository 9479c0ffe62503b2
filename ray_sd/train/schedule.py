"""Learning rate schedules as functions of the step alone, so that a resumed run needs no state for them."""

import math
from collections.abc import Callable

from ray_sd.config.trainer import ConstantSchedule, CosineSchedule, LinearSchedule


def learning_rate_factor(
    schedule: ConstantSchedule | LinearSchedule | CosineSchedule, max_steps: int
) -> Callable[[int], float]:
    """Share of the peak learning rate at step 0 … max_steps - 1.

    Warm-up rises linearly and reaches the peak after `warmup_steps`; `cosine` then anneals to
    `min_ratio` in `num_cycles` cycles, each starting at the peak (SGDR, arXiv:1608.03983).
    """
    length = max(1, max_steps - schedule.warmup_steps)

    def shape(progress: float) -> float:
        match schedule:
            case ConstantSchedule():
                return 1.0
            case LinearSchedule(min_ratio=low):
                return 1 - (1 - low) * progress
            case CosineSchedule(min_ratio=low, num_cycles=cycles):
                return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * (progress * cycles % 1.0)))

    def factor(step: int) -> float:
        if step < schedule.warmup_steps:
            return (step + 1) / (schedule.warmup_steps + 1)
        return shape(min(1.0, (step - schedule.warmup_steps) / length))

    return factor
