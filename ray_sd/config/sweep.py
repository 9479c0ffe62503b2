"""What `jobs/sweep.py` takes: an experiment, and what is tried in it."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_serializer, field_validator, model_validator

from ray_sd.config.base import Schema, name_to_mapping
from ray_sd.config.experiment import ExperimentConfig
from ray_sd.config.metrics import PREFIX

Mode = Literal["min", "max"]
RANGES = ("uniform", "loguniform", "randint")
KINDS = ("choice", "grid", *RANGES, "around")
LOWER_IS_BETTER = ("loss", "lpips", "drift")
"""Ends of the names of metrics that are minimized unless `sweep.mode` says otherwise."""
LOSSES = ("loss", "validation_loss")
"""Of training itself, whatever else may be labelled so."""


class Distribution(Schema):
    """Values that a setting may take: one of `choice`, `grid`, `uniform`, `loguniform`, `randint` and `around`."""

    choice: tuple[Any, ...] | None = None
    """One of these."""
    grid: tuple[Any, ...] | None = None
    """Each of these, with each of every other grid."""
    uniform: tuple[float, float] | None = None
    """A number between two."""
    loguniform: tuple[float, float] | None = None
    """A number between two, every factor as likely as any other."""
    randint: tuple[int, int] | None = None
    """A whole number from the first to the last, both included."""
    around: float | None = Field(None, gt=1)
    """A number between the experiment's own value divided by this and multiplied by it, every factor as likely as any other."""
    when: dict[str, Any] | None = None
    """Only where settings at these paths have these values, or one of a list of them."""

    @property
    def kind(self) -> str:
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        """All values of a choice or grid; the ends of a range, which `around` has once it is `placed`."""
        return getattr(self, self.kind)

    def placed(self, own: Any) -> "Distribution":
        """The same, `around` as the range that it is for an experiment's own value. Raises ValueError where that has none."""
        if self.around is None:
            return self
        if not isinstance(own, float) or own <= 0:
            raise ValueError(
                f"around: the experiment has {own} there, which is no decimal number above 0; give a range"
            )
        return Distribution(loguniform=(own / self.around, own * self.around), when=self.when)

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given)} together; give one of them"
                if given
                else f"no distribution; give one of: {', '.join(KINDS)}"
            )
        if self.around is not None:
            return self
        if not self.values:
            raise ValueError(f"{self.kind} names no value")
        if self.kind in RANGES and not self.values[0] < self.values[1]:
            raise ValueError(f"{self.kind}: {self.values[0]:g} is not below {self.values[1]:g}")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform: {self.loguniform[0]:g} has no logarithm; begin above 0")
        return self


class NoScheduler(Schema):
    """Every trial trains to its end."""

    name: Literal["none"] = "none"
    """Kind of scheduler."""


class AshaScheduler(Schema):
    """Stop trials that are among the worse of those that got as far (arXiv:1810.05934)."""

    name: Literal["asha"] = "asha"
    """Kind of scheduler."""
    grace_steps: int | None = Field(None, ge=1)
    """Steps that every trial gets; null takes half of all."""
    reduction_factor: float = Field(2, gt=1)
    """Of so many trials that come to a rung one goes on, and rungs are so many times as far apart."""


class MedianScheduler(Schema):
    """Stop trials whose best is worse than the median of the others' means so far."""

    name: Literal["median"] = "median"
    """Kind of scheduler."""
    grace_steps: int | None = Field(None, ge=1)
    """Steps that every trial gets; null takes those of one report."""
    min_trials: int = Field(3, ge=1)
    """Others that must have got as far before any is stopped."""


class PbtScheduler(Schema):
    """Let bad trials go on from good ones' weights, with settings that differ a little (arXiv:1711.09846)."""

    name: Literal["pbt"] = "pbt"
    """Kind of scheduler."""
    interval_steps: int | None = Field(None, ge=1)
    """Steps between exchanges; null takes those of one report."""
    quantile: float = Field(0.25, gt=0, le=0.5)
    """Share of the trials that is replaced, and share that is copied."""
    resample_probability: float = Field(0.25, ge=0, le=1)
    """Probability that a copied setting is drawn anew instead of changed a little."""


Scheduler = Annotated[
    NoScheduler | AshaScheduler | MedianScheduler | PbtScheduler,
    Field(discriminator="name"),
    BeforeValidator(name_to_mapping),
]


def _one_to_list(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def hide_password(url: str) -> str:
    """A database URL with `***` for its password. Raises ValueError for what is no such URL."""
    from sqlalchemy import make_url  # takes a while, and few sweeps have a database of their own
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):  # whose words may hold the password
        raise ValueError(
            "this is no database URL; write it as postgresql://user:password@host/database, with %40 for an @ in the password"
        ) from None


class SweepSettings(Schema):
    """What is tried, how much of it, and what counts as good."""

    space: dict[str, Distribution]
    """What is tried: distributions by path, such as `trainer.learning_rate: {loguniform: [1e-5, 1e-3]}`."""
    constraints: tuple[str, ...] = ()
    """What must hold of a trial's settings, such as `method.alpha <= 2 * method.rank`; other draws are thrown away."""
    metric: Annotated[tuple[str, ...], BeforeValidator(_one_to_list)] = ("validation_loss",)
    """What counts: a metric that a run reports, with or without its `val/`, or two that are traded against each other."""
    mode: Annotated[tuple[Mode, ...] | None, BeforeValidator(_one_to_list)] = None
    """`min` or `max` for each metric; null minimizes losses, drifts and LPIPS, and maximizes the others."""
    num_trials: int = Field(8, ge=1)
    """Settings that are tried, those of `include_base` and of grids among them."""
    num_seeds: int = Field(1, ge=1)
    """Runs of the same settings with different seeds, so that the report tells luck from merit."""
    include_base: bool = True
    """Try the experiment's own settings first, to compare with."""
    searcher: Literal["optuna", "random"] = "optuna"
    """How settings are chosen: by Optuna's tree-structured Parzen estimator, or at random."""
    scheduler: Scheduler = NoScheduler()
    """What happens to bad trials: `none`, `asha`, `median` or `pbt`."""
    report_steps: int | None = Field(None, ge=1)
    """Steps between reports, each with a checkpoint, validation loss and pictures; null takes an eighth of all steps."""
    max_concurrent: int | None = Field(None, ge=1)
    """Trials at once; null takes as many as the cluster has room for."""
    time_limit: float | None = Field(None, gt=0)
    """Minutes, over all its starts, after which a sweep begins no trial; those at work come to their end. Null sets no limit."""
    trial_time_limit: float | None = Field(None, gt=0)
    """Minutes of work after which a trial counts as failed; null waits."""
    max_failures: int = Field(1, ge=0)
    """Times that a trial which failed goes on from its last checkpoint."""
    optuna_storage: str | None = None
    """Database URL of the Optuna study; null keeps an SQLite file in the sweep's folder. Its password is never written down."""

    @field_validator("optuna_storage")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is not None:
            hide_password(url)
        return url

    @field_serializer("optuna_storage")
    def _hide_password(self, url: str | None) -> str | None:
        return None if url is None else hide_password(url)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """One for each metric."""
        return self.mode or tuple("min" if name.endswith(LOWER_IS_BETTER) else "max" for name in self.metric)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.space:
            raise ValueError("space names no setting; give distributions by path")
        if not 1 <= len(self.metric) <= 2 or len(set(self.metric)) < len(self.metric):
            raise ValueError(f"metric names {len(self.metric)} metrics; give one, or two different ones")
        if self.mode is not None and len(self.mode) != len(self.metric):
            raise ValueError(f"{len(self.mode)} modes for {len(self.metric)} metrics")
        if len(self.metric) > 1 and self.scheduler.name != "none":
            raise ValueError(f"scheduler {self.scheduler.name} judges by one metric, and there are two; take none")
        if self.num_seeds > 1 and self.scheduler.name != "none":
            raise ValueError(
                f"scheduler {self.scheduler.name} would part the {self.num_seeds} runs of the same settings; take none, or "
                "num_seeds=1"
            )
        if isinstance(self.scheduler, PbtScheduler):
            self._check_pbt()
        return self

    def _check_pbt(self) -> None:
        for path, distribution in self.space.items():
            if distribution.when is not None or not path.startswith(("trainer.", "dataset.")):
                raise ValueError(
                    f"scheduler pbt changes settings while weights stay, and {path} may change what the weights are; take "
                    "settings of trainer without conditions, or another scheduler"
                )
        if self.constraints:
            raise ValueError("scheduler pbt changes settings without a look at constraints; take another scheduler")
        if self.time_limit is not None:
            raise ValueError(
                "scheduler pbt begins all trials together, which time_limit would part; set trainer.max_steps"
            )
        if self.num_trials < 2:
            raise ValueError("scheduler pbt compares trials; set num_trials to 2 or more")


class SweepConfig(ExperimentConfig):
    """A sweep over settings of an experiment (`jobs/sweep.py`)."""

    sweep: SweepSettings
    """Group `sweep`."""

    @property
    def experiment(self) -> ExperimentConfig:
        """The experiment that every trial is a change of."""
        experiment = ExperimentConfig(**{name: getattr(self, name) for name in ExperimentConfig.model_fields})
        experiment._origin = self._origin
        return experiment

    def without_password(self) -> Self:
        """The same with `***` for the password of its database, for what Tune keeps in files."""
        hidden = self.sweep.model_dump(include={"optuna_storage"})
        return self.model_copy(update={"sweep": self.sweep.model_copy(update=hidden)})

    @property
    def metrics(self) -> tuple[str, ...]:
        """`sweep.metric` as runs report it: what is measured on pictures may be named without its `val/`."""
        on_pictures = {metric.key for metric in self.trainer.validation.metrics}
        whole = {name: f"{PREFIX}{name}" for name in self.sweep.metric if name not in LOSSES}
        return tuple(whole[name] if whole.get(name) in on_pictures else name for name in self.sweep.metric)

    @property
    def report_steps(self) -> int:
        """Steps between reports."""
        return self.sweep.report_steps or max(1, self.trainer.max_steps // 8)

    @model_validator(mode="after")
    def _check_sweep(self) -> Self:
        if isinstance(self.resume, str):
            raise ValueError("resume: a sweep goes on as a whole, by resume=true")
        for name in self.sweep.metric:
            if name == "validation_loss" and not self.dataset.holdout:
                raise ValueError(
                    "sweep.metric: validation_loss needs rows that are not trained on; set dataset.holdout, or another metric"
                )
        if self.report_steps > self.trainer.max_steps:
            raise ValueError(
                f"sweep.report_steps {self.report_steps} is more than trainer.max_steps {self.trainer.max_steps}"
            )
        grace = getattr(self.sweep.scheduler, "grace_steps", None)
        if grace is not None and grace > self.trainer.max_steps:
            raise ValueError(
                f"sweep.scheduler.grace_steps {grace} is more than trainer.max_steps {self.trainer.max_steps}"
            )
        return self
