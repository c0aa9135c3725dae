"""Structures of strangers: the same answers as ever, and whatever one takes, it takes in a process that can be ended."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from partinf.engine import Engine, FakeRunner, FinishReason, SamplingParams
from partinf.engine.constraint import Constraint, allows
from partinf.foundation.errors import Costly, InvalidInput
from partinf.structured import Grammars, Isolated, Kind, Structure
from partinf.structured.isolated import IsolatedAnswer
from partinf.structured.messages import Bounds
from tests.structured.support import TOKENIZER, in_doubt
from tests.structured.test_grammars import LIMITS, VOCAB

# It can be read in so many ways that a token takes seconds, part of them with the interpreter's lock held.
AMBIGUOUS = Structure.grammar("start: s\ns: s s s | s s | /[a-z ]/")
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}}, "required": ["a"]}
STRUCTURES = [
    Structure.json_object(),
    Structure.json_schema(SCHEMA),
    Structure.regex("([a-f]{2}:){5}[a-f]{2}|x{3,}y"),
    Structure.choice(['a"b', "gr\N{LATIN SMALL LETTER O WITH DIAERESIS}ss"]),
]
HOSTILE = {
    "read in many ways": AMBIGUOUS,
    "states without end": Structure.regex("(.*a.{14}c?)+d"),
    "nested repetition": Structure.regex("((((((a{0,30}){0,30}){0,30}){0,30}){0,30}){0,30})"),
    "many states": Structure.regex("(.*a.{20,30}){1,50}"),
    "long text": Structure.json_schema({"type": "string", "maxLength": 1_000_000}),
    "large enum": Structure.json_schema({"enum": [f"x{number}" for number in range(10_000)]}),
    "many properties": Structure.json_schema(
        {"properties": {f"p{i}": {"properties": {f"q{k}": {"anyOf": [{}, {"type": "null"}]} for k in range(20)}} for i in range(50)}}
    ),
    "product of choices": Structure.json_schema(
        {"allOf": [{"anyOf": [{"properties": {f"a{i}_{k}": {"type": "integer"}}} for k in range(10)]} for i in range(10)]}
    ),
    "deep": Structure.json_schema('{"items":' * 100 + "{}" + "}" * 100),
    "endless reference": Structure.json_schema({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}),
    "ambiguous": Structure.grammar('start: s\ns: s s s | s s | "a" | '),
    "large multiples": Structure.json_schema({"type": "integer", "multipleOf": 1_234_567, "minimum": 1}),
}


@pytest.fixture(scope="module")
def strangers() -> Iterator[Isolated]:
    found = Isolated(TOKENIZER, VOCAB)
    yield found
    found.close()


@pytest.fixture(scope="module")
def by_process() -> Iterator[Isolated]:
    """Nothing is quick enough for it to be compiled here."""
    found = Isolated(TOKENIZER, VOCAB, Bounds(quick_seconds=-1.0))
    yield found
    found.close()


def masks(grammars: Grammars, structure: Structure, lose_at: int | None = None) -> list[bytes | None]:
    """Those of an answer that a model in doubt gives; its process is another one from one token on."""
    kept = grammars(structure)
    state, mask = kept.start(), kept.first_mask
    tokens, found = list[int](), list[bytes | None]([mask])
    for place in range(12):
        allowed = [token for token in range(VOCAB) if allows(mask, token)]
        tokens.append(allowed[in_doubt([place, *tokens]) % len(allowed)])
        if place == lose_at and isinstance(grammars, Isolated):
            grammars._own = threading.local()
        try:
            following = state.accept(tokens[-1], quick=True)
        except Costly:
            following = state.accept(tokens[-1])
        found.append(following)
        if following is None:
            break
        mask = following
    return found


def test_masks_are_those_of_one_process(strangers: Isolated, by_process: Isolated) -> None:
    """Found out here, by a process from the start or in the middle, and by one that does not know the answer yet."""
    plain = Grammars(TOKENIZER, VOCAB)
    for structure in STRUCTURES:
        expected = masks(plain, structure)
        assert masks(strangers, structure) == expected
        assert masks(by_process, structure, 2 if structure.kind is Kind.JSON else None) == expected


def test_an_answer_that_meets_the_limits_goes_on_in_a_process_and_so_do_later_ones(strangers: Isolated) -> None:
    kept, plain, here = strangers(AMBIGUOUS), Grammars(TOKENIZER, VOCAB)(AMBIGUOUS).start(), list[bool]()
    first = kept.start()
    while here[-1:] != [False] or len(here) < 3:
        token = 2 + ord("a") + len(here) % 26
        try:
            mask = first.accept(token, quick=True)
            here.append(True)
        except Costly:
            mask = first.accept(token)
            here.append(False)
        assert mask == plain.accept(token)
    assert 2 < len(here) < 100
    with pytest.raises(Costly):
        first.accept(2, quick=True)
    with pytest.raises(Costly):
        kept.start().accept(token, quick=True)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_structures_take_little_of_the_engines_process(strangers: Isolated, name: str) -> None:
    """In all of its threads, whatever they take elsewhere."""
    started = time.process_time()
    try:
        kept = strangers(HOSTILE[name])
    except InvalidInput:
        assert time.process_time() - started < 0.2
        return
    assert time.process_time() - started < 0.5
    engine = Engine(FakeRunner(LIMITS, in_doubt), tokenizer=TOKENIZER, lag=1, check_invariants=True, num_mask_threads=1)
    params = [SamplingParams(max_tokens=24, constraint=kept), SamplingParams(max_tokens=24)]
    started = time.process_time()
    hostile, fine = engine.generate([[5], [6]], params)
    assert time.process_time() - started < 24 * 0.02
    assert hostile.finish_reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.FAILED)
    alone = Engine(FakeRunner(LIMITS, in_doubt), tokenizer=TOKENIZER).generate([[6]], replace(params[1]))
    assert fine.tokens == alone[0].tokens


def write(state: Constraint, count: int) -> None:
    """So many letters."""
    for _ in range(count):
        state.accept(2 + ord("a"))


def test_what_takes_too_long_fails_alone() -> None:
    strangers = Isolated(TOKENIZER, VOCAB, Bounds(quick_seconds=-1.0, mask_seconds=0.004))
    try:
        other = strangers(Structure.regex("[a-z]{400}")).start()
        hostile = strangers(AMBIGUOUS).start()
        other.accept(2 + ord("b"))
        with pytest.raises(RuntimeError, match=r"more than 0\.004 s of a core to find out"):
            write(hostile, 150)
        assert allows(other.accept(2 + ord("c")) or b"", 2 + ord("z"))
    finally:
        strangers.close()


def test_what_takes_too_long_to_compile_is_refused_and_the_next_one_is_not() -> None:
    strangers = Isolated(TOKENIZER, VOCAB, Bounds(compile_seconds=0.02))
    try:
        with pytest.raises(InvalidInput, match=r"json: the structure takes more than 0\.02 s of a core to compile"):
            strangers(HOSTILE["large multiples"])
        assert strangers(Structure.choice(["a"])).first_mask
    finally:
        strangers.close()


def test_a_process_that_gets_no_core_is_not_reported_as_too_costly() -> None:
    clients = Isolated(TOKENIZER, VOCAB, Bounds(quick_seconds=-1.0, patience=0.3))
    try:
        state = clients(Structure.regex("[a-z]{40}")).start()
        (process,) = clients._processes
        os.kill(process.child.pid, signal.SIGSTOP)
        with pytest.raises(RuntimeError, match=r"no process had a core for the structure within 0\.3 s"):
            state.accept(2 + ord("a"))
    finally:
        clients.close()


def test_what_takes_too_much_memory_is_refused() -> None:
    strangers = Isolated(TOKENIZER, VOCAB, Bounds(memory=1 << 20))
    try:
        with pytest.raises(InvalidInput, match="json: .*(memory|process ended)"):
            strangers(HOSTILE["large enum"])
    finally:
        strangers.close()


def test_a_process_that_has_grown_gives_way_to_another(by_process: Isolated, monkeypatch: pytest.MonkeyPatch) -> None:
    state = by_process(Structure.regex("[a-z]{40}")).start()
    first = state.accept(2 + ord("a"))
    process = by_process._own.process
    ask = type(process).ask
    monkeypatch.setattr(type(process), "ask", lambda self, request: _full(ask(self, request)))
    state.accept(2 + ord("b"))
    monkeypatch.undo()
    assert by_process._own.process is None
    assert process.child.returncode is not None
    assert state.accept(2 + ord("c")) == first
    assert isinstance(state, IsolatedAnswer)


def _full(found):  # type: ignore[no-untyped-def]
    found.full = True
    return found


def test_closing_ends_what_is_being_found_out() -> None:
    strangers = Isolated(TOKENIZER, VOCAB, Bounds(quick_seconds=-1.0, mask_seconds=60))
    state, why = strangers(AMBIGUOUS).start(), list[str]()

    def go_on() -> None:
        try:
            write(state, 1000)
        except RuntimeError as error:
            why.append(str(error))

    thread = threading.Thread(target=go_on)
    thread.start()
    time.sleep(0.5)
    strangers.close()
    thread.join(10)
    assert not thread.is_alive()
    assert why
    assert all(process.child.returncode is not None for process in strangers._processes)
    strangers._own = threading.local()
    with pytest.raises(InvalidInput, match="closing"):
        strangers(Structure.choice(["b"]))
