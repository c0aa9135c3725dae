"""One process of a job that serves the demo model; started by the tests of this folder.

Arguments: what to do, then options as JSON. $PARTINF_RESULTS is a folder: process I writes `ready-I` once its first answers are there, and
process 0 the answers to `answers.json`; `read-I` holds the bytes of weights that it read.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

from partinf import hosts

RESULTS = Path(os.environ.get("PARTINF_RESULTS", "."))
MAX_LEN, ROWS = 48, 8


def requests(count: int) -> list[tuple[str, dict[str, Any]]]:
    """Prompts and parameters; some greedy, some drawn, some twice."""
    rng = random.Random(7)
    letters = "abcdefghij"
    found = []
    for number in range(count):
        text = " ".join(rng.choices(letters, k=rng.randint(2, 8)))
        task = rng.choice(["copy", "sort", "reverse"])
        params: dict[str, Any] = {"max_tokens": rng.choice([3, 8, 16]), "ignore_eos": number % 4 != 0}
        if number % 3 == 1:
            params |= {"temperature": 1.0, "seed": number, "n": 1 + number % 2}
        if number % 5 == 1:
            params["constraint"] = Alternating()
        found.append((f"{task}: {text} =", params))
    return found


class Alternating:
    """A grammar of even and odd tokens by turns, 9 of them, as only the process that takes requests knows it."""

    def __init__(self) -> None:
        self.first_mask = bytes([0b10101010] * 12)

    def start(self) -> Any:
        masks = [self.first_mask, bytes([0b01010101] * 12)] * 4
        return _Turns(masks[1:])


class _Turns:
    def __init__(self, masks: list[bytes]) -> None:
        self._masks = masks

    def accept(self, token: int, quick: bool = False) -> bytes | None:
        return self._masks.pop(0) if self._masks else None


SLICES = {"ws-2d": "cpu:2x2x2", "long-context": "cpu:2x2x2", "stages": "cpu:3x2"}


def make_engine(group: hosts.Group | None, layout: str = "ws-2d") -> Any:
    """The demo model with few pages and proactive swapping: 2D weight-stationary with batch-sharded attention, another layout that has a
    name, or three pipeline stages."""
    import partinf
    from partinf.buckets import Capacity
    from partinf.cli.arguments import named_layout
    from partinf.engine.engine import Engine
    from partinf.engine.estimates import Estimates
    from partinf.engine.policies.mlfq import MultiLevelFeedbackQueue
    from partinf.engine.policies.ranked import Eviction, Pages
    from partinf.execution.runner import JaxRunner
    from partinf.layout.files import make_layout
    from partinf.transformer.executables import open_cache
    from partinf.workload import DType, Workload

    workload = Workload(batch=ROWS, input_len=24, output_len=24, weights=DType.F32, kv=DType.F32)
    capacity = Capacity(max_rows=ROWS, max_len=MAX_LEN, prefill_tokens=32, random=True, constrained=True, page_size=8)
    staged = make_layout({"x": "stage", "y": "ffn"}, {"x": "none", "y": "heads"})
    bound = staged if layout == "stages" else named_layout(layout)
    plan = partinf.plan("demo", SLICES[layout], workload, layout=bound, capacity=capacity)
    model = partinf.load("demo", plan, compile_steps=False, group=group)
    runner: Any = JaxRunner(plan, model.params, model.mesh, num_host_pages=24, executables=open_cache())
    runner.warm_up()
    estimates = Estimates(lambda tokens: 0.004, 0.004, pages_for=runner.limits.pages_for)
    policy = MultiLevelFeedbackQueue(estimates, 4, alpha=0.05, pages=Pages(Eviction.PROACTIVE, None))
    return Engine(
        runner if group is None else group.runner(runner),
        tokenizer=model.tokenizer,
        policy=policy,
        lag=1,
        prefix_caching=True,
        check_invariants=True,
        replicas=group,
        num_mask_threads=0 if group is None else 2,
    )


def answer(engine: Any, count: int) -> dict[str, Any]:
    """Answers by request and sample; requests come one after another while others run, and every seventh is cancelled."""
    from partinf.engine.request import SamplingParams

    several = requests(count)
    done = threading.Event()

    def ask() -> None:
        for number, (prompt, params) in enumerate(several):
            engine.add_request(prompt, SamplingParams(**params), str(number))
            if number % 7 == 6:
                engine.cancel(str(number - 2))
            time.sleep(0.001)
        done.set()

    asking = threading.Thread(target=ask)
    asking.start()
    found: dict[str, Any] = {}
    while engine.has_work or not done.is_set():
        for output in engine.step():
            assert output.error is None, output.error
            found[f"{output.id}/{output.sample}"] = [output.finish_reason.value, list(output.tokens)]
        if not engine.has_work:
            time.sleep(0.001)
    asking.join()
    cancelled = sum(reason == "cancelled" for reason, _ in found.values())
    return {"answers": found, "swaps": engine.metrics.swap_outs, "cached": engine.metrics.cached_tokens, "cancelled": cancelled}


def note_bytes_read(index: int) -> None:
    """Let the reader of weights write down how much it has read."""
    from partinf.checkpoint.safetensors_files import TensorReader

    leave = TensorReader.__exit__

    def noted(reader: TensorReader, *error: Any) -> None:
        (RESULTS / f"read-{index}").write_text(str(reader.bytes_read))
        leave(reader, *error)

    TensorReader.__exit__ = noted  # type: ignore[method-assign]


def main() -> None:
    what, options = sys.argv[1], json.loads(sys.argv[2])
    group = hosts.join(bounds=hosts.Bounds(**options.get("bounds", {})))
    note_bytes_read(group.index)
    engine = make_engine(group, options.get("layout", "ws-2d"))
    if options.get("wrong") == group.index:
        engine._scheduler.pool.groups[0]._free[0][0].reverse()  # the same requests, other pages
    (RESULTS / f"ready-{group.index}").write_text(str(os.getpid()))
    if not group.leads:
        group.follow(engine)
        return
    if what == "answer":
        (RESULTS / "answers.json").write_text(json.dumps(answer(engine, options["requests"])))
        group.close()
        return
    while True:  # until the test ends it
        answer(engine, 20)


if __name__ == "__main__":
    main()
