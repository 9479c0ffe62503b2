from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LATENTS, PIXELS

from ray_sd.config import ExperimentConfig
from ray_sd.data import PreparedData, prepare, training_data, validation_batches
from ray_sd.data.lanes import LaneIterator, Lanes
from ray_sd.data.order import draw, epoch_order, row_seed
from ray_sd.methods import RowSpec

Batch = dict[str, torch.Tensor]


def lanes(rank: int = 0, world_size: int = 1, **settings: int) -> Lanes:
    values = {"num_rows": 10, "seed": 0, "shuffle_rows": 4096, "batch_size": 4, "accumulation_steps": 1} | settings
    size = values["batch_size"] // world_size // values["accumulation_steps"]
    return Lanes(**values, micro_batch_size=size, rank=rank)


def global_batch(step: int, world_size: int, accumulation_steps: int) -> list[tuple[int, int]]:
    return [
        place
        for rank in range(world_size)
        for part in range(accumulation_steps)
        for place in lanes(rank, world_size, batch_size=8, accumulation_steps=accumulation_steps).rows(
            step * accumulation_steps + part
        )
    ]


@pytest.mark.parametrize(("num_rows", "window"), [(10, 4096), (1000, 64), (1000, 1), (3, 2)])
def test_an_epoch_has_every_row_once(num_rows: int, window: int):
    assert sorted(epoch_order(0, 0, num_rows, window)) == list(range(num_rows))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(epoch_order(seed, epoch, 100, 4096)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert orders[0] == tuple(epoch_order(0, 0, 100, 4096))


def test_rows_of_a_window_come_from_few_neighbourhoods():
    order = epoch_order(0, 0, 64_000, 640)
    neighbourhoods = {len(set(order[start : start + 640] // 64)) for start in range(0, 64_000, 640)}
    assert max(neighbourhoods) <= 11
    assert (np.diff(order) != 1).mean() > 0.9


@pytest.mark.parametrize("num_rows", [3, 10, 64])
def test_the_stream_reads_each_row_once_an_epoch_also_where_a_step_spans_epochs(num_rows: int):
    places = [place for step in range(3 * num_rows) for place in lanes(num_rows=num_rows).rows(step)]
    assert Counter(places) == {(epoch, row): 1 for epoch in range(12) for row in range(num_rows)}


@pytest.mark.parametrize(("world_size", "accumulation_steps"), [(1, 8), (2, 1), (2, 2), (4, 1), (8, 1)])
def test_global_batches_do_not_depend_on_the_workers(world_size: int, accumulation_steps: int):
    for step in range(5):
        assert global_batch(step, world_size, accumulation_steps) == global_batch(step, 1, 1)


def test_row_seeds_fill_63_bits_and_depend_on_seed_epoch_and_id():
    seeds = [row_seed(seed, epoch, name) for seed in range(2) for epoch in range(2) for name in ("a", "b")]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**60


def test_draws_are_uniform_and_differ_by_purpose():
    values = np.array([[draw(seed, purpose) for purpose in ("variant", "caption")] for seed in range(2000)])
    assert np.abs(values.mean(axis=0) - 0.5).max() < 0.03
    assert abs(np.corrcoef(values.T)[0, 1]) < 0.1


@pytest.fixture
def prepared(
    folder: Path, configure: Callable, ray_cluster: None
) -> Callable[..., tuple[PreparedData, ExperimentConfig]]:
    def prepared(rows: RowSpec, trainer: dict[str, Any], **dataset: Any) -> tuple[PreparedData, ExperimentConfig]:
        config = configure(folder, trainer, **dataset)
        return prepare(config, rows), config

    return prepared


def batches(data: PreparedData, config: ExperimentConfig, rank: int, start: int, stop: int) -> list[Batch]:
    return list(LaneIterator(data.train, config, PIXELS, rank).batches(start, stop))


def joined(parts: list[Batch], name: str) -> torch.Tensor:
    return torch.cat([part[name] for part in parts])


def test_workers_read_the_same_rows_whatever_their_number(prepared: Callable):
    data, config = prepared(PIXELS, {"batch_size": 4}, flip=True)
    alone = batches(data, config, 0, 0, 5)
    assert [batch["pixels"].shape for batch in alone] == [(4, 3, 16, 16)] * 5
    assert alone[0]["pixels"].dtype == torch.uint8
    assert alone[0]["row_seed"].dtype == torch.int64
    for world_size, micro in ((2, 1), (4, 1)):
        trainer = config.trainer.model_copy(update={"num_workers": world_size, "micro_batch_size": micro})
        several = config.model_copy(update={"trainer": trainer})
        ranks = [batches(data, several, rank, 0, 5) for rank in range(world_size)]
        per_step = 4 // world_size // micro
        for name in ("pixels", "row_seed"):
            for step in range(5):
                parts = [batch for rank in ranks for batch in rank[step * per_step : (step + 1) * per_step]]
                assert torch.equal(joined(parts, name), alone[step][name])


def test_a_resumed_stream_goes_on_where_it_stopped(prepared: Callable):
    data, config = prepared(PIXELS, {"batch_size": 4}, flip=True, crop={"name": "random", "num_variants": 2})
    whole, resumed = batches(data, config, 0, 0, 7), batches(data, config, 0, 3, 7)
    for name in ("pixels", "row_seed"):
        assert torch.equal(joined(whole[3:], name), joined(resumed, name))


def test_epochs_draw_among_the_variants(prepared: Callable):
    data, config = prepared(PIXELS, {"batch_size": 10}, flip=True)
    seen: dict[bytes, set[bytes]] = {}
    for batch in batches(data, config, 0, 0, 8):
        for picture in batch["pixels"].numpy():
            either = min(picture.tobytes(), picture[:, :, ::-1].tobytes())
            seen.setdefault(either, set()).add(picture.tobytes())
    assert len(seen) == 10
    assert Counter(len(pictures) for pictures in seen.values())[2] >= 8


def test_captions_are_dropped_at_the_asked_rate_for_the_empty_one(prepared: Callable):
    rows = replace(LATENTS, caption_dropout=0.25)
    data, config = prepared(rows, {"batch_size": 10})
    read = list(LaneIterator(data.train, config, rows, 0).batches(0, 40))
    text = joined(read, "text_embeds")
    assert text.dtype == torch.float32
    assert joined(read, "latent_mean").dtype == torch.float32
    different = {row.numpy().tobytes(): 0 for row in text}
    assert len(different) == 11
    dropped = Counter(row.numpy().tobytes() for row in text).most_common(1)[0][1]
    assert 70 <= dropped <= 130  # 100 of 400 expected, with a standard deviation of 9

    tokens = replace(rows, text="tokens")
    data = prepare(config, tokens)
    ids = joined(list(LaneIterator(data.train, config, tokens, 0).batches(0, 4)), "input_ids")
    assert ids.dtype == torch.int64
    assert ids.ndim == 2


def test_ray_train_hands_each_worker_its_lanes(prepared: Callable, tmp_path: Path):
    import ray.train
    from ray.train.torch import TorchTrainer

    data, config = prepared(PIXELS, {"batch_size": 4, "num_workers": 2})
    expected = [joined(batches(data, config, rank, 0, 3), "row_seed").tolist() for rank in range(2)]
    folder = str(tmp_path)

    def loop() -> None:
        shard = ray.train.get_dataset_shard("train")
        seeds = [seed for batch in shard.batches(0, 3) for seed in batch["row_seed"].tolist()]
        (Path(folder) / f"{ray.train.get_context().get_world_rank()}").write_text(repr(seeds))

    datasets, dataset_config = training_data(data, config, PIXELS)
    TorchTrainer(
        loop,
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        datasets=datasets,
        dataset_config=dataset_config,
        run_config=ray.train.RunConfig(storage_path=str(tmp_path / "runs"), name="lanes"),
    ).fit()
    assert [(tmp_path / f"{rank}").read_text() for rank in range(2)] == [repr(seeds) for seeds in expected]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_covers_all_rows_and_timesteps_once_with_equal_batches(prepared: Callable, world_size: int):
    trainer = {"batch_size": 4, "num_workers": world_size, "validation": {"num_timesteps": 4}}
    data, config = prepared(LATENTS, trainer, holdout=3)
    ranks = [list(validation_batches(data.validation, config, LATENTS, r, world_size)) for r in range(world_size)]
    assert {len(rank) for rank in ranks} == {3}
    parts = [batch for rank in ranks for batch in rank]
    assert {tuple(batch["latent_mean"].shape) for batch in parts} == {(4 // world_size, 4, 2, 2)}
    real = joined(parts, "weight").bool()
    assert joined(parts, "weight").dtype == torch.float32
    timesteps, seeds = joined(parts, "timesteps")[real], joined(parts, "row_seed")[real]
    assert Counter(timesteps.tolist()) == {125: 3, 375: 3, 625: 3, 875: 3}
    assert sorted(seeds.tolist()) == sorted(
        row_seed(0, -1, f"{name} {number}") for name in data.validation.load().ids.to_pylist() for number in range(4)
    )
