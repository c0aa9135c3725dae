"""Does a decode step take longer when the KV cache is larger than what it reads? Writes cache_size.json.

    python -m experiments.calibrated_cpu.cache_size          # a minute

The smaller of the two models, one CPU device, context 256, a cache that is just large enough against one of 1024 pages. A step that writes
its new keys and values in place takes the same time with both.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}

from experiments.calibrated_cpu.measure import models
from experiments.results import write
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.measure.steps import Steps, for_buckets
from partinf.measure.timing import alternate
from partinf.plans import Bucket, Plan
from partinf.workload import DType

LARGE, PAGES = 1024, 16


def main() -> None:
    layout, calls = make_layout({"x": "replica"}, {"x": "batch"}), {}
    for dtype in (DType.F32, DType.BF16):
        for rows in (1, 8):
            buckets = (Bucket(rows, PAGES), Bucket(prefill_tokens=16, prefill_slots=1))
            plan = for_buckets(Plan(models()[1], parse_slice("cpu:1"), layout, weights=dtype, kv=dtype), buckets)
            for pages in (rows * PAGES, LARGE):
                held = Steps(replace(plan, cache=replace(plan.cache, pages_per_shard=pages)))
                calls[f"{dtype}, {rows} rows, {pages} pages"] = held.call(buckets[0])
    timings = alternate(calls, 15.0)
    found = {name: {"seconds": timing.seconds, "spread": timing.spread, "repeats": timing.repeats} for name, timing in timings.items()}
    found["load_average"] = os.getloadavg()[0]
    write(__file__, found, "cache_size.json")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
