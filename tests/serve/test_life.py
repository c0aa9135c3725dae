"""A server's life as its process shows it: not ready, ready, draining, gone."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from partinf.checkpoint.tokenizer import load_tokenizer
from partinf.cli import main
from partinf.engine.admission import derived_seed
from partinf.foundation import resources
from partinf.foundation.errors import InvalidInput
from partinf.serve.server import Loaded, Options, listen, serve
from tests.serve.support import events, wait_until

SECRET = "copy: s e c r e t ="
BODY = {"model": "demo", "prompt": SECRET, "temperature": 0, "ignore_eos": True}


class Process:
    """A server process and what it printed; leaves no process behind."""

    def __init__(self, command: list[str], root: Path, environment: dict[str, str | None]) -> None:
        wanted = {**os.environ, "PYTHONPATH": str(root), **environment}
        self.child = subprocess.Popen(
            [sys.executable, *command],
            env={name: value for name, value in wanted.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.child.stderr is not None
        self.errors = [self.child.stderr.readline()]
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.errors[0])
        if found is None:
            self.child.kill()
            raise AssertionError(self.errors[0] + self.child.communicate()[1])
        self.port = int(found.group(1))

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode()

    def wait_ready(self, seconds: float = 20) -> None:
        wait_until(lambda: self.ask("GET", "/health")[0] == 200, seconds)

    def wait_running(self, count: int) -> None:
        """Until so many tokens have been generated."""
        counter = re.compile(r"^partinf:generation_tokens_total\{.*\} (.*)", re.M)
        wait_until(lambda: float(counter.findall(self.ask("GET", "/metrics")[1])[0]) >= count)

    def end(self) -> tuple[int, str]:
        """Exit code and all that was printed."""
        out, errors = self.child.communicate(timeout=20)
        return self.child.returncode, out + "".join(self.errors) + errors


@contextlib.contextmanager
def process(root: Path, *command: object, **environment: str | None) -> Iterator[Process]:
    found = Process([str(word) for word in command], root, environment)
    with found.child:  # which closes its pipes
        try:
            yield found
        finally:
            found.child.kill()


@contextlib.contextmanager
def fake_process(root: Path, step_seconds: float, drain_seconds: float, load_seconds: float = 0.0) -> Iterator[Process]:
    with process(root, "-m", "tests.serve.served_process", step_seconds, drain_seconds, load_seconds) as found:
        yield found


def test_ready_only_when_warm(root: Path) -> None:
    with fake_process(root, 0, 5, load_seconds=1) as server:
        for method, path, body in (("GET", "/health", None), ("POST", "/v1/completions", BODY), ("GET", "/v1/models", None)):
            status, text = server.ask(method, path, body)
            assert status == 503
            assert "being loaded" in json.loads(text)["error"]["message"]
        server.wait_ready()
        assert server.ask("POST", "/v1/completions", BODY)[0] == 200
        server.child.send_signal(signal.SIGTERM)
        code, printed = server.end()
    assert code == 0
    assert "ready: nothing to compile" in printed


def test_a_model_that_cannot_be_loaded() -> None:
    def load() -> Loaded:
        raise InvalidInput("no such weights")

    with listen("127.0.0.1", 0) as listener, pytest.raises(InvalidInput, match="no such weights"):
        serve(listener, load, Options(["demo"]))


def test_a_port_that_is_taken() -> None:
    with listen("127.0.0.1", 0) as listener, pytest.raises(InvalidInput, match=r"--port \d+: .*[Aa]ddress"):
        listen("127.0.0.1", listener.getsockname()[1])


def test_bad_flags_are_listed_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["--port", "99999", "--max-num-seqs", "0", "--max-num-batched-tokens", "0", "--scheduler", "fcsf", "--api-key", ""]
    wrong += [
        "--coordinator",
        "here",
        "--max-model-len",
        "-1",
        "--chat-template",
        "nowhere",
        "--layout",
        "ws-9d",
        "--shutdown-timeout",
        "nan",
    ]
    assert main(["serve", "--model", "demo", *wrong]) == 2
    errors = capsys.readouterr().err
    named = [flag for flag in wrong if flag.startswith("--")]
    assert [flag for flag in named if flag != "--layout" and flag.strip("-").replace("-", " ") not in errors.replace("-", " ")] == []
    assert "did you mean 'fcfs'?" in errors
    assert "unknown layout 'ws-9d'" in errors
    assert main(["serve", "--model", "gpt3-13b"]) == 2
    assert "without weights" in capsys.readouterr().err


def test_a_signal_while_loading_ends_it(root: Path) -> None:
    with fake_process(root, 0, 5, load_seconds=60) as server:
        started = time.monotonic()
        server.child.send_signal(signal.SIGTERM)
        code, _ = server.end()
    assert code == 3  # the thread that loads is left behind
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_draining_finishes_what_is_in_flight_and_takes_nothing_new(root: Path, sent: signal.Signals) -> None:
    with fake_process(root, 0.02, 20) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        server.wait_ready()
        whole = pool.submit(server.ask, "POST", "/v1/completions", BODY | {"max_tokens": 60})
        streamed = pool.submit(server.ask, "POST", "/v1/completions", BODY | {"max_tokens": 60, "stream": True})
        server.wait_running(4)
        server.child.send_signal(sent)
        time.sleep(0.2)
        status, text = server.ask("POST", "/v1/completions", BODY)
        assert (status, json.loads(text)["error"]["message"]) == (503, "the server is shutting down")
        assert server.ask("GET", "/health")[0] == 503
        status, text = whole.result()
        assert (status, json.loads(text)["usage"]["completion_tokens"]) == (200, 60)
        status, text = streamed.result()
        assert (status, events(text)[-1]["choices"][0]["finish_reason"]) == (200, "length")
        code, printed = server.end()
    assert code == 0
    assert "draining: 2 requests" in printed
    assert "cancelling" not in printed
    assert "e c r" not in printed  # nothing of a prompt


def test_draining_is_bounded(root: Path) -> None:
    with fake_process(root, 0.1, 0.5) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        server.wait_ready()
        whole = pool.submit(server.ask, "POST", "/v1/completions", BODY | {"max_tokens": 100})
        streamed = pool.submit(server.ask, "POST", "/v1/completions", BODY | {"max_tokens": 100, "stream": True})
        server.wait_running(4)
        started = time.monotonic()
        server.child.send_signal(signal.SIGTERM)
        assert whole.result()[0] == 503
        last = events(streamed.result()[1])[-1]
        assert last["error"]["message"] == "the server is shutting down"
        code, printed = server.end()
    assert time.monotonic() - started < 9  # of 10 seconds that the answers would take
    assert code == 0
    assert "time is up: cancelling 2 requests" in printed


def test_a_second_signal_ends_at_once(root: Path) -> None:
    with fake_process(root, 0.1, 60) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        server.wait_ready()
        answer = pool.submit(server.ask, "POST", "/v1/completions", BODY | {"max_tokens": 100})
        server.wait_running(2)
        server.child.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        started = time.monotonic()
        server.child.send_signal(signal.SIGTERM)
        code, _ = server.end()
        assert isinstance(answer.exception(), OSError | http.client.HTTPException)
    assert code == 128 + signal.SIGTERM
    assert time.monotonic() - started < 8  # of 10 seconds that the answer would take


def test_the_command_serves_the_demo_model(root: Path) -> None:
    command = ["-m", "partinf", "serve", "--model", "demo", "--slice", "cpu:1", "--port", 0, "--max-num-seqs", 4, "--max-model-len", 64]
    command += ["--served-model-name", "tiny", "small", "--api-key", "sesame", "--max-num-batched-tokens", 68, "--scheduler", "mlfq"]
    command += ["--host", "127.0.0.1", "--seed", 3]
    with process(root, *command) as server:
        server.wait_ready(120)
        assert server.ask("GET", "/v1/models")[0] == 401
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        headers = {"content-type": "application/json", "authorization": "Bearer sesame"}

        def ask(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
            connection.request(method, path, json.dumps(body), headers)
            return json.loads(connection.getresponse().read())

        with contextlib.closing(connection):
            drawn = BODY | {"model": "tiny", "temperature": 1.5}
            first = ask("POST", "/v1/completions", drawn)["choices"]
            assert ask("POST", "/v1/completions", drawn | {"seed": derived_seed(3, "0-0")})["choices"] == first
            for name in ("small", "tiny"):
                content = ask("POST", "/v1/completions", BODY | {"model": name, "ignore_eos": False})
                assert (content["model"], content["choices"][0]["text"]) == ("tiny", " s e c r e t")
            cards = ask("GET", "/v1/models")["data"]
            assert [(card["id"], card["max_model_len"]) for card in cards] == [("tiny", 64), ("small", 64)]
        server.child.send_signal(signal.SIGTERM)
        code, printed = server.end()
    assert code == 0
    assert re.search(r"; chat template: \S*demo/\w+", printed)
    assert re.search(r"ready: [1-9] programs compiled, 0 loaded in \d+\.\d s", printed)
    assert re.search(r"ready: .*; slow grammars on (1 thread|2 threads)", printed)
    assert "e c r" not in printed


@pytest.mark.slow
def test_a_directory_without_a_tokenizer_is_served_by_token_ids(root: Path, tmp_path: Path) -> None:
    """Whole and as a stream, up to the end that its files name; whatever needs text is refused and harms nothing."""
    demo = resources.find("models", "demo")
    bare = Path(shutil.copytree(demo, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "chat_template*")))
    ids = load_tokenizer(demo).encode("sort: d b a c =")
    command = ["-m", "partinf", "serve", "--model", bare, "--slice", "cpu:1", "--port", 0, "--max-num-seqs", 4, "--max-model-len", 64]
    with process(root, *command) as server:
        server.wait_ready(240)
        (name,) = (card["id"] for card in json.loads(server.ask("GET", "/v1/models")[1])["data"])
        body = {"model": name, "prompt": ids, "temperature": 0, "logprobs": 0, "max_tokens": 16}
        for wrong in ({"prompt": "sort: d b a c ="}, {"prompt": [*ids, 1 << 20]}, {"stop": "c"}):
            assert server.ask("POST", "/v1/completions", body | wrong)[0] == 400, wrong
        assert server.ask("POST", "/tokenize", {"model": name, "prompt": "a"})[0] == 400
        status, content = server.ask("POST", "/v1/completions", body)
        (choice,) = json.loads(content)["choices"]
        assert (status, choice["finish_reason"]) == (200, "stop")
        tokens = choice["logprobs"]["tokens"]
        assert load_tokenizer(demo).decode([int(token) for token in tokens]) == " a b c d"
        streamed = [event["choices"][0] for event in events(server.ask("POST", "/v1/completions", body | {"stream": True})[1])]
        assert [token for part in streamed if part["logprobs"] for token in part["logprobs"]["tokens"]] == tokens
        server.child.send_signal(signal.SIGTERM)
        code, printed = server.end()
    assert code == 0, printed
