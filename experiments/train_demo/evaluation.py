"""Exact match of the demo model on held-out tasks, two ways.

`teacher_forced` is cheap and used while training: greedy decoding writes the right answer exactly if the right token has the highest
logit at every answer position given the right tokens before it. `greedy_exact_match` really decodes, token by token, and is the figure
that is published.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
from flax import nnx
from model import DemoModel
from tasks import RowBuilder, to_rows
from tokenizer import BOS, EOS, PAD

from partinf.demo_tasks import Task, check


@nnx.jit
def best_tokens(model: DemoModel, tokens: jax.Array) -> jax.Array:
    """The most probable token after every position, [B, T]."""
    return jnp.argmax(model(tokens), axis=-1)


def teacher_forced(
    model: DemoModel, tokenizer: sentencepiece.SentencePieceProcessor, tasks: dict[str, list[Task]], row_len: int
) -> dict[str, float]:
    """Share of tasks of each kind whose every answer token and EOS is predicted, given the right ones before it."""
    result = {}
    for kind, of_kind in tasks.items():
        builders = [RowBuilder(tokenizer, row_len) for _ in of_kind]
        for builder, task in zip(builders, of_kind, strict=True):
            builder.add(task)
        rows = to_rows(builders)
        right = (np.asarray(best_tokens(model, rows.tokens)) == rows.targets) | (np.asarray(rows.weights) == 0)
        result[kind] = float(right.all(axis=1).mean())
    return result


def greedy_answers(model: DemoModel, tokenizer: sentencepiece.SentencePieceProcessor, tasks: list[Task], row_len: int) -> list[str | None]:
    """What greedy decoding writes after each prompt; None where EOS does not come within `row_len` tokens.

    Every step recomputes the whole array [tasks, row_len]; tokens behind the current position cannot be seen from it.
    """
    prompts = [[BOS, *ids] for ids in tokenizer.encode([task.prompt for task in tasks], num_threads=1)]
    tokens = np.full((len(tasks), row_len), PAD, np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
    rows, lengths = np.arange(len(tasks)), np.array([len(ids) for ids in prompts])
    running = lengths < row_len
    while running.any():
        following = np.asarray(best_tokens(model, tokens))[rows, lengths - 1]
        tokens[rows[running], lengths[running]] = following[running]
        lengths = lengths + running
        running = running & (following != EOS) & (lengths < row_len)
    ends = lengths - 1
    return [
        tokenizer.decode(tokens[row, len(prompts[row]) : ends[row]].tolist()) if tokens[row, ends[row]] == EOS else None for row in rows
    ]


def greedy_exact_match(
    model: DemoModel, tokenizer: sentencepiece.SentencePieceProcessor, tasks: dict[str, list[Task]], row_len: int
) -> dict[str, float]:
    """Share of tasks of each kind that greedy decoding answers exactly, with EOS in time."""
    result = {}
    for kind, of_kind in tasks.items():
        answers = greedy_answers(model, tokenizer, of_kind, row_len)
        right = [answer is not None and check(task, answer) for task, answer in zip(of_kind, answers, strict=True)]
        result[kind] = sum(right) / len(right)
    return result
