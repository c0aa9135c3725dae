"""Servers in this process, on an engine that the test can look into, and clients that misbehave."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from partinf.checkpoint.tokenizer import Tokenizer, load_tokenizer
from partinf.engine import Engine, FakeRunner, RunnerLimits
from partinf.engine.step import Step
from partinf.foundation.resources import find
from partinf.serve.chat_template import ChatTemplate, load_chat_template
from partinf.serve.server import Loaded, Options, Server, listen

DEMO = find("models", "demo")
LIMITS = RunnerLimits(
    max_decode_rows_per_shard=8,
    max_prefill_tokens=64,
    max_prefill_slots_per_shard=8,
    page_size=4,
    pages_per_shard=256,
    num_shards=1,
    num_slots=8,
    max_len=128,
    vocab_size=96,
)


def wait_until(happened: Callable[[], object], seconds: float = 20) -> None:
    """Wait for something that the server does in its own time."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.003)


class Slow(FakeRunner):
    """A fake runner whose steps take time, or wait while `gate` is shut."""

    def __init__(self, limits: RunnerLimits = LIMITS, seconds: float = 0.0, rule: Callable[[Sequence[int]], int] | None = None) -> None:
        super().__init__(limits, rule)
        self.seconds = seconds
        self.gate = threading.Event()
        self.gate.set()

    def submit(self, step: Step) -> None:
        assert self.gate.wait(60)
        time.sleep(self.seconds)
        super().submit(step)
        del self.steps[:-1]


class Serving:
    """A running server: where it is, and what is behind it."""

    def __init__(self, server: Server, port: int, engine: Engine) -> None:
        self.server, self.port, self.engine = server, port, engine
        self.url = f"http://127.0.0.1:{port}"

    def post(self, path: str, body: object, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, content and headers of a request on a connection of its own; bodies that are bytes go as they are."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._ask("POST", path, raw, {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()})

    def get(self, path: str, **headers: str) -> tuple[int, Any, dict[str, str]]:
        return self._ask("GET", path, None, headers)

    def _ask(self, method: str, path: str, raw: bytes | None, headers: dict[str, str]) -> tuple[int, Any, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, raw, headers)
            response = connection.getresponse()
            content, kept = response.read(), {name.lower(): value for name, value in response.getheaders()}
            is_json = kept.get("content-type", "").startswith("application/json")
            return response.status, json.loads(content) if is_json else content.decode(), kept

    def wait_idle(self) -> None:
        """Until the engine has nothing left; then every page must be free."""
        wait_until(lambda: not (self.engine.has_work or self.engine.load.num_running or self.num_waiting_clients))
        assert self.engine.load.page_usage == 0
        self.engine._scheduler.check()

    @property
    def num_waiting_clients(self) -> int:
        running = self.server.front.running
        return 0 if running is None else running.engine.num_requests


@contextlib.contextmanager
def serving(
    engine: Engine,
    tokenizer: Tokenizer | None = None,
    template: ChatTemplate | None = None,
    load: Callable[[], Loaded] | None = None,
    **options: Any,
) -> Iterator[Serving]:
    """A server in a thread of its own, ready unless the test brings a `load` of its own."""
    loaded = Loaded(engine, tokenizer, template)
    server = Server(load or (lambda: loaded), Options(**{"names": ["demo", "other-name"]} | options))
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listener],), name="server")
    thread.start()
    try:
        found = Serving(server, listener.getsockname()[1], engine)
        if load is None:
            wait_until(lambda: server.front.running)
        yield found
    finally:
        server.stop()
        thread.join(30)
        server.thread.join(10)
        assert not thread.is_alive()
        assert not server.thread.is_alive()


def fake_engine(runner: FakeRunner | None = None, **options: Any) -> Engine:
    """An engine on the fake runner with the demo model's tokenizer."""
    return Engine(runner or FakeRunner(LIMITS), **{"tokenizer": load_tokenizer(DEMO), "check_invariants": True, "lag": 1} | options)


@contextlib.contextmanager
def fake_serving(runner: FakeRunner | None = None, engine: dict[str, Any] | None = None, **options: Any) -> Iterator[Serving]:
    """A server on the fake runner, with the demo model's tokenizer and chat template."""
    with serving(fake_engine(runner, **engine or {}), load_tokenizer(DEMO), load_chat_template(DEMO), **options) as found:
        yield found


def events(text: str) -> list[Any]:
    """The events of a stream; the last must be [DONE]."""
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]
