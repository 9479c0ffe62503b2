"""What engines measure in processes of their own, for all tests of `test_engine.py` at once."""

import gc
import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from ray_sd.config import ExperimentConfig, TrainerConfig
from ray_sd.config.load import load_config
from ray_sd.methods import build_method
from ray_sd.models import load_model
from ray_sd.train import checkpoint, zero
from ray_sd.train import engine as engine_module
from ray_sd.train.engine import Engine
from ray_sd.train.loop import Objective
from ray_sd.train.optimizers import EMA, PARAMETER
from ray_sd.train.quantize import quantize_frozen
from ray_sd.train.validation import validation_loss

STEPS, SAVED, BATCH, RATE = 6, 3, 4, 1e-3
"""Steps of a whole run, those after which it is saved, rows of each, and the learning rate."""
FEW_STEPS = 2
"""For whatever shows in the second one whether the first was right."""
VOCABULARY = 2969
"""Words of the tiny model's tokenizer; new ones come after them."""
TOKENS = ["placeholder_token=[<cat>, <mat>]", "num_vectors=2"]
KINDS = {
    "full": ["method=full", f"trainer.learning_rate={RATE}"],
    "lora": ["method=lora", f"trainer.learning_rate={RATE}"],
    "loha": ["method=loha", f"trainer.learning_rate={RATE}"],
    "lokr": ["method=lokr", f"trainer.learning_rate={RATE}"],
    "oft": ["method=oft", "method.block_size=8", f"trainer.learning_rate={RATE}"],
    "textual_inversion": [
        "method=textual_inversion",
        *(f"method.{setting}" for setting in TOKENS),
        "trainer.learning_rate=0.5",
    ],
    "dreambooth": ["method=dreambooth", "method.class_prompt=a cat", f"trainer.learning_rate={RATE}"],
    "pivotal": [
        "method=pivotal",
        "method.class_prompt=a cat",
        "method.adapter.text_encoder=true",
        *(f"method.tokens.{setting}" for setting in TOKENS),
        f"trainer.learning_rate={RATE}",
        "trainer.token_learning_rate=0.5",
    ],
}
OF_CLIPS = ["model=tiny_random_video", "dataset=spin", f"trainer.learning_rate={RATE}"]
KINDS |= {
    "temporal": [*OF_CLIPS, "method=temporal", "trainer.gradient_checkpointing=true"],
    "temporal_lora": [*OF_CLIPS, "method=temporal_lora", "method.lora.rank=4", "trainer.learning_rate=0.02"],
    "interpolation": [*OF_CLIPS, "method=interpolation", "method.layers=all"],
    "temporal_decoder": [*OF_CLIPS, "method=temporal_decoder"],
    "inflate": [*OF_CLIPS, "method=inflate"],  # its image model is saved before anything is measured
}
CLIPS = ("temporal", "temporal_lora", "interpolation", "temporal_decoder", "inflate")
XL = ("lora", "textual_inversion", "dreambooth", "pivotal")
KINDS |= {f"{kind}_xl": [*KINDS[kind], "model=tiny_random_xl"] for kind in XL}
METHODS = [kind for kind in KINDS if kind != "full"]
LEARN_TOKENS = [kind for kind in METHODS if kind.startswith(("textual_inversion", "pivotal"))]
WITH_CLASS = [kind for kind in METHODS if kind.startswith(("dreambooth", "pivotal"))]
DIFFERENT = ("lora", "textual_inversion", "pivotal", "temporal", "pivotal_xl")
"""Methods that each give an engine other kinds of groups and modules; all others are like one of these."""
PRODIGY = {"d0": 1e-4, "d_coef": 50.0}
"""Moves the estimate within a few steps."""
SAVED_AT = {"adamw_8bit": 2, "adafactor": 0, "lion": 2, "prodigy": 0}
"""Stage at which two workers save each."""
KINDS |= {name: [*KINDS["full"], f"trainer.optimizer={name}"] for name in ("adamw_8bit", "adafactor")}
KINDS["lion"] = ["method=full", "trainer.optimizer=lion", f"trainer.learning_rate={RATE / 3}"]
KINDS["prodigy"] = ["method=full", "trainer.optimizer=prodigy", "trainer.learning_rate=1"]
KINDS["prodigy"] += [f"trainer.optimizer.{name}={value}" for name, value in PRODIGY.items()]


class Runs(NamedTuple):
    """What two workers, or one, measure for every run of the tests, and what only for the slow ones."""

    often: list[tuple]
    rarely: list[tuple]

    @property
    def rows(self) -> list:
        return [*self.often, *(pytest.param(*run, marks=pytest.mark.slow) for run in self.rarely)]

    def of(self, kinds: list[str]) -> "Runs":
        return Runs(*([run for run in runs if run[0] in kinds] for runs in self))


# An engine knows no method, only the groups and the modules that it is given: every method at one stage, and every stage with
# three methods; at stage 3, whose parameters are gathered module by module, all that differ.
STAGES_OF_METHODS = Runs(
    often=[*((kind, 1) for kind in DIFFERENT), *(("textual_inversion", stage) for stage in (0, 2, 3))],
    rarely=[(kind, 1) for kind in METHODS if kind not in DIFFERENT]
    + [(kind, stage) for kind in ("lora", "temporal") for stage in (0, 2)]
    + [(kind, 3) for kind in DIFFERENT if kind != "textual_inversion"],
)
# Stages 1 and 2 keep one flat tensor a group, stage 3 others, and stage 0 the parameters.
STAGES_OF_OPTIMIZERS = Runs(
    often=[("adamw_8bit", 0), ("adamw_8bit", 2), ("adafactor", 0), ("lion", 2), ("prodigy", 0)],
    rarely=[("adamw_8bit", 1), ("adamw_8bit", 3), ("lion", 0), ("lion", 1), ("lion", 3)],
)
RESUMED = Runs(
    often=[
        ("adamw_8bit", 2, 2),
        ("adamw_8bit", 1, 0),
        ("adafactor", 1, 0),
        ("lion", 1, 0),
        ("prodigy", 1, 0),
    ],
    rarely=[("adamw_8bit", 1, 3), ("lion", 1, 3)],
)
"""Number of workers and stage with which each goes on."""
ACCUMULATED = Runs(
    often=[("small", 1, 2), ("large", 1, 2), ("small", 1, 1)],
    rarely=[("small", 3, 1), ("small", 3, 2), ("large", 1, 1)],
)
HALF_PRECISION = Runs(
    often=[("bf16", 0), ("fp16", 1), ("fp16", 3)],
    rarely=[("bf16", 1), ("bf16", 2), ("bf16", 3), ("fp16", 0), ("fp16", 2)],
)
QUANTISED = Runs(often=[("nf4", 1), ("int8", 0)], rarely=[("nf4", 0), ("nf4", 2), ("int8", 1), ("int8", 2)])
CAN_BUILD = shutil.which(os.environ.get("CXX", "c++")) is not None and shutil.which("ninja") is not None


def measure(folder: Path, image_model: Path, rarely: bool) -> dict:
    """Losses, states and the like by name, and the folder that all of it lies in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        start_processes(_start_workers, (folder, image_model, rarely), start_method="spawn")
    return {"folder": str(folder)} | {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def _start_workers(_: int, folder: Path, image_model: Path, rarely: bool) -> None:
    """Two workers, then a single one, each a fork of a process that has imported everything and run nothing."""
    KINDS["inflate"].append(f"method.image_model={image_model}")
    gc.freeze()  # DeepSpeed collects garbage with every engine of stage 3
    for workers in (2, 1):
        start_processes(_work, (workers, folder, rarely), nprocs=workers, start_method="fork")


def _work(rank: int, workers: int, folder: Path, rarely: bool) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    meeting = folder / f"meeting-{workers}-{rarely}"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    _measure_all(folder, rank, workers, rarely)
    dist.destroy_process_group()


def _measure_all(folder: Path, rank: int, workers: int, rarely: bool) -> None:
    def record(name: str, losses: list[float], engine: Engine, **more: object) -> None:
        kept = sum(
            value.nbytes
            for state in engine._optimizer_states()
            for key, value in state.items()
            if torch.is_tensor(value) and key != EMA
        )
        found = {"losses": losses, "sums": _sums(engine), "bytes": kept, "scale": engine._loss_scale or 1.0}
        found |= {"scalars": engine.scalars(), "learning_rate": engine.learning_rate}
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(found | more))

    if workers == 1:
        _release_weights_after_each_use()
    if not rarely:
        _measure_whole_runs(record, folder, rank, workers)
    if workers == 2:
        _release_weights_after_each_use()
    _measure_optimizers(record, folder, rank, workers, rarely)
    if workers == 2:
        _measure_methods(record, rank, rarely)
    small = zero.SMALL
    for size, stage, expected_workers in ACCUMULATED[rarely]:
        if expected_workers == workers:
            zero.SMALL = small if size == "small" else 0
            engine, _ = _engine(stage, workers, micro_batch_size=1)
            record(f"accumulated-{size}-{workers}-{stage}", _run(engine, rank, workers, 0, FEW_STEPS, rows=1), engine)
    zero.SMALL = small
    if workers == 1:
        _measure_variants(record, folder, rarely)


def _release_weights_after_each_use() -> None:
    """Let ZeRO 3 do so, as it does in large models.

    In small ones it looks through all layers behind each for another use, which here takes it longer than all the rest.
    """
    configuration = engine_module.deepspeed_config

    def changed(*arguments: object) -> dict:
        found = configuration(*arguments)
        found["zero_optimization"]["stage3_max_reuse_distance"] = 0
        return found

    engine_module.deepspeed_config = changed


def _sums(engine: Engine) -> dict[str, float]:
    """Of the absolute values of all parameters and of their moving averages. Collective."""
    return {
        key: sum(float(engine._get(parameter, key).double().abs().sum()) for parameter in engine.parameters.values())
        for key in (PARAMETER, EMA)
    }


def _restore(engine: Engine, folder: Path) -> dict[str, float]:
    """How far each key of the state is off what was saved, as a share of the largest value."""
    assert checkpoint.restore(engine, folder) == SAVED
    keys = {name: engine.state_keys(name) for name in engine.parameters}
    saved = checkpoint._tensors(folder, checkpoint.read_index(folder), keys, engine.shapes)
    off: dict[str, float] = defaultdict(float)
    largest: dict[str, float] = defaultdict(float)
    for (_, found), (_, expected) in zip(engine.state(), saved, strict=True):
        for key, value in found.items():
            off[key] = max(off[key], float((value - expected[key]).abs().max()))
            largest[key] = max(largest[key], float(expected[key].abs().max()))
    return {key: off[key] / largest[key] for key in off}


def _measure_whole_runs(record: Callable, folder: Path, rank: int, workers: int) -> None:
    for stage in (0, 1, 2, 3):
        before = _storages()
        engine, config = _engine(stage, workers)
        losses = _run(engine, rank, workers, 0, SAVED)
        found = {"resident": sum(storage.nbytes() for key, storage in _storages().items() if key not in before)}
        if (stage, workers) == (2, 2):
            checkpoint.save(engine, folder / "saved", step=SAVED, rank=rank, world_size=workers, config=config)
        losses += _run(engine, rank, workers, SAVED, STEPS)
        # The second worker has a row less, and one instead that does not count.
        batch, weight = held_out_rows(range(rank, 5 + workers - 1, workers), "full"), torch.ones(-(-5 // workers))
        weight[-1] = float(rank + 1 < workers or workers == 1)
        found["held_out"] = validation_loss(engine, [batch | {"weight": weight}])
        found["gradient_norm"] = engine.gradient_norm()
        record(f"whole-{workers}-{stage}", losses, engine, **found)
    for stage in (0, 1, 2, 3) if workers == 1 else ():
        engine, _ = _engine(stage, workers)
        off = _restore(engine, folder / "saved")
        record(f"resumed-1-{stage}", _run(engine, rank, workers, SAVED, STEPS), engine, off=off)


def _storages() -> dict[int, torch.UntypedStorage]:
    """What all tensors of this process lie in. As long as they are held, no other takes the key of one of them."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    return {storage._cdata: storage for storage in storages}


def _measure_optimizers(record: Callable, folder: Path, rank: int, workers: int, rarely: bool) -> None:
    for name, stage in STAGES_OF_OPTIMIZERS[rarely] if workers == 2 else ():
        engine, config = _engine(stage, workers, kind=name)
        losses = _run(engine, rank, workers, 0, SAVED)
        if stage == SAVED_AT[name]:
            checkpoint.save(engine, folder / name, step=SAVED, rank=rank, world_size=workers, config=config)
        record(f"{name}-{stage}", losses + _run(engine, rank, workers, SAVED, STEPS), engine)
    for name, resumed_on, stage in RESUMED[rarely]:
        if resumed_on == workers:
            engine, _ = _engine(stage, workers, kind=name)
            off = _restore(engine, folder / name)
            record(f"{name}-resumed-{workers}-{stage}", _run(engine, rank, workers, SAVED, STEPS), engine, off=off)


def _measure_methods(record: Callable, rank: int, rarely: bool) -> None:
    for kind, stage in STAGES_OF_METHODS[rarely]:
        engine, _ = _engine(stage, 2, kind=kind)
        found = {"vocabulary": [_vocabulary(engine)]} if kind in LEARN_TOKENS else {}
        losses = _run(engine, rank, 2, 0, FEW_STEPS, kind=kind)
        if kind in LEARN_TOKENS:
            found["vocabulary"].append(_vocabulary(engine))
        record(f"{kind}-{stage}", losses, engine, **found)


def _vocabulary(engine: Engine) -> str:
    """Digest of the bytes of the text encoders' own rows."""
    encoders = [encoder for encoder, _ in engine._deepspeed.module.model.text_encoders().values()]
    weights = [encoder.get_input_embeddings().vocabulary.weight for encoder in encoders]
    with engine_module.deepspeed.zero.GatheredParameters(weights, enabled=engine.stage == 3):
        return hashlib.sha256(b"".join(weight.detach().numpy().tobytes() for weight in weights)).hexdigest()


def _measure_variants(record: Callable, folder: Path, rarely: bool) -> None:
    record("untrained", [], _engine(0, 1)[0])
    for stage in (1, 2, 3) if rarely and CAN_BUILD else ():
        offload = {"stage": stage, "param_persistence_threshold": 0, "offload": True}
        engine, _ = _engine(stage, 1, zero=offload)
        record(f"offload-{stage}", _run(engine, 0, 1, 0, STEPS), engine)
        engine, _ = _engine(stage, 1, zero=offload)
        checkpoint.restore(engine, folder / "saved")
        record(f"offload-resumed-{stage}", _run(engine, 0, 1, SAVED, STEPS), engine)
    for kind, stage in QUANTISED[rarely]:
        engine, _ = _engine(stage, 1, kind="lora", quantize=kind)
        record(f"{kind}-{stage}", _run(engine, 0, 1, 0, SAVED, kind="lora"), engine)
    # Last, since DeepSpeed remembers in the whole process that an engine used autocast.
    for precision, stage in HALF_PRECISION[rarely]:
        engine, _ = _engine(stage, 1, precision=precision)
        record(f"{precision}-{stage}", _run(engine, 0, 1, 0, SAVED), engine)
    engine_module.FIRST_LOSS_SCALE = 2.0**60
    for stage in (2, 3) if rarely else (1,):
        engine, _ = _engine(stage, 1, precision="fp16")
        record(f"overflow-{stage}", _run(engine, 0, 1, 0, FEW_STEPS), engine)


@cache
def _config_of(kind: str) -> ExperimentConfig:
    """Composed once: an engine takes little longer than that."""
    return load_config(["experiment=smoke", *KINDS[kind], "trainer.ema_decay=0.9"], ExperimentConfig)


def prepared(kind: str):
    config = _config_of(kind)
    torch.manual_seed(0)
    method = build_method(config.method)
    model = load_model(config.model, method.components())
    method.prepare(model, config.trainer)
    return method, model, config


def _engine(
    stage: int, workers: int, kind: str = "full", quantize: str | None = None, **changes: object
) -> tuple[Engine, ExperimentConfig]:
    method, model, config = prepared(kind)
    if quantize is not None:
        assert quantize_frozen(model.unet, quantize, torch.float32) > 40
    trainer = trainer_of(config, stage, workers, **changes)
    groups = method.parameter_groups(model, trainer)
    parameters = checkpoint.trained_parameters(model)
    return Engine(Objective(method, model).train(), parameters, groups, trainer, torch.device("cpu")), config


def trainer_of(config: ExperimentConfig, stage: int, workers: int, **changes: object) -> TrainerConfig:
    return TrainerConfig.model_validate(
        config.trainer.model_dump()
        | {"num_workers": workers, "batch_size": BATCH, "zero": {"stage": stage, "param_persistence_threshold": 0}}
        | changes
    )


def _run(
    engine: Engine, rank: int, workers: int, start: int, stop: int, rows: int | None = None, kind: str = "full"
) -> list[float]:
    """Mean losses over all workers of steps start … stop - 1, `rows` at once."""
    share = BATCH // workers
    rows = rows or share
    losses = []
    for step in range(start, stop):
        engine.set_learning_rate(1.0)
        total = torch.zeros(())
        for first in range(rank * share, (rank + 1) * share, rows):
            loss = engine(batch_of(step, range(first, first + rows), kind))
            engine.backward(loss)
            engine.step()
            total += loss.detach() * rows / BATCH
        dist.all_reduce(total)
        losses.append(float(total))
    return losses


def batch_of(step: int, rows: range, kind: str) -> dict[str, torch.Tensor]:
    """Rows of step `step`, each from a seed of its own, for DreamBooth each with one of its class."""
    batch = _rows([1000 * step + row for row in rows], kind)
    if kind in WITH_CLASS:
        batch |= {
            f"class_{name}": value for name, value in _rows([1000 * step + 500 + row for row in rows], kind).items()
        }
    return batch


def held_out_rows(rows: range, kind: str) -> dict[str, torch.Tensor]:
    """Rows at timesteps of their own, as validation has them."""
    return batch_of(77, rows, kind) | {"timesteps": torch.tensor([100 + 150 * row for row in rows])}


def _rows(seeds: list[int], kind: str) -> dict[str, torch.Tensor]:
    """Rows that each depend on nothing but their seed."""
    if kind in CLIPS:
        return _clips(seeds, condition_frames=2 if kind == "interpolation" else 1)
    xl = kind.endswith("_xl")
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        row = {"latent_mean": torch.randn(4, 8, 8, generator=generator), "latent_std": torch.full((4, 8, 8), 0.1)}
        if kind in LEARN_TOKENS:
            row["input_ids"] = torch.randint(512, (16,), generator=generator)
            row["input_ids"][3:7] = torch.arange(VOCABULARY, VOCABULARY + 4)
        else:
            row["text_embeds"] = torch.randn(16, 96 if xl else 32, generator=generator)
        if xl:
            row["add_time_ids"] = torch.randint(64, 1024, (6,), generator=generator).float()
        if xl and kind in LEARN_TOKENS:
            row["input_ids_2"] = row["input_ids"].clone()
        elif xl:
            row["pooled_text_embeds"] = torch.randn(48, generator=generator)
        rows.append(row)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return batch | {"row_seed": torch.tensor(seeds)}


def _clips(seeds: list[int], condition_frames: int) -> dict[str, torch.Tensor]:
    """Of three frames each; with their pixels, for methods of either."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        frames = torch.randint(256, (3, 3, 64, 64), generator=generator, dtype=torch.uint8)
        row = {
            "pixels": frames[..., :32, :32],
            "condition_pixels": frames[:condition_frames],
            "latent_mean": torch.randn(3, 4, 8, 8, generator=generator),
            "latent_std": torch.full((3, 4, 8, 8), 0.1),
            "image_embeds": torch.randn(1, 32, generator=generator),
            "fps": torch.tensor(7.0),
            "motion_bucket_id": torch.tensor(float(1 + seed % 200)),
        }
        rows.append(row)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return batch | {"row_seed": torch.tensor(seeds)}
