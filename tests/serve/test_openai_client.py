"""The official client, in both of its majors, against the demo model: it gets what it requests and understands what is reported to it."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from partinf.checkpoint.tokenizer import load_tokenizer
from partinf.engine import SamplingParams
from tests.serve.support import DEMO, Serving

TOKENIZER = load_tokenizer(DEMO)
SORT, SORTED = "sort: d b a c =", " a b c d"

Client = Any  # an OpenAI of either major


@pytest.fixture(scope="module", params=[2, 3])
def openai(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Both majors, one after the other under their one name: 2 is installed as usual, 3 in a directory of its own."""

    def loaded() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] == "openai"]

    before = {name: sys.modules.pop(name) for name in loaded()}
    with pytest.MonkeyPatch.context() as patch:
        if request.param == 3:
            directory = Path(sys.prefix) / "openai-3"
            assert directory.is_dir(), f"{directory} is missing; make test installs it"
            patch.syspath_prepend(directory)
        client = importlib.import_module("openai")
        assert client.__version__.startswith(f"{request.param}.")
        yield client
    for name in loaded():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture(scope="module")
def client(openai: ModuleType, demo: Serving) -> Iterator[Client]:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="unused", max_retries=0, timeout=30) as client:
        yield client


def test_models(openai: ModuleType, client: Client) -> None:
    assert [model.id for model in client.models.list()] == ["demo", "other-name"]
    assert client.models.retrieve("demo").owned_by == "partinf"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_a_completion(client: Client) -> None:
    answer = client.completions.create(model="demo", prompt=SORT, temperature=0)
    assert answer.choices[0].text == SORTED
    assert (answer.choices[0].finish_reason, answer.model, answer.object) == ("stop", "demo", "text_completion")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 5, 12)


def test_prompts_of_every_kind(client: Client) -> None:
    ids = TOKENIZER.encode(SORT)
    other = "repeat: 3 k ="
    for prompt in (ids, [SORT, other], [ids, TOKENIZER.encode(other)]):
        answer = client.completions.create(model="other-name", prompt=prompt, temperature=0)
        assert [choice.text for choice in answer.choices] == [SORTED, " k k k"][: len(answer.choices)]
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))


def test_a_stream_is_the_answer_in_pieces(client: Client) -> None:
    chunks = list(
        client.completions.create(
            model="demo", prompt=["copy: h e y =", SORT], temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    texts, reasons = ["", ""], ["", ""]
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] += choice.finish_reason or ""
    assert (texts, reasons) == ([" h e y", SORTED], ["stop", "stop"])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 6


def test_chat(client: Client) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=[
            {"role": "user", "content": "copy: a b ="},
            {"role": "assistant", "content": " a b"},
            {"role": "user", "content": [{"type": "text", "text": SORT}]},
        ],
        temperature=0,
        max_completion_tokens=20,
    )
    message = answer.choices[0].message
    assert (message.role, message.content, message.refusal) == ("assistant", SORTED, None)
    assert answer.choices[0].finish_reason == "stop"


def test_a_chat_stream(client: Client) -> None:
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": SORT}],
            temperature=0,
            stream=True,
            logprobs=True,
            top_logprobs=1,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in deltas) == SORTED
    assert deltas[-1].finish_reason == "stop"
    tokens = [entry for choice in deltas if choice.logprobs for entry in choice.logprobs.content or ()]
    assert [entry.token for entry in tokens] == [" a", " b", " c", " d", "</s>"]
    assert all(entry.top_logprobs[0].token == entry.token and entry.top_logprobs[0].logprob == entry.logprob for entry in tokens)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


def test_logprobs_and_alternatives(client: Client, demo: Serving) -> None:
    (choice,) = client.completions.create(model="demo", prompt=SORT, temperature=0, logprobs=3).choices
    found = choice.logprobs
    assert found is not None
    assert found.tokens == [" a", " b", " c", " d", "</s>"]
    assert found.text_offset == [0, 2, 4, 6, 8]
    engine = demo.engine.generate([SORT], SamplingParams(max_tokens=16, logprobs=True, top_logprobs=3))[0]
    assert found.token_logprobs == pytest.approx(list(engine.logprobs or ()), abs=1e-5)
    for alternatives, token, logprob in zip(found.top_logprobs or (), found.tokens, found.token_logprobs or (), strict=True):
        assert len(alternatives) == 3
        assert alternatives[token] == logprob == max(alternatives.values())


def test_echo_scores_the_prompt(client: Client, demo: Serving) -> None:
    """`echo` without anything generated: the log-probabilities that prefill alone gives."""
    prompt = "copy: a b ="
    (choice,) = client.completions.create(model="demo", prompt=prompt, echo=True, max_tokens=0, logprobs=0).choices
    assert (choice.text, choice.finish_reason) == (prompt, "length")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["<s>", "copy:", " a", " b", " ="]
    assert choice.logprobs.text_offset == [0, 0, 5, 7, 9]
    values = choice.logprobs.token_logprobs
    assert values is not None
    assert values[0] is None
    # Token by token, as the engine says what it would have generated.
    ids = TOKENIZER.encode(prompt)
    for place in range(1, len(ids)):
        forced = SamplingParams(max_tokens=1, logprobs=True, logit_bias={ids[place]: 100.0}, stop_token_ids=(ids[place],))
        (output,) = demo.engine.generate([ids[:place]], forced)
        assert output.tokens == (ids[place],)
        assert values[place] == pytest.approx((output.logprobs or ())[0], abs=1e-4)


def test_an_echoed_prompt_of_ids_has_its_likeliest_tokens(client: Client, demo: Serving) -> None:
    """As clients that score texts request it: whether greedy generation would give the same."""
    prompts = [TOKENIZER.encode(SORT + SORTED), [1, 5, 12, 11, 9]]
    answer = client.completions.create(model="demo", prompt=prompts, max_tokens=1, temperature=0, logprobs=1, echo=True)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        found = choice.logprobs
        assert found is not None
        tops = found.top_logprobs or []
        assert tops[0] is None
        assert len(tops) == len(prompt) + 1
        for place in range(1, len(prompt)):
            (best,) = demo.engine.generate([prompt[:place]], SamplingParams(max_tokens=1, logprobs=True, ignore_eos=True))
            text = TOKENIZER.token_text(best.tokens[0])
            assert tops[place][text] == pytest.approx((best.logprobs or ())[0], abs=1e-4)
            assert max(tops[place], key=tops[place].__getitem__) == text
            assert tops[place][found.tokens[place]] == found.token_logprobs[place]  # type: ignore[index]
            assert len(tops[place]) == 1 + (text != found.tokens[place])  # type: ignore[index]
    start = len(TOKENIZER.encode(SORT))
    sorted_tokens = answer.choices[0].logprobs
    assert all(
        max(top, key=top.__getitem__) == token
        for top, token in zip(sorted_tokens.top_logprobs[start:], sorted_tokens.tokens[start:], strict=True)
    )  # type: ignore[union-attr, index]
    (plain,) = client.completions.create(model="demo", prompt=SORT, max_tokens=0, logprobs=0, echo=True).choices
    assert all(len(top) == 1 for top in plain.logprobs.top_logprobs[1:])  # type: ignore[union-attr, index]


def test_echo_and_an_answer(client: Client) -> None:
    (choice,) = client.completions.create(model="demo", prompt=SORT, echo=True, temperature=0, logprobs=1).choices
    assert choice.text == SORT + SORTED
    found = choice.logprobs
    assert found is not None
    assert "".join(token for token in found.tokens or () if token not in ("<s>", "</s>")) == SORT + SORTED
    assert found.text_offset == sorted(found.text_offset or ())
    streamed = client.completions.create(model="demo", prompt=SORT, echo=True, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == SORT + SORTED


def test_samples_and_seeds(client: Client) -> None:
    def sample(seed: int, n: int = 4) -> list[str]:
        answer = client.completions.create(model="demo", prompt="copy: a", temperature=1.5, max_tokens=6, seed=seed, n=n)
        assert [choice.index for choice in answer.choices] == list(range(n))
        return [choice.text for choice in answer.choices]

    first = sample(7)
    assert sample(7) == first
    assert sample(7, n=2) == first[:2]
    assert sample(-7) != first
    assert len(set(first)) > 1


def test_stop_and_length(client: Client) -> None:
    (stopped,) = client.completions.create(model="demo", prompt=SORT, temperature=0, stop=" c").choices
    assert (stopped.text, stopped.finish_reason) == (" a b", "stop")
    (cut,) = client.completions.create(model="demo", prompt=SORT, temperature=0, max_tokens=2).choices
    assert (cut.text, cut.finish_reason) == (" a b", "length")
    pieces = client.completions.create(model="demo", prompt=SORT, temperature=0, stop=["b c", "zzz"], stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == " a "


def test_what_steers_sampling(client: Client, demo: Serving) -> None:
    """Every one of these reaches the engine: the answer is the engine's own to the same parameters."""
    adjusted = [
        {"logit_bias": {"14": 100}},
        {"presence_penalty": 2.0, "temperature": 0},
        {"frequency_penalty": 2.0, "temperature": 0},
        {"seed": 3, "top_p": 0.5},
        {"seed": 3, "extra_body": {"top_k": 2, "min_p": 0.2, "repetition_penalty": 1.5}},
        {"temperature": 0, "extra_body": {"ignore_eos": True}},
    ]
    for more in adjusted:
        (choice,) = client.completions.create(model="demo", prompt="repeat: 9 k =", max_tokens=8, **more).choices  # type: ignore[call-overload]
        given = {name: value for name, value in more.items() if name != "extra_body"} | more.get("extra_body", {})  # type: ignore[operator]
        given["logit_bias"] = {int(token): bias for token, bias in given.get("logit_bias", {}).items()}
        params = SamplingParams(max_tokens=8, **{"temperature": 1.0, "seed": 0} | given)
        if "seed" in given or given.get("temperature") == 0:
            assert choice.text == demo.engine.generate(["repeat: 9 k ="], params)[0].text, more
        else:
            assert len(set(choice.text.split())) == 1


def test_errors_that_the_client_knows(openai: ModuleType, client: Client) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt", prompt=SORT)
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="demo", prompt=SORT, temperature=9, n=0, suffix="x")
    assert {offence["param"] for offence in bad.value.body["offences"]} == {"temperature", "n", "suffix"}  # type: ignore[index]
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="demo", prompt=[5] * 128)
    assert (long.value.param, long.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError) as room:
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": SORT}], max_completion_tokens=500)
    assert (room.value.param, room.value.code) == ("max_completion_tokens", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="demo", messages=[{"role": "system", "content": "be kind"}])
    assert refused.value.param == "messages"
    assert "user and assistant, not system" in refused.value.message


@pytest.mark.parametrize("chat", [False, True])
def test_the_async_client(openai: ModuleType, demo: Serving, chat: bool) -> None:
    import asyncio

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="unused", max_retries=0) as client:
            if chat:
                answer = await client.chat.completions.create(
                    model="demo", messages=[{"role": "user", "content": SORT}], temperature=0, logprobs=True
                )
                assert answer.choices[0].message.content == SORTED
                logprobs = answer.choices[0].logprobs
                assert logprobs is not None
                assert math.isclose(sum(entry.logprob for entry in logprobs.content or ()), 0, abs_tol=0.1)
            else:
                stream = await client.completions.create(model="demo", prompt=SORT, temperature=0, stream=True)
                assert "".join([chunk.choices[0].text async for chunk in stream]) == SORTED

    asyncio.run(main())
