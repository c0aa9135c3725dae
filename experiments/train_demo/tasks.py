"""Training and held-out batches of the demo tasks, as token arrays.

The tasks themselves are defined in `partinf.demo_tasks`. A prompt belongs to the held-out set if its CRC-32 says so, for ever and
independently of seeds: no prompt that is evaluated was ever trained on, not even where there are few (repeat has 520 in all).

A training row holds as many tasks as fit, one after another, without a mask between them: nothing is wasted on padding, and the model
learns to answer at any position of its context and to ignore the tasks before its own.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import sentencepiece
from tokenizer import BOS, EOS, PAD

from partinf.demo_tasks import SEPARATOR, TASKS, Task, after_solved, make_task

HELD_OUT_SHARE = 8  # one prompt in 8 is held out


def is_held_out(prompt: str) -> bool:
    """Whether a prompt may only be evaluated on."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_SHARE == 0


def sample_task(kind: str, rng: random.Random, *, held_out: bool) -> Task:
    """A random task of `kind` from the training or the held-out prompts."""
    while True:
        task = make_task(kind, rng)
        if is_held_out(task.prompt) == held_out:
            return task


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Tokens and what has to be predicted after each.

    Attributes:
        tokens: int32 [..., T].
        targets: int32 [..., T]: the right token after each one: an answer, then EOS even where another task follows. PAD inside prompts.
        weights: float32 [..., T]: of every target in the loss; the answer of a task and its EOS share the task's weight, else zero.
    """

    tokens: jax.Array | np.ndarray
    targets: jax.Array | np.ndarray
    weights: jax.Array | np.ndarray


def fit(column: list[Any], fill: Any, length: int) -> list[Any]:
    """`column` cut or filled up to `length`."""
    return (column + [fill] * length)[:length]


class RowBuilder:
    """Appends tasks to one row of `length` tokens; what does not fit is cut off."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor, length: int) -> None:
        self._tokenizer, self._length = tokenizer, length
        self._separator = tokenizer.encode(SEPARATOR)
        self._columns: tuple[list[int], list[int], list[float]] = ([], [], [])

    @property
    def full(self) -> bool:
        return len(self._columns[0]) >= self._length

    def add(self, task: Task) -> None:
        """Append `task` after a separator, or after BOS at the start."""
        start = self._separator if self._columns[0] else [BOS]
        prompt, answer = self._tokenizer.encode(task.prompt), self._tokenizer.encode(task.answer)
        tokens, targets, weights = self._columns
        tokens += [*start, *prompt, *answer]
        silent = len(start) + len(prompt) - 1
        targets += [PAD] * silent + [*answer, EOS]
        weights += [0.0] * silent + [1 / (len(answer) + 1)] * (len(answer) + 1)

    def finish(self) -> tuple[list[int], list[int], list[float]]:
        """Tokens, targets and weights, each exactly `length` long."""
        tokens, targets, weights = self._columns
        return fit(tokens, PAD, self._length), fit(targets, PAD, self._length), fit(weights, 0.0, self._length)


def to_rows(builders: list[RowBuilder]) -> Rows:
    """[rows, T]."""
    tokens, targets, weights = zip(*(builder.finish() for builder in builders), strict=True)
    return Rows(np.array(tokens, np.int32), np.array(targets, np.int32), np.array(weights, np.float32))


def training_chunks(
    tokenizer: sentencepiece.SentencePieceProcessor, *, seed: int, chunk: int, batch: int, row_len: int, kind_weights: Mapping[str, float]
) -> Iterator[Rows]:
    """Endless training data: `chunk` steps of `batch` rows each, [chunk, batch, row_len]; kinds are drawn with `kind_weights`."""
    rng = random.Random(seed)
    kinds, shares = list(kind_weights), list(kind_weights.values())
    while True:
        builders = [RowBuilder(tokenizer, row_len) for _ in range(chunk * batch)]
        for builder in builders:
            while not builder.full:
                builder.add(sample_task(rng.choices(kinds, shares)[0], rng, held_out=False))
        rows = to_rows(builders)
        shape = (chunk, batch, row_len)
        yield Rows(rows.tokens.reshape(shape), rows.targets.reshape(shape), rows.weights.reshape(shape))


def held_out_tasks(per_kind: int, *, seed: int, solved_before: int = 0) -> dict[str, list[Task]]:
    """`per_kind` held-out tasks of every kind, each after `solved_before` solved tasks of random kinds."""
    rng = random.Random(seed)
    kinds = list(TASKS)

    def draw(kind: str) -> Task:
        context = [sample_task(rng.choice(kinds), rng, held_out=True) for _ in range(solved_before)]
        return after_solved(context, sample_task(kind, rng, held_out=True))

    return {kind: [draw(kind) for _ in range(per_kind)] for kind in TASKS}
