"""What policies want to know of a loaded model, measured on requests of its own: times of steps, and of the copy of a page."""

from __future__ import annotations

import bisect
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from partinf.engine.engine import Engine
from partinf.engine.estimates import Estimates
from partinf.engine.request import SamplingParams
from partinf.engine.step import PageCopy, PageTable, PrefillChunk, RowSampling, Step
from partinf.plans import Bucket


def measured_estimates(
    runner: Any, buckets: Sequence[Bucket], repeats: int = 5, agree: Callable[[list[float]], list[float]] = lambda times: times
) -> Estimates:
    """Times of a step with a prompt and of a decode step, medians measured on requests of this model's own, and of the copy of a page. A
    bucket pads all prompts that it holds alike, so there is one time for each size of the buckets that take prompts.

    Args:
        runner: of a model on its devices. buckets: those of its plan.
        agree: makes of the times of this process those that all processes of a group take.
    """
    engine, limits = Engine(runner), runner.limits
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    sizes = sorted({bucket.prefill_tokens // limits.num_prefill_shards for bucket in buckets if bucket.prefill_tokens})
    times = []
    for size in sizes:
        prompt = [1] * max(1, min(size, limits.max_context - 4))
        outputs = [engine.generate([prompt], params)[0] for _ in range(repeats + 1)][1:]  # the first has first-call costs
        times.append(statistics.median(output.ttft or 0.0 for output in outputs))
    decode = statistics.median(output.time_per_token or times[-1] for output in outputs)
    page = _page_seconds(runner) if limits.num_host_pages else 0.0
    decode, page, *times = agree([decode, page, *times])

    def first_iteration(tokens: int) -> float:
        whole, rest = divmod(tokens, sizes[-1])
        return whole * times[-1] + (times[bisect.bisect_left(sizes, rest)] if rest else 0.0)

    return Estimates(first_iteration, decode, page, page, limits.pages_for)


def _page_seconds(runner: Any, repeats: int = 20) -> float:
    """Time to copy one KV page to host memory or back, measured on groups that go there and back; the pages' content stays."""
    group = runner.limits.groups[0]
    pages = tuple(range(min(16, group.pages_per_shard, group.num_host_pages)))
    tables = tuple(PageTable((0,)) for _ in runner.limits.groups)
    copy = PageCopy(pages, pages, shard=0)
    fetched = Step(prefill=(PrefillChunk(0, 0, (1,), 0, tables, True, RowSampling()),))  # its token is on the host once all is done

    def seconds(steps: list[Step]) -> float:
        started = time.perf_counter()
        for step in steps:
            runner.submit(step)
            runner.collect()
        return time.perf_counter() - started

    there_and_back = [Step(swap_out=(copy,)), Step(swap_in=(copy,))]
    seconds([*there_and_back, fetched])  # first-call costs
    taken = seconds([*there_and_back * repeats, fetched]) - seconds([fetched])
    return max(0.0, taken) / (2 * repeats * len(pages))
