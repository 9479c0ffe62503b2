"""DeepSpeed at every ZeRO stage and worker count against a plain loop, and state that moves between them.

Those marked slow ask for more combinations.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from diffusers import UNet2DConditionModel
from lion_pytorch import Lion
from measured_engines import (
    ACCUMULATED,
    BATCH,
    CAN_BUILD,
    FEW_STEPS,
    HALF_PRECISION,
    KINDS,
    LEARN_TOKENS,
    PRODIGY,
    QUANTISED,
    RESUMED,
    SAVED,
    SAVED_AT,
    STAGES_OF_METHODS,
    STAGES_OF_OPTIMIZERS,
    STEPS,
    batch_of,
    held_out_rows,
    measure,
    prepared,
    trainer_of,
)
from prodigyopt import Prodigy
from tiny_models import UNET, save_tiny_model
from transformers.optimization import Adafactor

from ray_sd.config import TrainerConfig
from ray_sd.train import precision
from ray_sd.train.loop import Objective
from ray_sd.train.memory import measure_step, resident
from ray_sd.train.optimizers import EMA, PARAMETER

pytestmark = pytest.mark.cluster

CLOSE = 3e-5
"""How far losses of all weights may be off by rounding, on any processor; an update changes the next one by 1e-2."""
PLAIN = {
    "adamw_8bit": lambda groups: AdamW8bit(groups, weight_decay=0.01),
    "adafactor": lambda groups: Adafactor(groups, scale_parameter=False, relative_step=False),
    "lion": lambda groups: Lion(groups, weight_decay=0.1),
    "prodigy": lambda groups: Prodigy(
        groups, weight_decay=0.01, use_bias_correction=True, safeguard_warmup=True, **PRODIGY
    ),
}
"""The libraries' own, with what the configuration sets by default."""


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
    """Losses and states by the names that workers give them."""
    rarely = request.node.get_closest_marker("slow") is not None
    return request.getfixturevalue("measured_rarely" if rarely else "measured_often")


@pytest.fixture(scope="module")
def measured_often(tmp_path_factory, image_model) -> dict:
    return measure(tmp_path_factory.mktemp("engine"), image_model, rarely=False)


@pytest.fixture(scope="module")
def measured_rarely(tmp_path_factory, image_model, measured_often) -> dict:
    folder = Path(measured_often["folder"])
    return measured_often | measure(folder, image_model, rarely=True)


@pytest.fixture(scope="module")
def plain(reference) -> list[float]:
    return reference["losses"]


@pytest.fixture(scope="module")
def reference() -> dict:
    """Losses and moving average of a loop without ray, DeepSpeed, or division of any kind."""
    return _plain_loop("full")


@cache
def _plain_loop(kind: str, steps: int = STEPS) -> dict:
    method, model, config = prepared(kind)
    objective = Objective(method, model).train()
    groups = [{k: v for k, v in g.items() if k != "name"} for g in method.parameter_groups(model, config.trainer)]
    parameters = [p for group in groups for p in group["params"]]
    optimizer = PLAIN.get(kind, torch.optim.AdamW)(groups)
    averages = [p.detach().clone() for p in parameters]
    losses, norms = [], []
    for step in range(steps):
        loss = objective(batch_of(step, range(BATCH), kind))
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, config.trainer.max_grad_norm)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        decay = min(config.trainer.ema_decay, (2 + step) / (11 + step))
        for average, p in zip(averages, parameters, strict=True):
            average.mul_(decay).add_(p.detach(), alpha=1 - decay)
    with torch.no_grad():
        held_out = float(objective.eval()(held_out_rows(range(5), kind)).mean())
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
    _, _, config = prepared("full")
    trainer = trainer_of(config, stage, workers)
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


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 3))])
def test_the_scale_of_the_fp16_loss_falls_with_each_overflow(measured, stage):
    found = measured[f"overflow-{stage}"]
    assert found["scale"] == 2.0**60 / 2**FEW_STEPS
    assert found["sums"][PARAMETER] == pytest.approx(measured["untrained"]["sums"][PARAMETER], rel=1e-7)


@pytest.mark.parametrize(("multiplies", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_native_precision_is_bf16_only_where_the_cpu_has_it(monkeypatch: pytest.MonkeyPatch, multiplies, expected):
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: multiplies)
    assert precision.compute_dtype(TrainerConfig(precision="native"), torch.device("cpu")) == expected
    assert precision.compute_dtype(TrainerConfig(precision="native"), torch.device("cuda")) == torch.bfloat16
    assert precision.compute_dtype(TrainerConfig(), torch.device("cpu")) == torch.float32
