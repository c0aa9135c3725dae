"""Tokenizers: text survives the round trip, and a stream adds up to the whole without ever breaking a character."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partinf.checkpoint.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from partinf.foundation.errors import InvalidInput
from tests.checkpoint.tokenizer_files import KINDS, TOKENIZERS, copy, each_kind

TEXTS = ["the lazy dog", "a", " leading and  double spaces ", "naïve 東京 привет", "\n\ttabs\n", "<0x41> <s>", ""]
TEXTS += ["👩\u200d👩\u200d👧\u200d👦 and 🤷🏽\u200d♀️!", "🇩🇪🇯🇵"]


@each_kind
@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    if "<s>" not in text:  # the BOS token, which is no text
        assert tokenizer.decode(ids) == text


@each_kind
@pytest.mark.parametrize("text", TEXTS)
def test_stream_gives_whole_characters_that_add_up(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "�" not in "".join(pieces)
    assert stream.finish() == ""
    assert "".join(pieces) == tokenizer.decode(ids)
    if "👩" in text:
        assert "" in pieces[1:], "the emoji takes several ids, so some must wait"


@each_kind
@given(data=st.data())
def test_stream_adds_up_for_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Sampled ids are no encoding of a text: they end inside characters, and some are no UTF-8 at all."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 9), max_size=30))
    continuation = data.draw(st.booleans())
    stream = tokenizer.stream(continuation=continuation)
    pieces = [*(stream.push(token) for token in ids), stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids, continuation=continuation)


@each_kind
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<\0"), max_size=30))
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_equals_the_backends(text: str) -> None:
    """Reading bytes gives what the libraries' own decoders give."""
    import sentencepiece
    import tokenizers

    processor = sentencepiece.SentencePieceProcessor(model_file=str(KINDS["sentencepiece"] / "tokenizer.model"))
    ids = processor.encode(text)
    if "<s>" not in text:  # the library finds no special tokens
        assert TOKENIZERS["sentencepiece"].encode(text, add_bos=False) == ids
    assert TOKENIZERS["sentencepiece"].decode(ids) == processor.decode(ids)
    for kind in ("byte_level", "pieces_as_json"):
        backend = tokenizers.Tokenizer.from_file(str(KINDS[kind] / "tokenizer.json"))
        ids = backend.encode(text, add_special_tokens=False).ids
        assert TOKENIZERS[kind].encode(text, add_bos=False) == ids
        assert TOKENIZERS[kind].decode(ids) == backend.decode(ids)


def test_both_files_of_one_vocabulary_agree() -> None:
    for text in [*TEXTS, "<s>", "</s> the</s><s>dog <unk>"]:
        assert TOKENIZERS["sentencepiece"].encode(text) == TOKENIZERS["pieces_as_json"].encode(text)


def test_a_continuation_keeps_the_space_before_its_first_word() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = tokenizer.encode("lazy dog", add_bos=False)
    assert tokenizer.decode(ids, continuation=True) == " lazy dog"
    assert tokenizer.decode(ids) == "lazy dog"


def test_the_end_of_a_sequence_inside_a_character() -> None:
    for tokenizer in TOKENIZERS.values():
        ids = tokenizer.encode("ok 🦊")
        stream = tokenizer.stream()
        assert "".join(stream.push(token) for token in ids[:-1]) == "ok "
        assert stream.finish() == "�"


@each_kind
def test_ids_without_text(tokenizer: Tokenizer) -> None:
    """Special tokens and ids of a padded vocabulary are no text."""
    assert tokenizer.decode([*tokenizer.eos_ids, tokenizer.bos_id, tokenizer.vocab_size + 7, -1]) == ""


def test_bos_as_the_files_say(tmp_path: Path) -> None:
    plain = {"bos_token": "<s>"}
    assert copy("sentencepiece", tmp_path / "a", tokenizer_config=plain).encode("a")[0] == 1
    assert copy("sentencepiece", tmp_path / "b", tokenizer_config=None).encode("a")[0] == 1
    assert copy("sentencepiece", tmp_path / "c", tokenizer_config=plain | {"add_bos_token": False}).encode("a")[0] != 1
    assert copy("pieces_as_json", tmp_path / "d", tokenizer_config=plain).encode("a")[0] == 1
    bare = json.loads((KINDS["pieces_as_json"] / "tokenizer.json").read_text()) | {"post_processor": None}
    assert copy("pieces_as_json", tmp_path / "e", tokenizer=bare, tokenizer_config=plain).encode("a")[0] != 1
    as_object = {"bos_token": {"content": "<s>"}, "add_bos_token": True}
    assert copy("pieces_as_json", tmp_path / "e", tokenizer=bare, tokenizer_config=as_object).encode("a")[0] == 1
    assert copy("byte_level", tmp_path / "f", tokenizer_config=None).encode("a")[0] == 0
    off = copy("byte_level", tmp_path / "g", tokenizer_config={"bos_token": "<|begin_of_text|>", "add_bos_token": False})
    assert off.encode("a")[0] != 0
    assert off.encode("a", add_bos=True)[0] == 0


def test_a_text_ends_at_what_any_file_names(tmp_path: Path) -> None:
    assert TOKENIZERS["byte_level"].eos_ids == {1, 2}
    assert TOKENIZERS["sentencepiece"].eos_ids == {2}
    files = {"generation_config": {"eos_token_id": [7, 8]}, "config": {"eos_token_id": 9}, "tokenizer_config": {"eos_token": "<|eot_id|>"}}
    assert copy("byte_level", tmp_path / "a", **files).eos_ids == {7, 8, 9, 2}
    assert copy("byte_level", tmp_path / "b", **files | {"generation_config": {}}).eos_ids == {9, 2}
    assert copy("byte_level", tmp_path / "c", **files | {"generation_config": None, "config": {"eos_token_id": None}}).eos_ids == {2}
    assert copy("byte_level", tmp_path / "d", generation_config=None, tokenizer_config=None).eos_ids == set()
    with pytest.raises(InvalidInput, match="eos_token_id holds 'two'; expected an id"):
        copy("byte_level", tmp_path / "e", generation_config={"eos_token_id": "two"})


def test_a_limit_in_the_file_does_not_cut_prompts(tmp_path: Path) -> None:
    content = json.loads((KINDS["byte_level"] / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    tokenizer = copy("byte_level", tmp_path, tokenizer=content)
    assert tokenizer.decode(tokenizer.encode("the quick brown fox")) == "the quick brown fox"


def test_bad_directories(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no such directory"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidInput, match=r"no tokenizer: found config.json; expected tokenizer.json or tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nothing of the kind")
    with pytest.raises(InvalidInput, match="not a sentencepiece model that can be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(InvalidInput, match="not a tokenizer that can be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InvalidInput, match="not JSON"):
        load_tokenizer(tmp_path)


def test_a_decoder_of_words_is_refused(tmp_path: Path) -> None:
    content = json.loads((KINDS["byte_level"] / "tokenizer.json").read_text())
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(InvalidInput, match="decoder WordPiece is not supported"):
        copy("byte_level", tmp_path, tokenizer=content)


def test_checking_files_needs_no_jax(run_python: Callable[..., CompletedProcess[str]]) -> None:
    code = "import sys, partinf.checkpoint.tokenizer, partinf.checkpoint.hf_names; assert 'jax' not in sys.modules"
    assert run_python("-c", code).returncode == 0


@each_kind
def test_special_tokens_by_name(tokenizer: Tokenizer) -> None:
    """As chat templates write them."""
    assert tokenizer.bos_id is not None
    (eos, *_) = sorted(tokenizer.eos_ids)
    bos_name, eos_name = tokenizer.token_text(tokenizer.bos_id), tokenizer.token_text(eos)
    assert "" not in (bos_name, eos_name)
    inside = tokenizer.encode(" the dog", add_bos=False)
    assert tokenizer.encode_marked(f"{bos_name} the dog{eos_name}") == [tokenizer.bos_id, *inside, eos]
    assert tokenizer.encode_marked(eos_name * 2) == [eos, eos]
    assert tokenizer.encode_marked("") == []


@each_kind
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_for_readers(tokenizer: Tokenizer, text: str) -> None:
    """Whole characters as they are, the others by their bytes, which add up to the text."""
    ids = tokenizer.encode(text, add_bos=False)
    for token in ids:
        shown, raw = tokenizer.token_text(token), tokenizer.token_bytes(token)
        assert shown
        if shown.startswith("bytes:"):
            assert bytes.fromhex(shown[6:].replace("\\x", "")) == raw
        elif raw:
            assert shown.encode() == raw
    if "<s>" not in text:
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() in (text, f" {text}")
    assert tokenizer.token_text(tokenizer.vocab_size + 9) == ""


def test_a_directory_without_a_tokenizer_is_used_by_token_ids(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidInput):
        find_tokenizer(tmp_path)
