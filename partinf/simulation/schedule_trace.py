"""The schedule as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing show: steps, and which request held which slot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from partinf.engine.batch import ScheduledBatch
from partinf.engine.request import Sequence
from partinf.engine.step import StepOutput

_PROCESSES = ("steps", "slots", "stages")  # of the trace
_STEPS, _SLOTS, _STAGES = range(3)


class ScheduleTrace:
    """Collects events; give `on_step` to an engine. One lane shows the steps (one more for every step that overlaps), one per slot the
    phases of its requests, and one per pipeline stage, where the runner knows, what the stage worked on."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = [
            {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}} for pid, name in enumerate(_PROCESSES)
        ]
        self._open: dict[int, tuple[str, str, float, float]] = {}  # slot → (request, phase, start, end so far)
        self._lanes: list[float] = []  # when the last step of each lane ended
        self._committed = 0.0

    def on_step(self, batch: ScheduledBatch, output: StepOutput, scheduled: float, committed: float) -> None:
        """A step that was committed. Where its own time is not known, it ran after the step before it, however early it was scheduled."""
        step = batch.step
        start = committed - output.seconds if output.seconds else max(scheduled, self._committed)
        self._committed = committed
        kinds = [f"decode {len(step.decode)}"] if step.decode else []
        kinds += [f"prefill {step.num_prefill_tokens}"] if step.prefill else []
        kinds += [f"out {sum(len(copy.pages) for copy in step.swap_out)}"] if step.swap_out else []
        kinds += [f"in {sum(len(copy.pages) for copy in step.swap_in)}"] if step.swap_in else []
        self._add(
            _STEPS,
            self._lane(start, committed),
            " + ".join(kinds),
            start,
            committed,
            {"tokens": step.num_tokens, "padded": output.padded_tokens},
        )
        self._events.append({"ph": "C", "pid": _STEPS, "name": "rows", "ts": start * 1e6, "args": {"rows": step.num_rows}})
        for stage, (began, ended) in enumerate(output.stages):
            self._add(_STAGES, stage, " + ".join(kinds), began, ended, {"rows": step.num_rows})
        for sequence, row in zip(batch.decode, step.decode, strict=True):
            self._extend(row.slot, sequence, "decode", start, committed)
        for sequence, chunk in zip(batch.prefill, step.prefill, strict=True):
            self._extend(chunk.slot, sequence, "prefill", start, committed)

    def write(self, path: Path) -> None:
        """Write the trace, with what is still open ended at its last step."""
        for slot in list(self._open):
            self._close(slot)
        path.write_text(json.dumps({"traceEvents": self._events, "displayTimeUnit": "ms"}))

    def _lane(self, start: float, end: float) -> int:
        """The first lane that is free by then: steps in different stages of a pipeline overlap."""
        free = next((lane for lane, ended in enumerate(self._lanes) if ended <= start + 1e-9), len(self._lanes))
        self._lanes[free : free + 1] = [end]
        return free

    def _extend(self, slot: int, sequence: Sequence, phase: str, start: float, end: float) -> None:
        """Consecutive steps of one request in one phase are one bar."""
        name = sequence.request.id
        found = self._open.get(slot)
        if found is not None and found[:2] == (name, phase) and start - found[3] < 1e-9:
            self._open[slot] = (name, phase, found[2], end)
            return
        if found is not None:
            self._close(slot)
        self._open[slot] = (name, phase, start, end)

    def _close(self, slot: int) -> None:
        name, phase, start, end = self._open.pop(slot)
        self._add(_SLOTS, slot, f"{name} {phase}", start, end, {"request": name})

    def _add(self, pid: int, tid: int, name: str, start: float, end: float, args: dict[str, Any]) -> None:
        event = {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": start * 1e6, "dur": (end - start) * 1e6, "args": args}
        self._events.append(event)
