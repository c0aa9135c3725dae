"""Structures compiled for the vocabulary of one model, in this process.

llguidance counts what it does, in compiling as in every mask, and stops at a bound. What it counts is not all that takes time: a grammar
that can be read in many ways takes seconds for a token within the bounds of `FULL`, part of them with the interpreter's lock held. A server
of untrusted clients therefore compiles by `isolated`. Only tokens are allowed whose bytes the grammar takes; a text that leaves no choice
comes in the tokens by which the tokenizer writes it.
"""

from __future__ import annotations

import importlib
import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Protocol

from partinf.foundation import extras
from partinf.foundation.errors import InvalidInput
from partinf.structured.structure import Kind, Structure

# Compiled structures: clients send the same one with each request, and a hostile one takes some 50 MB.
_REMEMBERED = 16
_TEXTS, _TEXT_LENGTH = 4096, 64  # texts without a choice whose tokens are remembered, and the bytes of the longest of them
_SHOWN = 300  # characters of an error
_COMPLETE = ("NoExtension", "EndOfSentence")  # why llguidance stops when all is well
_ALL = {"precompute_large_lexemes": False, "verbose_errors": False}
# Of llguidance: lexer fuel goes at some 50,000 per millisecond in compiling and 14,000 in a mask, items at 20,000 where a grammar can be
# read in one way alone, and by the square of those in a row where it cannot; states take 2 kB.
FULL: Mapping[str, int | bool] = MappingProxyType(
    {
        **_ALL,
        "initial_lexer_fuel": 1_000_000,
        "step_lexer_fuel": 100_000,
        "step_max_items": 20_000,
        "max_items_in_row": 1000,
        "max_lexer_states": 20_000,
        "max_grammar_size": 100_000,
    }
)
"""What a structure may take at most."""
QUICK: Mapping[str, int | bool] = MappingProxyType(
    {
        **FULL,
        "step_lexer_fuel": 20_000,
        "step_max_items": 2000,
        "max_items_in_row": 100,
        "max_lexer_states": 5000,
    }
)
"""What one may take between two steps of an engine: a millisecond or two for a token, at worst five, and 10 MB."""
_SPACES = r" |\n[ \t]{0,40}"  # a run of white space that has an end: a model in doubt writes spaces
_JSON = {"lenient": False, "coerce_one_of": False}  # what a schema cannot switch on: either would let answers through that are not valid


class Tokenizer(Protocol):
    """What is needed of a tokenizer (`partinf.checkpoint.tokenizer.Tokenizer` has it)."""

    vocab_size: int

    @property
    def eos_ids(self) -> Collection[int]: ...

    def encode_marked(self, text: str) -> list[int]: ...

    def token_bytes(self, token: int) -> bytes: ...

    def token_text(self, token: int) -> str: ...


def missing() -> str | None:
    """Why no grammar can be compiled, if the package is not installed."""
    return extras.missing(extras.SERVE, "structured output", ("llguidance",))


class TooComplex(RuntimeError):
    """A bound was met before it was known what may follow."""


class State(Protocol):
    """The state of one answer: a `partinf.engine.constraint.Constraint`."""

    def accept(self, token: int, quick: bool = False) -> bytes | None: ...


class Kept(Protocol):
    """What is remembered: a `partinf.engine.constraint.Grammar`.

    Attributes:
        worn: an answer has failed, perhaps for the states that all of its answers share; later ones begin with new ones.
    """

    @property
    def first_mask(self) -> bytes: ...

    @property
    def worn(self) -> bool: ...

    def start(self) -> State: ...


class Grammars:
    """Compiles structures, in any thread; others run meanwhile."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, limits: Mapping[str, int | bool] = FULL) -> None:
        """
        Args:
            vocab_size: of the model, which may be padded beyond the tokenizer's.
            limits: of llguidance, by its names.

        Raises:
            InvalidInput: llguidance is missing, or no token ends a text, so that none of these answers could end.
        """
        if (why := missing()) is not None:
            raise InvalidInput(why)
        llguidance: Any = importlib.import_module("llguidance")
        ends = sorted(token for token in tokenizer.eos_ids if token < vocab_size)
        if not ends:
            raise InvalidInput("structured output: the tokenizer names no token that ends a text")
        self._library = llguidance
        self._limits = llguidance.LLParserLimits(**limits)
        vocabulary = _Vocabulary(tokenizer, vocab_size, ends[0])
        self._size = vocab_size
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary), n_vocab=len(vocabulary.tokens), eos_token=ends)
        self._compiled: OrderedDict[Structure, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, structure: Structure) -> Kept:
        """The structure as a constraint of `SamplingParams`.

        Raises:
            InvalidInput: it is wrong, holds what is not supported, is too complex, or nothing in the vocabulary begins it.
        """
        with self._lock:
            known = self._compiled.get(structure)
            if known is not None and not known.worn:
                self._compiled.move_to_end(structure)
                return known
        compiled = self._make(structure)
        with self._lock:
            self._compiled[structure] = compiled
            while len(self._compiled) > _REMEMBERED:
                self._compiled.popitem(last=False)
        return compiled

    def _make(self, structure: Structure) -> Kept:
        return self.compile(structure)

    def compile(self, structure: Structure) -> Compiled:
        """As a call of this, and never from memory."""
        try:
            grammar = self._grammar(structure)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"{structure.kind}: {_short(error)}") from None
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise InvalidInput(f"{structure.kind}: {_short(matcher.get_error())}")
        compiled = Compiled(matcher, self._size)
        if matcher.is_error() or not any(compiled.first_mask):
            raise InvalidInput(f"{structure.kind}: no token of the vocabulary begins such an answer")
        return compiled

    def _grammar(self, structure: Structure) -> str:
        matcher, text = self._library.LLMatcher, structure.text
        if structure.kind is Kind.JSON:
            spaces = {"whitespace_flexible": structure.spaces} | ({"whitespace_pattern": _SPACES} if structure.spaces else {})
            found: str = matcher.grammar_from_json_schema(text, overrides=_JSON | spaces)
        elif structure.kind is Kind.REGEX:
            found = matcher.grammar_from_regex(text)
        elif structure.kind is Kind.CHOICE:
            found = matcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(text))))
        else:
            found = self._library.grammar_from("grammar", text)
        return found


class Compiled:
    """A compiled structure, as `Kept` has it."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._size = matcher, vocab_size
        self.first_mask = _mask(matcher, vocab_size)
        self.worn = False

    def start(self) -> Answer:
        return Answer(self, self._matcher.deep_copy(), self._size)


class Answer:
    """The state of one answer (`partinf.engine.constraint.Constraint`)."""

    def __init__(self, compiled: Compiled, matcher: Any, vocab_size: int) -> None:
        self._compiled, self._matcher, self._size = compiled, matcher, vocab_size

    def accept(self, token: int, quick: bool = False) -> bytes | None:
        """As the protocol has it, and as quick as its limits are.

        Raises:
            TooComplex: what may follow takes too much to find out.
            RuntimeError: it is nothing that the vocabulary can write.
        """
        matcher = self._matcher
        if matcher.consume_token(token) and not matcher.is_stopped():
            mask = _mask(matcher, self._size)
            if any(mask) and not matcher.is_error():
                return mask
        if matcher.is_stopped() and not matcher.is_error() and matcher.stop_reason() in _COMPLETE:
            return None
        self._compiled.worn = True
        why = matcher.get_error() or (matcher.stop_reason() if matcher.is_stopped() else "no token of the vocabulary can come next")
        text = f"the answer cannot go on within its structure: {_short(why)}"
        raise TooComplex(text) if matcher.is_error() else RuntimeError(text)

    def skip(self, token: int) -> None:
        """Take a token, and do not find out what may follow it.

        Raises:
            TooComplex: as `accept`.
        """
        if not self._matcher.consume_token(token):
            raise TooComplex(f"the answer cannot go on within its structure: {_short(self._matcher.get_error())}")


def _mask(matcher: Any, vocab_size: int) -> bytes:
    """The tokens that may come next, without the bytes that were added to the vocabulary."""
    mask: bytes = matcher.compute_bitmask()
    size, rest = divmod(vocab_size, 8)
    return mask[:size] + (bytes([mask[size] & ((1 << rest) - 1)]) if rest else b"")


class _Vocabulary:
    """A tokenizer as llguidance reads it, which writes any text: bytes that the vocabulary lacks stand behind it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: int) -> None:
        count = min(tokenizer.vocab_size, vocab_size)
        pieces = [tokenizer.token_bytes(token) for token in range(count)]
        self.eos_token_id = eos
        self.bos_token_id = None
        self.special_token_ids = [token for token in range(count) if not pieces[token]]
        # Those that have no text get a name, which no grammar takes as text.
        self.tokens = [piece or f"<{tokenizer.token_text(token) or token}>".encode() for token, piece in enumerate(pieces)]
        self.tokens += [b""] * (vocab_size - count)
        known = set(pieces)
        self.tokens += [piece for byte in range(256) if (piece := bytes([byte])) not in known]
        self._tokenizer = tokenizer
        texts = [piece if token >= vocab_size else b"" for token, piece in enumerate(self.tokens)]
        texts[:count] = pieces
        self._ids = {piece: token for token, piece in reversed(list(enumerate(texts))) if piece}
        self._longest = max(map(len, pieces), default=1)
        self._remembered = lru_cache(_TEXTS)(self._write)

    def __call__(self, text: bytes) -> list[int]:
        """Tokens whose bytes are those of the text. A mask asks for them wherever the grammar leaves no choice, mostly for the same few
        bytes, and the tokenizer takes longer than the rest of the mask."""
        return self._remembered(text) if len(text) <= _TEXT_LENGTH else self._write(text)

    def _write(self, text: bytes) -> list[int]:
        """The tokenizer's own tokens where they add nothing to the text, else the longest that fit."""
        try:
            tokens = self._tokenizer.encode_marked(text.decode())
        except (UnicodeDecodeError, InvalidInput):
            return self._greedy(text)
        return tokens if b"".join(map(self._tokenizer.token_bytes, tokens)) == text else self._greedy(text)

    def _greedy(self, text: bytes) -> list[int]:
        tokens, place = [], 0
        while place < len(text):
            sizes = range(min(self._longest, len(text) - place), 0, -1)
            size = next(size for size in sizes if text[place : place + size] in self._ids)
            tokens.append(self._ids[text[place : place + size]])
            place += size
        return tokens


def _short(error: object) -> str:
    """What is wrong in one line."""
    text = " ".join(str(error).split("<state>")[0].split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
