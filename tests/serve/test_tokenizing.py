"""Texts as tokens and back, what probes ask, and pages in browsers."""

from __future__ import annotations

import http.client
from typing import Any

import pytest

from partinf.checkpoint.tokenizer import load_tokenizer
from partinf.cli.dispatch import main
from tests.serve.support import DEMO, LIMITS, Serving, fake_engine, fake_serving, serving

TOKENIZER = load_tokenizer(DEMO)
MESSAGES = [{"role": "user", "content": "copy: a b ="}]


def tokens(found: Serving, body: dict[str, Any]) -> Any:
    status, answer, _ = found.post("/tokenize", body)
    assert status == 200, answer
    return answer


def test_a_text_and_back(shared: Serving) -> None:
    ids = TOKENIZER.encode("copy: a b =")
    answer = tokens(shared, {"model": "demo", "prompt": "copy: a b ="})
    assert answer == {"count": len(ids), "max_model_len": LIMITS.max_len, "tokens": ids, "token_strs": None}
    assert tokens(shared, {"prompt": "copy: a b =", "add_special_tokens": False})["tokens"] == ids[1:]
    texts = tokens(shared, {"prompt": "copy: a b =", "return_token_strs": True})["token_strs"]
    assert texts == [TOKENIZER.token_text(token) for token in ids]
    assert tokens(shared, {"prompt": "a " * 500})["count"] > LIMITS.max_len, "it need not fit the context"
    assert tokens(shared, {"prompt": ""})["tokens"] == []
    assert shared.post("/detokenize", {"tokens": ids})[1] == {"prompt": "<s>copy: a b ="}
    assert shared.post("/detokenize", {"tokens": [], "model": "other-name"})[1] == {"prompt": ""}


def test_a_conversation(shared: Serving) -> None:
    answer = tokens(shared, {"messages": MESSAGES})
    body = {"model": "demo", "messages": MESSAGES, "max_tokens": 1}
    assert answer["count"] == shared.post("/v1/chat/completions", body)[1]["usage"]["prompt_tokens"]
    assert tokens(shared, {"messages": MESSAGES, "add_special_tokens": True})["count"] == answer["count"] + 1
    assert (
        tokens(shared, {"messages": MESSAGES, "continue_final_message": True, "chat_template_kwargs": {"x": 1}})["count"] == answer["count"]
    )


@pytest.mark.parametrize(
    "path, body, param",
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": "a " * 1_000_000}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a", "weight": 0}]}, "messages[0]"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, 96]}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_named(shared: Serving, path: str, body: dict[str, Any], param: str) -> None:
    status, answer, _ = shared.post(path, body)
    assert status == 400, answer
    offences = answer["error"].get("offences", [answer["error"]])
    assert any(offence["param"].startswith(param) for offence in offences), answer


def test_other_models_and_models_without_a_tokenizer(shared: Serving) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert shared.post(path, body | {"model": "gpt"})[0] == 404
        with serving(fake_engine(tokenizer=None)) as bare:
            assert bare.post(path, body)[0] == 400


def test_probes(shared: Serving) -> None:
    assert shared.get("/ping")[:2] == (200, "")
    assert shared.post("/ping", b"")[:2] == (200, "")
    assert set(shared.get("/version")[1]) == {"version"}


def test_keys_are_required_where_there_is_work() -> None:
    with fake_serving(api_keys=["sesame"]) as found:
        assert found.post("/tokenize", {"prompt": "a"})[0] == found.post("/detokenize", {"tokens": [1]})[0] == 401
        assert found.post("/tokenize", {"prompt": "a"}, authorization="Bearer sesame")[0] == 200
        assert found.get("/ping")[0] == found.get("/version")[0] == 200


def preflight(found: Serving, origin: str) -> tuple[int, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", found.port, timeout=20)
    asks = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}
    connection.request("OPTIONS", "/v1/completions", headers=asks)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status, {name.lower(): value for name, value in response.getheaders()}


def test_pages_of_other_origins_are_answered_when_allowed(shared: Serving) -> None:
    ours, others = "https://chat.example.org", "https://evil.example.org"
    body = {"model": "demo", "prompt": "copy: a =", "max_tokens": 1}
    with fake_serving(cors_origins=[ours]) as found:
        status, headers = preflight(found, ours)
        assert (status, headers["access-control-allow-origin"]) == (200, ours)
        assert "authorization" in headers["access-control-allow-headers"].lower()
        assert headers["x-request-id"]
        assert preflight(found, others)[0] == 400
        for more in ({}, {"stream": True}, {"temperature": -1}):
            headers = found.post("/v1/completions", body | more, origin=ours)[2]
            assert headers["access-control-allow-origin"] == ours
            assert "x-request-id" in headers["access-control-expose-headers"]
            assert "access-control-allow-origin" not in found.post("/v1/completions", body | more, origin=others)[2]
    assert preflight(shared, ours)[0] == 405
    assert "access-control-allow-origin" not in shared.post("/v1/completions", body, origin=ours)[2]


def test_what_is_no_origin_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", "demo", "--cors-origin", "example.org", "--cors-origin", "https://a.b/c", "--cors-origin", "*"]) == 2
    printed = capsys.readouterr().err
    assert "--cors-origin example.org: it is no origin" in printed
    assert "--cors-origin https://a.b/c" in printed
    assert "--cors-origin *" not in printed
