"""Answers whose every token can be worked out, on the fake runner: their form, and that a stream adds up to the whole."""

from __future__ import annotations

import asyncio
import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from partinf.checkpoint.tokenizer import load_tokenizer
from partinf.engine import FinishReason, SamplingParams
from tests.serve.support import LIMITS, Serving, Slow, events, fake_engine, fake_serving, serving

BODY = {"model": "demo", "prompt": "copy: a b =", "max_tokens": 12, "ignore_eos": True}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "copy: a ="}], "max_tokens": 12, "ignore_eos": True}


def choices_of(stream: list[Any]) -> dict[int, dict[str, Any]]:
    """What the events of a stream add up to, by index."""
    found: dict[int, dict[str, Any]] = {}
    for event in stream:
        for choice in event["choices"]:
            whole = found.setdefault(choice["index"], {"text": "", "logprobs": [], "finish_reason": None})
            assert whole["finish_reason"] is None, "nothing comes after the end"
            whole["text"] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            whole["logprobs"].append(choice["logprobs"])
            whole["finish_reason"] = choice["finish_reason"]
    return found


@pytest.mark.parametrize(
    "more", [{}, {"n": 3, "seed": 5}, {"temperature": 0, "stop": "o"}, {"temperature": 0, "logprobs": 2}, {"echo": True, "seed": 1}]
)
def test_a_stream_adds_up_to_the_whole(shared: Serving, more: dict[str, Any]) -> None:
    body = BODY | {"prompt": ["copy: a b =", "sort: c b a ="], "seed": 0} | more
    whole = shared.post("/v1/completions", body)[1]
    streamed = choices_of(events(shared.post("/v1/completions", body | {"stream": True})[1]))
    assert sorted(streamed) == [choice["index"] for choice in whole["choices"]] == list(range(2 * body.get("n", 1)))
    for choice in whole["choices"]:
        mine = streamed[choice["index"]]
        assert (mine["text"], mine["finish_reason"]) == (choice["text"], choice["finish_reason"])
        if "logprobs" in more:
            assert all(len(part["tokens"]) == 1 for part in mine["logprobs"]), "one event per token"
            for key, values in choice["logprobs"].items():
                assert [value for part in mine["logprobs"] if part for value in part[key]] == values


def test_a_chat_stream_adds_up_to_the_whole(shared: Serving) -> None:
    body = CHAT | {"seed": 3, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = shared.post("/v1/chat/completions", body)[1]
    streamed = choices_of(events(shared.post("/v1/chat/completions", body | {"stream": True})[1]))
    for choice in whole["choices"]:
        mine = streamed[choice["index"]]
        assert (mine["text"], mine["finish_reason"]) == (choice["message"]["content"], choice["finish_reason"])
        assert [entry for part in mine["logprobs"] if part for entry in part["content"]] == choice["logprobs"]["content"]


def test_samples_without_a_seed() -> None:
    """They differ from request to request, and are the same again in a server that begins again with the same seed."""

    def texts(seed: int) -> list[str]:
        with fake_serving(engine={"seed": seed}) as found:
            return [found.post("/v1/completions", BODY)[1]["choices"][0]["text"] for _ in range(3)]

    first = texts(1)
    assert len(set(first)) == 3
    assert texts(1) == first
    assert texts(2) != first


def test_usage_is_only_sent_on_request(shared: Serving) -> None:
    plain = events(shared.post("/v1/completions", BODY | {"stream": True})[1])
    assert all("usage" not in event for event in plain)
    sent = events(shared.post("/v1/completions", BODY | {"stream": True, "stream_options": {"include_usage": True}, "n": 2})[1])
    assert all(event["usage"] is None for event in sent[:-1])
    details = {"cached_tokens": 0}
    assert sent[-1]["usage"] == {"prompt_tokens": 5, "completion_tokens": 24, "total_tokens": 29, "prompt_tokens_details": details}
    assert sent[-1]["choices"] == []


def test_only_an_echo(shared: Serving) -> None:
    for more in ({}, {"stream": True}):
        status, content, _ = shared.post("/v1/completions", BODY | {"max_tokens": 0, "echo": True} | more)
        assert status == 200
        found = content if not more else events(content)[0]
        assert (found["choices"][0]["text"], found["choices"][0]["finish_reason"]) == (BODY["prompt"], "length")
        assert not more or len(events(content)) == 1
    assert shared.post("/v1/completions", BODY | {"max_tokens": 0, "echo": True})[1]["usage"]["completion_tokens"] == 0


def test_special_tokens_in_a_conversation(shared: Serving) -> None:
    """The template's `<s>` is the token, and is counted once."""
    usage = shared.post("/v1/chat/completions", CHAT)[1]["usage"]
    assert usage["prompt_tokens"] == 4  # <s>, copy:, a, =


def test_a_model_without_a_tokenizer() -> None:
    with serving(fake_engine(tokenizer=None)) as found:
        for path, body in (("completions", BODY), ("chat/completions", CHAT)):
            status, content, _ = found.post(f"/v1/{path}", body)
            assert (status, content["error"]["param"]) == (400, "messages" if "messages" in body else "prompt")
            assert "tokenizer" in content["error"]["message"]
        status, content, _ = found.post("/v1/completions", BODY | {"prompt": [5, 6], "temperature": 0, "logprobs": 0})
        assert (status, content["choices"][0]["text"]) == (200, "")
        tokens = found.engine.generate([[5, 6]], SamplingParams(max_tokens=12))[0].tokens
        assert content["choices"][0]["logprobs"]["tokens"] == [str(token) for token in tokens]
        _, content, _ = found.post("/v1/completions", BODY | {"prompt": [5, 6], "temperature": 0, "stop": "a"})
        assert "stop strings need a tokenizer" in content["error"]["message"]


def test_a_text_of_a_model_without_a_tokenizer_ends_where_its_files_say() -> None:
    """In one answer and as a stream, and at tokens that the request names; `ignore_eos` goes on."""
    tokens = fake_engine(tokenizer=None).generate([[5, 6]], SamplingParams(max_tokens=12))[0].tokens
    ends, body = len(set(tokens[:4])), BODY | {"ignore_eos": False, "prompt": [5, 6], "temperature": 0, "max_tokens": 12, "logprobs": 0}
    assert ends == 4
    with serving(fake_engine(tokenizer=None, eos_ids=(tokens[3],))) as found:
        choice = found.post("/v1/completions", body)[1]["choices"][0]
        assert (choice["finish_reason"], choice["logprobs"]["tokens"]) == ("stop", [str(token) for token in tokens[:4]])
        assert found.post("/v1/completions", body | {"ignore_eos": True})[1]["choices"][0]["finish_reason"] == "length"
        choice = found.post("/v1/completions", body | {"stop_token_ids": [tokens[1]]})[1]["choices"][0]
        assert (choice["finish_reason"], len(choice["logprobs"]["tokens"])) == ("stop", 2)
        parts = [event["choices"][0] for event in events(found.post("/v1/completions", body | {"stream": True})[1]) if event["choices"]]
        assert [token for part in parts if part["logprobs"] for token in part["logprobs"]["tokens"]] == [str(one) for one in tokens[:4]]
        assert parts[-1]["finish_reason"] == "stop"


def test_the_engines_thread_hands_over_once_per_iteration() -> None:
    """However many requests run."""
    from partinf.serve.engine_thread import EngineThread

    async def main() -> tuple[int, int]:
        engine = fake_engine(Slow(LIMITS, seconds=0.002))
        thread = EngineThread(engine)
        calls = 0
        hand_out = thread._hand_out

        def counted(*given: Any) -> None:
            nonlocal calls
            calls += 1
            hand_out(*given)

        thread._hand_out = counted  # type: ignore[method-assign]
        running = asyncio.create_task(asyncio.to_thread(thread.run))
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        inboxes = [thread.submit([[5, number]], params, stream=True) for number in range(8)]
        try:
            outputs = await asyncio.gather(*(inbox.outputs() for inbox in inboxes))
            assert all(one.finish_reason is FinishReason.LENGTH for ((one,),) in outputs)
            for inbox in inboxes:
                inbox.close()
            await thread.idle()
        finally:  # a thread that goes on would keep a failure from being seen
            thread.stop()
            await running
        return calls, engine.metrics.iterations

    calls, iterations = asyncio.run(main())
    assert calls <= iterations < 60


@pytest.mark.parametrize("prompt", ["e\u0301 x", "x e\u0301e\u0301 \u1e9b\u0323 é", "😀 e\u0301", "plain"])
@pytest.mark.parametrize("kind", ["NFC", "NFKC", "NFD"])
def test_offsets_where_the_tokenizer_normalizes(tmp_path: Path, root: Path, prompt: str, kind: str) -> None:
    """The slices of an echoed text are its tokens."""
    file = json.loads((root / "tests/fixtures/tokenizer_byte_level/tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(file | {"normalizer": {"type": kind}}))
    tokenizer = load_tokenizer(tmp_path)
    limits = replace(LIMITS, vocab_size=tokenizer.vocab_size)
    with serving(fake_engine(Slow(limits), tokenizer=tokenizer), tokenizer) as found:
        body = {"model": "demo", "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 0}
        status, content, _ = found.post("/v1/completions", body)
    assert status == 200
    (choice,) = content["choices"]
    logprobs, text = choice["logprobs"], choice["text"]
    ends = [*logprobs["text_offset"][1:], len(text)]
    spelled = [(token, text[start:end]) for token, start, end in zip(logprobs["tokens"], logprobs["text_offset"], ends, strict=True)]
    assert all(token == slice for token, slice in spelled if slice and not token.startswith("bytes:")), spelled
    assert "".join(slice for _, slice in spelled) == text
    assert text == unicodedata.normalize(kind, prompt)  # type: ignore[arg-type]
