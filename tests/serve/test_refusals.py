"""What is refused, with which status, in OpenAI's form, and that nothing of it harms others."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest

from partinf.serve.answers import ChatAnswer
from partinf.serve.bodies import Bounds
from tests.serve.support import LIMITS, Serving, Slow, events, fake_serving, wait_until

GOOD = {"model": "demo", "prompt": "copy: a b =", "max_tokens": 3}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "copy: a ="}]}


def refusal(serving: Serving, path: str, body: object, status: int = 400) -> dict[str, Any]:
    """The error of a request that must be refused."""
    found, content, _ = serving.post(path, body)
    assert found == status, content
    assert set(content) == {"error"}
    error: dict[str, Any] = content["error"]
    assert set(error) - {"offences"} == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def params(error: dict[str, Any]) -> set[str | None]:
    return {offence["param"] for offence in error.get("offences", [error])}


def test_every_offence_is_listed(fake: Serving) -> None:
    wrong = {
        "model": "demo",
        "prompt": "copy: a =",
        "temperature": -1,
        "top_p": 0,
        "n": "two",
        "max_tokens": 1.5,
        "stop": ["", "x"],
        "logit_bias": {"5": 101},
        "seed": True,
        "suffix": "s",
        "temprature": 1,
        "best_of": 129,
        "stream_options": {"include_usage": True},
    }
    wrong |= {"prompt": [5, 96], "stop_token_ids": [97]}  # what the engine knows is found together with what the types know
    error = refusal(fake, "/v1/completions", wrong)
    expected = set(wrong) - {"model", "stop", "logit_bias"} | {"stop[0]", "logit_bias[...]"}
    assert params(error) == expected
    assert "did you mean 'temperature'" in error["message"]
    assert error["param"] in expected


@pytest.mark.parametrize(
    "path, body, param",
    [
        ("completions", {"model": "demo"}, "prompt"),
        ("completions", GOOD | {"prompt": ""}, "prompt"),
        ("completions", GOOD | {"prompt": []}, "prompt"),
        ("completions", GOOD | {"prompt": [1, "a"]}, "prompt"),
        ("completions", GOOD | {"prompt": [96]}, "prompt"),
        ("completions", GOOD | {"prompt": [-1]}, "prompt"),
        ("completions", GOOD | {"prompt": [10**30]}, "prompt"),
        ("completions", GOOD | {"prompt": [[5], [96]]}, "prompt[1]"),
        ("completions", GOOD | {"prompt": [5] * 300}, "prompt"),
        ("completions", GOOD | {"max_tokens": 0}, "max_tokens"),
        ("completions", GOOD | {"max_tokens": 200}, "max_tokens"),
        ("completions", GOOD | {"logit_bias": {"96": 1}}, "logit_bias"),
        ("completions", GOOD | {"stop_token_ids": [96]}, "stop_token_ids"),
        ("completions", GOOD | {"prompt": [[5]] * 100, "n": 3}, "n"),
        ("completions", GOOD | {"prompt": [[5]] * 257}, "prompt"),
        ("completions", GOOD | {"logit_bias": {"a": 1}}, "logit_bias"),
        ("completions", GOOD | {"best_of": 2, "stream": True}, "best_of"),
        ("completions", GOOD | {"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ("completions", GOOD | {"stream": True, "stream_options": {"usage": True}}, "stream_options"),
        ("chat/completions", CHAT | {"messages": []}, "messages"),
        ("chat/completions", CHAT | {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ("chat/completions", CHAT | {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("chat/completions", CHAT | {"messages": [{"role": "system", "content": "x"}]}, "messages"),
        (
            "chat/completions",
            CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        ("chat/completions", CHAT | {"tools": [{"type": "function"}]}, "tools[0]"),
        ("chat/completions", CHAT | {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ("chat/completions", CHAT | {"response_format": {"type": "json_object"}}, "response_format"),
        ("chat/completions", CHAT | {"top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", CHAT | {"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
        ("chat/completions", CHAT | {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_the_parameter_is_named(shared: Serving, path: str, body: dict[str, Any], param: str) -> None:
    assert params(refusal(shared, f"/v1/{path}", body)) == {param}
    shared.wait_idle()


def test_very_many_offences_are_counted(shared: Serving) -> None:
    """An answer stays small, and is there at once."""
    started = time.monotonic()
    strange = refusal(shared, "/v1/completions", GOOD | {f"name{number}": 1 for number in range(100_000)})
    assert len(strange["offences"]) == 21
    assert strange["offences"][-1]["message"].startswith("99980 more names")
    empty = refusal(shared, "/v1/chat/completions", CHAT | {"messages": [{"role": "user"}] * 50_000})
    assert len(empty["offences"]) == 101
    assert empty["offences"][-1]["message"] == "and 49900 more"
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"\xff"',
        b'{"model": NaN}',
        b'{"model": "\\ud800"}',
        b"[" * 100_000,
        b'{"model": 1e999}',
        b'{"a":' * 5000,
    ],
)
def test_bodies_that_are_no_request(shared: Serving, raw: bytes) -> None:
    assert refusal(shared, "/v1/completions", raw)["param"] is None


def test_values_that_ask_for_nothing_are_taken(shared: Serving) -> None:
    idle = {"tools": None, "response_format": {"type": "text"}, "store": False, "user": "me", "n": None, "stop": None, "logprobs": None}
    status, content, _ = shared.post("/v1/chat/completions", CHAT | idle | {"max_tokens": 2})
    assert (status, len(content["choices"])) == (200, 1)
    assert shared.post("/v1/completions", GOOD | {"best_of": 1, "suffix": ""})[0] == 200


def test_unknown_names(shared: Serving) -> None:
    error = refusal(shared, "/v1/completions", GOOD | {"model": "gpt"}, 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "the server has demo, other-name" in error["message"]
    assert shared.get("/v1/nothing")[0] == 404
    assert shared.get("/v1/completions")[0] == 405
    assert shared.get("/v1/models/gpt")[0] == 404


def test_keys() -> None:
    with fake_serving(api_keys=["sesame", "schlüssel"]) as serving:
        for wrong in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sesame"}, {"authorization": "Basic sesame"}):
            for status, content, headers in (serving.post("/v1/completions", GOOD, **wrong), serving.get("/v1/models", **wrong)):
                assert status == 401
                assert content["error"]["type"] == "authentication_error"
                assert headers["www-authenticate"] == "Bearer"
        for key in (b"sesame", "schlüssel".encode()):
            assert serving.post("/v1/completions", GOOD, authorization=(b"Bearer " + key).decode("latin-1"))[0] == 200
        assert serving.get("/health")[0] == 200  # for probes, which have no key
        assert serving.get("/metrics")[0] == 200


def test_bodies_are_bounded_and_typed() -> None:
    with fake_serving(bounds=Bounds(body_bytes=1000)) as serving:
        fitting = json.dumps(GOOD).encode()
        assert serving.post("/v1/completions", fitting + b" " * (1000 - len(fitting)))[0] == 200
        for size in (1001, 3500, 100_000):
            error = refusal(serving, "/v1/completions", fitting + b" " * (size - len(fitting)), 413)
            assert "1000" in error["message"]
        assert serving.post("/v1/completions", GOOD, content_type="text/plain")[0] == 415
        assert serving.post("/v1/completions", GOOD, content_type="application/json; charset=utf-8")[0] == 200


def test_bodies_are_bounded_together() -> None:
    body = json.dumps(GOOD).encode()
    with fake_serving(bounds=Bounds(body_bytes=1000, all_bytes=1500)) as serving:
        with socket.create_connection(("127.0.0.1", serving.port)) as slow:
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"
            slow.sendall(head + body + b" " * 800)
            wait_until(lambda: serving.server.front._bodies._held)
            assert serving.post("/v1/completions", body + b" " * 500)[0] == 200
            status, content, headers = serving.post("/v1/completions", body + b" " * 800)
            assert (status, headers["retry-after"]) == (503, "1")
            assert "at once" in content["error"]["message"]
        wait_until(lambda: not serving.server.front._bodies._held)
        assert serving.post("/v1/completions", body + b" " * 800)[0] == 200


def test_a_full_queue() -> None:
    import concurrent.futures

    runner = Slow(LIMITS)
    with fake_serving(runner, engine={"max_waiting": 3}) as serving:
        runner.gate.clear()
        body = GOOD | {"prompt": [5, 6], "max_tokens": 4}
        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            answers = [pool.submit(serving.post, "/v1/completions", body) for _ in range(30)]
            wait_until(lambda: sum(answer.done() for answer in answers) >= 15)  # only refusals while the gate is shut
            runner.gate.set()
            found = [answer.result() for answer in answers]
        refused = [(content, headers) for status, content, headers in found if status == 429]
        assert {status for status, _, _ in found} == {200, 429}
        assert len(refused) >= 15
        for content, headers in refused:
            assert int(headers["retry-after"]) >= 1
            assert (content["error"]["type"], content["error"]["code"]) == ("rate_limit_error", "overloaded")
        serving.wait_idle()


def test_some_of_many_prompts_do_not_stay_when_others_are_refused() -> None:
    runner = Slow(LIMITS)
    with fake_serving(runner, engine={"max_waiting": 3}) as serving:
        runner.gate.clear()
        status, _, _ = serving.post("/v1/completions", GOOD | {"prompt": [[5]] * 50})
        assert status == 429
        runner.gate.set()
        serving.wait_idle()


def test_a_failing_engine_says_so_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def rule(context: object) -> int:
        if len(context) == 9:  # type: ignore[arg-type]
            raise OSError(f"device lost while it read {context}")
        return 5

    body = {"model": "demo", "prompt": [4] * 6, "max_tokens": 9, "temperature": 0}
    with fake_serving(Slow(LIMITS, rule=rule)) as serving:
        error = refusal(serving, "/v1/completions", body, 500)
        assert error["type"] == "server_error"
        status, text, _ = serving.post("/v1/completions", body | {"stream": True})
        assert status == 200
        assert '"server_error"' in text.split("\n\n")[-3]
        assert serving.post("/v1/completions", body | {"prompt": [4], "max_tokens": 3})[0] == 200
    assert "OSError" in caplog.text
    assert "4, 4" not in caplog.text + error["message"] + text


def test_an_event_that_cannot_be_written_ends_its_stream_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def event(self: ChatAnswer, prompt: int, event: object) -> None:
        raise ValueError(f"cannot write {event}")

    monkeypatch.setattr(ChatAnswer, "event", event)
    more = {"stream": True, "max_tokens": 100, "ignore_eos": True}
    with fake_serving(Slow(LIMITS, seconds=0.005)) as serving:
        status, text, _ = serving.post("/v1/chat/completions", CHAT | more)
        assert (status, events(text)[-1]["error"]["type"]) == (200, "server_error")
        serving.wait_idle()
        assert serving.engine.metrics.generated_tokens < 50  # it was cancelled
        assert events(serving.post("/v1/completions", GOOD | more)[1])[-1]["choices"][0]["finish_reason"] == "length"
    assert "ValueError" in caplog.text
    assert "TokenEvent(" not in caplog.text
