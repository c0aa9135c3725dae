"""The tasks of the demo model: prompts whose right answer anyone can work out, and the check of an answer.

A model trained on such tasks shows that a partitioned program is right, not only that it runs: every answer is checked. The module is
the single definition of the text format, used by the script that trained the model (experiments/train_demo) and by `partinf demo`. It
is standard library only.

    copy: d b a c = d b a c                 3 to 10 letters, repeats allowed
    sort: d b a c = a b c d                 the same, in alphabetical order
    reverse: d b a c = c a b d              the same, backwards
    recall: d 4 k 12 a 7 ? k = 12           2 to 8 pairs of a letter and a number from 1 to 20, then the letter that is requested
    repeat: 5 k = k k k k k                 1 to 20 times, so the length of the answer is chosen by the prompt

The prompt ends with "=", the answer starts with a space (prompt + answer is the line above) and the model ends it by EOS. Solved tasks may
stand before a prompt, each ended by ";" (`after_solved`): they do not change the answer, so prompts can be made as long as the context
allows and can share a prefix.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

LETTERS: Sequence[str] = string.ascii_lowercase
MAX_NUMBER = 20
SEPARATOR = ";"


@dataclass(frozen=True)
class Task:
    """One prompt and the only right answer to it; `kind` is a key of `TASKS`."""

    kind: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class TaskKind:
    """How prompts of one kind are drawn and answered.

    Attributes:
        sizes: Smallest and largest size: letters (copy, sort, reverse), pairs (recall) or repetitions (repeat).
        draw: The words of a prompt's body for a size.
        solve: The words of the answer to a body.
    """

    sizes: tuple[int, int]
    draw: Callable[[random.Random, int], list[str]]
    solve: Callable[[list[str]], list[str]]


def _draw_letters(rng: random.Random, size: int) -> list[str]:
    return rng.choices(LETTERS, k=size)


def _draw_pairs(rng: random.Random, size: int) -> list[str]:
    keys = rng.sample(LETTERS, size)
    pairs = [word for key in keys for word in (key, str(rng.randint(1, MAX_NUMBER)))]
    return [*pairs, "?", rng.choice(keys)]


def _draw_repetition(rng: random.Random, size: int) -> list[str]:
    return [str(size), rng.choice(LETTERS)]


TASKS: Mapping[str, TaskKind] = MappingProxyType(
    {
        "copy": TaskKind((3, 10), _draw_letters, list),
        "sort": TaskKind((3, 10), _draw_letters, sorted),
        "reverse": TaskKind((3, 10), _draw_letters, lambda body: body[::-1]),
        "recall": TaskKind((2, 8), _draw_pairs, lambda body: [body[body.index(body[-1]) + 1]]),
        "repeat": TaskKind((1, MAX_NUMBER), _draw_repetition, lambda body: int(body[0]) * [body[1]]),
    }
)


def make_task(kind: str, rng: random.Random, size: int | None = None) -> Task:
    """Draw a task of `kind`.

    Args:
        kind: A key of `TASKS`.
        rng: Where the random choices come from; the same state gives the same task.
        size: Letters, pairs or repetitions (see `TaskKind.sizes`); drawn uniformly when not given. For "repeat" it is the number of
            tokens in the answer before EOS.

    Raises:
        ValueError: `size` is outside what the model was trained on.
    """
    low, high = TASKS[kind].sizes
    if size is None:
        size = rng.randint(low, high)
    if not low <= size <= high:
        raise ValueError(f"a {kind} task has a size from {low} to {high}, not {size}")
    body = TASKS[kind].draw(rng, size)
    return Task(kind, f"{kind}: {' '.join(body)} =", "".join(f" {word}" for word in TASKS[kind].solve(body)))


def mixed_tasks(count: int, seed: int) -> Iterator[Task]:
    """`count` tasks of all kinds in turn, of random sizes."""
    rng = random.Random(seed)
    kinds = tuple(TASKS)
    for index in range(count):
        yield make_task(kinds[index % len(kinds)], rng)


def after_solved(solved: Sequence[Task], task: Task) -> Task:
    """`task` with the prompts and answers of `solved` before it: the same answer to a longer prompt."""
    context = "".join(f"{earlier.prompt}{earlier.answer}{SEPARATOR}" for earlier in solved)
    return Task(task.kind, context + task.prompt, task.answer)


def check(task: Task, text: str) -> bool:
    """Whether `text`, what a model wrote after the prompt, is the right answer word by word (spacing does not count)."""
    return text.split() == task.answer.split()
