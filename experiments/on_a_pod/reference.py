"""The published decode steps, measured on a slice of one's own: what the planner predicts, what was published, what is measured here.

    python -m experiments.on_a_pod.reference                        # the programs by name, with the slice of each
    python -m experiments.on_a_pod.reference NAME                   # on that slice; on several hosts, in one process of each, with --hosts
    python -m experiments.on_a_pod.reference NAME --slice cpu:2x2 --model demo --weights f32 --context 64    # to try it without one

The programs are the sets of `experiments/published/published.toml`: model, machine, roles of its axes, batches and contexts. What runs
here is the library's own program in that layout, with random weights, so a published time is a neighbour's and no target; what is predicted
is the program that runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.published.sets import sets
from partinf.experiment.result import ledger_of
from partinf.foundation.errors import InvalidInput, raise_offences
from partinf.foundation.limits import MAX_LEN, outside
from partinf.foundation.rounding import ceil_div, round_up
from partinf.hardware.hardware_file import slice_of
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.plans import Bucket, Plan
from partinf.workload import DType

ROUNDS = 20  # fixed, so that all processes make the same calls
_PROMPT = 16  # tokens of the prompt that every runner has a step for


def programs() -> dict[str, dict[str, Any]]:
    """The published programs that the library can run, by name."""
    return {one["name"]: one for one in sets() if one["kind"] == "steps" and "model" in one}


@dataclass(frozen=True)
class Cell:
    """One decode step. `published`: seconds that were published of it; `context`: keys that a lane reads."""

    batch: int
    context: int
    published: float


def cells(one: Mapping[str, Any]) -> list[Cell]:
    """The decode steps of a set; those that differ only in how much a cache has room for are one, the first."""
    found: dict[tuple[int, int], Cell] = {}
    for row in one["rows"]:
        if row.get("step_ms", 1):
            context = one["context"] if "context" in one else row["input"] + row["output"] // 2
            seconds = row["step_ms"] / 1e3 if "step_ms" in row else 1 / row["tokens_per_second"]
            found.setdefault((row["batch"], context), Cell(row["batch"], context, seconds))
    return list(found.values())


def planned(one: Mapping[str, Any], given: Mapping[str, Any], chosen: Sequence[Cell]) -> tuple[Plan, list[Bucket]]:
    """The plan of a set, whose buckets hold these cells, and the bucket of each.

    Args:
        given: of `slice`, `mesh`, `model`, `weights`, `kv`, `hardware` what is to stand in place of the set's own; None for nothing.

    Raises:
        InvalidInput: a slice without the axes of the set's layout, or what a plan refuses.
    """
    from partinf.measure.steps import for_buckets

    wanted = {key: given.get(key) or one.get(key) for key in ("model", "mesh", "weights", "kv")}
    if given.get("slice"):
        wanted["mesh"] = given.get("mesh")
    slice_ = slice_of(given.get("slice") or one["machine"], wanted["mesh"], given.get("hardware"))
    layout = make_layout(one["storage"], one["attention"], one["attention"], decode_whole=True, experts=one.get("experts"))
    plan = Plan(load_model_config(str(wanted["model"])), slice_, layout, DType(wanted["weights"]), DType(wanted["kv"]))
    size, ways = plan.cache.page_size, plan.num_sequence_shards
    buckets = [Bucket(round_up(cell.batch, plan.num_shards), round_up(ceil_div(cell.context, size), ways)) for cell in chosen]
    slots = plan.prefill_slot_multiple()
    prompts = Bucket(prefill_tokens=round_up(slots * _PROMPT, plan.prefill_token_multiple()), prefill_slots=slots)
    return for_buckets(plan, (*dict.fromkeys(buckets), prompts)), buckets


def measured(plan: Plan, chosen: Sequence[Cell], buckets: Sequence[Bucket], rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """A row for each cell; seconds."""
    from partinf.measure.steps import Steps
    from partinf.measure.timing import alternate

    steps = Steps(plan)
    timings = alternate({str(bucket): steps.call(bucket) for bucket in dict.fromkeys(buckets)}, budget=0.0, least=rounds, most=rounds)
    rows = []
    for cell, bucket in zip(chosen, buckets, strict=True):
        took, predicted = timings[str(bucket)], ledger_of(plan, bucket).seconds
        row = {"batch": cell.batch, "context": cell.context, "published": cell.published, "predicted": predicted}
        rows.append(row | {"measured": took.seconds, "spread": took.spread, "predicted_over_measured": predicted / took.seconds})
    return rows


def _offences(args: argparse.Namespace, known: Mapping[str, Any]) -> list[str]:
    found = [] if args.name in known else [f"no program '{args.name}'; valid: {', '.join(known)}"]
    found += [] if args.context is None else outside("--context", args.context, 1, MAX_LEN)
    return found + outside("--rounds", args.rounds, 1, 10_000)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", help="of a program; without, they are listed")
    parser.add_argument("--hosts", action="store_true", help="this process is one of several, one per host of the slice")
    parser.add_argument("--context", type=int, help="keys that every lane reads, in place of the published ones")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    for key in ("slice", "mesh", "model", "weights", "kv", "hardware"):
        parser.add_argument(f"--{key}")
    args = parser.parse_args(words)
    known = programs()
    if args.name is None:
        print("\n".join(f"{name}: {one['model']} on {one['machine']}, {len(cells(one))} steps" for name, one in known.items()))
        return 0
    try:
        raise_offences(_offences(args, known))
        if args.hosts:
            from partinf.hosts.job import initialize

            initialize()
        chosen = [Cell(one.batch, args.context or one.context, one.published) for one in cells(known[args.name])]
        plan, buckets = planned(known[args.name], vars(args), chosen)
        rows = measured(plan, chosen, buckets, args.rounds)
    except InvalidInput as error:
        print("\n".join(error.offences), file=sys.stderr)
        return 2
    print(f"{plan.model.name} on {plan.slice.name}: ms per decode step")
    print("batch  context  published  predicted  measured      ±  predicted/measured")
    for row in rows:
        times = "  ".join(f"{1e3 * row[key]:9.4g}" for key in ("published", "predicted", "measured"))
        print(f"{row['batch']:5d}  {row['context']:7d}  {times}  {row['spread']:4.0%}  {row['predicted_over_measured']:.2f}")
    print(json.dumps({"program": args.name, "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
