"""Every answer has the id of its request, and the log says why a request was refused, without anything of a prompt."""

from __future__ import annotations

import http.client
import json
import logging
import threading
from collections.abc import Iterator

import pytest

from partinf.serve.server import Loaded
from tests.serve.support import Serving, Slow, fake_engine, fake_serving, serving, wait_until

GOOD = {"model": "demo", "prompt": "copy: a =", "max_tokens": 2}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "copy: a ="}], "max_tokens": 2}
SECRET = "hunter2"


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING, logger="partinf.serve"):
        yield


@pytest.mark.parametrize("path, body", [("/v1/completions", GOOD), ("/v1/chat/completions", CHAT), ("/tokenize", {"prompt": "a"})])
def test_an_id_comes_back_or_is_made(shared: Serving, path: str, body: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    streams = [{}] if path == "/tokenize" else [{}, {"stream": True}]
    for more in streams:
        assert shared.post(path, body | more, x_request_id="mine-7")[2]["x-request-id"] == "mine-7"
        first, second = (shared.post(path, body | more)[2]["x-request-id"] for _ in range(2))
        assert len(first) == len(second) == 32
        assert first != second
    assert caplog.messages == [], "what is answered is not logged"


def test_every_other_path_and_error_has_one(shared: Serving) -> None:
    for path in (
        "/health",
        "/metrics",
        "/openapi.json",
        "/version",
        "/ping",
        "/v1/models",
        "/v1/models/gpt",
        "/nothing",
        "/v1/completions",
    ):
        assert shared.get(path, **{"x-request-id": "mine-8"})[2]["x-request-id"] == "mine-8", path
    assert shared.post("/v1/completions", GOOD | {"model": "gpt"}, x_request_id="mine-9")[2]["x-request-id"] == "mine-9"


def test_ids_that_could_not_stand_in_a_line_are_replaced(shared: Serving) -> None:
    for given in ("a b", "x" * 129, "", "\u00e9"):
        found = shared.post("/v1/completions", GOOD, x_request_id=given)[2]["x-request-id"]
        assert len(found) == 32


@pytest.mark.parametrize(
    "path, body, reason",
    [
        ("/v1/completions", GOOD | {"temperature": -1, "n": 0}, "400: POST /v1/completions: n: expected `int` >= 1"),
        ("/v1/completions", GOOD | {"suffix": "x"}, "suffix is not supported"),
        ("/v1/completions", GOOD | {"model": "gpt"}, "404: POST /v1/completions: the model 'gpt' is not served"),
        ("/v1/completions", b"{", "the body is not JSON"),
        ("/v1/chat/completions", CHAT | {"tools": 3}, "tools"),
        ("/v1/chat/completions", CHAT | {"tools": [{"type": "function", "function": {"name": "f"}}]}, "template knows none"),
        ("/v1/completions", GOOD | {"structured_outputs": {"regex": "("}}, "structured_outputs.regex: "),
        ("/v1/completions", GOOD | {"response_format": {"type": "json_schema"}}, "response_format.json_schema is missing"),
        ("/v1/completions", GOOD | {"lora": "x"}, "no parameter of this endpoint"),
        ("/nothing", GOOD, "404: POST /nothing"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_the_reason_is_one_line_with_the_id(
    shared: Serving, path: str, body: object, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert shared.post(path, body, x_request_id="mine-1")[0] >= 400
    (line,) = caplog.messages
    assert line.startswith("request mine-1 refused with ")
    assert reason in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/completions", GOOD | {"prompt": {"text": SECRET}}),
        ("/v1/completions", GOOD | {"stop": [[SECRET]]}),
        ("/v1/chat/completions", CHAT | {"messages": [{"role": SECRET, "content": SECRET}]}),
        ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": SECRET, "text": SECRET}]}]}),
        ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": {"a": SECRET}}]}),
        ("/v1/chat/completions", CHAT | {"messages": [{"role": "system", "content": SECRET}]}),
        ("/v1/completions", b'{"model": "demo", "prompt": "hunter2'),
        ("/v1/completions", GOOD | {"prompt": SECRET, "suffix": SECRET}),
        ("/v1/completions", GOOD | {"prompt": SECRET * 1000}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_log_holds_nothing_of_a_prompt(shared: Serving, path: str, body: object, caplog: pytest.LogCaptureFixture) -> None:
    assert shared.post(path, body)[0] == 400
    (line,) = caplog.messages
    assert SECRET not in line


def test_a_line_cannot_be_forged_and_is_short(shared: Serving, caplog: pytest.LogCaptureFixture) -> None:
    shared.post("/v1/completions", GOOD | {"model": "a\nrequest x refused", "\u2028" * 50: 1} | {f"name\r{n}": 1 for n in range(500)})
    shared.get("/%0Arequest%20x")
    for line in caplog.messages:
        assert line.isprintable()
        assert len(line) < 700


def test_a_connection_too_many_and_a_stream_that_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    body = json.dumps(GOOD | {"stream": True, "ignore_eos": True, "max_tokens": 100}).encode()
    with fake_serving(Slow(seconds=0.05), max_connections=1, drain_seconds=0.1) as found:
        held = http.client.HTTPConnection("127.0.0.1", found.port, timeout=20)
        held.request("POST", "/v1/completions", body, {"content-type": "application/json", "x-request-id": "cut"})
        response = held.getresponse()
        status, _, headers = found.get("/health")
        assert status == 503
        assert caplog.messages == [f"request {headers['x-request-id']} refused with 503: a connection: there are 1 connections already"]
        found.server.stop()
        assert b"shutting down" in response.read()
        held.close()
    assert caplog.messages[1:] == ["request cut refused with 503: POST /v1/completions: the server is shutting down"]


def test_probes_that_have_to_wait_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    ready = threading.Event()

    def load() -> Loaded:
        assert ready.wait(20)
        return Loaded(fake_engine(), None, None)

    with serving(fake_engine(), load=load) as found:
        assert [found.get(path)[0] for path in ("/health", "/ping", "/metrics")] == [503] * 3
        assert caplog.messages == []
        assert found.get("/v1/models")[0] == 503
        ready.set()
        wait_until(lambda: found.server.front.running)
    (line,) = caplog.messages
    assert "503: GET /v1/models: the model is being loaded" in line
