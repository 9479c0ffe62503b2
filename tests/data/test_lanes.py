import json
import os
import signal
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import ray._private.state
import torch
from in_process import prepare
from ray.exceptions import ActorDiedError
from sample_pictures import LATENTS, PIXELS, captioned_pictures, experiment
from waiting import wait_for

from ray_sd.config import ExperimentConfig
from ray_sd.config.rows import RowSpec
from ray_sd.data import PreparedData, blocks, training_batches, validation_batches
from ray_sd.data.lanes import LaneReader, Lanes, lanes_of, to_tensors
from ray_sd.data.order import draw, epoch_order, row_seed
from ray_sd.models import load_model

Batch = dict[str, torch.Tensor]


def lanes(rank: int = 0, world_size: int = 1, **settings: Any) -> Lanes:
    values = {"buckets": (10,), "seed": 0, "shuffle_rows": 4096, "batch_size": 4, "accumulation_steps": 1} | settings
    size = values["batch_size"] // world_size // values["accumulation_steps"]
    return Lanes(**values, micro_batch_size=size, rank=rank)


def global_batch(
    step: int, world_size: int, accumulation_steps: int, buckets: tuple[int, ...]
) -> list[tuple[int, int]]:
    return [
        place
        for rank in range(world_size)
        for part in range(accumulation_steps)
        for place in lanes(rank, world_size, batch_size=8, accumulation_steps=accumulation_steps, buckets=buckets).rows(
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
    places = [place for step in range(3 * num_rows) for place in lanes(buckets=(num_rows,)).rows(step)]
    assert Counter(places) == {(epoch, row): 1 for epoch in range(12) for row in range(num_rows)}


def test_the_steps_of_buckets_read_each_row_once_a_pass_and_mix_the_buckets():
    """Buckets of 1 and 5 rows never fill a batch in one epoch; what is left over begins the next."""
    buckets, starts = (1, 5, 32, 14), (0, 1, 6, 38)
    steps = [lanes(buckets=buckets).rows(step) for step in range(13 * 20)]  # 52 rows in batches of 4, 20 epochs
    taken = [{bisect_right(starts, row) - 1 for _, row in places} for places in steps]
    assert all(len(of_step) == 1 for of_step in taken)
    assert Counter(place for places in steps for place in places) == {
        (epoch, row): 1 for epoch in range(20) for row in range(52)
    }
    order = [of_step.pop() for of_step in taken]
    assert order[:13] != sorted(order[:13])
    assert len({tuple(order[start : start + 13]) for start in range(0, 260, 13)}) > 15


@pytest.mark.parametrize("buckets", [(10,), (3, 9, 1)])
@pytest.mark.parametrize(("world_size", "accumulation_steps"), [(1, 8), (2, 1), (2, 2), (4, 1), (8, 1)])
def test_global_batches_do_not_depend_on_the_workers(
    buckets: tuple[int, ...], world_size: int, accumulation_steps: int
):
    for step in range(20):
        assert global_batch(step, world_size, accumulation_steps, buckets) == global_batch(step, 1, 1, buckets)


def test_row_seeds_fill_63_bits_and_depend_on_seed_epoch_and_id():
    seeds = [row_seed(seed, epoch, name) for seed in range(2) for epoch in range(2) for name in ("a", "b")]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**60


def test_draws_are_uniform_and_differ_by_purpose():
    values = np.array([[draw(seed, purpose) for purpose in ("variant", "caption")] for seed in range(2000)])
    assert np.abs(values.mean(axis=0) - 0.5).max() < 0.03
    assert abs(np.corrcoef(values.T)[0, 1]) < 0.1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures beside a cache in which all that these tests read gets encoded."""
    return captioned_pictures(tmp_path_factory.mktemp("lanes") / "pictures")


def prepared(
    pictures: Path, rows: RowSpec, trainer: dict[str, Any], **dataset: Any
) -> tuple[PreparedData, ExperimentConfig]:
    config = experiment(pictures.parent / "cache", pictures, trainer, **dataset)
    return prepare(config, rows), config


def read(data: PreparedData, config: ExperimentConfig, rows: RowSpec, rank: int, start: int, stop: int) -> list[Batch]:
    """What the reader of a rank makes of its micro-batches, without an actor."""
    reader = LaneReader(data, config, rows, lanes_of(data.train, config, rank))
    return [to_tensors(reader.micro_batch(number)) for number in range(start, stop)]


def joined(parts: list[Batch], name: str) -> torch.Tensor:
    return torch.cat([part[name] for part in parts])


def test_workers_read_the_same_rows_whatever_their_number(pictures: Path):
    data, config = prepared(pictures, PIXELS, {"batch_size": 4}, flip=True)
    alone = read(data, config, PIXELS, 0, 0, 5)
    assert [batch["pixels"].shape for batch in alone] == [(4, 3, 16, 16)] * 5
    for world_size, micro in ((2, 1), (2, 2), (4, 1)):
        trainer = config.trainer.model_copy(update={"num_workers": world_size, "micro_batch_size": micro})
        several = config.model_copy(update={"trainer": trainer})
        per_step = 4 // world_size // micro
        ranks = [read(data, several, PIXELS, rank, 0, 5 * per_step) for rank in range(world_size)]
        for name in ("pixels", "row_seed"):
            for step in range(5):
                parts = [batch for rank in ranks for batch in rank[step * per_step : (step + 1) * per_step]]
                assert torch.equal(joined(parts, name), alone[step][name])


def test_ray_data_delivers_the_lanes_in_order_and_resumes_where_it_stopped(pictures: Path, ray_cluster: None):
    trainer = {"batch_size": 4, "num_workers": 2, "micro_batch_size": 1}
    data, config = prepared(pictures, PIXELS, trainer, flip=True, crop={"name": "random", "num_variants": 2})
    whole, resumed = (list(training_batches(data, config, PIXELS, 1, start, 100)) for start in (0, 97))
    assert [len(whole), len(resumed)] == [200, 6]
    assert whole[0]["pixels"].dtype == torch.uint8
    assert whole[0]["row_seed"].dtype == torch.int64
    for name in ("pixels", "row_seed"):
        assert torch.equal(joined(whole, name), joined(read(data, config, PIXELS, 1, 0, 200), name))
        assert torch.equal(joined(whole[194:], name), joined(resumed, name))


def test_scheduling_rests_beside_training_in_any_cluster(
    pictures: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(blocks, "is_one_machine", lambda: False)
    rests: list[float] = []
    monkeypatch.setattr("ray_sd.cluster.pace.time", SimpleNamespace(sleep=rests.append))
    data, config = prepared(pictures, PIXELS, {"batch_size": 4})
    assert len(list(training_batches(data, config, PIXELS, 0, 0, 2))) == 2
    assert rests


def readers() -> set[str]:
    """The actors that read lanes now."""
    actors = ray._private.state.actors()  # what ray.util.state tells needs a dashboard
    return {
        name for name, actor in actors.items() if "LaneReader" in actor["ActorClassName"] and actor["State"] != "DEAD"
    }


def test_a_stream_that_is_left_early_gives_its_reader_back(pictures: Path, ray_cluster: None):
    data, config = prepared(pictures, PIXELS, {"batch_size": 4})
    before = readers()
    batches = training_batches(data, config, PIXELS, 0, 0, 10_000)
    next(batches)
    [reader] = readers() - before
    batches.close()
    wait_for(lambda: reader not in readers())


def test_another_reader_goes_on_where_one_was_lost(
    pictures: Path, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    class Lost(LaneReader):
        def micro_batch(self, number: int) -> dict[str, np.ndarray]:
            if number == 100 and not (tmp_path / "lost").exists():
                (tmp_path / "lost").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().micro_batch(number)

    data, config = prepared(pictures, PIXELS, {"batch_size": 4}, flip=True)
    monkeypatch.setattr("ray_sd.data.lanes.LaneReader", Lost)
    batches = list(training_batches(data, config, PIXELS, 0, 0, 130))
    assert "the reader of worker 0 was lost, and another reads on: " in caplog.text
    for name in ("pixels", "row_seed"):
        assert torch.equal(joined(batches, name), joined(read(data, config, PIXELS, 0, 0, 130), name))


def test_a_reader_that_is_lost_at_the_same_place_again_ends_the_stream(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    data, config = prepared(pictures, PIXELS, {"batch_size": 4})
    begun: list[int] = []

    def lost(*arguments: Any) -> Iterator[Batch]:
        *_, start, _ = arguments
        begun.append(start)
        yield from ({} for _ in range(start, 3))
        raise ActorDiedError

    monkeypatch.setattr("ray_sd.data.lanes._batches", lost)
    batches = training_batches(data, config, PIXELS, 0, 0, 10)
    assert [next(batches) for _ in range(3)] == [{}] * 3
    with pytest.raises(ActorDiedError):
        next(batches)
    assert begun == [0, 3]


def test_epochs_draw_among_the_variants(pictures: Path):
    data, config = prepared(pictures, PIXELS, {"batch_size": 10}, flip=True)
    seen: dict[bytes, set[bytes]] = {}
    for batch in read(data, config, PIXELS, 0, 0, 8):
        for picture in batch["pixels"].numpy():
            either = min(picture.tobytes(), picture[:, :, ::-1].tobytes())
            seen.setdefault(either, set()).add(picture.tobytes())
    assert len(seen) == 10
    assert Counter(len(pictures) for pictures in seen.values())[2] >= 8


def test_epochs_draw_among_the_captions_of_a_row(tmp_path: Path):
    folder = captioned_pictures(tmp_path / "pictures")
    for file in folder.glob("*.txt"):
        file.unlink()
    lines = [{"file_name": f"{i}.png", "caption": [f"one {i}", f"two {i}"]} for i in range(10)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = RowSpec(images="pixels", text="tokens", caption_dropout=0.0)
    data, config = prepared(folder, rows, {"batch_size": 10})
    seen = {tuple(ids) for batch in read(data, config, rows, 0, 0, 12) for ids in batch["input_ids"].tolist()}
    assert len(seen) == 20


def test_epochs_draw_among_templates_in_place_of_captions(pictures: Path):
    rows = RowSpec("pixels", "tokens", 0.0, templates=("a <cat>", "the <cat>"), placeholders=(("<cat>", 3),))
    data, config = prepared(pictures, rows, {"batch_size": 10})
    model = load_model(config.model, {"tokenizer"})
    model.add_placeholder("<cat>", 3)
    seen = Counter(tuple(ids) for batch in read(data, config, rows, 0, 0, 12) for ids in batch["input_ids"].tolist())
    assert seen.keys() == {tuple(ids) for ids in model.tokenize(["a <cat>", "the <cat>"])["input_ids"].tolist()}
    assert min(seen.values()) > 40  # of 120


def test_captions_are_dropped_at_the_asked_rate_for_the_empty_one(pictures: Path):
    rows = replace(LATENTS, caption_dropout=0.25)
    data, config = prepared(pictures, rows, {"batch_size": 10})
    batches = read(data, config, rows, 0, 0, 40)
    text = joined(batches, "text_embeds")
    assert text.dtype == torch.float32
    assert joined(batches, "latent_mean").dtype == torch.float32
    often = Counter(row.numpy().tobytes() for row in text).most_common()
    assert len(often) == 11
    assert 70 <= often[0][1] <= 130  # 100 of 400 expected, with a standard deviation of 9
    assert often[1][1] < 50

    tokens = replace(rows, text="tokens")
    ids = joined(read(prepare(config, tokens), config, tokens, 0, 0, 40), "input_ids")
    assert ids.dtype == torch.int64
    # The same rows lose their captions, however captions are stored.
    dropped = Counter(map(tuple, ids.tolist())).most_common(1)[0]
    assert dropped[1] == often[0][1]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_covers_all_rows_and_timesteps_once_with_equal_batches(pictures: Path, world_size: int):
    trainer = {"batch_size": 4, "num_workers": world_size, "validation": {"num_timesteps": 4}}
    data, config = prepared(pictures, LATENTS, trainer, holdout=3)
    ranks = [list(validation_batches(data.validation, config, LATENTS, r, world_size)) for r in range(world_size)]
    assert {len(rank) for rank in ranks} == {3}
    parts = [batch for rank in ranks for batch in rank]
    assert {tuple(batch["latent_mean"].shape) for batch in parts} == {(4 // world_size, 4, 2, 2)}
    assert joined(parts, "weight").dtype == torch.float32
    real = joined(parts, "weight").bool()
    timesteps, seeds = joined(parts, "timesteps")[real], joined(parts, "row_seed")[real]
    assert Counter(timesteps.tolist()) == {125: 3, 375: 3, 625: 3, 875: 3}
    assert sorted(seeds.tolist()) == sorted(
        row_seed(0, -1, f"{name} {number}") for name in data.validation.load().ids.to_pylist() for number in range(4)
    )


def test_validation_pads_with_rows_of_no_weight(pictures: Path):
    trainer = {"batch_size": 8, "num_workers": 2, "validation": {"num_timesteps": 1}}
    data, config = prepared(pictures, LATENTS, trainer, holdout=3)
    ranks = [list(validation_batches(data.validation, config, LATENTS, rank, 2)) for rank in range(2)]
    assert [batch["weight"].tolist() for rank in ranks for batch in rank] == [[1, 1, 1, 0], [0, 0, 0, 0]]
