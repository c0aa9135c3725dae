"""`partinf serve` under load for minutes, with every field that clients send and clients that leave. Writes over_http.json.

    python -m experiments.soak.over_http --minutes 10

The server is a process of its own, as a user starts it, with a small random model whose vocabulary writes any text, few pages and a short
queue; this process is its clients. Each request is first answered alone; under load whole answers and streams are compared with that, and
what a client that leaves has heard must be the beginning of it. At the end nothing may be left in the server, its counts must be those of
its clients, its memory may not have grown, and it must end at SIGTERM. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import httpx
import psutil

from experiments.results import machine, write
from experiments.soak.checks import growth, thinned
from experiments.soak.http_asks import MODEL, TEMPLATE, WRONG, Ask, Streamed, drawn, whole

ROOT = Path(__file__).parents[2]
KNOWN, CLIENTS = 102, 24
SHARE_STREAMED, SHARE_LEAVING, SHARE_OTHER = 0.6, 0.12, 0.1
FLAT = 0.03  # memory may grow by this share between the second fifth of the run and the last
DRIFT = 0.01  # of sampled answers, where a choice hung by a rounding
SERVED = ["--max-num-seqs", "8", "--max-waiting", "12", "--kv-pages", "140", "--max-model-len", "1024"]


def make_model(folder: Path) -> None:
    """A directory as they come from a hub: two layers of random weights, a tokenizer of bytes and a chat template that knows tools."""
    import shutil

    from partinf import api
    from partinf.checkpoint.hf import save_hf
    from partinf.checkpoint.tokenizer import load_tokenizer
    from partinf.model.config import ModelConfig
    from partinf.partition.sharding import device_mesh
    from partinf.transformer.params import random_params
    from partinf.workload import DType, Workload

    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ROOT / "tests/fixtures/tokenizer_byte_level" / name, folder)
    vocabulary = load_tokenizer(folder).vocab_size
    config = ModelConfig(MODEL, 2, 64, 128, 4, 2, 16, vocabulary, max_len=1024)
    plan = api.plan(config, "cpu:1", Workload(batch=8, input_len=64, output_len=64, weights=DType.F32, kv=DType.F32))
    save_hf(random_params(plan, device_mesh(plan), False, 0), config, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


class Server:
    """The process, where it listens, what it logs, and what memory it and its children take."""

    def __init__(self, model: Path, log: Path) -> None:
        command = [sys.executable, "-m", "partinf", "serve", "--model", str(model), "--slice", "cpu:1", "--port", "0"]
        command += ["--served-model-name", MODEL, "--weights", "f32", *SERVED]
        self.log = log
        with log.open("w") as file:
            self.child = subprocess.Popen(command, stderr=file, stdout=file, env=os.environ | {"PYTHONPATH": str(ROOT)})
        self.memory: list[float] = []
        self.url = f"http://127.0.0.1:{self._port()}"

    def _port(self) -> int:
        for _ in range(3000):
            if found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.log.read_text()):
                return int(found[1])
            if self.child.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError(self.log.read_text())

    def wait_ready(self) -> None:
        for _ in range(6000):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            if self.child.poll() is not None:
                raise RuntimeError(self.log.read_text())
            time.sleep(0.1)
        raise RuntimeError("not ready after ten minutes")

    def metrics(self) -> dict[str, float]:
        """Values by name, added up over finished reasons."""
        found: Counter[str] = Counter()
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith("partinf:") and "_bucket" not in line:
                name, value = line.rsplit(" ", 1)
                found[name.partition("{")[0].removeprefix("partinf:")] += float(value)
        return dict(found)

    async def watch(self) -> None:
        process = psutil.Process(self.child.pid)
        while True:
            held = 0
            for one in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    held += one.memory_info().rss
            self.memory.append(held / 1e6)
            await asyncio.sleep(0.5)

    def end(self) -> int:
        self.child.send_signal(signal.SIGTERM)
        return self.child.wait(60)


class Clients:
    """All clients, and the outcomes of their requests.

    Attributes:
        outcomes: requests by what became of them. samples: of requests that were answered. perhaps: at most so many more, of clients that
            left before they could know whether they were queued.
        compared: samples that were compared with what they are alone; drifted of them, sampled, left it.
    """

    def __init__(self, url: str, asks: list[Ask], seed: int) -> None:
        limits = httpx.Limits(max_connections=2 * CLIENTS, max_keepalive_connections=CLIENTS)
        self._http = httpx.AsyncClient(base_url=url, limits=limits, timeout=120)
        self._asks = asks
        self._seed = seed
        self.outcomes: Counter[str] = Counter()
        self.samples = self.perhaps = self.compared = self.drifted = 0
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        if len(self.problems) < 20:
            self.problems.append(text)

    async def learn(self) -> None:
        """Answer every request alone."""
        for ask in self._asks:
            response = await self._http.post(ask.path, json=ask.body)
            if response.status_code != 200:
                raise RuntimeError(f"alone: {response.status_code} {response.text[:300]} for {ask.body}")
            ask.alone = whole(response.json())
            self.samples += ask.samples

    async def run(self, seconds: float) -> None:
        """Clients that send one request after the other."""
        ends = time.monotonic() + seconds
        await asyncio.gather(*(self._client(random.Random(f"{self._seed} {number}"), ends) for number in range(CLIENTS)))
        await self._http.aclose()

    async def _client(self, rng: random.Random, ends: float) -> None:
        while time.monotonic() < ends:
            fate = rng.random()
            try:
                if fate < SHARE_OTHER:
                    await self._other(rng)
                else:
                    await self._ask(rng.choice(self._asks), rng)
            except Exception as error:  # a server that fails, or says what no client understands: others go on, and reported at the end
                self.problem(f"{type(error).__name__}: {error}")

    async def _other(self, rng: random.Random) -> None:
        """What is refused, and the small endpoints."""
        if rng.random() < 0.5:
            path, body = rng.choice(WRONG)
            response = await self._http.post(path, json=body)
            self.outcomes["wrong, refused"] += 1
            if response.status_code not in (400, 429) or not response.headers.get("x-request-id"):
                self.problem(f"{response.status_code} for {str(body)[:200]}")
            return
        text = "".join(rng.choices("abc é ", k=20))
        tokens = (await self._http.post("/tokenize", json={"model": MODEL, "prompt": text})).json()["tokens"]
        back = (await self._http.post("/detokenize", json={"model": MODEL, "tokens": tokens})).json()["prompt"]
        if not back.endswith(text):
            self.problem(f"{text!r} came back as {back!r}")
        for path in ("/version", "/ping", "/metrics", "/v1/models", "/health"):
            if (status := (await self._http.get(path)).status_code) != 200:
                self.problem(f"{path}: {status}")
        self.outcomes["other endpoints"] += 1

    async def _ask(self, ask: Ask, rng: random.Random) -> None:
        leaves = rng.random() < SHARE_LEAVING
        if ask.streams and rng.random() < SHARE_STREAMED:
            await self._stream(ask, rng.randint(1, 20) if leaves else None)
        elif leaves:
            self.perhaps += ask.samples
            with contextlib.suppress(httpx.ReadTimeout):
                await self._http.post(ask.path, json=ask.body, timeout=httpx.Timeout(60, read=rng.uniform(0.005, 0.3)))
            self.outcomes["left"] += 1
        else:
            response = await self._http.post(ask.path, json=ask.body)
            if await self._accepted(response, ask):
                self._compare(ask, whole(response.json()))

    async def _stream(self, ask: Ask, leaves_after: int | None) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        heard, number = Streamed(), 0
        async with self._http.stream("POST", ask.path, json=ask.body | {"stream": True, "stream_options": options}) as response:
            if not await self._accepted(response, ask):
                return
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk or chunk.get("usage") is None:
                        self.problem(f"in a stream: {line[:200]}")
                    heard.hear(chunk)
                    number += 1
                    if number == leaves_after:
                        self.outcomes["left"] += 1
                        self._compare_beginning(ask, heard.choices)
                        return
        self._compare(ask, heard.choices)

    async def _accepted(self, response: httpx.Response, ask: Ask) -> bool:
        if response.status_code == 200:
            self.outcomes["answered"] += 1
            self.samples += ask.samples
            return True
        self.outcomes["refused"] += 1
        if response.status_code != 429 or not int(response.headers.get("retry-after", "0")):
            self.problem(f"{response.status_code} {(await response.aread())[:300]!r} for {str(ask.body)[:300]}")
        await asyncio.sleep(0.05)
        return False

    def _compare(self, ask: Ask, found: dict[int, dict[str, Any]]) -> None:
        self.compared += len(ask.alone)
        if found != ask.alone:
            self.drifted += 1
            if (
                ask.body.get("temperature") == 0
                or found.keys() != ask.alone.keys()
                or any(not one["finish_reason"] for one in found.values())
            ):
                self.problem(f"{found} instead of {ask.alone} for {str(ask.body)[:300]}")

    def _compare_beginning(self, ask: Ask, found: dict[int, dict[str, Any]]) -> None:
        if any(not ask.alone[index]["text"].startswith(one["text"]) for index, one in found.items() if ask.body.get("temperature") == 0):
            self.problem(f"{found} does not begin {ask.alone}")


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Server]:
    model = folder / MODEL  # its name is part of those of compiled programs
    model.mkdir()
    make_model(model)
    server = Server(model, folder / "log")
    try:
        server.wait_ready()
        yield server
    finally:
        if server.child.poll() is None:
            server.child.kill()
            server.child.wait()


async def loaded(server: Server, seconds: float, seed: int) -> Clients:
    clients = Clients(server.url, drawn(KNOWN, seed), seed)
    await clients.learn()
    watch = asyncio.create_task(server.watch())
    await clients.run(seconds)
    for _ in range(3000):  # what clients left behind is cancelled
        if not server.metrics()["num_requests_running"]:
            break
        await asyncio.sleep(0.1)
    watch.cancel()
    return clients


def wrong(server: Server, clients: Clients, metrics: dict[str, float]) -> list[str]:
    """Everything that does not hold at the end."""
    found = list(clients.problems)
    left = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    found += [f"at the end {name} is {metrics[name]}" for name in left if metrics[name]]
    ended = metrics["request_success_total"]
    if not clients.samples <= ended <= clients.samples + clients.perhaps:
        found.append(f"{ended:.0f} samples ended; clients know of {clients.samples}, and of at most {clients.perhaps} more")
    if not metrics["num_preemptions_total"]:
        found.append("no request was preempted")
    found += [
        f"nothing was {name}" for name in ("answered", "refused", "left", "wrong, refused", "other endpoints") if not clients.outcomes[name]
    ]
    if clients.drifted > DRIFT * clients.compared:
        found.append(f"{clients.drifted} of {clients.compared} samples are not what they are alone")
    if growth(server.memory) > FLAT:
        found.append(f"memory grew by {growth(server.memory):.1%}")
    if "Traceback" in (text := server.log.read_text()) or " failed: " in text:
        found.append("the log has a failure")
    return found


def soak(seconds: float, seed: int = 0) -> dict[str, Any]:
    """The server and its clients for so many seconds."""
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as server:
        load = os.getloadavg()[0]
        clients = asyncio.run(loaded(server, seconds, seed))
        metrics = server.metrics()
        problems = wrong(server, clients, metrics)
        if code := server.end():
            problems.append(f"the server ended with {code} at SIGTERM")
        names = ("generation_tokens_total", "num_preemptions_total", "prefix_cache_hits_total", "request_success_total", "iterations_total")
        return {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "load_average": load,
            "seconds": seconds,
            "outcomes": dict(clients.outcomes),
            "compared": clients.compared,
            "drifted": clients.drifted,
            **{name: metrics[name] for name in names},
            "memory_mb": thinned(server.memory),
            "memory_growth": growth(server.memory),
            "problems": problems,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="(default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results = soak(60 * args.minutes, args.seed)
    write(__file__, results, "over_http.json")
    for name, value in results.items():
        print(f"{name}: {value}")
    return 1 if results["problems"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
