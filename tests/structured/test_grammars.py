"""Answers by schemas, expressions, choices and grammars: all of them keep to what was requested, whatever the model prefers."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from decimal import Decimal
from typing import Any

import jsonschema_rs as jsonschema
import pytest

from partinf.engine import Engine, FakeRunner, FinishReason, RequestOutput, RunnerLimits, SamplingParams
from partinf.engine.constraint import allows
from partinf.foundation.errors import InvalidInput
from partinf.structured import Grammars, Structure
from tests.structured.schemas import random_schema
from tests.structured.support import EOS, TOKENIZER, in_doubt

VOCAB = 300  # the model's, beyond the tokenizer's
LIMITS = RunnerLimits(
    max_decode_rows_per_shard=16,
    max_prefill_tokens=64,
    max_prefill_slots_per_shard=16,
    page_size=16,
    pages_per_shard=16 * 64,
    num_shards=1,
    num_slots=16,
    max_len=1024,
    vocab_size=VOCAB,
)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENIZER, VOCAB)


def answers(grammars: Grammars, structures: list[Structure], **how: Any) -> list[RequestOutput]:
    engine = Engine(FakeRunner(LIMITS, in_doubt), tokenizer=TOKENIZER, lag=1)
    params = [SamplingParams(max_tokens=1000, constraint=grammars(structure), **how) for structure in structures]
    return engine.generate([[5, number % 250] for number in range(len(structures))], params)


def answer(grammars: Grammars, structure: Structure) -> str:
    (output,) = answers(grammars, [structure])
    assert output.finish_reason is FinishReason.STOP
    return output.text


def check_schemas(grammars: Grammars, count: int, seed: int) -> Counter[str]:
    """Every finished answer validates; how many finished, did not, and were refused."""
    rng, found = random.Random(seed), Counter[str]()
    accepted: list[dict[str, Any]] = []
    for _ in range(count):
        schema = random_schema(rng)
        try:
            grammars(Structure.json_schema(schema))
            accepted.append(schema)
        except InvalidInput:
            found["refused"] += 1
    outputs = answers(grammars, [Structure.json_schema(schema) for schema in accepted])
    for schema, output in zip(accepted, outputs, strict=True):
        found[output.finish_reason.value] += 1
        if output.finish_reason is FinishReason.STOP:
            validator = jsonschema.validator_for(schema, validate_formats=True)
            value = json.loads(output.text, parse_float=Decimal)  # 1e1212 is a number, and no float
            assert validator.is_valid(value), (schema, output.text)
    return found


def test_answers_by_random_schemas_are_valid(grammars: Grammars) -> None:
    found = check_schemas(grammars, 60, seed=1)
    assert found["stop"] >= 0.95 * (60 - found["refused"]), found
    assert found["refused"] < 20, found


@pytest.mark.slow
def test_answers_by_a_thousand_random_schemas_are_valid(grammars: Grammars) -> None:
    found = check_schemas(grammars, 1000, seed=2)
    print(f"1,000 random schemas: {dict(found)}")
    assert found["stop"] >= 0.95 * (1000 - found["refused"]), found
    assert 0 < found["refused"] < 300, found


def test_every_kind_of_structure(grammars: Grammars) -> None:
    assert isinstance(json.loads(answer(grammars, Structure.json_object())), dict)
    assert re.fullmatch("[a-c]{3}(-[0-9]{2}){2}", answer(grammars, Structure.regex("[a-c]{3}(-[0-9]{2}){2}")))
    texts = ['a"b\\\n', "größer", "{x}"]
    for text in texts:
        assert answer(grammars, Structure.choice([text])) == text
    assert answer(grammars, Structure.choice(texts)) in texts
    assert re.fullmatch("(ab)+!", answer(grammars, Structure.grammar('start: "ab"+ "!"')))
    assert re.fullmatch("(ab)+!", answer(grammars, Structure.grammar('root ::= "ab"+ "!"')))


def follows(grammars: Grammars, structure: Structure, text: str) -> bool:
    """Whether a text may be the answer."""
    compiled = grammars(structure)
    state, mask = compiled.start(), bytes(compiled.first_mask)
    for place, token in enumerate(TOKENIZER.encode(text), start=1):
        if not allows(mask, token):
            return False
        following = state.accept(token)
        if following is None:
            return place == len(text)
        mask = following
    return allows(mask, EOS)


def test_white_space_ends(grammars: Grammars) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
    assert follows(grammars, Structure.json_schema(schema), "[1,\n   2 ]")
    assert not follows(grammars, Structure.json_schema(schema), "[1,  2]")
    assert not follows(grammars, Structure.json_schema(schema), "[1,\n\n2]")
    assert follows(grammars, Structure.json_schema(schema, spaces=False), "[1,2]")
    assert not follows(grammars, Structure.json_schema(schema, spaces=False), "[1, 2]")


def test_samples_differ_and_share_nothing(grammars: Grammars) -> None:
    outputs = answers(grammars, [Structure.regex("[a-z]{8}")], n=6, temperature=1.0, seed=3)
    assert all(re.fullmatch("[a-z]{8}", output.text) for output in outputs)
    assert len({output.text for output in outputs}) > 3


def test_a_structure_is_compiled_once(grammars: Grammars) -> None:
    assert grammars(Structure.regex("a+b")) is grammars(Structure.regex("a+b"))


@pytest.mark.parametrize(
    ("structure", "why"),
    [
        (lambda: Structure.json_schema("{"), "json: "),
        (lambda: Structure.json_schema('{"type": "foo"}'), "json: Invalid type: foo"),
        (lambda: Structure.json_schema({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}), "Unimplemented keys"),
        (lambda: Structure.json_schema({"$ref": "https://example.com/schema.json"}), "json: Resource"),
        (lambda: Structure.json_schema({"type": "integer", "minimum": 3, "maximum": 2}), "Unsatisfiable"),
        (lambda: Structure.json_schema({"a": {1, 2}}), "cannot be written as JSON"),
        (lambda: Structure.regex("a("), "regex: .*unclosed group"),
        (lambda: Structure.regex("(?=a)b"), "regex: .*look-around"),
        (lambda: Structure.grammar("start: nothing"), 'grammar: .*unknown name: "nothing"'),
        (lambda: Structure.choice([]), "choice: at least one text"),
        (lambda: Structure.regex("a" * (1 << 18)), "regex of 262144 characters; valid: 1 to 131072"),
    ],
)
def test_what_cannot_be_held_to_is_refused_with_the_reason(grammars: Grammars, structure: Any, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        grammars(structure())


def test_texts_without_a_choice_are_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of a key or of a separator ask for the same few bytes again and again; long texts are not kept."""
    texts, encode = list[str](), type(TOKENIZER).encode_marked
    monkeypatch.setattr(type(TOKENIZER), "encode_marked", lambda self, text: texts.append(text) or encode(self, text))
    kept = Grammars(TOKENIZER, VOCAB)(Structure.regex("(ab[cd]){20}x{90}"))
    for letter in (b"c", b"d"):
        state = kept.start()
        for byte in (b"ab" + letter) * 20:
            assert state.accept(2 + byte)
    forced = Counter(text for text in texts if len(text) <= 64)
    assert forced["ab"]
    assert max(forced.values()) == 1
    assert any(len(text) > 64 for text in texts)


def test_a_structure_whose_states_are_used_up_is_compiled_anew(grammars: Grammars) -> None:
    structure = Structure.regex("([ab]*a[ab]{16}c?)+d")
    compiled = grammars(structure)
    with pytest.raises(RuntimeError, match="the answer cannot go on"):
        compiled.start().accept(2 + ord("z"))
    assert grammars(structure) is not compiled
    assert follows(grammars, structure, "a" * 17 + "d")


class Letters:
    """A vocabulary that cannot write most texts."""

    vocab_size = 5
    eos_ids = frozenset({0})

    def encode_marked(self, text: str) -> list[int]:
        raise InvalidInput("it cannot be encoded")

    def token_bytes(self, token: int) -> bytes:
        return [b"", b"a", b"b", b"ab", b"-"][token]

    def token_text(self, token: int) -> str:
        return "</s>"


def test_a_vocabulary_that_cannot_write_the_answer_is_reported() -> None:
    grammars = Grammars(Letters(), 6)
    with pytest.raises(InvalidInput, match="json: no token of the vocabulary begins such an answer"):
        grammars(Structure.json_object())
    state = grammars(Structure.regex("ab-c")).start()
    state.accept(3)
    with pytest.raises(RuntimeError, match="no token of the vocabulary can come next"):
        state.accept(4)
