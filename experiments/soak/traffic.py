"""Requests of the soak: demo tasks with parameters of every kind, and what each of them gets when it runs alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from partinf.api import Model
from partinf.demo_tasks import TASKS, Task, after_solved, make_task
from partinf.engine import RequestOutput, SamplingParams
from partinf.engine.constraint import Grammar
from partinf.structured import Grammars, Structure

STARTS = 4  # beginnings of solved tasks that prompts share
STRUCTURES = (
    Structure.regex("( [a-m]){3,9}"),
    Structure.regex("( [a-z]){1,4}( [a-c]| [x-z]){2,6}"),
    Structure.choice([" a b c", " c b a", " q z"]),
    Structure.grammar('start: (" a" | " b")+ " c"'),
)


@dataclass(frozen=True)
class Known:
    """A request whose answer is known.

    Attributes:
        alone: what it got when nothing else ran, one output per sample.
        plain: greedy, with logits that are not adjusted, so that `task` says what is right; where the model errs, it must err as it does
            alone.
    """

    task: Task
    params: SamplingParams
    plain: bool
    alone: tuple[RequestOutput, ...]


def known_requests(model: Model, count: int, seed: int) -> list[Known]:
    """Draw requests and answer them one by one; no two run together, nothing is cached."""
    compiled = Grammars(model.tokenizer, model.runner.limits.vocab_size)
    grammars = [compiled(structure) for structure in STRUCTURES]
    return [
        Known(task, params, plain, tuple(model.generate([task.prompt], params)))
        for task, params, plain in _drawn(count, random.Random(seed), grammars)
    ]


def _drawn(count: int, rng: random.Random, grammars: Sequence[Grammar]) -> Iterator[tuple[Task, SamplingParams, bool]]:
    starts = [[make_task(kind, rng, 3) for kind in rng.sample(("copy", "sort", "reverse"), 2)] for _ in range(STARTS)]
    kinds = tuple(TASKS)
    held = partial(_held, grammars=grammars)
    for number in range(count):
        task = make_task(kinds[number % len(kinds)], rng)
        if rng.random() < 0.4:
            task = after_solved(rng.choice(starts), task)
        make = rng.choice((_plain, _plain, _plain, _sampled, _several, _adjusted, _scored, _long, _least, held, held))
        yield task, make(rng), make is _plain


def _params(rng: random.Random, **values: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 24, "logprobs": True, "priority": rng.randint(0, 2), "seed": rng.randrange(1 << 32)} | values)


def _plain(rng: random.Random) -> SamplingParams:
    return _params(rng)


def _sampled(rng: random.Random) -> SamplingParams:
    cut = rng.choice(({}, {"top_k": 12}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 20, "top_p": 0.95, "stop": (" q",)}))
    return _params(rng, temperature=rng.uniform(0.5, 1.5), **cut)


def _several(rng: random.Random) -> SamplingParams:
    return _params(rng, temperature=1.0, n=rng.randint(2, 4))


def _adjusted(rng: random.Random) -> SamplingParams:
    bias = {rng.randrange(4, 90): rng.uniform(-5.0, 5.0) for _ in range(3)}
    how = rng.choice(({"presence_penalty": 1.0}, {"frequency_penalty": 0.7}, {"repetition_penalty": 1.3}, {"logit_bias": bias}))
    return _params(rng, temperature=rng.choice((0.0, 1.0)), **how)


def _scored(rng: random.Random) -> SamplingParams:
    return _params(rng, prompt_logprobs=True, top_logprobs=rng.randint(1, 5))


def _long(rng: random.Random) -> SamplingParams:
    return _params(rng, ignore_eos=True, max_tokens=rng.randint(24, 48))


def _least(rng: random.Random) -> SamplingParams:
    how = rng.choice(({}, {"stop_token_ids": (rng.randrange(10, 36),)}, {"skip_special_tokens": False}))
    return _params(rng, min_tokens=rng.randint(4, 12), temperature=rng.choice((0.0, 1.0)), **how)


def _held(rng: random.Random, grammars: Sequence[Grammar]) -> SamplingParams:
    how = rng.choice(({}, {"temperature": 1.0}, {"temperature": 1.0, "n": 3}, {"presence_penalty": 1.0}, {"top_logprobs": 3}))
    return _params(rng, constraint=rng.choice(grammars), **how)
