"""Our server beside diffusers' pipeline in the usual ones, under the same load: `python benchmarks/serve_load.py`.

The embedded model, three ways:

- `lock`: FastAPI around `StableDiffusionPipeline` with a lock;
- `batch`: the same with `@serve.batch`, where requests of equal steps, guidance and adapter go through the pipeline in one call;
- `ours`: `ray_sd.serve.app.build`.

Each is an application of Ray Serve with FastAPI in one process and the model in another: no way pays for HTTP on the core of its
model, and all pay for the same hops. Models have one thread each and share one core; clients, Serve's proxy and FastAPI share
another. All are up at once and are asked in turns, with the same requests in the same order; who is not asked takes nothing.

Loads: `uniform` is 20 steps, guidance 4 and no adapter; `mixed` is 8 to 50 steps, every second request guided, and one of eight
LoRAs each. Throughput is that of clients who ask again as soon as they are answered, in pictures that the model has finished: the
median of the turns, of which a busy machine may spoil one. Latency is that of requests which come by chance (Poisson), 0.8 times
as many as the better of the others can do. Where a model had far less than all of its core under load (`mixed_core_share_ours`
and so on), the machine was busy, and the run tells little.

- `mixed_throughput_ratio`, `uniform_throughput_ratio`: our images a second over the better of the others'; bars 2.7 and 1;
- `mixed_p95_ratio`: our 95th percentile of latency over the better of the others'; bar 0.4;
- `short_wait_ratio`: seconds of a request of 8 steps that comes just after three of 50, ours over the better of the others';
- `row_rate_over_bare_unet`: rows a second that are denoised under the mixed load, by the clock, over those of the bare U-Net on
  the same core in batches of our mean, just before and after, in a process as Python starts it; bar 0.85;
- `mixed_adapter_cost_ratio`: a step's time a row in batches of eight rows, with eight LoRAs over without; bar 1.15;
- `lone_overhead_ratio`, `lone_overhead_ms`: one request alone, before any adapter is loaded, over the same with `lock`; bars 1.05
  and 20.
"""

import argparse
import asyncio
import base64
import io
import itertools
import logging
import os
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import ray
import serve_baselines
import torch
from batch_step import bare_unet, of_rows, random_lora
from PIL import Image
from ray import serve
from report import print_table, write_result

import ray_sd.embedded
from ray_sd.cluster import quiet_serve, quiet_tokens
from ray_sd.config import ExperimentConfig
from ray_sd.config.export import AdapterExportConfig
from ray_sd.config.load import load_config
from ray_sd.embedded.sprites import caption, catalogue
from ray_sd.export.adapter_output import write_adapter
from ray_sd.models import DiffusionModel, load_model
from ray_sd.serve.app import build

BARS = {"mixed_throughput_ratio": 2.7, "uniform_throughput_ratio": 1.0, "row_rate_over_bare_unet": 0.85}
AT_MOST = {
    "mixed_p95_ratio": 0.4,
    "mixed_adapter_cost_ratio": 1.15,
    "lone_overhead_ratio": 1.05,
    "lone_overhead_ms": 20,
}
WAYS = ("lock", "batch", "ours")
OTHERS = WAYS[:2]
MODEL_CORE, OTHER_CORE = 0, 1
ADAPTERS = tuple(f"lora{number}" for number in range(8))
LORA_SCALE = 0.1
"""Of random LoRAs that change a picture a lot."""
STEPS, GUIDANCE = (8, 12, 20, 30, 50), (1.0, 4.0)
"""That are mixed."""
TRIED_SIZES, TRIED_WAITS = (4, 16, 32), (0.0, 0.02, 0.1)
"""Of `batch`, by `--tune`; waits in seconds."""
UTILIZATION = 0.8
WARM_UP = 8.0
"""Seconds of a saturating load before any count: as long as a picture of many steps takes, so that they are in."""
BARE_STEPS = 30
MOST_DIFFERENCE = 0.5
"""Between two ways' pictures of one request: the mean over values of 0 to 255."""

NAMES = (Path(ray_sd.embedded.__file__).parent / "names.txt").read_text().splitlines()
COLOURS = list(catalogue().colours)

Json = dict[str, Any]

logger = logging.getLogger(__name__)


class Clients:
    """Those who ask, all in this process."""

    def __init__(self, address: str, count: int) -> None:
        """count: who ask without a pause where a way is saturated."""
        self._count = count
        self._http = httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None))
        self._urls = {way: f"{address}/{way}/v1/images/generations" for way in WAYS}

    async def picture(self, way: str, request: Json) -> np.ndarray:
        """`[H, W, 3]` in 0 to 255."""
        answer = (await self._ask(way, request)).json()
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))), np.float32)

    async def seconds(self, way: str, request: Json) -> float:
        began = time.perf_counter()
        await self._ask(way, request)
        return time.perf_counter() - began

    async def saturate(self, way: str, requests: Iterator[Json], during: Awaitable[Any]) -> Any:
        """What `during` gives while all ask without a pause. They leave without what they asked for then."""

        async def ask_on() -> None:
            while True:
                await self._ask(way, next(requests))

        asking = [asyncio.create_task(ask_on()) for _ in range(self._count)]
        found = await during
        for one in asking:
            one.cancel()
        for one in await asyncio.gather(*asking, return_exceptions=True):
            if isinstance(one, BaseException) and not isinstance(one, asyncio.CancelledError):
                raise one
        await self._ask(way, request("last", 1, 1.0))  # answered when the model is free again
        return found

    async def arrive(self, way: str, requests: Sequence[Json], rate: float) -> list[float]:
        """Latencies in seconds of requests that come by chance, `rate` a second on the whole."""
        chance = random.Random("arrivals")
        pauses = [chance.expovariate(1.0) for _ in requests]
        unit = len(requests) / rate / sum(pauses)
        asked = []
        for pause, request in zip(pauses, requests, strict=True):
            await asyncio.sleep(unit * pause)
            asked.append(asyncio.create_task(self.seconds(way, request)))
        return await asyncio.gather(*asked)

    async def behind(self, way: str, long: Sequence[Json], short: Json) -> float:
        """Seconds of a request that comes just after others."""
        others = [asyncio.create_task(self._ask(way, request)) for request in long]
        await asyncio.sleep(0.2)
        seconds = await self.seconds(way, short)
        await asyncio.gather(*others)
        return seconds

    async def _ask(self, way: str, request: Json) -> httpx.Response:
        return (await self._http.post(self._urls[way], json=request)).raise_for_status()


class Replica:
    """The model of a way, as it is seen from outside."""

    def __init__(self, way: str, deployment: str, processes: Sequence[psutil.Process]) -> None:
        """Raises SystemExit where not just one of the processes is its."""
        self.handle = serve.get_deployment_handle(deployment, way)
        found = [one for one in processes if f"ServeReplica:{way}:{deployment}" in _title(one)]
        if len(found) != 1:
            raise SystemExit(f"{len(found)} processes were found that serve {way}, not one")
        self.process = found[0]

    async def work_during(self, doing: Awaitable[Any]) -> "Work":
        before = await self._now()
        await doing
        after = await self._now()
        return Work({name: after[name] - before[name] for name in before})

    async def work_within(self, seconds: float) -> "Work":
        """After WARM_UP."""
        await asyncio.sleep(WARM_UP)
        return await self.work_during(asyncio.sleep(seconds))

    async def _now(self) -> dict[str, float]:
        figures = await self.handle.figures.remote()
        used = self.process.cpu_times()
        now = time.perf_counter()
        # Others' pictures come many at once: they say when the last were done, so that none is counted in part.
        counted = {name: figures[name] for name in ("pictures", "rows", "steps", "stepping_seconds") if name in figures}
        return counted | {"drawing": figures.get("ended", now), "cpu": used.user + used.system, "seconds": now}


class Work(dict[str, float]):
    """What a model did in a while.

    `pictures` in `drawing` seconds, `cpu` seconds of the processor in `seconds` by the clock; of ours `rows`, `steps` and
    `stepping_seconds`, too.
    """

    @classmethod
    def total(cls, works: "Sequence[Work]") -> "Work":
        return cls({name: sum(work[name] for work in works) for name in works[0]})

    @property
    def rate(self) -> float:
        """Images a second."""
        return self["pictures"] / self["drawing"]

    @property
    def mean_batch(self) -> float:
        return self["rows"] / self["steps"]

    @property
    def core_share(self) -> float:
        """How much of its core the model had: where it is far below 1 under load, others took the rest."""
        return self["cpu"] / self["seconds"]


def _title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def main() -> None:
    options = parse_options()
    if not {MODEL_CORE, OTHER_CORE} <= os.sched_getaffinity(0):
        raise SystemExit(f"models take core {MODEL_CORE} and all else {OTHER_CORE}; this process may not use both")
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    torch.set_num_threads(1)
    model = load_model(load_config(["experiment=demo"], ExperimentConfig).model).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as scratch:
        adapters = Path(scratch)
        export_adapters(model, adapters)
        with served(adapters, options.max_rows) as (address, replicas):
            if options.tune:
                asyncio.run(tune(Clients(address, options.clients), replicas["batch"], adapters, options.seconds))
                return
            figures = asyncio.run(measure(Clients(address, options.clients), replicas, model, adapters, options))
    write_result("serve_load", figures, BARS, vars(options), at_most=AT_MOST, keep=not options.short)


def export_adapters(model: DiffusionModel, folder: Path) -> None:
    for seed, name in enumerate(ADAPTERS):
        config = AdapterExportConfig(model=model.config, output=str(folder / name))
        write_adapter(random_lora(model, rank=8, seed=seed, scale=LORA_SCALE), folder / name, model, config, base=None)


@contextmanager
def served(adapters: Path, max_rows: int) -> Iterator[tuple[str, dict[str, Replica]]]:
    """All ways, each at its name below the address; their models have a core then, and all else has another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet_serve()
    quiet_tokens()
    ray.init(num_cpus=2 * len(WAYS), include_dashboard=False, logging_level=logging.WARNING)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        ours = {"settings": ["model=emoji"], "threads": 1, "batching": {"max_rows": max_rows}}
        applications = {
            "lock": serve_baselines.build(serve_baselines.LockedModel),
            "batch": serve_baselines.build(serve_baselines.BatchedModel),
            "ours": build({"models": {"emoji": ours}, "adapters": str(adapters)}),
        }
        for way, application in applications.items():
            serve.run(application, name=way, route_prefix=f"/{way}")
        this = psutil.Process()
        processes = [this, *this.children(recursive=True)]
        replicas = {way: Replica(way, "model-emoji" if way == "ours" else "model", processes) for way in WAYS}
        models = [replica.process for replica in replicas.values()]
        for process in processes:
            pin(process, MODEL_CORE if process in models else OTHER_CORE)
        where = "models, of one thread each: core %d; clients, Serve's proxy and FastAPI: core %d"
        logger.info(where, MODEL_CORE, OTHER_CORE)
        yield f"http://127.0.0.1:{port}", replicas
    finally:
        ray.shutdown()


def pin(process: psutil.Process, core: int) -> None:
    """From outside, so that no way has to know of it. Threads and processes that come later have their parents' core."""
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        for thread in process.threads():
            os.sched_setaffinity(thread.id, {core})


async def measure(
    clients: Clients,
    replicas: dict[str, Replica],
    model: DiffusionModel,
    adapters: Path,
    options: argparse.Namespace,
) -> dict[str, float]:
    await check_alike(clients, None)
    logger.info("one request alone, in turns")
    alone = await lone_seconds(clients, options.alone)
    uniform = await saturated(clients, replicas, uniform_requests, model, options)
    for way in OTHERS:
        await replicas[way].handle.load_adapters.remote(adapters)
    for adapter in (ADAPTERS[0], ADAPTERS[-1]):
        await check_alike(clients, adapter)
    adapter_cost = await adapter_cost_ratio(clients, replicas["ours"], options.alone // 4)
    short = await short_seconds(clients, options.alone // 4)
    mixed = await saturated(clients, replicas, mixed_requests, model, options)
    rate = UTILIZATION * max(mixed.rates[way] for way in OTHERS)
    requests = list(itertools.islice(mixed_requests("by chance"), options.requests))
    logger.info("%d requests by chance to each, %.2f a second", len(requests), rate)
    latencies = {way: await clients.arrive(way, requests, rate) for way in WAYS}
    percentiles = {share: {way: float(np.percentile(latencies[way], share)) for way in WAYS} for share in (50, 95, 99)}
    loads = {"uniform": uniform, "mixed": mixed}
    print_table(
        f"{options.clients} clients, or {rate:.2f} requests a second by chance",
        ["", *WAYS],
        [
            *(table_row(f"{name}, images/s", load.rates) for name, load in loads.items()),
            *(table_row(f"mixed by chance, p{share} in s", found) for share, found in percentiles.items()),
            table_row("8 steps just after three of 50, s", short),
            table_row("20 steps alone, s", alone),
            *(table_row(f"{name}, share of the core", load.core_shares) for name, load in loads.items()),
            *(
                table_row(f"{name}, rows a step", {"ours": load.works["ours"].mean_batch})
                for name, load in loads.items()
            ),
            *(table_row(f"{name}, rows/s over bare U-Net's", {"ours": load.over_bare}) for name, load in loads.items()),
        ],
    )
    figures = {
        "mixed_throughput_ratio": over_better(mixed.rates, max),
        "mixed_p95_ratio": over_better(percentiles[95], min),
        "uniform_throughput_ratio": over_better(uniform.rates, max),
        "short_wait_ratio": over_better(short, min),
        "row_rate_over_bare_unet": mixed.over_bare,
        "mixed_adapter_cost_ratio": adapter_cost,
        "lone_overhead_ratio": alone["ours"] / alone["lock"],
        "lone_overhead_ms": 1e3 * (alone["ours"] - alone["lock"]),
        "uniform_row_rate_over_bare_unet": uniform.over_bare,
        "mixed_mean_batch": mixed.works["ours"].mean_batch,
    }
    for way in WAYS:
        for name, load in loads.items():
            figures |= {f"{name}_images_per_second_{way}": load.rates[way]}
            figures |= {f"{name}_core_share_{way}": load.core_shares[way]}
        figures |= {f"mixed_p{share}_seconds_{way}": found[way] for share, found in percentiles.items()}
        figures |= {f"short_wait_seconds_{way}": short[way]}
    return {name: round(value, 3) for name, value in figures.items()}


async def tune(clients: Clients, batch: Replica, adapters: Path, seconds: float) -> None:
    """Show what `batch` makes of the mixed load with other sizes of its batches, and waits for them."""
    await batch.handle.load_adapters.remote(adapters)
    rows = []
    for size, wait in itertools.product(TRIED_SIZES, TRIED_WAITS):
        await batch.handle.tune.remote(size, wait)
        work = await clients.saturate("batch", mixed_requests("tune"), batch.work_within(seconds))
        rows.append([f"{size} pictures, {wait:g} s", f"{work.rate:.2f}", f"{work.core_share:.2f}"])
        logger.info("%s: %s images/s with %s of the core", *rows[-1])
    print_table("batch, mixed load", ["at most, and wait", "images/s", "share of the core"], rows)


async def check_alike(clients: Clients, adapter: str | None) -> None:
    """Raises SystemExit where ways differ in what they draw, or an adapter makes no difference.

    Two pictures of equal settings are asked for at once, so that those who batch do.
    """
    asked = [request(f"alike {number}", 20, 4.0, adapter) for number in range(2)]
    drawn = {way: await asyncio.gather(*(clients.picture(way, one) for one in asked)) for way in WAYS}
    for way in OTHERS:
        difference = max(differences(drawn[way], drawn["ours"]))
        if difference > MOST_DIFFERENCE:
            raise SystemExit(f"pictures of {way} and ours differ by {difference:.2f} with the adapter {adapter}")
    if adapter is not None:
        plain = [await clients.picture("ours", request(f"alike {number}", 20, 4.0)) for number in range(2)]
        if min(differences(drawn["ours"], plain)) < 10 * MOST_DIFFERENCE:
            raise SystemExit(f"the adapter {adapter} changes too little to tell whether it is applied")


def differences(pictures: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> list[float]:
    return [float(np.abs(one - other).mean()) for one, other in zip(pictures, others, strict=True)]


async def lone_seconds(clients: Clients, turns: int) -> dict[str, float]:
    """Medians of one request after another, with nobody else there."""
    found: dict[str, list[float]] = {"lock": [], "ours": []}
    for turn in range(turns):
        for way, seconds in found.items():
            seconds.append(await clients.seconds(way, request(f"alone {turn}", 20, 4.0)))
    return {way: statistics.median(seconds) for way, seconds in found.items()}


@dataclass(frozen=True)
class Saturated:
    works: dict[str, Work]
    rates: dict[str, float]
    """Images a second: medians of the turns, of which a busy machine may spoil one."""
    over_bare: float
    """The same of our rows a second over those of the bare U-Net in such batches, measured just before and after each turn."""

    @property
    def core_shares(self) -> dict[str, float]:
        return {way: work.core_share for way, work in self.works.items()}


async def saturated(
    clients: Clients,
    replicas: dict[str, Replica],
    requests: Callable[[str], Iterator[Json]],
    model: DiffusionModel,
    options: argparse.Namespace,
) -> Saturated:
    works: dict[str, list[Work]] = {way: [] for way in WAYS}
    over_bare = []
    for turn in range(options.turns):
        for way, found in works.items():
            before = bare_row_rate(model, options.max_rows) if way == "ours" else None
            work = await clients.saturate(way, requests(f"turn {turn}"), replicas[way].work_within(options.seconds))
            found.append(work)
            logger.info("%s, turn %d: %.2f images/s with %.2f of the core", way, turn, work.rate, work.core_share)
            if before is not None:
                bare = statistics.mean([before, bare_row_rate(model, work.mean_batch)])
                over_bare.append(work["rows"] / work["seconds"] / bare)
    return Saturated(
        works={way: Work.total(found) for way, found in works.items()},
        rates={way: statistics.median(work.rate for work in found) for way, found in works.items()},
        over_bare=statistics.median(over_bare),
    )


def bare_row_rate(model: DiffusionModel, rows: float) -> float:
    """Rows a second of the bare U-Net in batches of so many, on the models' core, which nobody else uses now."""
    os.sched_setaffinity(0, {MODEL_CORE})
    try:
        with torch.inference_mode():
            step = bare_unet(model, of_rows(round(rows)))
            times = []
            for _ in range(BARE_STEPS):
                began = time.perf_counter()
                step()
                times.append(time.perf_counter() - began)
    finally:
        os.sched_setaffinity(0, {OTHER_CORE})
    return round(rows) / statistics.median(times)


async def adapter_cost_ratio(clients: Clients, ours: Replica, turns: int) -> float:
    """Of a step's time a row: medians over batches of eight rows."""
    found: dict[str, list[float]] = {"with": [], "without": []}
    for turn in range(turns):
        for kind, seconds in found.items():
            eight = [
                request(f"{kind} {turn} {adapter}", 50, 1.0, adapter if kind == "with" else None)
                for adapter in ADAPTERS
            ]
            work = await ours.work_during(asyncio.gather(*(clients.seconds("ours", one) for one in eight)))
            seconds.append(work["stepping_seconds"] / work["rows"])
    return statistics.median(found["with"]) / statistics.median(found["without"])


async def short_seconds(clients: Clients, turns: int) -> dict[str, float]:
    """Medians of a request of few steps that comes just after three of many."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(turns):
        long = [request(f"long {turn} {adapter}", 50, 4.0, adapter) for adapter in ADAPTERS[:3]]
        for way, seconds in found.items():
            seconds.append(await clients.behind(way, long, request(f"short {turn}", 8, 1.0, ADAPTERS[3])))
    return {way: statistics.median(seconds) for way, seconds in found.items()}


def uniform_requests(name: str) -> Iterator[Json]:
    for number in itertools.count():
        yield request(f"uniform {name} {number}", 20, 4.0)


def mixed_requests(name: str) -> Iterator[Json]:
    """Every steps with every guidance once, in any order, and so on: turns differ little in what they ask for."""
    chance = random.Random(name)
    for turn in itertools.count():
        kinds = list(itertools.product(STEPS, GUIDANCE))
        chance.shuffle(kinds)
        for steps, guidance in kinds:
            yield request(f"mixed {name} {turn} {steps} {guidance}", steps, guidance, chance.choice(ADAPTERS))


def request(name: str, steps: int, guidance: float, adapter: str | None = None) -> Json:
    """Its prompt and seed are drawn by its name."""
    chance = random.Random(name)
    return {
        "prompt": caption(chance.choice(NAMES), chance.choice(COLOURS)),
        "seed": chance.randrange(2**32),
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "adapters": [] if adapter is None else [adapter],
    }


def over_better(found: Mapping[str, float], better: Callable[[Iterable[float]], float]) -> float:
    """Ours over the better of the others'."""
    return found["ours"] / better(found[way] for way in OTHERS)


def table_row(what: str, found: Mapping[str, float]) -> list[str]:
    return [what, *(f"{found[way]:.2f}" if way in found else "" for way in WAYS)]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="of each way, under each saturating load")
    parser.add_argument("--seconds", type=float, default=8, help="of a turn, after it has warmed up")
    parser.add_argument("--clients", type=int, default=32, help="who saturate")
    parser.add_argument("--requests", type=int, default=360, help="that come by chance; of fewer, a handful decide")
    parser.add_argument("--alone", type=int, default=12, help="requests with nobody else there, of each way")
    parser.add_argument("--max-rows", type=int, default=32, help="of a step of ours")
    parser.add_argument("--tune", action="store_true", help="try sizes and waits of `batch` under the mixed load, only")
    parser.add_argument("--short", action="store_true", help="keep no result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
