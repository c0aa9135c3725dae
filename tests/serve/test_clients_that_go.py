"""Clients that go away, are slow, or are too many."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import resource
import socket
import time
from dataclasses import replace
from typing import Any

import httpx
import pytest

from partinf.checkpoint.tokenizer import load_tokenizer
from partinf.engine import RequestTimes, SamplingParams
from partinf.serve.bodies import Bounds
from partinf.serve.connections import Outlet
from partinf.structured import Grammars, Structure
from tests.serve.support import DEMO, LIMITS, Serving, Slow, events, fake_serving, wait_until

LONG = {"model": "demo", "prompt": [5, 6, 7], "max_tokens": 120, "ignore_eos": True}
# Answers with more than the sockets between hold.
LARGE = LONG | {"prompt": [[5]] * 64, "n": 4, "max_tokens": 80, "stream": True, "logprobs": 20}


def request_bytes(body: dict[str, Any], version: str = "1.1") -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


def generated(serving: Serving) -> int:
    return serving.engine.metrics.generated_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("samples", [1, 3])
def test_a_client_that_goes_cancels_its_request(stream: bool, samples: int) -> None:
    with fake_serving(Slow(LIMITS, seconds=0.01)) as serving:
        with socket.create_connection(("127.0.0.1", serving.port)) as client:
            client.sendall(request_bytes(LONG | {"stream": stream, "n": samples}))
            wait_until(lambda: generated(serving) >= 5)
        serving.wait_idle()
        assert generated(serving) < 60 * samples
        status, _, _ = serving.post("/v1/completions", LONG | {"max_tokens": 2})
        assert status == 200


def test_a_client_that_goes_while_it_waits() -> None:
    runner = Slow(LIMITS)
    with fake_serving(runner) as serving:
        runner.gate.clear()
        with socket.create_connection(("127.0.0.1", serving.port)) as client:
            client.sendall(request_bytes(LONG | {"prompt": [[5]] * 20}))
            wait_until(lambda: serving.num_waiting_clients == 20)
        runner.gate.set()
        serving.wait_idle()
        assert generated(serving) < 100


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_takes_nothing_is_dropped(stream: bool) -> None:
    with fake_serving(bounds=Bounds(stall_seconds=0.3)) as serving:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", serving.port))
            client.sendall(request_bytes(LARGE | {"stream": stream}))
            wait_until(lambda: serving.num_waiting_clients)
            wait_until(lambda: not serving.num_waiting_clients)
            wait_until(lambda: not serving.server.server_state.connections)
        serving.wait_idle()


def test_a_slow_client_gets_all_of_its_stream() -> None:
    """The engine has long finished when it begins to read."""
    with fake_serving() as serving, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.settimeout(20)
        client.connect(("127.0.0.1", serving.port))
        client.sendall(request_bytes(LARGE, version="1.0"))
        wait_until(lambda: serving.num_waiting_clients)
        wait_until(lambda: not serving.engine.has_work)
        pieces = list[bytes]()
        while piece := client.recv(1 << 18):
            pieces.append(piece)
        content = b"".join(pieces)
        assert content.count(b'"finish_reason":"length"') == 256
        assert content.endswith(b"\n\ndata: [DONE]\n\n")
        serving.wait_idle()


def test_slow_is_not_gone() -> None:
    """The clock of a connection, on one whose client takes a little all the time, and then nothing."""

    class Transport:
        left = 1000
        aborted = False

        def get_write_buffer_size(self) -> int:
            return self.left

        def abort(self) -> None:
            self.aborted = True

    async def main() -> None:
        transport = Transport()
        outlet = Outlet(transport, stall_seconds=0.05)  # type: ignore[arg-type]
        outlet.wind()
        for _ in range(10):
            await asyncio.sleep(0.03)
            transport.left -= 10
        assert not transport.aborted
        await asyncio.sleep(0.15)
        assert transport.aborted
        outlet.stop()

    asyncio.run(main())


def test_a_client_of_http_1_0_gets_its_stream_unframed(shared: Serving) -> None:
    with socket.create_connection(("127.0.0.1", shared.port)) as client, client.makefile("rb") as answer:
        client.sendall(request_bytes(LONG | {"max_tokens": 5, "stream": True}, version="1.0"))
        head, _, content = answer.read().decode().partition("\r\n\r\n")
    assert "transfer-encoding" not in head.lower()
    assert len(events(content)) == 5


def test_heads_that_never_end() -> None:
    with fake_serving(head_seconds=0.3) as serving:
        started = time.monotonic()
        with socket.create_connection(("127.0.0.1", serving.port)) as client:
            client.settimeout(5)
            client.sendall(b"POST /v1/completions HTTP/1.1\r\n")
            try:
                while time.monotonic() < started + 15:
                    client.sendall(b"x-slow: 1\r\n")
                    time.sleep(0.05)
            except OSError:
                pass
        assert 0.2 < time.monotonic() - started < 10
        assert serving.get("/health")[0] == 200


def test_a_body_that_never_ends() -> None:
    with fake_serving(bounds=Bounds(body_seconds=0.3)) as serving, socket.create_connection(("127.0.0.1", serving.port)) as client:
        client.settimeout(5)
        client.sendall(request_bytes(LONG)[:-5])
        assert client.recv(100).startswith(b"HTTP/1.1 408")


def test_connections_are_bounded() -> None:
    with fake_serving(max_connections=3) as serving:
        held = [socket.create_connection(("127.0.0.1", serving.port)) for _ in range(3)]
        wait_until(lambda: len(serving.server.server_state.connections) == 3)
        status, content, headers = serving.get("/health")
        assert (status, headers["retry-after"], content["error"]["code"]) == (503, "1", "unavailable")
        held.pop().close()
        wait_until(lambda: len(serving.server.server_state.connections) < 3)
        assert serving.get("/health")[0] == 200
        for client in held:
            client.close()


PROMPTS = ["copy: d b a c =", "sort: q a z =", "reverse: h e y =", "repeat: 9 k =", "recall: d 4 k 12 a 7 ? k ="]


REGEX = "( [a-m]){3,12}( [n-z]){2,20}"
FIELDS: list[dict[str, Any]] = [
    {},
    {"min_tokens": 6, "stop_token_ids": [12, 13]},
    {"structured_outputs": {"regex": REGEX}},
    {"structured_outputs": {"choice": [" a b c", " x y"]}},
]


async def storm(serving: Serving, count: int, seed: int) -> tuple[list[tuple[dict[str, Any], str | None]], int]:
    """So many streams at once, some of which are left at a random place; bodies with the texts of those that were read to the end, and
    how many were there at one time."""
    rng = random.Random(seed)
    most = 0

    async def one(client: httpx.AsyncClient, number: int) -> tuple[dict[str, Any], str | None]:
        body = {
            "model": "demo",
            "prompt": rng.choice(PROMPTS),
            "max_tokens": rng.randint(8, 32),
            "temperature": rng.choice([0.0, 1.0]),
            "seed": number,
            "ignore_eos": True,
            "stream": True,
            **rng.choice(FIELDS),
        }
        leave_after = rng.choice([None, None, 0, 1, 3])
        await asyncio.sleep(rng.random() * 0.1)
        texts = []
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if leave_after is not None and len(texts) >= leave_after:
                    return body, None
                if line.startswith("data: {"):
                    texts.append(json.loads(line[6:])["choices"][0]["text"])
            assert line == "" or line == "data: [DONE]"
        return body, "".join(texts)

    async def look() -> None:
        nonlocal most
        while True:
            most = max(most, serving.num_waiting_clients)
            await asyncio.sleep(0.002)

    limits = httpx.Limits(max_connections=count, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=serving.url, limits=limits, timeout=60) as client:
        looking = asyncio.ensure_future(look())
        found = await asyncio.gather(*(one(client, number) for number in range(count)))
        looking.cancel()
        return found, most


def check_storm(serving: Serving, count: int, seed: int) -> int:
    """That every answer is the engine's own, and nothing is left behind; how many requests were there at one time."""
    found, most = asyncio.run(storm(serving, count, seed))
    serving.wait_idle()  # all pages are free
    whole = [(body, text) for body, text in found if text is not None]
    assert count * 0.2 < len(whole) < count * 0.7
    grammars = Grammars(load_tokenizer(DEMO), serving.engine.limits.vocab_size)

    def params_of(body: dict[str, Any]) -> SamplingParams:
        given = {name: body[name] for name in ("max_tokens", "min_tokens", "temperature", "seed", "ignore_eos") if name in body}
        outputs = body.get("structured_outputs", {})
        structures = [Structure.regex(outputs["regex"])] if "regex" in outputs else []
        structures += [Structure.choice(outputs["choice"])] if "choice" in outputs else []
        held = grammars(structures[0]) if structures else None
        return SamplingParams(stop_token_ids=tuple(body.get("stop_token_ids", ())), constraint=held, **given)

    params = [params_of(body) for body, _ in whole]
    expected = serving.engine.generate([body["prompt"] for body, _ in whole], params)
    assert [text for _, text in whole] == [output.text for output in expected]
    return most


def test_many_streams_and_random_disconnects(demo: Serving) -> None:
    """Most of them wait in the queue while others come and go; some answers are held to a structure or to a least length."""
    assert check_storm(demo, 200, seed=0) > 100


OURS = {"partinf", "uvicorn", "starlette", "h11", "uvloop", "_asyncio"}


def check_memory(serving: Serving, count: int, rounds: int) -> None:
    """Nothing is left of a request that has ended, but for its times, of which the engine keeps a bounded number."""

    def objects() -> int:
        gc.collect()
        return sum(str(type(each).__module__).partition(".")[0] in OURS and type(each) is not RequestTimes for each in gc.get_objects())

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    def storms(number: int) -> None:
        for seed in range(number):
            check_storm(serving, count, seed)
        wait_until(lambda: not serving.server.server_state.connections)

    storms(3)
    before, size = objects(), resident()
    storms(rounds)
    wait_until(lambda: objects() < before + 20)  # not one for each request, nor for each round; some are in the event loop's hands
    assert resident() - size < 32 << 20  # it goes up and down by more than objects take


def test_memory_stays_flat() -> None:
    with fake_serving(Slow(LIMITS), {"num_mask_threads": 2}) as serving:
        check_memory(serving, 50, rounds=4)


@pytest.mark.slow
def test_memory_stays_flat_under_the_model(demo: Serving) -> None:
    check_memory(demo, 200, rounds=10)


def test_an_iterations_events_are_whole() -> None:
    """Bytes of one character that come in different tokens reach the client as one character."""
    from tests.checkpoint.paths import FIXTURES
    from tests.serve.support import fake_engine, serving

    tokenizer = load_tokenizer(FIXTURES / "tokenizer_byte_level")
    text = " naïve 東京 👩\u200d👩\u200d👧\u200d👦 end"
    script = tokenizer.encode(text, add_bos=False)
    limits = replace(LIMITS, vocab_size=tokenizer.vocab_size)
    runner = Slow(limits, rule=lambda context: script[len(context) - 1])
    with serving(fake_engine(runner, tokenizer=tokenizer), tokenizer) as found:
        body = {"model": "demo", "prompt": [40], "max_tokens": len(script), "temperature": 0, "stream": True, "logprobs": 0}
        pieces = [event["choices"][0] for event in events(found.post("/v1/completions", body)[1])]
    assert "".join(piece["text"] for piece in pieces) == text
    assert "�" not in json.dumps(pieces, ensure_ascii=False)
    assert [token for piece in pieces for token in piece["logprobs"]["tokens"]] == [tokenizer.token_text(token) for token in script]
    offsets = [offset for piece in pieces for offset in piece["logprobs"]["text_offset"]]
    assert offsets == sorted(offsets)
    assert offsets[-1] < len(text)
