"""Special tokens: which the files name, how they stand in a text, and which of them end one."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partinf.checkpoint.tokenizer import Tokenizer, load_tokenizer
from partinf.foundation.errors import InvalidInput
from partinf.foundation.resources import find
from tests.checkpoint.tokenizer_files import TOKENIZERS, content_of, copy, each_kind

IM_END = "<|im_end|>"
FLAGS = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def settings(**more: object) -> dict[str, Any]:
    return content_of("sentencepiece", "tokenizer_config") | more


# Ids as transformers 5.24 gives them for the same files.
@pytest.mark.parametrize(
    "more, text, ids",
    [
        ({"legacy": False}, "</s>\nx", [2, 13, 387]),
        ({"legacy": False}, "<s>[INST] hi", [1, 383, 76, 81, 86, 87, 384, 342, 295]),
        ({"legacy": False}, "a</s>b", [277, 2, 358]),
        ({"legacy": False}, "</s></s> b", [2, 2, 342, 358]),
        ({"legacy": False}, "<unk>a", [0, 349]),
        ({"legacy": False}, "hi the dog", [342, 295, 262, 342, 334]),
        ({"legacy": True}, "</s>\nx", [2, 342, 13, 387]),
        ({"legacy": True}, "a</s>b", [277, 2, 342, 358]),
        ({"legacy": None}, "a</s>b", [277, 2, 342, 358]),
        ({"legacy": False, "add_prefix_space": False}, "a</s>b", [349, 2, 358]),
        ({"legacy": False, "add_prefix_space": False}, "hi the dog", [295, 262, 342, 334]),
    ],
)
def test_the_space_before_a_stretch_of_text(tmp_path: Path, more: dict[str, Any], text: str, ids: list[int]) -> None:
    tokenizer = copy("sentencepiece", tmp_path, tokenizer_config=settings(**more))
    assert tokenizer.encode_marked(text) == ids
    assert tokenizer.encode(text, add_bos=False) == ids


def test_without_the_space_a_text_survives(tmp_path: Path) -> None:
    tokenizer = copy("sentencepiece", tmp_path, tokenizer_config=settings(legacy=False, add_prefix_space=False))
    for text in ("the lazy dog", " the dog", "", "  "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@each_kind
def test_one_rule_for_special_tokens_in_plain_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_id is not None
    name = tokenizer.token_text(tokenizer.bos_id)
    assert tokenizer.encode(f"{name}the dog", add_bos=False) == tokenizer.encode_marked(f"{name}the dog")
    assert tokenizer.encode(name) == [tokenizer.bos_id, tokenizer.bos_id]


def test_the_demo_model_reads_its_marks() -> None:
    assert load_tokenizer(find("models", "demo")).encode("<s>sort: b a =") == [1, 1, 5, 12, 11, 9]


@pytest.mark.parametrize("kind", ["sentencepiece", "pieces_as_json"])
@pytest.mark.parametrize("complete", [False, True])
def test_added_tokens_are_one_id_each(tmp_path: Path, kind: str, complete: bool) -> None:
    config = settings(eos_token=IM_END, legacy=False)
    files: dict[str, object] = {"added_tokens": {IM_END: 400, "the dog": 401}}
    if complete:
        tokens = {"400": FLAGS | {"content": IM_END}, "401": FLAGS | {"content": "the dog", "special": False}}
        files = {"added_tokens": {IM_END: 401}, "generation_config": {"eos_token_id": 2}}
        config |= {"added_tokens_decoder": tokens}
    tokenizer = copy(kind, tmp_path, tokenizer_config=config, **files)
    ids = tokenizer.encode(f"a{IM_END}the dog", add_bos=False)
    assert ids[-2:] == [400, 401]
    assert ids == tokenizer.encode_marked(f"a{IM_END}the dog")
    assert tokenizer.decode(ids) == "athe dog"
    assert (tokenizer.token_text(400), tokenizer.token_bytes(400), tokenizer.token_text(401)) == (IM_END, b"", "the dog")
    assert tokenizer.eos_ids == ({2, 400} if complete else {400})
    assert tokenizer.vocab_size == 402


def test_blanks_and_words_next_to_added_tokens(tmp_path: Path) -> None:
    tokens = {
        "400": FLAGS | {"content": "<m>", "lstrip": True, "rstrip": True},
        "401": FLAGS | {"content": "tok", "special": False, "single_word": True},
        "402": FLAGS | {"content": "<m>2"},
    }
    tokenizer = copy("sentencepiece", tmp_path, tokenizer_config=settings(legacy=False, added_tokens_decoder=tokens))
    assert tokenizer.encode_marked("a <m>  b") == [277, 400, 358]
    assert tokenizer.encode_marked("<m>2<m>") == [402, 400], "the longest"
    assert 401 in tokenizer.encode_marked("a tok.")
    assert 401 not in tokenizer.encode_marked("token stok")


def test_names_of_tokens_may_share_their_beginnings(tmp_path: Path) -> None:
    tokens = {
        str(400 + place): FLAGS | {"content": name} for place, name in enumerate(["<a>", "<ab>", "<a>c", "[x|y]", "(", "<a>cd" * 400])
    }
    tokenizer = copy("sentencepiece", tmp_path, tokenizer_config=settings(added_tokens_decoder=tokens))
    assert tokenizer.encode_marked("<a><ab><a>c[x|y]((") == [400, 401, 402, 403, 404, 404]
    far = "x" * 300_000 + "<a>c" + "<a>" * 70_000
    assert tokenizer.encode_marked(far)[-70_001:] == [402] + [400] * 70_000


@pytest.mark.parametrize("kind", ["sentencepiece", "pieces_as_json"])
def test_bos_and_eos_as_the_files_say(tmp_path: Path, kind: str) -> None:
    both = copy(kind, tmp_path / "a", tokenizer_config=settings(add_bos_token=False, add_eos_token=True))
    assert both.encode("a") == [277, 2]
    assert both.encode_marked("a") == [277]
    other = copy(kind, tmp_path / "b", tokenizer_config=settings(bos_token={"content": "</s>"}, add_bos_token=True))
    assert (other.bos_id, other.encode("a")) == (2, [2, 277])
    older = {"eos_token": "<unk>", "bos_token": {"content": "</s>"}}
    mapped = copy(kind, tmp_path / "c", special_tokens_map=older, tokenizer_config={"eos_token": "</s>"})
    assert (mapped.eos_ids, mapped.bos_id) == ({0}, 2)
    alone = copy(kind, tmp_path / "d", special_tokens_map=older, tokenizer_config={"add_eos_token": None})
    assert (alone.eos_ids, alone.bos_id) == ({0}, 2)
    complete = {"eos_token": "</s>", "added_tokens_decoder": {"0": FLAGS | {"content": "<unk>"}}}
    newer = copy(kind, tmp_path / "e", special_tokens_map=older, tokenizer_config=complete)
    assert (newer.eos_ids, newer.bos_id) == ({2}, 2)


def test_ids_that_end_a_text_are_reported_where_files_differ(tmp_path: Path) -> None:
    files = {"generation_config": {"eos_token_id": 3}, "tokenizer_config": settings()}
    differ = copy("sentencepiece", tmp_path / "a", **files)
    assert differ.eos_ids == {2, 3}
    assert differ.eos_note == "a text ends at 2 </s>, 3 <0x00>: all that generation_config.json, the tokenizer name"
    agree = {"generation_config": {"eos_token_id": [2]}, "config": {"eos_token_id": 2}}
    assert copy("sentencepiece", tmp_path / "b", **agree).eos_note is None
    none = copy("byte_level", tmp_path / "c", generation_config=None, tokenizer_config=None)
    assert none.eos_note == "no file names a token that ends a text; texts end at their greatest length"
    assert none.eos_ids == set()
    absent = copy("sentencepiece", tmp_path / "d", tokenizer_config=settings(eos_token=IM_END))
    assert absent.eos_note == f"the tokenizer's EOS '{IM_END}' is no token of its vocabulary, and is left out"
    assert absent.eos_ids == {2}


@pytest.mark.parametrize(
    "files, message",
    [
        ({"generation_config": {"eos_token_id": 200}, "config": {"vocab_size": 96}}, r"generation_config.json: .* 200, .* ids are 0 to 95"),
        ({"config": {"eos_token_id": [2, -1]}}, r"config.json: eos_token_id holds -1, .* ids are 0 to 399"),
        ({"config": {"eos_token_id": 10**30}}, r"config.json: eos_token_id holds 10000"),
        ({"config": {"eos_token_id": 7, "text_config": {"vocab_size": 5}}}, "ids are 0 to 4"),
        ({"generation_config": {"eos_token_id": [True]}}, "holds true; expected an id or a list of ids"),
        ({"generation_config": {"eos_token_id": {"a": 1}}}, "expected an id or a list of ids"),
        ({"config": {"vocab_size": 2}}, r"the tokenizer's EOS '</s>' is id 2; the ids of the model are 0 to 1"),
    ],
)
def test_ends_that_no_text_reaches_are_refused(tmp_path: Path, files: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        copy("sentencepiece", tmp_path, **files)


def test_a_padded_vocabulary_may_end_a_text(tmp_path: Path) -> None:
    tokenizer = copy("sentencepiece", tmp_path, config={"vocab_size": 512, "eos_token_id": 511})
    assert tokenizer.eos_ids == {2, 511}
    assert TOKENIZERS["sentencepiece"].eos_ids == {2}


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("copies")
    added = {"added_tokens_decoder": {"400": FLAGS | {"content": IM_END}, "401": FLAGS | {"content": "ab", "special": False}}}
    made = {name: settings(legacy=legacy, **added) for name, legacy in (("first", False), ("all", True))}
    made["none"] = settings(legacy=False, add_prefix_space=False, **added)
    found = {name: copy("sentencepiece", root / name, tokenizer_config=config) for name, config in made.items()}
    composing = content_of("byte_level") | {"normalizer": {"type": "NFC"}}
    return found | {"composing": copy("byte_level", root / "composing", tokenizer=composing)}


@given(text=st.text("abe \n\u0301\u0308é東🦊", max_size=30), cut=st.integers(0, 30))
def test_any_text_survives_added_tokens_and_composing(copies: dict[str, Tokenizer], text: str, cut: int) -> None:
    for name, tokenizer in copies.items():
        # Where every stretch of text begins with a space of its own, one after a token keeps it: no tokens for that one.
        prompt = text.replace("b", "") if name == "all" else text
        ids = tokenizer.encode(prompt)
        whole = tokenizer.decode(ids)
        assert whole == (unicodedata.normalize("NFC", prompt) if name == "composing" else prompt)
        stream = tokenizer.stream()
        pieces = [stream.push(token) for token in ids]
        assert "".join(pieces) + stream.finish() == whole
        assert whole.startswith("".join(pieces[:cut]))
