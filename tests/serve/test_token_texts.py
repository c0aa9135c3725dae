"""Where the tokens of an answer stand in its text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from partinf.checkpoint.tokenizer import load_tokenizer
from partinf.engine import FakeRunner
from partinf.serve.token_texts import Offsets
from tests.checkpoint.paths import FIXTURES
from tests.serve.support import LIMITS, Serving, fake_engine, serving


@pytest.fixture(scope="module")
def composing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server whose tokenizer puts letters and their accents together."""
    directory: Path = tmp_path_factory.mktemp("nfc")
    shutil.copytree(FIXTURES / "tokenizer_byte_level", directory, dirs_exist_ok=True)
    content = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps(content | {"normalizer": {"type": "NFC"}}))
    tokenizer = load_tokenizer(directory)
    with serving(fake_engine(FakeRunner(replace(LIMITS, vocab_size=tokenizer.vocab_size)), tokenizer=tokenizer), tokenizer) as found:
        yield found


@pytest.mark.parametrize("prompt", ["e\u0301 x", "the lazy dog", "a\u030a\u0301 na\u00efve \u6771", "the</s> <|eot_id|>dog"])
def test_slices_of_the_text_are_the_tokens(composing: Serving, prompt: str) -> None:
    body = {"model": "demo", "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 3, "ignore_eos": True, "seed": 1}
    (choice,) = composing.post("/v1/completions", body)[1]["choices"]
    text, offsets, tokens = choice["text"], choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
    slices = [text[start:end] for start, end in pairwise([*offsets, len(text)])]
    assert "".join(slices) == text
    for part, token in zip(slices, tokens, strict=True):
        if not token.startswith(("bytes:", "<|")):
            assert part == token


def test_an_echo_alone_is_the_text_that_was_given(composing: Serving) -> None:
    body = {"model": "demo", "prompt": "e\u0301 x", "echo": True, "max_tokens": 0}
    assert composing.post("/v1/completions", body)[1]["choices"][0]["text"] == "e\u0301 x"


def test_broken_characters_stay_with_their_tokens() -> None:
    tokenizer = load_tokenizer(FIXTURES / "tokenizer_byte_level")
    whole = tokenizer.encode_marked("\u6771")
    equals, letter = tokenizer.encode_marked("="), tokenizer.encode_marked("a")
    ids = [*letter, *whole, whole[0], *equals, whole[0], *whole]
    offsets, text = Offsets(tokenizer), tokenizer.decode(ids, continuation=True)
    assert text == "a\u6771\ufffd=\ufffd\u6771"
    begins = [offsets.push(token) for token in ids]
    assert len(whole) > 1
    assert begins == [0, *[1] * len(whole), 2, 3, 4, *[5] * len(whole)]
