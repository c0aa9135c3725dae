"""Rows that are held to masks, on the real model: against numpy, on every kind of mesh, in stages, and among others that are not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partinf.engine import Engine, RequestOutput, SamplingParams
from partinf.engine.constraint import allows
from partinf.execution import runner as execution_runner
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.config import ModelConfig
from partinf.plans import CacheConfig, Plan
from partinf.transformer import reference
from partinf.transformer.masks import _parts_of_bits, _parts_of_bytes, laid_out, restrict, restrict_plain
from tests.execution.test_extended_sampling import LAYOUTS, make_runner

MAX_LEN = 28  # of the runner


@dataclass(frozen=True)
class Remainders:
    """After a token only those with another remainder by 3, and above some number, may come."""

    least: int

    @property
    def first_mask(self) -> bytes:
        return self.after(0)

    def after(self, token: int) -> bytes:
        bits = np.arange(512) % 3 != token % 3
        bits[: self.least] = False
        return np.packbits(bits, bitorder="little").tobytes()

    def start(self) -> _Walk:
        return _Walk(self)


@dataclass
class _Walk:
    grammar: Remainders

    def accept(self, token: int, quick: bool = False) -> bytes:
        return self.grammar.after(token)


@dataclass(frozen=True)
class Always:
    """The same tokens may come all the time."""

    first_mask: bytes

    def start(self) -> Always:
        return self

    def accept(self, token: int, quick: bool = False) -> bytes:
        return self.first_mask


PROMPTS = [[3, 5, 7, 5, 9, 11, 13, 7, 2, 3 + n] for n in range(4)] + [[4, 4]]
PARAMS = [
    SamplingParams(max_tokens=12, constraint=Remainders(40)),
    SamplingParams(max_tokens=12, frequency_penalty=1.5, top_logprobs=3, constraint=Remainders(10)),
    SamplingParams(max_tokens=12, temperature=4.0, top_k=40, min_p=0.02, n=2, seed=4, constraint=Remainders(0)),
    SamplingParams(max_tokens=12),
    SamplingParams(max_tokens=12, temperature=0.9, top_p=0.9, n=2, seed=8),
]
PARAMS = [replace(params, ignore_eos=True, logprobs=True) for params in PARAMS]


@cache
def alone() -> list[RequestOutput]:
    """The answers to requests that come one by one."""
    engine = Engine(make_runner("cpu:1"))
    return [output for prompt, params in zip(PROMPTS, PARAMS, strict=True) for output in engine.generate([prompt], params)]


def test_the_likeliest_of_the_allowed_tokens_is_taken_and_its_own_probability_given() -> None:
    runner = make_runner("cpu:1")
    output = alone()[0]
    row = [*output.prompt, *output.tokens]
    padded = jnp.asarray([row + [0] * (MAX_LEN - len(row))])
    logits = np.asarray(jax.jit(reference.forward, static_argnums=1)(jax.tree.map(np.asarray, runner.params), runner.plan.model, padded))[0]
    grammar = PARAMS[0].constraint
    assert isinstance(grammar, Remainders)
    masks = [grammar.first_mask, *map(grammar.after, output.tokens)]
    free = 0
    for index, token in enumerate(output.tokens):
        at = len(output.prompt) - 1 + index
        allowed = restrict_plain(logits[at], masks[index])
        assert allowed.max() - allowed[token] < 1e-4
        np.testing.assert_allclose(output.logprobs[index], jax.nn.log_softmax(logits[at])[token], atol=1e-4)
        free += int(logits[at].argmax() == token)
    assert free < len(output.tokens)  # masks do something


@pytest.mark.parametrize("slice_name", LAYOUTS)
def test_tokens_depend_neither_on_the_company_nor_on_the_mesh(slice_name: str) -> None:
    runner = make_runner(slice_name)
    compiled = runner.num_compiled
    engine = Engine(runner, lag=1, check_invariants=True)
    outputs = engine.generate(PROMPTS, PARAMS)
    assert [(output.tokens, output.sample) for output in outputs] == [(output.tokens, output.sample) for output in alone()]
    assert runner.num_compiled == compiled


def test_masks_that_lie_on_the_devices_are_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """And those of another state are."""
    runner = make_runner("cpu:1")
    sent: list[dict[int, bytes]] = []
    monkeypatch.setattr(execution_runner, "laid_out", lambda masks, plan: sent.append(dict(masks)) or laid_out(masks, plan))
    bits = np.packbits(np.arange(512) % 2, bitorder="little").tobytes()
    params = SamplingParams(max_tokens=6, ignore_eos=True, constraint=Always(bits))
    outputs = []
    for _ in range(2):
        runner.reset()
        outputs += Engine(runner).generate([[3, 5, 7], [4, 4]], params)
        assert len(sent) <= 2  # at the first token of each, unless they begin together
        sent.clear()
    assert all(token % 2 for output in outputs for token in output.tokens)
    assert [output.tokens for output in outputs[:2]] == [output.tokens for output in outputs[2:]]


def test_sampled_tokens_keep_to_their_masks() -> None:
    samples = [output for output in alone() if output.prompt == tuple(PROMPTS[2])]
    assert len({output.tokens for output in samples}) == 2
    for output in samples:
        assert all((new - old) % 3 for old, new in zip((0, *output.tokens), output.tokens, strict=False))


def test_masks_whose_parts_end_within_words_reach_every_entry() -> None:
    """A vocabulary of 250 over 16 devices: no part is a multiple of 32."""
    model = ModelConfig("tiny", 2, 64, 128, 8, 4, 16, 250, max_len=64)
    layout = make_layout({"x": "embed", "y": "ffn", "z": "ffn"}, dict.fromkeys("xyz", "batch"))
    plan = Plan(model, parse_slice("cpu:16", "2x2x4"), layout, cache=CacheConfig(4, 64, 3))
    generator = np.random.default_rng(5)
    bits = generator.random(model.vocab_size) < 0.3
    mask = np.packbits(bits, bitorder="little").tobytes()
    words = laid_out({1: mask}, plan)
    for vocab, parts, size in ((250, 16, 16), (241, 4, 64), (500, 2, 256)):
        given = generator.bytes(generator.integers(1, vocab // 8 + 2))
        np.testing.assert_array_equal(_parts_of_bytes(given, vocab, parts, size), _parts_of_bits(given, vocab, parts, size))
    parts, vocab = 16, model.padded_vocab_size
    local = vocab // parts
    assert local % 32
    logits = generator.standard_normal((2, vocab)).astype(np.float32)
    rows = np.array([1, 0])  # the second is not constrained
    found = np.concatenate(
        [
            restrict(jnp.asarray(mine), jnp.asarray(own), jnp.asarray([1, 2]), jnp.asarray(rows))
            for mine, own in zip(np.split(logits, parts, axis=1), np.split(words, parts, axis=1), strict=True)
        ],
        axis=1,
    )
    np.testing.assert_array_equal(found[0], restrict_plain(logits[0], mask))
    np.testing.assert_array_equal(found[1], logits[1])
    assert [allows(mask, entry) for entry in range(model.vocab_size)] == bits.tolist()
    assert not allows(mask, 1 << 20)
