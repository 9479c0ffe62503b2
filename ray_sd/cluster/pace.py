"""The pace of Ray Data's scheduling loop."""

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.data import DataContext

STEP_SECONDS = 0.05
"""How long it rests."""


def rest_between_steps(context: "DataContext") -> None:
    """Let Ray Data's scheduling loop rest between its steps. context: a data set's.

    The loop waits for blocks, but not while it holds blocks back: then it takes a whole core, and the interpreter lock of
    the process that it runs in.
    """
    # Here, since this takes a second to import, and most that need a cluster have no use for it.
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Pace(ExecutionCallback):
        def on_execution_step(self, executor: object) -> None:
            time.sleep(STEP_SECONDS)

    context.custom_execution_callback_classes.append(Pace)
