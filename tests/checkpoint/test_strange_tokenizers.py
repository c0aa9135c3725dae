"""Tokenizer files of another kind: whatever is in them, reading ends in a tokenizer or in `InvalidInput`, and so does using it."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from partinf.checkpoint.tokenizer import load_tokenizer
from partinf.foundation.errors import InvalidInput
from partinf.foundation.resources import find
from tests.checkpoint.tokenizer_files import KINDS

DIRECTORIES = KINDS | {"demo": find("models", "demo")}
FILES = [
    ("byte_level", "tokenizer.json"),
    ("byte_level", "tokenizer_config.json"),
    ("byte_level", "generation_config.json"),
    ("pieces_as_json", "tokenizer.json"),
    ("sentencepiece", "tokenizer.model"),
    ("sentencepiece", "tokenizer_config.json"),
    ("demo", "tokenizer.model"),
    ("demo", "tokenizer_config.json"),
    ("demo", "generation_config.json"),
]
NUMBERS: list[Any] = [None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 1e400, -1e308, 1.5]
TEXTS: list[Any] = ["", "x", "▁", "</s>", "\0", "é" * 50, "\ud800"]
NESTED: list[Any] = [[], [1], ["a"], [[]], {}, {"a": 1}, {"content": 3}, {"type": "Sequence"}, {"type": "BPE"}, {"type": "ByteLevel"}]
ODD = NUMBERS + TEXTS + NESTED
PROBES = ["the lazy dog", "<s> é東 ▁", "", "the lazy dog " * 100]


def lay_out(kind: str, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    for file in DIRECTORIES[kind].iterdir():
        if file.suffix in (".json", ".model"):
            shutil.copy(file, to)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    keys = list(value)[:60] if isinstance(value, dict) else range(min(len(value), 40)) if isinstance(value, list) else ()
    for key in keys:
        yield from places(value[key], (*path, key))


def mutated_json(rng: random.Random, value: Any) -> Any:
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 2)):
        paths = [path for path in places(value) if path]
        if not paths or rng.random() < 0.02:
            return rng.choice(ODD)
        *outer, last = rng.choice(paths)
        at = value
        for key in outer:
            at = at[key]
        if rng.random() < 0.4:
            del at[last]
        else:
            at[last] = copy.deepcopy(rng.choice(ODD))
    return value


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    for _ in range(rng.randint(1, 3)):
        place, length, other = rng.randrange(len(data) + 1), rng.randint(1, 40), rng.randrange(len(data) + 1)
        middle = rng.choice([rng.randbytes(1), b"", rng.randbytes(length), data[other : other + length]])
        end = len(data) if rng.random() < 0.1 else rng.choice([place, place + 1, place + len(middle)])
        data = data[:place] + middle + data[end:]
    return data


def use(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    for text in PROBES:
        tokenizer.decode(tokenizer.encode(text))
        with contextlib.suppress(InvalidInput):
            tokenizer.encode(text, limit=9)
    for token in (-1, 0, 1, 2, 99, tokenizer.vocab_size):
        tokenizer.token_text(token)


def check_mutations(to: Path, seeds: range) -> tuple[int, int]:
    """How many were read, and how many refused; anything else is raised."""
    refused = 0
    for seed in seeds:
        rng = random.Random(seed)
        kind, name = FILES[seed % len(FILES)]
        lay_out(kind, to)
        data = (to / name).read_bytes()
        if name.endswith(".json") and rng.random() < 0.9:
            data = json.dumps(mutated_json(rng, json.loads(data)), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        else:
            data = mutated_bytes(rng, data)
        (to / name).write_bytes(data)
        try:
            use(to)
        except InvalidInput:
            refused += 1
        except BaseException as error:
            error.add_note(f"seed {seed}: {kind}/{name}")
            raise
    return len(seeds) - refused, refused


def test_mutated_files(tmp_path: Path) -> None:
    read, refused = check_mutations(tmp_path / "mutated", range(270))
    assert read > 50
    assert refused > 50


@pytest.mark.slow
def test_many_mutated_files(tmp_path: Path) -> None:
    check_mutations(tmp_path / "mutated", range(1000, 13_000))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", "special_tokens_map.json"]
)
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b"\xff\xfe\x00",
        b"",
        b"3",
        b'"a"',
        b"[1, 2]",
        b"null",
        b'{"a": ' + b"9" * 9999,
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_no_json_object(tmp_path: Path, kind: str, name: str, content: bytes) -> None:
    lay_out(kind, tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=name):
        load_tokenizer(tmp_path / "model")


@pytest.mark.parametrize(
    "kind, name", [*FILES, ("sentencepiece", "special_tokens_map.json"), ("sentencepiece", "added_tokens.json"), ("demo", "config.json")]
)
def test_a_directory_or_a_link_to_nowhere(tmp_path: Path, kind: str, name: str) -> None:
    lay_out(kind, tmp_path / "model")
    (tmp_path / "model" / name).unlink(missing_ok=True)
    (tmp_path / "model" / name).mkdir()
    with pytest.raises(InvalidInput, match=f"{name}: a directory"):
        load_tokenizer(tmp_path / "model")
    (tmp_path / "model" / name).rmdir()
    (tmp_path / "model" / name).symlink_to(tmp_path / "absent")
    with pytest.raises(InvalidInput, match=f"{name}: a link to .*absent, which is not there"):
        load_tokenizer(tmp_path / "model")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer_config.json", {"bos_token": 3}, "bos_token = 3; expected a string"),
        ("tokenizer_config.json", {"eos_token": {"content": ["</s>"]}}, "eos_token = {'content'"),
        ("tokenizer_config.json", {"add_bos_token": "false"}, "add_bos_token = 'false'; expected true or false"),
        ("tokenizer_config.json", {"legacy": 1}, "legacy = 1; expected true or false"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder = "),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "'x'; expected token ids"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 30: {}}}, "expected token ids, whole numbers from 0 to"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"400": {"content": ""}}}, "content is empty"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"400": {"content": "a", "special": 1}}}, "special = 1"),
        ("tokenizer_config.json", {"additional_special_tokens": ["a", 3]}, "additional_special_tokens = "),
        ("special_tokens_map.json", {"unk_token": []}, "unk_token = "),
        ("added_tokens.json", {"a": "400"}, "a = '400'; expected a whole number"),
        ("added_tokens.json", {"a": 1 << 31}, "expected a whole number"),
        ("added_tokens.json", {"": 400}, "a token without text"),
    ],
)
def test_values_of_another_type(tmp_path: Path, name: str, content: object, message: str) -> None:
    lay_out("sentencepiece", tmp_path / "model")
    (tmp_path / "model" / name).write_text(json.dumps(content))
    with pytest.raises(InvalidInput) as refused:
        load_tokenizer(tmp_path / "model")
    assert any(name in offence and message in offence for offence in refused.value.offences)


def test_every_offence_at_once(tmp_path: Path) -> None:
    lay_out("sentencepiece", tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"bos_token": 3, "legacy": "no", "added_tokens_decoder": {"-1": {}}}')
    (tmp_path / "model" / "added_tokens.json").write_text('{"a": null}')
    with pytest.raises(InvalidInput) as refused:
        load_tokenizer(tmp_path / "model")
    assert len(refused.value.offences) == 4


def test_a_vocabulary_without_tokens_is_refused(tmp_path: Path) -> None:
    lay_out("byte_level", tmp_path / "model")
    content = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    for model in ({"type": "BPE", "vocab": {}, "merges": []}, {"type": "WordLevel", "vocab": {}, "unk_token": "x"}):
        (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(content | {"model": model}))
        with pytest.raises(InvalidInput, match=r"tokenizer.json: its vocabulary is empty"):
            load_tokenizer(tmp_path / "model")


@pytest.mark.parametrize("kind", ["byte_level", "demo"])
def test_a_byte_order_mark_is_no_fault(tmp_path: Path, kind: str) -> None:
    lay_out(kind, tmp_path / "model")
    expected = load_tokenizer(tmp_path / "model").encode("sort: b a =")
    for file in (tmp_path / "model").glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_tokenizer(tmp_path / "model").encode("sort: b a =") == expected


def test_ids_with_gaps(tmp_path: Path) -> None:
    """The greatest id counts, not the number of tokens."""
    lay_out("byte_level", tmp_path / "model")
    content = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    last = max(vocab, key=vocab.__getitem__)
    vocab[last] = 900
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path / "model")
    assert tokenizer.vocab_size == 901
    assert tokenizer.token_text(900) != ""
    assert tokenizer.token_text(800) == ""


@pytest.mark.parametrize("kind, name", [("byte_level", "tokenizer.json"), ("demo", "tokenizer.model")])
@pytest.mark.parametrize(
    "content, what",
    [(b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"), (b"<!DOCTYPE html>", "an HTML or XML page")],
)
def test_what_a_download_left_instead(tmp_path: Path, kind: str, name: str, content: bytes, what: str) -> None:
    lay_out(kind, tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=f"{name}: not a .* that can be read; it looks like {what}"):
        load_tokenizer(tmp_path / "model")
