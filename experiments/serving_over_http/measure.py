"""Throughput through HTTP against the engine's own: llama-125m with random weights, 32 sequences per iteration. Writes results.json.

    python -m experiments.serving_over_http.measure        # some minutes on two cores

One process holds the model and the server as `partinf serve` runs them; another is the client. The same requests are answered by
`Engine.generate`, through HTTP as whole answers, and through HTTP as streams, in turns, so that what else the machine does falls on all
three. Texts must be the same each time.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import io
import json
import math
import os
import random
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from partinf import api
from partinf.buckets import Capacity
from partinf.checkpoint.tokenizer import Tokenizer, load_tokenizer
from partinf.engine import Engine, SamplingParams
from partinf.engine.policies.fcfs import FirstComeFirstServed
from partinf.serve.server import Loaded, Options, Server, listen
from partinf.workload import DType, Workload

MODEL, ROWS, SEED = "llama-125m", 32, 0
WAYS = ("engine", "http whole", "http stream")
QUIET, MOST_TRIES = 0.03, 4  # share of the machine that others may take in a round that counts; rounds that are tried for each of these


def requests(count: int, vocab_size: int, longest: int = 64) -> list[dict[str, Any]]:
    """Bodies of completions: prompts of 16 to 48 tokens, answers of half the longest to the longest, all sent at once."""
    rng = random.Random(SEED)
    return [
        {
            "model": MODEL,
            "prompt": rng.choices(range(vocab_size), k=rng.randint(16, 48)),
            "max_tokens": rng.randint(longest // 2, longest),
            "temperature": 0,
            "ignore_eos": True,
        }
        for _ in range(count)
    ]


def word_tokenizer(vocab_size: int) -> Tokenizer:
    """Every token is a word, so that each event of a stream has text."""
    words = {"</s>": 0} | {f"Ġ{number}": number for number in range(1, vocab_size)}
    layout = {
        "version": "1.0",
        "added_tokens": [
            {"id": 0, "content": "</s>", "special": True} | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": words, "merges": []},
    }
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "tokenizer.json").write_text(json.dumps(layout, ensure_ascii=False))
        return load_tokenizer(directory)


def load(rows: int, max_len: int) -> tuple[Any, Engine, Tokenizer]:
    workload = Workload(rows, max_len // 2, max_len // 2, weights=DType.F32, kv=DType.F32)
    capacity = Capacity(max_rows=rows, max_len=max_len, prefill_tokens=256, extended=True)
    model = api.load(MODEL, api.plan(MODEL, "cpu:1", workload, capacity=capacity), random_weights=True)
    tokenizer = word_tokenizer(model.plan.model.vocab_size)
    policy = FirstComeFirstServed(rows, chunk_prefills=True)
    return model, Engine(model.runner, tokenizer=tokenizer, policy=policy, lag=1), tokenizer


def through_engine(engine: Engine, bodies: list[dict[str, Any]]) -> tuple[float, list[str]]:
    params = [SamplingParams(max_tokens=body["max_tokens"], ignore_eos=True) for body in bodies]
    started = time.perf_counter()
    outputs = engine.generate([body["prompt"] for body in bodies], params)
    return time.perf_counter() - started, [output.text for output in outputs]


class Client:
    """The client's process: given a way, it sends everything at once and reports how long it took and what it got."""

    def __init__(self, port: int, count: int, vocab_size: int, longest: int = 64) -> None:
        command = [sys.executable, "-m", "experiments.serving_over_http.measure", "--client", *map(str, (port, count, vocab_size, longest))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, way: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(way, file=self._process.stdin, flush=True)
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def client(port: int, count: int, vocab_size: int, longest: int) -> None:
    """The client's process."""
    bodies = requests(count, vocab_size, longest)
    for line in sys.stdin:
        print(json.dumps(ask(port, bodies, line.strip() == "http stream")), flush=True)


def ask(port: int, bodies: list[dict[str, Any]], stream: bool) -> dict[str, Any]:
    """Send all of these at once, each on its own connection, and read the answers.

    The client shares the machine with the server, so it only keeps what comes; it looks into that when the clock has stopped.
    """
    requests = []
    for body in bodies:
        raw = json.dumps(body | {"stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(raw)}\r\n"
        requests.append(head.encode() + b"content-type: application/json\r\n\r\n" + raw)
    pieces: list[list[bytes]] = [[] for _ in bodies]
    first = [0.0] * len(bodies)  # seconds until a token came
    begin = b"data: {" if stream else b"{"
    selector = selectors.DefaultSelector()
    started, before = time.perf_counter(), time.process_time()
    for number, request in enumerate(requests):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(request)
        selector.register(connection, selectors.EVENT_READ, number)
    while selector.get_map():
        for key, _ in selector.select():
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            piece = connection.recv(1 << 16)
            pieces[key.data].append(piece)
            if not first[key.data] and begin in piece:
                first[key.data] = time.perf_counter() - started
            if not piece:
                selector.unregister(connection)
                connection.close()
    seconds, cpu = time.perf_counter() - started, time.process_time() - before
    answers = [answered(b"".join(each)) for each in pieces]
    assert not stream or all(len(answer) == body["max_tokens"] for answer, body in zip(answers, bodies, strict=True))
    return {"seconds": seconds, "cpu": cpu, "digest": digest(["".join(answer) for answer in answers]), "first": statistics.median(first)}


def answered(raw: bytes) -> list[str]:
    """The texts of one answer: of its events, or the one text of a whole answer."""
    response = http.client.HTTPResponse(Kept(raw))  # type: ignore[arg-type]  # it reads a file of it, and nothing else
    response.begin()
    content = response.read().decode()
    assert response.status == 200, content
    if response.getheader("content-type") == "application/json":
        return [json.loads(content)["choices"][0]["text"]]
    events = content.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2]]


class Kept:
    """What a connection brought."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._raw)


@contextlib.contextmanager
def served(engine: Engine, tokenizer: Tokenizer) -> Iterator[int]:
    """A server of this engine in a thread, as `partinf serve` runs it; its port."""
    server = Server(lambda: Loaded(engine, tokenizer, None), Options([MODEL]))
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    while server.front.running is None:
        time.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        server.stop()
        thread.join()


def digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@dataclass(frozen=True)
class Run:
    """One way, once, in seconds; those of the CPU are summed over the cores.

    Attributes:
        seconds: from the first request to the last answer. first: median time to the first token, where the client knows it.
        server_cpu, client_cpu, others_cpu: of the process with model and server, of the client, and of all else on this machine.
    """

    seconds: float
    first: float
    server_cpu: float
    client_cpu: float
    others_cpu: float

    @property
    def others_share(self) -> float:
        """Of the machine."""
        return self.others_cpu / self.seconds / (os.cpu_count() or 1)


def busy_seconds() -> float:
    """Of all cores since the machine started, by anybody, its host included (Linux)."""
    user, nice, system, _, _, *interrupts_and_stolen = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")


def measure(count: int, longest: int, repeats: int, rows: int) -> dict[str, Any]:
    """Rounds of all ways, of which those count during which others left the machine alone.

    Raises:
        SystemExit: the machine is too busy.
    """
    model, engine, tokenizer = load(rows, max_len=128)
    vocab_size = model.plan.model.vocab_size
    bodies = requests(count, vocab_size, longest)
    tokens = sum(body["max_tokens"] for body in bodies)
    digests = set()
    rounds: list[dict[str, Run]] = []
    tried = -1  # the first warms everything up
    with served(engine, tokenizer) as port:
        clients = Client(port, count, vocab_size, longest)

        def run(way: str) -> Run:
            mine, all_ = time.process_time(), busy_seconds()
            if way == "engine":
                seconds, texts = through_engine(engine, bodies)
                found = {"seconds": seconds, "first": 0.0, "cpu": 0.0, "digest": digest(texts)}
            else:
                found = clients.run(way)
            mine, all_ = time.process_time() - mine, busy_seconds() - all_
            digests.add(found["digest"])
            return Run(found["seconds"], found["first"], mine, found["cpu"], all_ - mine - found["cpu"])

        while len(rounds) < repeats and tried < MOST_TRIES * repeats:
            each = {way: run(way) for way in WAYS}
            others = max(one.others_share for one in each.values())
            counts = tried >= 0 and others <= QUIET
            rounds += [each] if counts else []
            tried += 1
            speeds = ", ".join(f"{way} {tokens / one.seconds:.1f}" for way, one in each.items())
            print(f"tokens/s: {speeds}; others {others:.1%} of the machine{'' if counts else ', does not count'}", file=sys.stderr)
        clients.close()
    assert len(digests) == 1, "texts differ between ways or runs"
    if len(rounds) < repeats:
        raise SystemExit(f"only {len(rounds)} of {tried} rounds were left alone; this machine is too busy")
    # Neighbours in time are compared: the machine's speed changes over minutes.
    logs = {way: [math.log(each["engine"].seconds / each[way].seconds) for each in rounds] for way in WAYS[1:]}

    def median(what: str, way: str) -> float:
        return statistics.median(getattr(each[way], what) for each in rounds)

    return {
        "model": MODEL,
        "random_weights": True,
        "rows": rows,
        "requests": count,
        "longest_answer": longest,
        "generated_tokens": tokens,
        "texts_equal": True,
        "cpus": os.cpu_count(),
        "rounds_that_count": len(rounds),
        "rounds": tried,
        "tokens_per_second": {way: tokens / median("seconds", way) for way in WAYS},
        "share_of_engine": {way: math.exp(statistics.mean(each)) for way, each in logs.items()},
        "standard_error": {way: statistics.stdev(each) / math.sqrt(len(each)) for way, each in logs.items()},
        "server_cpu_seconds": {way: median("server_cpu", way) for way in WAYS},
        "client_cpu_seconds": {way: median("client_cpu", way) for way in WAYS},
        "first_event_seconds": median("first", "http stream"),
        "runs": {way: [asdict(each[way]) for each in rounds] for way in WAYS},
    }


def table(results: dict[str, Any]) -> str:
    """The table of README.md."""
    tokens = results["generated_tokens"]
    lines = ["| | tokens/s | of the engine's | CPU of the server, ms per token | of the client |", "|---|---|---|---|---|"]
    for way in WAYS:
        share = f"{results['share_of_engine'][way]:.1%} ± {results['standard_error'][way]:.1%}" if way != "engine" else ""
        cpu = [f"{1e3 * results[f'{side}_cpu_seconds'][way] / tokens:.2f}" for side in ("server", "client")]
        lines.append(f"| {way} | {results['tokens_per_second'][way]:.0f} | {share} | {cpu[0]} | {cpu[1]} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--client", nargs=4, type=int, metavar=("PORT", "COUNT", "VOCAB", "LONGEST"))
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--longest", type=int, default=64, help="tokens of the longest answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    args = parser.parse_args()
    if args.client:
        client(*args.client)
        return 0
    results = measure(args.requests, args.longest, args.repeats, args.rows)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
