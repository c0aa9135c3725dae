"""vLLM's and OpenAI's fields that change what is generated, from which prompt, and what is reported."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from typing import Any

import pytest

from partinf.checkpoint.tokenizer import load_tokenizer
from partinf.engine import FakeRunner
from partinf.serve.chat_template import ChatTemplate
from tests.serve.support import DEMO, LIMITS, Serving, events, fake_engine, serving

TOKENIZER = load_tokenizer(DEMO)
COPY = {"model": "demo", "prompt": "copy: a b =", "temperature": 0, "max_tokens": 12}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "copy: a b ="}], "temperature": 0, "max_tokens": 12}
TURNS = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def turns() -> Iterator[Serving]:
    """A template that ends every message by a token and begins the answer."""
    with serving(fake_engine(), TOKENIZER, ChatTemplate(TURNS, {})) as found:
        yield found


def ask(serving: Serving, body: dict[str, Any], chat: bool = False) -> Any:
    status, answer, _ = serving.post("/v1/chat/completions" if chat else "/v1/completions", body)
    assert status == 200, answer
    return answer


def refused(serving: Serving, body: dict[str, Any], chat: bool = False) -> Any:
    status, answer, _ = serving.post("/v1/chat/completions" if chat else "/v1/completions", body)
    assert status == 400, answer
    return answer["error"]


def test_least_tokens(demo: Serving) -> None:
    """The model ends after two words, unless it must not."""
    plain = ask(demo, COPY)
    assert (plain["choices"][0]["text"], plain["usage"]["completion_tokens"]) == (" a b", 3)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        longer = pool.submit(ask, demo, COPY | {"min_tokens": 6})
        others = [pool.submit(ask, demo, COPY | {"logit_bias": {"5": 0.0}}) for _ in range(3)]
    answer = longer.result()
    assert answer["usage"]["completion_tokens"] >= 7
    assert answer["choices"][0]["text"].startswith(" a b")
    assert all(other.result()["choices"][0]["text"] == " a b" for other in others), "the others end where they did"
    (eos,) = TOKENIZER.eos_ids
    names = ask(demo, COPY | {"min_tokens": 6, "logprobs": 0})["choices"][0]["logprobs"]["tokens"]
    assert TOKENIZER.token_text(eos) not in names[:6]
    assert ask(demo, COPY | {"min_tokens": 12})["choices"][0]["finish_reason"] == "length"
    assert ask(demo, COPY | {"stop": " a", "min_tokens": 0})["choices"][0]["text"] == ""
    assert ask(demo, COPY | {"stop": " a", "min_tokens": 2})["choices"][0]["text"] == " a b"
    assert ask(demo, COPY | {"stop_token_ids": TOKENIZER.encode("a", add_bos=False), "min_tokens": 9})["usage"]["completion_tokens"] >= 10
    assert (
        "".join(event["choices"][0]["text"] for event in events(demo.post("/v1/completions", COPY | {"min_tokens": 6, "stream": True})[1]))
        == answer["choices"][0]["text"]
    )
    demo.wait_idle()


def test_least_tokens_that_cannot_be(shared: Serving) -> None:
    assert refused(shared, COPY | {"min_tokens": 13})["param"] == "min_tokens"
    error = refused(shared, CHAT | {"min_tokens": 127, "max_tokens": None}, chat=True)
    assert (error["param"], error["code"]) == ("min_tokens", "context_length_exceeded")


def test_tokens_that_end_a_text(demo: Serving) -> None:
    """They are no part of it."""
    (b,) = TOKENIZER.encode(" b", add_bos=False)[-1:]
    answer = ask(demo, COPY | {"stop_token_ids": [b]})
    assert (answer["choices"][0]["finish_reason"], answer["choices"][0]["text"].rstrip()) == ("stop", " a")


def test_prompts_that_are_cut(demo: Serving) -> None:
    ids = TOKENIZER.encode("copy: x y z; copy: a b =", add_bos=False)
    last = TOKENIZER.encode("copy: a b =")
    for prompt in (ids, TOKENIZER.decode(ids)):
        answer = ask(demo, COPY | {"prompt": prompt, "truncate_prompt_tokens": 3, "echo": True, "max_tokens": 1})
        assert answer["usage"]["prompt_tokens"] == 3
        assert answer["choices"][0]["text"].startswith(TOKENIZER.decode(ids[-3:]))
    long = [*last] * 60
    assert refused(demo, COPY | {"prompt": long})["code"] == "context_length_exceeded"
    answer = ask(demo, COPY | {"prompt": long, "truncate_prompt_tokens": -1, "ignore_eos": True})
    assert answer["usage"]["prompt_tokens"] == LIMITS.max_len - 12
    text = "a " * 3000
    assert ask(demo, COPY | {"prompt": text, "truncate_prompt_tokens": -1})["usage"]["prompt_tokens"] == LIMITS.max_len - 12
    chat = CHAT | {"messages": [{"role": "user", "content": text}], "truncate_prompt_tokens": 50}
    assert ask(demo, chat, chat=True)["usage"]["prompt_tokens"] == 50
    assert refused(demo, COPY | {"truncate_prompt_tokens": 0})["param"] == "truncate_prompt_tokens"
    assert refused(demo, COPY | {"truncate_prompt_tokens": -2})["param"] == "truncate_prompt_tokens"
    assert refused(demo, COPY | {"prompt": "a " * 2_000_000, "truncate_prompt_tokens": 5})["code"] == "context_length_exceeded"


def test_the_best_of_several(demo: Serving) -> None:
    body = COPY | {"temperature": 2, "seed": 3, "max_tokens": 5}
    all_of_them = ask(demo, body | {"n": 6, "logprobs": 0})["choices"]
    mean = lambda choice: sum(choice["logprobs"]["token_logprobs"]) / len(choice["logprobs"]["token_logprobs"])  # noqa: E731
    want = [choice["text"] for choice in sorted(all_of_them, key=mean, reverse=True)[:2]]
    answer = ask(demo, body | {"n": 2, "best_of": 6})
    assert [choice["text"] for choice in answer["choices"]] == want
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] > 12, "all that were made are counted"
    two = ask(demo, body | {"n": 1, "best_of": 3, "prompt": ["copy: a b =", "sort: c b ="]})
    assert [choice["index"] for choice in two["choices"]] == [0, 1]
    assert refused(demo, body | {"n": 3, "best_of": 2})["param"] == "best_of"
    assert refused(demo, body | {"best_of": 2, "stream": True})["param"] == "best_of"
    assert refused(demo, body | {"best_of": 100, "prompt": ["a"] * 3})["param"] == "best_of"


def test_log_probabilities_of_prompts(demo: Serving) -> None:
    echoed = ask(demo, COPY | {"echo": True, "logprobs": 1, "max_tokens": 0})["choices"][0]["logprobs"]
    ids = TOKENIZER.encode(COPY["prompt"])
    for count in (0, 1):
        found = ask(demo, COPY | {"prompt_logprobs": count, "max_tokens": 1})["choices"][0]["prompt_logprobs"]
        assert found[0] is None
        assert len(found) == len(ids)
        for token, entry, value, top in zip(ids[1:], found[1:], echoed["token_logprobs"][1:], echoed["top_logprobs"][1:], strict=True):
            own = entry[str(token)]
            assert (own["logprob"], own["decoded_token"]) == (value, TOKENIZER.token_text(token))
            likeliest = max(top.values())
            assert own["rank"] == (1 if value == likeliest else None)
            if count:
                assert [other["logprob"] for other in entry.values() if other["rank"] == 1] == [likeliest]
            assert len(entry) <= 1 + count
    answer = ask(demo, CHAT | {"prompt_logprobs": 0, "n": 2}, chat=True)
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in ask(demo, CHAT, chat=True)
    for body, chat in ((COPY, False), (CHAT, True)):
        assert refused(demo, body | {"prompt_logprobs": 2}, chat)["param"] == "prompt_logprobs"
        assert refused(demo, body | {"prompt_logprobs": 1, "stream": True}, chat)["param"] == "prompt_logprobs"


@pytest.mark.parametrize(
    "more", [{}, {"n": 3}, {"max_tokens": 0}, {"max_tokens": 0, "n": 2}, {"max_tokens": 1}, {"prompt": ["a b", "copy: a ="]}], ids=str
)
def test_an_echo_with_log_probabilities_in_a_stream_is_that_of_the_whole_answer(demo: Serving, more: dict[str, Any]) -> None:
    body = COPY | {"echo": True, "logprobs": 1} | more
    whole = ask(demo, body)
    status, text, _ = demo.post("/v1/completions", body | {"stream": True, "stream_options": {"include_usage": True}})
    assert status == 200
    sent = events(text)
    found: dict[int, dict[str, Any]] = {}
    for event in sent:
        for choice in event["choices"]:
            one = found.setdefault(choice["index"], {"text": "", "logprobs": {}, "finish_reason": None})
            one["text"] += choice["text"]
            one["finish_reason"] = choice["finish_reason"] or one["finish_reason"]
            for name, values in (choice["logprobs"] or {}).items():
                one["logprobs"].setdefault(name, []).extend(values)
    want = {choice["index"]: {name: choice[name] for name in ("text", "logprobs", "finish_reason")} for choice in whole["choices"]}
    assert found == want
    assert sent[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_special_tokens_by_name() -> None:
    bos = TOKENIZER.bos_id
    assert bos is not None
    body = COPY | {"max_tokens": 2, "skip_special_tokens": False}
    with serving(fake_engine(FakeRunner(LIMITS, lambda context: bos)), TOKENIZER) as found:
        assert ask(found, body)["choices"][0]["text"] == "<s><s>"
        assert ask(found, body | {"skip_special_tokens": True})["choices"][0]["text"] == ""
        streamed = events(found.post("/v1/completions", body | {"stream": True, "logprobs": 0})[1])
        assert "".join(event["choices"][0]["text"] for event in streamed) == "<s><s>"
        assert [event["choices"][0]["logprobs"]["text_offset"] for event in streamed] == [[0], [3]]
        echoed = ask(found, body | {"echo": True, "logprobs": 0})["choices"][0]
        assert echoed["text"] == "<s>copy: a b =<s><s>"


def test_special_tokens_of_the_prompt(shared: Serving) -> None:
    plain = ask(shared, COPY | {"max_tokens": 1})["usage"]["prompt_tokens"]
    assert ask(shared, COPY | {"max_tokens": 1, "add_special_tokens": False})["usage"]["prompt_tokens"] == plain - 1
    plain = ask(shared, CHAT | {"max_tokens": 1}, chat=True)["usage"]["prompt_tokens"]
    assert ask(shared, CHAT | {"max_tokens": 1, "add_special_tokens": True}, chat=True)["usage"]["prompt_tokens"] == plain + 1


def test_the_last_message_is_continued(turns: Serving) -> None:
    def tokens(**more: Any) -> int:
        count: int = ask(turns, CHAT | {"max_tokens": 1, "messages": messages} | more, chat=True)["usage"]["prompt_tokens"]
        return count

    messages = [{"role": "user", "content": "copy: a b ="}, {"role": "assistant", "content": " a"}]
    count = lambda text: len(TOKENIZER.encode_marked(text))  # noqa: E731
    start = "user: copy: a b =</s>assistant:  a"
    assert tokens() == count(start + "</s>assistant: ")
    assert tokens(add_generation_prompt=False) == count(start + "</s>")
    assert tokens(continue_final_message=True) == tokens(continue_final_message=True, add_generation_prompt=False) == count(start)
    for more in ({"add_generation_prompt": True}, {"messages": [messages[0], {"role": "assistant", "content": " "}]}):
        body = CHAT | {"messages": messages, "continue_final_message": True} | more
        assert refused(turns, body, chat=True)["param"] == "continue_final_message"


def test_a_template_that_writes_another_text_cannot_continue_it() -> None:
    with serving(fake_engine(), TOKENIZER, ChatTemplate("{{ messages[0].content | upper }}", {})) as found:
        assert refused(found, CHAT | {"continue_final_message": True}, chat=True)["param"] == "continue_final_message"
    with serving(fake_engine(), TOKENIZER, ChatTemplate("{{ messages[0].content | trim }}</s>", {})) as found:
        body = CHAT | {"messages": [{"role": "user", "content": " a b "}], "continue_final_message": True, "max_tokens": 1}
        assert ask(found, body, chat=True)["usage"]["prompt_tokens"] == len(TOKENIZER.encode_marked("a b"))


def test_all_of_it_at_once(demo: Serving) -> None:
    """The fields of a request do not disturb each other, nor other requests."""
    body = COPY | {"min_tokens": 4, "stop_token_ids": [9], "truncate_prompt_tokens": 4, "best_of": 3, "n": 2, "prompt_logprobs": 1}
    body |= {"skip_special_tokens": False, "echo": True, "logprobs": 2, "temperature": 1, "seed": 1, "repetition_penalty": 1.1}
    first, second = ask(demo, body), ask(demo, body)
    assert first["choices"] == second["choices"]
    assert ask(demo, COPY)["choices"][0]["text"] == " a b"
    demo.wait_idle()
