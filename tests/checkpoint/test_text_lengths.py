"""Texts that cannot fit are refused before they are encoded, those that fit never are, and encoding lets other threads run."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partinf.checkpoint.tokenizer import Tokenizer
from partinf.checkpoint.tokenizer.length import LengthBound
from partinf.foundation.errors import InvalidInput
from tests.checkpoint.tokenizer_files import TOKENIZERS, content_of, copy, each_kind
from tests.engine.support import make_engine

SWALLOWING = {"id": 400, "content": "<m>", "single_word": False, "lstrip": True, "rstrip": True, "normalized": False, "special": True}
NORMALIZERS: dict[str, Any] = {
    "nfc": {"type": "NFC"},
    "nfkd": {"type": "NFKD"},
    "lower": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]},
    "no spaces": {"type": "Replace", "pattern": {"String": " "}, "content": ""},
    "strip": {"type": "Strip", "strip_left": True, "strip_right": True},
    "by pattern": {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"},
    "accents": {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]},
}
ALPHABETS = ["ab ", "x", " \u3000\t", "e\u0301a", "the lazydog ", "<s/>unk", "İKSß\u212a", "東京🦊", "<m> a"]


def variants(root: Path) -> dict[str, Tokenizer]:
    """Tokenizers that add, change, swallow and drop text."""
    found = dict(TOKENIZERS)
    for name, normalizer in NORMALIZERS.items():
        found[name] = copy("byte_level", root / name, tokenizer=content_of("byte_level") | {"normalizer": normalizer})
    pieces = content_of("pieces_as_json")
    found["swallowing"] = copy(
        "pieces_as_json", root / "swallowing", tokenizer=pieces | {"added_tokens": [*pieces["added_tokens"], SWALLOWING]}
    )
    without_bytes = pieces["model"] | {"byte_fallback": False}
    found["unknown"] = copy("pieces_as_json", root / "unknown", tokenizer=pieces | {"model": without_bytes})
    cut = {"type": "Split", "pattern": {"String": "a"}, "behavior": "Removed", "invert": False}
    found["removed"] = copy("pieces_as_json", root / "removed", tokenizer=pieces | {"pre_tokenizer": cut})
    decoder = {"400": {"content": "<m>", "lstrip": True, "rstrip": True, "special": True}}
    config = content_of("sentencepiece", "tokenizer_config") | {"added_tokens_decoder": decoder, "legacy": False}
    found["marks"] = copy("sentencepiece", root / "marks", tokenizer_config=config)
    return found


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return variants(tmp_path_factory.mktemp("tokenizers"))


texts = st.one_of(
    st.sampled_from(ALPHABETS).flatmap(lambda alphabet: st.text(alphabet, max_size=60)),
    st.text(max_size=30).filter(lambda text: not any("\ud800" <= character <= "\udfff" for character in text)),
)


@given(text=texts, repeats=st.integers(1, 40))
def test_no_text_is_refused_that_fits(several: dict[str, Tokenizer], text: str, repeats: int) -> None:
    for name, tokenizer in several.items():
        ids = tokenizer.encode_marked(text * repeats)
        assert tokenizer._vocabulary.least_tokens(text * repeats, 10**9) <= len(ids), name
        assert tokenizer.encode_marked(text * repeats, limit=len(ids)) == ids


# Text that is normalized is measured part by part: what joins must not lie on two sides of a cut.
@pytest.mark.parametrize(
    "unit", ["é", "e\u0301", "\u1100\u1161\u11a8", "\u3131\u314f", "か\u3099", "東", "<|eot_id|>\u0338", "\u212b", "ﬁ", "🦊"]
)
@pytest.mark.parametrize("name", ["nfc", "nfkd", "lower"])
def test_normalized_text_is_measured_as_it_is_encoded(several: dict[str, Tokenizer], name: str, unit: str) -> None:
    tokenizer = several[name]
    for shift in range(3):
        text = "x" * shift + unit * (20_000 // len(unit))
        least, ids = tokenizer._vocabulary.least_tokens(text, 10**9), tokenizer.encode_marked(text)
        assert least <= len(ids)
        if name != "lower":
            assert least > len(ids) / 8


def test_a_stretch_that_cannot_be_cut_is_left_out(several: dict[str, Tokenizer]) -> None:
    assert several["nfc"]._vocabulary.least_tokens("a" + "\u0301" * 200_000 + "xyz", 10**9) in range(1, 10)


@given(tokens=st.lists(st.binary(min_size=1, max_size=6), min_size=1, max_size=6), data=st.data())
def test_the_bound_holds_for_every_way_to_cut(tokens: list[bytes], data: st.DataObject) -> None:
    bound = LengthBound(tokens, data.draw(st.sets(st.integers(0, 255)) | st.just(set(range(256)))))
    cut = data.draw(st.lists(st.sampled_from(tokens), max_size=40))
    assert bound.least(b"".join(cut)) <= len(cut)
    assert bound.least(*cut) <= len(cut)


@each_kind
@pytest.mark.parametrize("pattern", ["x", "ab", " ", "the lazy dog ", "<", "東", "</s>"])
def test_what_cannot_fit_is_refused_at_once(tokenizer: Tokenizer, pattern: str) -> None:
    text = pattern * (4_000_000 // len(pattern))
    start = time.process_time()
    with pytest.raises(InvalidInput, match=r"^the text has at least \d+ tokens, more than the 128 that fit$"):
        tokenizer.encode(text, limit=128)
    with pytest.raises(InvalidInput, match="more than the 0 that fit"):
        tokenizer.encode_marked(text, limit=0)
    assert time.process_time() - start < 3


def test_a_limit_counts_what_is_added() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    text = "x" * 800
    assert len(tokenizer.encode(text, limit=801)) == 801
    with pytest.raises(InvalidInput, match="at least 801 tokens, more than the 10 that fit"):
        tokenizer.encode(text, limit=10)


def test_a_long_token_is_no_reason_to_refuse(tmp_path: Path) -> None:
    """Runs of spaces are single tokens in many vocabularies."""
    content = content_of("byte_level")
    spaces = {
        "id": 320,
        "content": " " * 200,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
    }
    tokenizer = copy("byte_level", tmp_path, tokenizer=content | {"added_tokens": [*content["added_tokens"], spaces]})
    assert tokenizer.encode_marked(" " * 200 * 50, limit=50) == [320] * 50
    with pytest.raises(InvalidInput, match="at least 51 tokens, more than the 50"):
        tokenizer.encode_marked(" " * 200 * 51, limit=50)
    with pytest.raises(InvalidInput, match="at least 10000 tokens"):
        tokenizer.encode_marked("x" * 10_000, limit=50)


@pytest.mark.parametrize("kind", ["byte_level", "pieces_as_json"])
def test_other_threads_run_while_a_long_text_is_encoded(kind: str) -> None:
    turns, done = 0, threading.Event()

    def count() -> None:
        nonlocal turns
        while not done.wait(0.001):
            turns += 1

    other = threading.Thread(target=count)
    other.start()
    try:
        before = turns
        ids = TOKENIZERS[kind].encode("x" * 1_000_000)
        during = turns - before
    finally:
        done.set()
        other.join()
    assert len(ids) > 1_000_000
    assert during >= 5


def test_long_and_short_texts_are_encoded_alike() -> None:
    """They take different ways through the library."""
    for kind in ("byte_level", "pieces_as_json"):
        tokenizer, text = TOKENIZERS[kind], "the lazy dog naïve 東京 </s> " * 60
        backend: Any = tokenizer._vocabulary
        assert tokenizer.encode_marked(text) == backend._backend.encode(text, add_special_tokens=False).ids


@each_kind
def test_half_a_surrogate_pair(tokenizer: Tokenizer) -> None:
    for encode in (tokenizer.encode, tokenizer.encode_marked):
        with pytest.raises(InvalidInput, match="^the text holds half of a surrogate pair, which is no Unicode text$"):
            encode("a\ud800")


def test_the_engine_refuses_a_text_that_cannot_fit() -> None:
    engine = make_engine(tokenizer=TOKENIZERS["byte_level"])
    start = time.process_time()
    with pytest.raises(InvalidInput, match=r"the prompt: the text has at least \d+ tokens, more than the \d+ that fit"):
        engine.add_request("the dog " * 500_000)
    assert time.process_time() - start < 3


def test_a_text_without_a_bound_is_judged_by_its_beginning(several: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Accents without letters, which NFC may put in another order: the whole of them would be millions of ids."""
    tokenizer, encoded = several["nfc"], []
    vocabulary = tokenizer._vocabulary
    encode = vocabulary.encode
    monkeypatch.setattr(vocabulary, "encode", lambda text: encoded.append(len(text)) or encode(text))
    with pytest.raises(InvalidInput, match="more than the 100 that fit"):
        tokenizer.encode("\u0301\u0323" * 1_000_000, limit=100)
    assert 0 < max(encoded) < 100_000


def test_where_text_may_vanish_nothing_is_refused(several: dict[str, Tokenizer]) -> None:
    text = "the lazy dog b c" * 99
    unbounded = {name for name, tokenizer in several.items() if not tokenizer._vocabulary.least_tokens(text, 10**9)}
    assert unbounded == {"strip", "by pattern", "accents", "removed"}
    assert several["strip"].encode_marked(" " * 4000, limit=1) == []
