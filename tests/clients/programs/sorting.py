"""A task for Inspect: letters to be sorted, which the demo model does."""

from __future__ import annotations

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match
from inspect_ai.solver import generate

LETTERS = ("d b a c", "q a z", "h e y")


@task
def sorting() -> Task:
    samples = [Sample(input=f"sort: {letters} =", target=" ".join(sorted(letters.split()))) for letters in LETTERS]
    return Task(dataset=samples, solver=generate(), scorer=match(location="exact"))
