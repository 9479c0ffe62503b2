"""DeepSpeed at every ZeRO stage and worker count against a plain loop, and state that moves between them.

Workers are processes of their own, which measure for all tests at once; those marked slow ask for more combinations.
"""

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
from bitsandbytes.optim import AdamW8bit
from diffusers import UNet2DConditionModel
from lion_pytorch import Lion
from prodigyopt import Prodigy
from tiny_models import UNET, save_tiny_model
from torch.multiprocessing import start_processes
from transformers.optimization import Adafactor

from ray_sd.config import ExperimentConfig, TrainerConfig
from ray_sd.config.load import load_config
from ray_sd.methods import build_method
from ray_sd.models import load_model
from ray_sd.train import checkpoint
from ray_sd.train import engine as engine_module
from ray_sd.train.engine import EMA, PARAMETER, Engine
from ray_sd.train.loop import Objective
from ray_sd.train.memory import measure_step, resident
from ray_sd.train.quantize import quantize_frozen
from ray_sd.train.validation import validation_loss

pytestmark = pytest.mark.cluster

STEPS, SAVED, BATCH, RATE = 6, 3, 4, 1e-3
"""Steps of a whole run, those after which it is saved, rows of each, and the learning rate."""
CLOSE = 3e-5
"""How far losses of all weights may be off by rounding, on any processor; an update changes the next one by 1e-2."""
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

PRODIGY = {"d0": 1e-4, "d_coef": 50.0}
"""Moves the estimate within a few steps."""
PLAIN = {
    "adamw_8bit": lambda groups: AdamW8bit(groups, weight_decay=0.01),
    "adafactor": lambda groups: Adafactor(groups, scale_parameter=False, relative_step=False),
    "lion": lambda groups: Lion(groups, weight_decay=0.1),
    "prodigy": lambda groups: Prodigy(
        groups, weight_decay=0.01, use_bias_correction=True, safeguard_warmup=True, **PRODIGY
    ),
}
"""The libraries' own, with what the configuration sets by default."""
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


# An engine knows no method, only the groups and the modules that it is given.
STAGES_OF_METHODS = Runs(
    often=[(kind, 1) for kind in METHODS]
    + [(kind, stage) for kind in ("lora", "textual_inversion") for stage in (0, 2, 3)],
    rarely=[(kind, stage) for kind in METHODS for stage in (0, 2, 3) if kind not in ("lora", "textual_inversion")],
)
# Stages 1 and 2 keep one flat tensor a group, stage 3 others, and stage 0 the parameters.
STAGES_OF_OPTIMIZERS = Runs(
    often=[*(("adamw_8bit", stage) for stage in (0, 2, 3)), ("adafactor", 0), ("lion", 0), ("lion", 2), ("prodigy", 0)],
    rarely=[("adamw_8bit", 1), ("lion", 1), ("lion", 3)],
)
RESUMED = Runs(
    often=[
        ("adamw_8bit", 2, 2),
        ("adamw_8bit", 1, 0),
        ("adamw_8bit", 1, 3),
        ("adafactor", 1, 0),
        ("lion", 1, 0),
        ("prodigy", 1, 0),
    ],
    rarely=[("lion", 1, 3)],
)
"""Number of workers and stage with which each goes on."""
ACCUMULATED = Runs(
    often=[("small", 1, 2), ("small", 3, 2), ("large", 1, 2), ("small", 1, 1)],
    rarely=[("small", 3, 1), ("large", 1, 1)],
)
HALF_PRECISION = Runs(
    often=[(precision, stage) for precision in ("bf16", "fp16") for stage in (0, 1, 3)],
    rarely=[("bf16", 2), ("fp16", 2)],
)
QUANTISED = Runs(often=[("nf4", 0), ("nf4", 1), ("int8", 1)], rarely=[("nf4", 2), ("int8", 0), ("int8", 2)])
CAN_BUILD = shutil.which(os.environ.get("CXX", "c++")) is not None and shutil.which("ninja") is not None


@pytest.fixture(scope="module", autouse=True)
def image_model(tmp_path_factory) -> Path:
    """An image model whose U-Net has the shapes of the tiny video model's."""
    folder = save_tiny_model(tmp_path_factory.mktemp("image_model"), prediction_type="v_prediction")
    torch.manual_seed(0)
    same = {"norm_num_groups": 32, "use_linear_projection": True, "attention_head_dim": [2, 4]}
    UNet2DConditionModel(**UNET | same).save_pretrained(folder / "unet")
    KINDS["inflate"].append(f"method.image_model={folder}")
    return folder


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> dict:
    """Losses and states by the names that `_measure` gives them."""
    rarely = request.node.get_closest_marker("slow") is not None
    return request.getfixturevalue("measured_rarely" if rarely else "measured_often")


@pytest.fixture(scope="module")
def measured_often(tmp_path_factory, image_model) -> dict:
    return _in_processes(tmp_path_factory.mktemp("engine"), image_model, rarely=False)


@pytest.fixture(scope="module")
def measured_rarely(tmp_path_factory, image_model, measured_often) -> dict:
    folder = Path(measured_often["folder"])
    return measured_often | _in_processes(folder, image_model, rarely=True)


def _in_processes(folder: Path, image_model: Path, rarely: bool) -> dict:
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
    _measure(folder, rank, workers, rarely)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def plain(reference) -> list[float]:
    return reference["losses"]


@pytest.fixture(scope="module")
def reference() -> dict:
    """Losses and moving average of a loop without ray, DeepSpeed, or division of any kind."""
    return _plain_loop("full")


@cache
def _plain_loop(kind: str, steps: int = STEPS) -> dict:
    method, model, config = _prepared(kind)
    objective = Objective(method, model).train()
    groups = [{k: v for k, v in g.items() if k != "name"} for g in method.parameter_groups(model, config.trainer)]
    parameters = [p for group in groups for p in group["params"]]
    optimizer = PLAIN.get(kind, torch.optim.AdamW)(groups)
    averages = [p.detach().clone() for p in parameters]
    losses, norms = [], []
    for step in range(steps):
        loss = objective(_batch(step, range(BATCH), kind))
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, config.trainer.max_grad_norm)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        decay = min(config.trainer.ema_decay, (2 + step) / (11 + step))
        for average, p in zip(averages, parameters, strict=True):
            average.mul_(decay).add_(p.detach(), alpha=1 - decay)
    with torch.no_grad():
        held_out = float(objective.eval()(_held_out(range(5), kind)).mean())
    return {
        "losses": losses,
        "norm": norms[-1],
        "held_out": held_out,
        EMA: sum(float(average.double().abs().sum()) for average in averages),
    }


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_equal_those_of_a_plain_loop(measured, plain, stage, workers):
    assert measured[f"whole-{workers}-{stage}"]["losses"] == pytest.approx(plain, abs=CLOSE)
    assert plain[0] != pytest.approx(plain[-1], abs=1e-3)


@pytest.mark.parametrize(("kind", "stage"), STAGES_OF_METHODS.rows)
def test_every_method_learns_on_two_workers_as_in_a_plain_loop(measured, kind, stage):
    reference, found = _plain_loop(kind, steps=FEW_STEPS), measured[f"{kind}-{stage}"]
    assert found["losses"] == pytest.approx(reference["losses"], abs=1e-5)
    assert found["losses"][0] != pytest.approx(found["losses"][-1], abs=1e-3)
    assert found["sums"][EMA] == pytest.approx(reference[EMA], rel=1e-5)


@pytest.mark.parametrize(("kind", "stage"), STAGES_OF_METHODS.of(LEARN_TOKENS).rows)
def test_no_other_row_of_the_vocabulary_moves_at_any_stage(measured, kind, stage):
    before, after = measured[f"{kind}-{stage}"]["vocabulary"]
    assert before == after


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_gradients_norm_and_the_validation_loss_are_those_of_a_plain_loop(measured, reference, stage, workers):
    found = measured[f"whole-{workers}-{stage}"]
    assert found["gradient_norm"] == pytest.approx(reference["norm"], rel=1e-4)
    assert found["held_out"] == pytest.approx(reference["held_out"], abs=CLOSE)


@pytest.mark.parametrize(("size", "stage", "workers"), ACCUMULATED.rows)
def test_accumulated_micro_batches_equal_one_batch(measured, plain, size, stage, workers):
    """DeepSpeed reduces the gradients of small and of large models in different ways."""
    losses = measured[f"accumulated-{size}-{workers}-{stage}"]["losses"]
    assert losses == pytest.approx(plain[:FEW_STEPS], abs=CLOSE)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_state_saved_on_two_workers_at_stage_2_goes_on_on_one_at_any_stage(measured, plain, stage):
    whole, resumed = measured["whole-2-2"], measured[f"resumed-1-{stage}"]
    assert resumed["off"] == dict.fromkeys((PARAMETER, "exp_avg", "exp_avg_sq", EMA), 0)
    assert resumed["losses"] == pytest.approx(plain[SAVED:], abs=CLOSE)
    assert resumed["sums"] == pytest.approx(whole["sums"], rel=1e-5)


@pytest.mark.parametrize(("name", "stage"), STAGES_OF_OPTIMIZERS.rows)
def test_every_optimizer_learns_on_two_workers_as_in_a_plain_loop(measured, plain, name, stage):
    reference, found = _plain_loop(name), measured[f"{name}-{stage}"]
    # Lion takes signs, some of sums near zero; and in flat partitions, blocks of 8 bits begin at other numbers.
    tolerance = {"lion": 5e-4, "adamw_8bit": CLOSE if stage == 0 else 1e-3}.get(name, CLOSE)
    assert found["losses"] == pytest.approx(reference["losses"], abs=tolerance)
    assert found["losses"][0] != pytest.approx(found["losses"][-1], abs=1e-2)
    if name != "adamw_8bit":  # which is meant to learn as AdamW does, in less memory
        assert found["losses"] != pytest.approx(plain, abs=1e-4)
    assert found["sums"][EMA] == pytest.approx(reference[EMA], rel=tolerance)


@pytest.mark.parametrize(("name", "workers", "stage"), RESUMED.rows)
def test_every_optimizer_goes_on_where_it_was_saved(measured, name, workers, stage):
    """What was saved is there to the last bit; what is computed of it, by other workers in another order, is not."""
    whole, resumed = measured[f"{name}-{SAVED_AT[name]}"], measured[f"{name}-resumed-{workers}-{stage}"]
    moved = (workers, stage) != (2, SAVED_AT[name])
    # Blocks of 8 bits begin at other numbers there (half of what lies between two levels is 0.7 % of a block's largest);
    # where they do not, their scales are rounded.
    room = (0.01 if moved else 1e-6) if name == "adamw_8bit" else 0
    for key, off in resumed["off"].items():
        assert off <= (room if key.startswith("exp_avg") else 0), key
    tolerance = 1e-3 if name in ("lion", "adamw_8bit") else CLOSE
    assert resumed["losses"] == pytest.approx(whole["losses"][SAVED:], abs=tolerance)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_stays_in_memory_is_what_is_estimated(measured, stage, workers):
    _, _, config = _prepared("full")
    trainer = _trainer(config, stage, workers)
    step = measure_step(config, on_gpu=False)
    # ZeRO 3 keeps a buffer for gradients and a bucket from step to step.
    buffers = 4 * step.elements / workers + step.bucket if stage == 3 else 0
    expected = sum(resident(trainer, step).values()) + buffers
    assert measured[f"whole-{workers}-{stage}"]["resident"] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("_", "stage"), STAGES_OF_OPTIMIZERS.of(["adamw_8bit"]).rows)
def test_moments_in_8_bits_take_a_quarter_of_the_memory(measured, _, stage):
    """But for the small parameters of stage 0 and one scale a block."""
    found, whole = measured[f"adamw_8bit-{stage}"]["bytes"], measured[f"whole-2-{stage}"]["bytes"]
    assert found / whole < (0.6 if stage == 0 else 0.27)


def test_prodigy_moves_its_estimate_and_keeps_it(measured):
    first, whole = PRODIGY["d0"], measured["prodigy-0"]["scalars"]
    assert whole["d"] > 2 * first
    assert measured["prodigy-resumed-1-0"]["scalars"] == pytest.approx(whole)
    assert measured["prodigy-0"]["learning_rate"] == pytest.approx(whole["d"])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_moving_average_is_that_of_a_plain_loop(measured, reference, stage, workers):
    sums = measured[f"whole-{workers}-{stage}"]["sums"]
    assert sums[EMA] == pytest.approx(reference[EMA], rel=1e-6)
    assert sums[EMA] != pytest.approx(sums[PARAMETER], rel=1e-5)


@pytest.mark.skipif(not CAN_BUILD, reason="there is no C++ compiler, or no ninja, to build DeepSpeed's AdamW with")
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_optimizer_state_changes_nothing(measured, plain, stage):
    assert measured[f"offload-{stage}"]["losses"] == pytest.approx(plain, abs=CLOSE)
    assert measured[f"offload-resumed-{stage}"]["losses"] == pytest.approx(plain[SAVED:], abs=CLOSE)


@pytest.mark.parametrize(("precision", "stage"), HALF_PRECISION.rows)
def test_half_precision_follows_full_precision(measured, plain, precision, stage):
    losses = measured[f"{precision}-{stage}"]["losses"]
    assert losses == pytest.approx(plain[:SAVED], abs=2e-2)
    assert losses != pytest.approx(plain[:SAVED], abs=1e-6)


@pytest.mark.parametrize(("kind", "stage"), QUANTISED.rows)
def test_a_lora_on_a_quantised_base_learns_nearly_as_on_the_base(measured, kind, stage):
    """bitsandbytes' layers run on a CPU, too; only slowly, so that runs there are refused."""
    losses, plain = measured[f"{kind}-{stage}"]["losses"], _plain_loop("lora", SAVED)["losses"]
    assert losses == pytest.approx(plain, abs=0.05)
    assert losses != pytest.approx(plain, abs=1e-6)
    assert losses[0] != pytest.approx(losses[-1], abs=1e-3)


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_scale_of_the_fp16_loss_falls_with_each_overflow(measured, stage):
    found = measured[f"overflow-{stage}"]
    assert found["scale"] == 2.0**60 / 2**FEW_STEPS
    assert found["sums"][PARAMETER] == pytest.approx(measured["untrained"]["sums"][PARAMETER], rel=1e-7)


def _measure(folder: Path, rank: int, workers: int, rarely: bool) -> None:
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
    small = engine_module.SMALL
    for size, stage, expected_workers in ACCUMULATED[rarely]:
        if expected_workers == workers:
            engine_module.SMALL = small if size == "small" else 0
            engine, _ = _engine(stage, workers, micro_batch_size=1)
            record(f"accumulated-{size}-{workers}-{stage}", _run(engine, rank, workers, 0, FEW_STEPS, rows=1), engine)
    engine_module.SMALL = small
    if workers == 1:
        _measure_variants(record, folder, rarely)


def _release_weights_after_each_use() -> None:
    """Let ZeRO 3 do so, as it does in large models.

    In small ones it looks through all layers behind each for another use, which here takes it longer than all the rest.
    """
    configuration = engine_module._deepspeed_config

    def changed(*arguments: object) -> dict:
        found = configuration(*arguments)
        found["zero_optimization"]["stage3_max_reuse_distance"] = 0
        return found

    engine_module._deepspeed_config = changed


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
        batch, weight = _held_out(range(rank, 5 + workers - 1, workers), "full"), torch.ones(-(-5 // workers))
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
    for stage in (2,) if rarely else (1, 3):
        engine, _ = _engine(stage, 1, precision="fp16")
        record(f"overflow-{stage}", _run(engine, 0, 1, 0, FEW_STEPS), engine)


def _prepared(kind: str):
    config = load_config(["experiment=smoke", *KINDS[kind], "trainer.ema_decay=0.9"], ExperimentConfig)
    torch.manual_seed(0)
    method = build_method(config.method)
    model = load_model(config.model, method.components())
    method.prepare(model, config.trainer)
    return method, model, config


def _engine(
    stage: int, workers: int, kind: str = "full", quantize: str | None = None, **changes: object
) -> tuple[Engine, ExperimentConfig]:
    method, model, config = _prepared(kind)
    if quantize is not None:
        assert quantize_frozen(model.unet, quantize, torch.float32) > 40
    trainer = _trainer(config, stage, workers, **changes)
    groups = method.parameter_groups(model, trainer)
    parameters = checkpoint.trained_parameters(model)
    return Engine(Objective(method, model).train(), parameters, groups, trainer, torch.device("cpu")), config


def _trainer(config: ExperimentConfig, stage: int, workers: int, **changes: object) -> TrainerConfig:
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
            loss = engine(_batch(step, range(first, first + rows), kind))
            engine.backward(loss)
            engine.step()
            total += loss.detach() * rows / BATCH
        dist.all_reduce(total)
        losses.append(float(total))
    return losses


def _batch(step: int, rows: range, kind: str) -> dict[str, torch.Tensor]:
    """Rows of step `step`, each from a seed of its own, for DreamBooth each with one of its class."""
    batch = _rows([1000 * step + row for row in rows], kind)
    if kind in WITH_CLASS:
        batch |= {
            f"class_{name}": value for name, value in _rows([1000 * step + 500 + row for row in rows], kind).items()
        }
    return batch


def _held_out(rows: range, kind: str) -> dict[str, torch.Tensor]:
    """Rows at timesteps of their own, as validation has them."""
    return _batch(77, rows, kind) | {"timesteps": torch.tensor([100 + 150 * row for row in rows])}


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


@pytest.mark.parametrize(("multiplies", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_native_precision_is_bf16_only_where_the_cpu_has_it(monkeypatch: pytest.MonkeyPatch, multiplies, expected):
    monkeypatch.setattr(engine_module, "cpu_multiplies_bf16", lambda: multiplies)
    assert engine_module.compute_dtype(TrainerConfig(precision="native"), torch.device("cpu")) == expected
    assert engine_module.compute_dtype(TrainerConfig(precision="native"), torch.device("cuda")) == torch.bfloat16
    assert engine_module.compute_dtype(TrainerConfig(), torch.device("cpu")) == torch.float32
