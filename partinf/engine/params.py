"""The parameters of a request: `SamplingParams`, checked when it is made.

A step takes numbers in 32 bits, so this is where they are held to that: whole numbers have bounds or are only compared on the host, others
are finite as float32. Numbers of other libraries become Python's own.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from partinf.engine.constraint import Grammar
from partinf.foundation.errors import raise_offences
from partinf.foundation.limits import MAX_BIASES, TOP_LOGPROBS

MAX_SEED = 2**32 - 1
MAX_SAMPLES = 128
MAX_FLOAT32 = (2 - 2**-23) * 2.0**127
MAX_TEMPERATURE = 2.0**126  # its reciprocal, by which compilers may multiply, is a float32 too

_SHOWN = 80  # characters of a value in a message


def is_whole(value: Any, low: int, high: int | None = None) -> bool:
    """Whether it is a whole number of at least `low` and, if there is a bound, at most `high`; no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)


def is_unicode(value: Any) -> bool:
    """Whether it is text that can be written down: half of a surrogate pair cannot."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def is_number(value: Any) -> bool:
    """Whether it is a number that a float32 can be near: no bool, no NaN, nothing infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX_FLOAT32 <= value <= MAX_FLOAT32


def _within(value: Any, low: float, high: float) -> bool:
    return is_number(value) and low <= value <= high


def plain_number(value: Any) -> Any:
    """A number of another library as an int or a float; anything else as it is."""
    if type(value) in (int, float) or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def shown(value: Any) -> str:
    """A value in a message, shortened; Python refuses to write out whole numbers of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__} of huge numbers"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _biases(values: Any) -> bool:
    pairs = isinstance(values, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in values)
    if not pairs or not all(is_whole(token, 0) and _within(bias, -100, 100) for token, bias in values):
        return False
    return len(values) <= MAX_BIASES and len({token for token, _ in values}) == len(values)


def _more(value: int, most: Any) -> bool:
    return is_whole(most, 1) and value > most


def _all_of(values: Any, fine: Callable[[Any], bool]) -> bool:
    return isinstance(values, tuple) and all(fine(value) for value in values)


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    Attributes:
        max_tokens: tokens to generate at most, ≥ 1; capped at what the context leaves after the prompt.
        temperature: 0..2¹²⁶; 0 always takes the most likely token.
        top_k: sample among the k most likely tokens; 0 is off, and so is any number that the vocabulary does not reach.
        top_p: sample among the most likely tokens that hold this probability mass, 0 < top_p ≤ 1; 1 is off.
        min_p: sample among the tokens with at least this share of the most likely one's probability, 0..1; 0 is off.
        presence_penalty, frequency_penalty: -2..2, taken from the logits of tokens that were generated, once and as often as they were.
        repetition_penalty: > 0; positive logits of tokens in prompt and output are divided by it, others multiplied; 1 is off.
        logit_bias: token → what is added to its logit, -100..100; a mapping or pairs, kept as pairs in order of the tokens.
        n: answers to generate, which share the prompt's pages and differ in their random numbers; 1..128. Each is an output of its own.
        seed: 0..2³² - 1. The same seed gives the same tokens whatever else runs. None: derived from the engine's seed and the request id.
        min_tokens: tokens to generate before a stop string, a stop token or an end of sequence may end the text; at most max_tokens. Until
            then those tokens are not chosen, and stop strings are text. The context still ends it.
        stop: strings that end the text; the text before the first of them is returned. One string may be given bare.
        stop_token_ids: tokens that end the text, besides those that the tokenizer names as end of sequence.
        ignore_eos: go on after the tokenizer's end-of-sequence tokens.
        skip_special_tokens: leave special tokens out of the text; otherwise they stand in it by their names.
        logprobs: return the log-probability of every token.
        top_logprobs: return so many of the most likely tokens, with their log-probabilities, for every generated one; at most 20.
        prompt_logprobs: return the log-probability of every token of the prompt after the first.
        timeout: seconds from arrival after which the request ends with what it has, > 0; None for no bound.
        priority: the lowest runs first under the `priority` policy; others ignore it.
        constraint: a compiled grammar (`partinf.structured`) to which every answer is held; it ends where the grammar allows nothing more,
            or, where it may, with an end-of-sequence token.

    Raises:
        InvalidInput: every value out of range, with the valid range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    n: int = 1
    seed: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    timeout: float | None = None
    priority: int = 0
    constraint: Grammar | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            if isinstance(getattr(self, name), Iterable):
                object.__setattr__(self, name, tuple(map(plain_number, getattr(self, name))))
        for name in _NUMBERS:
            object.__setattr__(self, name, plain_number(getattr(self, name)))
        object.__setattr__(self, "logit_bias", _in_order(self.logit_bias))
        raise_offences(self._offences())

    def _offences(self) -> list[str]:
        checks = (
            ("max_tokens", is_whole(self.max_tokens, 1), "a whole number, at least 1"),
            ("temperature", _within(self.temperature, 0, MAX_TEMPERATURE), "a finite number, at least 0 and at most 2**126 (0 is greedy)"),
            ("top_k", is_whole(self.top_k, 0), "a whole number, at least 0 (0 is off)"),
            ("top_p", is_number(self.top_p) and 0 < self.top_p <= 1, "greater than 0 and at most 1 (1 is off)"),
            ("min_p", _within(self.min_p, 0, 1), "from 0 to 1 (0 is off)"),
            ("presence_penalty", _within(self.presence_penalty, -2, 2), "from -2 to 2 (0 is off)"),
            ("frequency_penalty", _within(self.frequency_penalty, -2, 2), "from -2 to 2 (0 is off)"),
            ("repetition_penalty", _within(self.repetition_penalty, 1e-3, 1e3), "from 0.001 to 1000 (1 is off)"),
            ("logit_bias", _biases(self.logit_bias), f"at most {MAX_BIASES} token ids, each once, with values from -100 to 100"),
            ("n", is_whole(self.n, 1, MAX_SAMPLES), f"a whole number from 1 to {MAX_SAMPLES}"),
            ("seed", self.seed is None or is_whole(self.seed, 0, MAX_SEED), f"a whole number from 0 to {MAX_SEED}, or None"),
            (
                "min_tokens",
                is_whole(self.min_tokens, 0) and not _more(self.min_tokens, self.max_tokens),
                "a whole number from 0 to max_tokens",
            ),
            ("stop", _all_of(self.stop, lambda text: is_unicode(text) and text != ""), "strings that are not empty"),
            ("stop_token_ids", _all_of(self.stop_token_ids, lambda token: is_whole(token, 0)), "token ids, at least 0"),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "True or False"),
            ("skip_special_tokens", isinstance(self.skip_special_tokens, bool), "True or False"),
            ("logprobs", isinstance(self.logprobs, bool), "True or False"),
            (
                "top_logprobs",
                is_whole(self.top_logprobs, 0, TOP_LOGPROBS),
                f"a whole number from 0 to {TOP_LOGPROBS}",
            ),
            ("prompt_logprobs", isinstance(self.prompt_logprobs, bool), "True or False"),
            ("timeout", self.timeout is None or (is_number(self.timeout) and self.timeout > 0), "seconds, greater than 0, or None"),
            (
                "constraint",
                self.constraint is None or isinstance(self.constraint, Grammar),
                "a compiled grammar of partinf.structured, or None",
            ),
            ("priority", is_whole(self.priority, -MAX_SEED, MAX_SEED), f"a whole number from {-MAX_SEED} to {MAX_SEED}"),
        )
        return [f"{name} = {shown(getattr(self, name))}; valid: {valid}" for name, fine, valid in checks if not fine]


_NUMBERS = (
    *("max_tokens", "temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("n", "seed", "min_tokens", "top_logprobs", "timeout", "priority"),
)


def _in_order(biases: Any) -> Any:
    """A mapping or pairs as a tuple of pairs in order of their tokens; as it comes, where it is something else."""
    pairs = biases.items() if isinstance(biases, Mapping) else biases
    try:
        return tuple(sorted(tuple(map(plain_number, pair)) for pair in pairs))
    except TypeError:
        return biases
