"""Progress on standard error, so that standard output stays clean: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

SECONDS_BETWEEN_LINES = 5.0


@contextlib.contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of `total` steps; yields the function that advances it. Where standard error is no terminal, what takes longer than some
    seconds prints a line every so often instead, and one at its end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(label, total)
        return
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)


class _Lines:
    """Prints how far it is, at most every so many seconds."""

    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._began = self._printed = time.monotonic()

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        late = now - self._printed >= SECONDS_BETWEEN_LINES
        if late or (self._done >= self._total and self._printed > self._began):
            self._printed = now
            print(f"{self._label}: {self._done} of {self._total} after {now - self._began:.0f} s", file=sys.stderr, flush=True)
