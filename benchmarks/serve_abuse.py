"""What abuse leaves of a server: `python benchmarks/serve_abuse.py`.

The embedded model behind `ray_sd.serve.app.build`, whose queue has four places, of which a key may take two. Two thousand
requests, 24 at a time, are of another kind each (KINDS): huge sizes and numbers, broken and deep JSON, broken multipart,
damaged pictures and such as are huge once they are decoded, floods of fields and headers, long addresses, wrong keys and
methods, odd characters, and clients who leave while they send, wait, or are sent to. Beside them are clients who send a byte
now and then, of headers and of bodies. All kinds had turns before anything is measured.

- `latency_ratio`: seconds of a usual request after all of that over before, medians of many; bar 1.1;
- `memory_ratio`: resident memory of the model's replica, the HTTP side, its admission and Serve's proxy, after over before;
  bar 1.05;
- `defects`: requests that the HTTP side counts with status 500, also of clients who had left; bar 0;
- `unanswered`: requests without an answer in time, but for who left; bar 0.

It ends with an error where an answer is a 500 or tells of the code, or where places in the queue or of a key were lost.
Serve's own proxy answers 500 to an `x-request-id` or `x-session-id` that is no UTF-8, before anything of ours is asked: that
is left out.
"""

import argparse
import asyncio
import io
import itertools
import json
import logging
import random
import socket
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import psutil
import ray
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from report import print_table, write_result

from ray_sd.cluster import quiet_serve, quiet_tokens
from ray_sd.serve.app import build
from ray_sd.serve.gate import hash_of

AT_MOST = {"latency_ratio": 1.1, "memory_ratio": 1.05, "defects": 0, "unanswered": 0}
GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"
ANN, BOB = ({"Authorization": f"Bearer sd-{name}"} for name in ("ann", "bob"))
"""Ann asks as one should, Bob does not."""
PLACES, CONCURRENT = 4, 2
MOST_BYTES = 500_000
DEADLINE = 20
"""Seconds; who sends a byte now and then is told after these."""
AT_ONCE = 24
SLOW = 64
"""Who send a byte now and then."""
USUAL = {"prompt": "a tiger face on a blue background", "num_inference_steps": 10}
FEW = {"prompt": "a cat", "num_inference_steps": 2}
LONG = {"prompt": "a cat", "num_inference_steps": 50}
PROCESSES = ("ServeReplica:ray_sd:model-emoji", "ServeReplica:ray_sd:api", "AdmissionActor", "ProxyActor")

Json = dict[str, Any]
Status = int | None
"""Of an answer; None where its client left or the connection was closed."""

logger = logging.getLogger(__name__)


class TooLateError(Exception):
    """There was no answer."""


class Abuser:
    """Who asks as one should not."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.host, self.port = address.removeprefix("http://").split(":")
        self.http = httpx.AsyncClient(base_url=address, timeout=3 * DEADLINE, limits=httpx.Limits(max_connections=None))
        self.told: list[str] = []
        """Answers that tell of the code, or of a defect."""

    async def ask(self, method: str, path: str, **settings: Any) -> Status:
        try:
            answer = await self.http.request(method, path, **{"headers": BOB} | settings)
        except httpx.TimeoutException as error:
            raise TooLateError(path) from error
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
            return None  # it was closed, as what is too long or no HTTP may be
        self.look(answer.status_code, answer.text)
        return answer.status_code

    async def generate(self, body: Any) -> Status:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.ask("POST", GENERATE, content=content, headers=BOB | {"Content-Type": "application/json"})

    async def form(self, content: bytes, kind: str = "multipart/form-data; boundary=b") -> Status:
        return await self.ask("POST", EDIT, content=content, headers=BOB | {"Content-Type": kind})

    async def edit(self, picture: bytes, *fields: tuple[str, Any]) -> Status:
        files = [("prompt", (None, "a cat")), ("num_inference_steps", (None, "2")), ("image", ("a.png", picture))]
        return await self.ask("POST", EDIT, files=[*files, *fields])

    async def raw(self, content: bytes, leave_after: int | None = None) -> Status:
        """Bytes as they are. leave_after: most bytes of the answer that the client reads before it is gone."""
        reader, writer = await asyncio.open_connection(self.host, int(self.port))
        try:
            async with asyncio.timeout(3 * DEADLINE):
                writer.write(content)
                await writer.drain()
                if leave_after is not None:
                    await reader.read(leave_after)
                    return None
                answer = (await reader.read(100_000)).decode("latin-1")
        except TimeoutError as error:
            raise TooLateError(content[:40]) from error
        except ConnectionError:
            return None
        finally:
            writer.transport.abort()
        status = int(answer.split(" ", 2)[1]) if answer.startswith("HTTP/") else None
        self.look(status, answer)
        return status

    async def slowly(self, first: bytes, rest: bytes) -> Status:
        """The rest byte by byte."""
        reader, writer = await asyncio.open_connection(self.host, int(self.port))
        answer = asyncio.create_task(reader.read(1000))
        try:
            writer.write(first)
            at = 0
            while True:
                done, _ = await asyncio.wait([answer], timeout=1)
                if done:
                    text = (await answer).decode("latin-1")
                    return int(text.split(" ", 2)[1]) if text.startswith("HTTP/") else None
                writer.write(rest[at : at + 1] or b"x")
                at += 1
        except ConnectionError:
            return None
        finally:
            answer.cancel()
            writer.transport.abort()

    def look(self, status: Status, text: str) -> None:
        if status == 500 or "Traceback" in text or '.py"' in text:
            self.told.append(f"{status}: {text[:300]}")


def head(path: str, length: int, kind: str = "application/json", method: str = "POST", key: Json = BOB) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: here", f"Content-Type: {kind}", f"Content-Length: {length}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in key.items()), "", ""]).encode()


def request(body: Json) -> bytes:
    content = json.dumps(body).encode()
    return head(GENERATE, len(content)) + content


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    Image.new(mode, (width, height)).save(content, "PNG")
    return content.getvalue()


def damaged(chance: random.Random) -> bytes:
    content = bytearray(PICTURE)
    for _ in range(8):
        content[chance.randrange(8, len(content))] = chance.randrange(256)
    return bytes(content)


PICTURE, BOMB = png(64, 64), png(8000, 8000, "1")
PART = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
KINDS: dict[str, Callable[[Abuser, random.Random], Awaitable[Status]]] = {
    "size": lambda a, c: a.generate(FEW | {"size": c.choice(["99999x99999", "8x99999", "0x0", "-8x8", "x" * 9999])}),
    "number": lambda a, c: a.generate(
        FEW | {c.choice(["n", "num_inference_steps", "seed"]): c.choice([-1, 10**9, 10**400])}
    ),
    "no number": lambda a, c: a.generate(
        b'{"prompt": "a", "guidance_scale": %s}' % c.choice([b"NaN", b"1e999", b"9" * 5000])
    ),
    "broken JSON": lambda a, c: a.generate(json.dumps(FEW).encode()[: c.randrange(1, 30)]),
    "deep JSON": lambda a, c: a.generate(
        b'{"prompt": "a", "adapters": ' + c.choice([b"[", b'{"a":']) * c.choice([400, 90_000])
    ),
    "many members": lambda a, c: a.generate(FEW | {f"field {number}": number for number in range(20_000)}),
    "long prompt": lambda a, c: a.generate(FEW | {"prompt": "a" * c.choice([2001, 400_000])}),
    "large body": lambda a, c: a.generate(b" " * (MOST_BYTES + 1)),
    "odd text": lambda a, c: a.generate(
        FEW | {"prompt": "".join(map(chr, (c.randrange(0xD800) for _ in range(40)))) + "\0"}
    ),
    "half characters": lambda a, c: a.generate(
        b'{"prompt": "a", "%s": "\\ud800"}' % c.choice([b"model", b"user", b"\\udfff"])
    ),
    "adapter": lambda a, c: a.generate(
        FEW | {"adapters": [c.choice(["../../etc/passwd", "\0", "a" * 129, "ü", "%2e%2e"])]}
    ),
    "parentheses": lambda a, c: a.generate(
        {"prompt": "(" * c.randrange(5, 40), "prompt_weighting": True} | {"n": 1, "num_inference_steps": 2}
    ),
    "users": lambda a, c: a.generate(FEW | {"user": f"{c.random()}" * 20}),
    "repeated": lambda a, c: a.ask(
        "POST", GENERATE, json=FEW | {"seed": c.randrange(9)}, headers=BOB | {"Idempotency-Key": "a"}
    ),
    "links": lambda a, c: a.generate(FEW | {"response_format": "url"}),
    "host": lambda a, c: a.ask(
        "POST", GENERATE, json=FEW | {"response_format": "url"}, headers=BOB | {"Host": c.choice(["", '"<', "[::1"])}
    ),
    "no key": lambda a, c: a.ask(
        "POST",
        GENERATE,
        json=FEW,
        headers={"Authorization": c.choice(["Bearer", "Basic eve", "Bearer sd-eve", "ü" * 5000]).encode("latin-1")},
    ),
    "not an admin": lambda a, c: a.ask("DELETE", f"/v1/adapters/{c.random()}"),
    "method": lambda a, c: a.ask(
        c.choice(["PUT", "PATCH", "TRACE", "PROPFIND", "OPTIONS", "NONSENSE"]), GENERATE, json=FEW
    ),
    "path": lambda a, c: a.ask("GET", f"/{c.random()}/%00/..%2f..%2f%ff"),
    "long path": lambda a, c: a.ask("GET", "/v1/models/" + "a" * c.choice([1000, 60_000])),
    "headers": lambda a, c: a.ask(
        "GET", "/v1/models", headers=BOB | {f"x-{number}": "y" * 100 for number in range(500)}
    ),
    "no HTTP": lambda a, c: a.raw(c.randbytes(1000) + b"\r\n\r\n"),
    "chunks": lambda a, c: a.raw(
        head(GENERATE, 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        + c.choice([b"zz\r\n", b"ffffffffffffffff\r\n", b"-1\r\n"])
    ),
    "endless chunks": lambda a, c: a.raw(
        head(GENERATE, 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        + b"10000\r\n"
        + (b" " * 65536 + b"\r\n10000\r\n") * 20
    ),
    "two lengths": lambda a, c: a.raw(head(GENERATE, 10).replace(b"Host", b"Content-Length: 90\r\nHost") + b"{" * 10),
    "no boundary": lambda a, c: a.form(
        PART + b"a\r\n--b--", c.choice(["multipart/form-data", "multipart/form-data; boundary=" + "b" * 500])
    ),
    "broken form": lambda a, c: a.form((PART + b"a\r\n--b--")[: c.randrange(60)] + c.randbytes(20)),
    "charset": lambda a, c: a.form(
        PART + b"\\ud800\r\n--b--\r\n",
        f"multipart/form-data; boundary=b; charset={c.choice(['undefined', 'punycode', 'utf-16', 'nothing'])}",
    ),
    "many fields": lambda a, c: a.form((PART + b"a\r\n") * 5000 + b"--b--\r\n"),
    "plain form": lambda a, c: a.form(b"a=%ff&" * 60_000, "application/x-www-form-urlencoded"),
    "adapters of a form": lambda a, c: a.edit(
        PICTURE, ("adapters[]", (None, "a")), ("adapters", (None, c.choice(["[" * 50_000, "b"])))
    ),
    "bomb": lambda a, c: a.edit(BOMB),
    "damaged picture": lambda a, c: a.edit(damaged(c)),
    "no picture": lambda a, c: a.edit(c.randbytes(5000)),
    "leaves while sending": lambda a, c: a.raw(
        head(EDIT, 400_000, "multipart/form-data; boundary=b") + PART + b"a" * c.randrange(200_000), leave_after=0
    ),
    "leaves while waiting": lambda a, c: a.raw(request(LONG), leave_after=0),
    "leaves a stream": lambda a, c: a.raw(
        request(LONG | {"stream": True, "partial_images": 3}), leave_after=c.randrange(1, 3000)
    ),
    "leaves a repeated one": lambda a, c: a.raw(
        request(FEW).replace(b"Host", f"Idempotency-Key: {c.random()}\r\nHost".encode()), leave_after=0
    ),
}


def main() -> None:
    options = parse_options()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logger.setLevel(logging.INFO)
    with served() as address:
        figures = asyncio.run(measure(Abuser(address), options))
    write_result("serve_abuse", figures, settings=vars(options), at_most=AT_MOST, keep=not options.short)


@contextmanager
def served() -> Iterator[str]:
    """Caches are small, so that they are full before anything is measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    caches = {"result_cache": 1, "prompt_cache": 1}
    arguments = {
        "models": {"emoji": {"settings": ["model=emoji"], "threads": 1, "batching": {"policy": "fair", **caches}}},
        "keys": {"ann": hash_of("sd-ann"), "bob": {"sha256": hash_of("sd-bob"), "concurrent": CONCURRENT}},
        "limits": {
            "max_upload_bytes": MOST_BYTES,
            "max_images": 2,
            "max_queue": PLACES,
            "deadline": DEADLINE,
            "idempotency_memory": 1,
            "url_memory": 1,
        },
    }
    quiet_serve()
    quiet_tokens()
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        _system_config={"metrics_report_interval_ms": 1000},
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(arguments), name="ray_sd", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        ray.shutdown()


async def measure(abuser: Abuser, options: argparse.Namespace) -> dict[str, float]:
    """Raises SystemExit where an answer was a defect, or something was lost."""
    await abuse(abuser, len(KINDS) * options.warm_up)
    before = await usual_seconds(abuser, options.usual), memory()
    statuses, unanswered = await abuse(abuser, options.requests)
    after = await usual_seconds(abuser, options.usual), memory()
    await check_places(abuser)
    if abuser.told:
        raise SystemExit("\n".join(abuser.told[:20]))
    print_table("Answers, by what was asked", ["", "answers"], [[kind, told] for kind, told in statuses.items()])
    logger.info("%.4f s before, %.4f after; %d not answered", before[0], after[0], unanswered)
    rows = [[name, f"{before[1][name] / 2**20:.1f}", f"{after[1][name] / 2**20:.1f}"] for name in PROCESSES]
    print_table("", ["MiB", "before", "after"], rows)
    return {
        "latency_ratio": round(after[0] / before[0], 3),
        "memory_ratio": round(sum(after[1].values()) / sum(before[1].values()), 3),
        "defects": await defects(),
        "unanswered": unanswered,
        "latency_before": round(before[0], 4),
        "latency_after": round(after[0], 4),
        "memory_growth_mib": round((sum(after[1].values()) - sum(before[1].values())) / 2**20, 1),
        "requests": options.requests,
    }


async def abuse(abuser: Abuser, requests: int) -> tuple[dict[str, str], int]:
    """All kinds in turns, and slow clients beside them. Gives the statuses of each, and how many were not answered."""
    slow_ones = [(b"POST ", request(FEW)), (head(GENERATE, MOST_BYTES), b" ")]
    slow = [asyncio.create_task(abuser.slowly(*parts)) for parts in slow_ones * (SLOW // 2)]
    names = itertools.islice(itertools.cycle(KINDS), requests)
    numbers = itertools.count()
    found: dict[str, Counter[Status]] = {name: Counter() for name in [*KINDS, "slow body"]}
    unanswered = 0

    async def ask_on() -> None:
        nonlocal unanswered
        for name in names:
            try:
                found[name][await KINDS[name](abuser, random.Random(next(numbers)))] += 1
            except TooLateError:
                logger.warning("%s was not answered", name)
                unanswered += 1

    began = time.perf_counter()
    await asyncio.gather(*(ask_on() for _ in range(AT_ONCE)))
    logger.info("%d requests of abuse in %.0f s", requests, time.perf_counter() - began)
    done, waiting = await asyncio.wait(slow[1::2], timeout=2 * DEADLINE)
    found["slow body"].update(one.result() for one in done)
    unanswered += len(waiting)
    for one in slow:
        one.cancel()
    await asyncio.gather(*slow, return_exceptions=True)
    await until_idle()
    told = {
        name: ", ".join(f"{count} x {status or 'left'}" for status, count in counts.most_common())
        for name, counts in found.items()
    }
    return told, unanswered


async def until_idle() -> None:
    handle = serve.get_deployment_handle("model-emoji", "ray_sd")
    async with asyncio.timeout(3 * DEADLINE):
        while (await handle.figures.remote())["busy"]:
            await asyncio.sleep(0.1)


async def usual_seconds(abuser: Abuser, count: int) -> float:
    """Median of one usual request after another."""
    seconds = []
    for number in range(count):
        began = time.perf_counter()
        answer = await abuser.http.post(GENERATE, json=USUAL | {"seed": number}, headers=ANN)
        answer.raise_for_status()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


async def check_places(abuser: Abuser) -> None:
    """Raises SystemExit where fewer are drawn for at once than before."""
    for key, most in ((ANN, PLACES), (BOB, CONCURRENT)):
        asked = [
            abuser.http.post(GENERATE, json=USUAL | {"seed": 10**6 + number}, headers=key) for number in range(most)
        ]
        statuses = [answer.status_code for answer in await asyncio.gather(*asked)]
        if statuses != [200] * most:
            raise SystemExit(f"places were lost: {most} requests at once were answered {statuses}")


def memory() -> dict[str, int]:
    """Resident bytes of PROCESSES."""
    found: Counter[str] = Counter()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            found.update({name: process.memory_info().rss for name in PROCESSES if name in title})
    if len(found) < len(PROCESSES):
        raise SystemExit(f"of {', '.join(PROCESSES)} only {', '.join(found)} are there")
    return dict(found)


async def defects() -> int:
    """Answers with status 500, sent or not, as Prometheus reads them."""
    await asyncio.sleep(5)  # until they are told
    port = ray.nodes()[0]["MetricsExportPort"]
    async with httpx.AsyncClient(timeout=60) as http:
        text = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    counted = [one for one in samples if one.name == "ray_sd_requests_total"]
    if not counted:
        raise SystemExit("no requests are counted")
    return int(sum(one.value for one in counted if one.labels["status"] == "500"))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="of abuse")
    parser.add_argument("--warm-up", type=int, default=10, help="requests of each kind before anything is measured")
    parser.add_argument("--usual", type=int, default=40, help="usual requests before and after")
    parser.add_argument("--short", action="store_true", help="keep no result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
