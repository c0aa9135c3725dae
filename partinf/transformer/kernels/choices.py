"""Which form a product takes on this machine: by what was measured here once, else by the platform's table.

Flags of a CPU do not say which form is fastest: they are right on one machine and wrong on the next. So all forms take turns for a few
seconds when the kernels are first used (`turns`). The result is stored next to the kernels under the same name, so that it holds for the
same machine and the same kernels, and it is part of the key of every compiled program. It is measured again only on request
(`partinf calibrate --products again`). Where nothing is stored between starts, and where times do not settle, the platform's table stands.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
from absl import logging

from partinf.foundation.caches import NATIVE, usable
from partinf.hardware.platform import CPU, Form
from partinf.transformer.kernels import cpu as cpu_kernels
from partinf.transformer.kernels import products
from partinf.transformer.kernels.turns import Times, take_turns

_ROWS = tuple(sorted({step << power for power in range(10) for step in (2, 3)} | {1}))  # for which a form is chosen
_PANEL = 16  # rows of x that meet weights together, at least
_QUIET = 0.5  # of all cores, that others may take while forms are measured: most of the time one is free
_ALL_ROWS = 1.1  # what a form that computes padding has to be faster by
Table = tuple[tuple[str, tuple[tuple[int, Form], ...]], ...]
"""By type of weights, up to how many rows which form; the last holds beyond its rows."""


@dataclass(frozen=True)
class Choices:
    """The forms of products on one machine.

    Attributes:
        table: what is chosen. times: what was measured, seconds of one product of each form by rows; empty for the platform's table.
        unsettled: types for which the times did not settle, which follow the platform's table. others: the share of all cores that other
            processes took while that was measured.
    """

    table: Table
    times: tuple[Times, ...] = ()
    unsettled: tuple[str, ...] = ()
    others: float = 0.0

    @property
    def doubtful(self) -> bool:
        """Whether so much else ran on the machine that other forms may be faster."""
        return self.others > _QUIET

    def form(self, x: jax.Array, weights: jax.Array) -> Form:
        """The form of the product x [T, E] · weights [F, E]."""
        lines = dict(self.table).get(products.kind_of(x, weights) or "")
        if lines is None:
            return Form.XLA
        chosen = next((form for rows, form in lines if x.shape[0] <= rows), lines[-1][1])
        return chosen if products.fits(chosen, x, weights) else Form.XLA

    @property
    def of_blocks(self) -> Form:
        """How attention, and experts with several rows, multiply numbers of bfloat16: as products of a panel do where those take tiles or
        pairs; else in float32."""
        lines = dict(self.table).get("bf16", ())
        chosen = next((form for rows, form in lines if rows >= _PANEL), Form.PANELS)
        return chosen if chosen in (Form.TILES, Form.PANELS_OF_PAIRS) else Form.PANELS


_lock = threading.Lock()
_current: list[Choices] = []


def current() -> Choices:
    """The choices of this process: those that were adopted, else this machine's; for one process of several, which run one program, the
    platform's table, unless all adopt those of one."""
    with _lock:
        if not _current:
            # On a thread of its own: the caller may be in the middle of tracing a program.
            with ThreadPoolExecutor(1) as other:
                _current.append(other.submit(of_this_machine if jax.process_count() == 1 else fallback).result())
        return _current[0]


def adopt(choices: Choices) -> None:
    """Take the choices of another process, as all hosts of a job take those of the first: they run one program."""
    with _lock:
        _current[:] = [choices]


def measure_again() -> Choices:
    """Measure, keep and take what is found."""
    found = _measured()
    adopt(found)
    return found


def fallback() -> Choices:
    """What the platform's table says, as far as this machine has its forms."""
    return Choices(tuple((kind, _of_table(kind)) for kind in CPU.products or {}))


def path() -> Path | None:
    """Where the choices of this machine are stored; None where nothing is."""
    folder = usable(NATIVE)
    return None if folder is None else folder / f"cpu_products-{cpu_kernels.digest()}.json"


def to_json(choices: Choices) -> str:
    return json.dumps(asdict(choices), indent=1)


def from_json(text: str) -> Choices:
    """What `to_json` wrote.

    Raises:
        ValueError, KeyError, TypeError: it did not.
    """
    stored = json.loads(text)
    table = tuple((str(kind), tuple((int(rows), Form(form)) for rows, form in lines)) for kind, lines in stored["table"])
    if any(not lines for _, lines in table):
        raise ValueError("a type without forms")
    return Choices(
        table, tuple(Times.read(each) for each in stored["times"]), tuple(map(str, stored["unsettled"])), float(stored["others"])
    )


def of_this_machine() -> Choices:
    """The choices that are stored here, measured now if they never were."""
    where = path()
    if where is None or not cpu_kernels.available():
        return fallback()
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = from_json(where.read_text())
        if all(form in products.forms(kind) for kind, lines in found.table for _, form in lines):
            return found
    return _measured()


def _measured() -> Choices:
    turns = take_turns()
    times, unsettled = turns.times, turns.unsettled
    kinds = {each.kind for each in times} - set(unsettled)
    table = tuple(
        (kind, chosen([each for each in times if each.kind == kind]) if kind in kinds else _of_table(kind)) for kind in CPU.products or {}
    )
    found = Choices(table, times, unsettled, turns.others)
    if unsettled:
        logging.warning("forms of products follow a table for %s: the machine is too busy to measure them", ", ".join(unsettled))
    elif found.doubtful:
        repeat = "partinf calibrate --products again"
        logging.warning("forms of products were measured while other programs took %.0f%% of the machine (%s)", 100 * found.others, repeat)
    where = path()
    if where is not None:
        with suppress(OSError):
            handle, name = tempfile.mkstemp(dir=where.parent, prefix="writing-")
            with os.fdopen(handle, "w") as file:
                file.write(to_json(found))
            os.replace(name, where)
    return found


def chosen(times: list[Times]) -> tuple[tuple[int, Form], ...]:
    """Up to how many rows which form takes least; of two about as fast, a kernel of ours, which leaves out padding."""

    def least(each: Times, rows: int) -> float:
        return each.seconds(rows) * (1.0 if products.leaves_out(each.form) else _ALL_ROWS)

    best = [min((least(each, rows), each.form) for each in times)[1] for rows in _ROWS]
    runs = itertools.groupby(zip(_ROWS, best, strict=True), key=lambda pair: pair[1])
    return tuple((max(rows for rows, _ in run), form) for form, run in runs)


def _of_table(kind: str) -> tuple[tuple[int, Form], ...]:
    has = products.forms(kind)
    lines = (CPU.products or {})[kind]
    return tuple((rows, next((form for form in forms if form in has), Form.XLA)) for rows, forms in lines)
