"""What steps of four models take on TPUs by the proof's estimate, today's program against the one before; no TPU.

    python -m experiments.tpu_steps.measure                  # compiles every case and writes the column `after` of results.json
    python -m experiments.tpu_steps.measure --only NAME      # one case
    python -m experiments.tpu_steps.measure --table          # the tables of README.md from results.json, nothing compiled
    python -m experiments.tpu_steps.measure --before TEXTS   # the column `before`, walked again; minutes

`before` is of programs that a checkout of da28871 compiled, whose layouts know no `whole`. TEXTS: a folder with the text of each and what
the compiler said of its memory, `file_of` of its name with .txt.gz and .json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.results import place, read, write
from experiments.timed_programs import measure as timed_programs
from partinf.buckets import serving_steps
from partinf.cost.ledger import Ledger, Op
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.plans import Bucket, Plan
from partinf.proof.compare import differences, planned_collectives
from partinf.proof.pace import stated_byte_rate
from partinf.proof.process import Compiled, Limits, compile_bucket
from partinf.proof.proving import network_of, planned_ledger, schedule_of
from partinf.proof.report import Work
from partinf.proof.schedule import Schedule
from partinf.workload import DType, Workload

_SECONDS = 3600.0


@dataclass(frozen=True)
class Case:
    """One step: decode of `batch` sequences of `length` tokens each, or a prompt of so many; `attention`: decode's roles."""

    model: str
    slice: str
    storage: Mapping[str, str]
    attention: Mapping[str, str]
    phase: str
    batch: int
    length: int
    weights: str = "bf16"
    kv: str = "bf16"

    def step(self) -> tuple[Plan, Bucket]:
        heads = {axis: "heads" if role == "ffn" else "none" for axis, role in self.storage.items()}
        decode = self.attention if self.phase == "decode" else heads
        layout = make_layout(self.storage, decode, heads, decode_whole=self.phase == "decode")
        types = {"weights": DType(self.weights), "kv": DType(self.kv)}
        plan = Plan(load_model_config(self.model), parse_slice(self.slice), layout, **types)
        length = {"context_len" if self.phase == "decode" else "input_len": self.length}
        plan, (bucket,) = serving_steps(plan, Workload(batch=self.batch, phase=self.phase, **types, **length))
        return plan, bucket


_TENSOR, _INT8 = {"x": "ffn", "y": "ffn"}, {"weights": "int8", "kv": "int8"}
_V5P = {"x": "ffn", "y": "ffn", "z": "ffn"}
CASES = {
    **{
        f"Llama 3 70B int8, v5e:4x4, batch {batch}": Case(
            "llama-3-70b", "v5e:4x4", _TENSOR, {"x": "heads", "y": y}, "decode", batch, 2048, **_INT8
        )
        for batch, y in ((8, "heads"), (32, "batch"), (128, "batch"))
    },
    "Llama 3 70B int8, bf16 cache, v5e:4x4, batch 32": Case(
        "llama-3-70b", "v5e:4x4", _TENSOR, {"x": "heads", "y": "batch"}, "decode", 32, 2048, weights="int8"
    ),
    "PaLM 540B int8, v4:4x4x4, batch 64": Case(
        "palm-540b", "v4:4x4x4", {"x": "embed", "y": "ffn", "z": "ffn"}, dict.fromkeys("xyz", "batch"), "decode", 64, 2048, weights="int8"
    ),
    "Qwen 3 8B, v6e:2x2, batch 8": Case("qwen-3-8b", "v6e:2x2", _TENSOR, {"x": "heads", "y": "heads"}, "decode", 8, 1536),
    **{
        f"Llama 3 8B, v5p:2x2x1, prompt of {length}": Case("llama-3-8b", "v5p:2x2x1", _V5P, {}, "prefill", 1, length)
        for length in (512, 8192, 32768)
    },
}


_PRODUCTS = ("partinf/transformer/kernels/products.py", "partinf/transformer/linear.py")
_CORES = ("kernel paged_decode", "kernel prompt_attention")
_LEAST, _COPY = 0.001, 0.01  # shares of a step from which entries and copies are listed
_FILLED = 512  # positions of the cache that are filled where others timed their program


def row_of(plan: Plan, bucket: Bucket, compiled: Compiled) -> dict[str, Any]:
    """A cell of results.json; times in ms."""
    schedule, ledger, layers = schedule_of(plan, bucket, compiled.program), planned_ledger(plan, bucket), plan.model.num_layers
    floor = (ledger.weight_bytes + ledger.kv_bytes) / stated_byte_rate(plan.slice.chip)
    exposed = sum(one.exposed_seconds for one in schedule.collectives)
    seconds = max(floor, schedule.compute_seconds + exposed)
    return {
        "ms": _ms(seconds),
        **({"filled_ms": _ms(schedule_of(plan, _filled(plan, bucket), compiled.program).seconds)} if bucket.decode_rows else {}),
        "collectives_ms": _ms(exposed),
        "floor_ms": _ms(floor),
        "kernel_ms": _ms(sum(kernel.seconds for kernel in schedule.kernels.values())),
        "collectives_per_layer": round(sum(one.count for one in schedule.collectives) / layers, 1),
        "code_mb": round(compiled.memory["generated_code"] / 1e6, 1),
        "temporaries_mb": round(compiled.memory["temp"] / 1e6, 1),
        "products_ms": _ms(sum(one.seconds * one.count for one in schedule.work if _is_product(one))),
        "cores_ms": _ms(sum(one.seconds * one.count for one in schedule.work if one.what.startswith(_CORES))),
        "rest_ms": rest_of(schedule.work, _LEAST * seconds),
        "unplanned_ms": unplanned(plan, ledger, schedule),
        "copies_ms": {f"{one.what}, {one.source_op}": _ms(one.count * one.seconds) for one in copies_of(schedule.work, _COPY * seconds)},
    }


def _filled(plan: Plan, bucket: Bucket) -> Bucket:
    """The same program with sequences of `_FILLED` tokens, whose kernel reads no page beyond them."""
    return replace(bucket, decode_pages=min(bucket.decode_pages, _FILLED // plan.cache.page_size))


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 2)


def _is_product(one: Work) -> bool:
    return one.source_op.startswith(_PRODUCTS) and not one.moves


def rest_of(work: Iterable[Work], least: float) -> dict[str, float]:
    """What is neither product nor core of attention, by the function of ours that it comes from; what takes less than `least` together."""
    found: dict[str, float] = defaultdict(float)
    for one in work:
        if not _is_product(one) and not one.what.startswith(_CORES):
            place, _, function = one.source_op.partition(" ")
            waits = one.what.startswith("waiting")
            name = "waiting for weights" if waits else f"{place.partition(':')[0].removeprefix('partinf/')} {function}".strip()
            found[name or "made by the compiler"] += one.seconds * one.count
    listed = {name: _ms(seconds) for name, seconds in sorted(found.items(), key=lambda pair: -pair[1]) if seconds >= least}
    return listed | {"all that take less": _ms(sum(seconds for seconds in found.values() if seconds < least))}


def unplanned(plan: Plan, ledger: Ledger, schedule: Schedule) -> dict[str, float]:
    """Collectives that are not those of the plan, and what they add."""
    network = network_of(plan)

    def seconds(op: str, axes: tuple[str, ...], num_bytes: int) -> float:
        return network.seconds(Op(op), axes, num_bytes) if op in list(Op) else 0.0

    found = differences(planned_collectives(ledger, plan.axis_sizes), schedule.collectives, seconds)
    return {f"{one.kind}: {one.what}": _ms(one.seconds) for one in found}


def copies_of(work: Iterable[Work], least: float) -> list[Work]:
    """What only moves data within the chip and takes as long."""
    return [one for one in work if one.moves and one.count * one.seconds > least]


def file_of(name: str) -> str:
    """The name of the file of a case, without what tells its kind."""
    return re.sub(r"\W+", "_", name)


def before(texts: Path) -> None:
    """Walk the programs of `before` again."""
    found = read(__file__, missing={})
    for name, case in CASES.items():
        text, memory = texts / f"{file_of(name)}.txt.gz", texts / f"{file_of(name)}.json"
        if text.is_file():
            compiled = Compiled("", 0.0, json.loads(memory.read_text())["memory"], gzip.decompress(text.read_bytes()).decode())
            row = row_of(*case.step(), compiled)
            found.setdefault(name, {})["before"] = {key: row[key] for key in _BEFORE}
    write(__file__, found)


_BEFORE = ("ms", "collectives_ms", "floor_ms", "kernel_ms", "collectives_per_layer", "code_mb", "temporaries_mb")


def steps_table(found: Mapping[str, Any]) -> str:
    """README's table of steps that have both columns."""
    lines = ["| step | before, ms | after, ms | collectives per layer | their ms | bytes alone, ms | code, MB |", f"|{'---|' * 7}"]
    for name, row in found.items():
        before, after = row["before"], row["after"]
        pairs = (f"{before[key]} → {after[key]}" for key in ("collectives_per_layer", "collectives_ms"))
        code = f"{before['code_mb']} → {after['code_mb']}"
        lines.append(f"| {name} | {before['ms']} | {after['ms']} | {' | '.join(pairs)} | {after['floor_ms']} | {code} |")
    return "\n".join(lines)


def foreign_table(found: Mapping[str, Any]) -> str:
    """README's table of our steps next to the program that others wrote and timed, by the same walk."""

    def theirs(file: str) -> dict[int, Any]:
        rows = read(timed_programs.__file__, file)["rows"]
        return {row["batch"]: row for row in rows if row["copies"] == 1 and row["context"] == 2048}

    timed, newer = theirs("results.json"), theirs("newer.json")
    titles = f"batch | ours, all 2048 read | ours, {_FILLED} read | theirs, {_FILLED} filled | their newer one | measured | ours / theirs"
    lines = [f"| {titles} |", f"|{'---|' * 7}"]
    for name, row in found.items():
        batch = int(name.rpartition(" ")[2]) if name.startswith("Llama 3 70B int8, v5e:4x4") else 0
        if batch in timed:
            ours, other = row["after"], timed[batch]["estimate"]
            ratios = " / ".join(f"{ours[key] / other:.2f}" for key in ("ms", "filled_ms"))
            their = (f"{one:.2f}" for one in (other, newer[batch]["estimate"], timed[batch]["measured"]))
            lines.append(f"| {batch} | {ours['ms']} | {ours['filled_ms']} | {' | '.join(their)} | {ratios} |")
    return "\n".join(lines)


def rest_table(found: Mapping[str, Any]) -> str:
    """README's table of what is neither product, core nor planned collective."""
    lines = ["| step | products | cores | collectives | what is left, ms | copies above 1 % of the step, ms |", f"|{'---|' * 6}"]
    for name, row in found.items():
        after = row["after"]
        left = ", ".join(f"`{what}` {ms}" for what, ms in after["rest_ms"].items())
        copies = ", ".join(f"{what} {ms}" for what, ms in after["copies_ms"].items()) or "none"
        lines.append(f"| {name} | {after['products_ms']} | {after['cores_ms']} | {after['collectives_ms']} | {left} | {copies} |")
    return "\n".join(lines)


def into_page() -> None:
    """Write README's tables, of what has both columns."""
    found = {name: row for name, row in read(__file__).items() if "after" in row and "before" in row}
    for mark, table in (("steps", steps_table), ("foreign", foreign_table), ("left", rest_table)):
        place(__file__, table(found), mark)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", choices=CASES, help="one case")
    parser.add_argument("--table", action="store_true", help="write README's tables")
    parser.add_argument("--before", type=Path, metavar="TEXTS", help="walk the programs before again")
    args = parser.parse_args()
    if args.before:
        before(args.before)
    if args.before or args.table:
        into_page()
        return
    for name, case in CASES.items():
        if args.only in (None, name):
            plan, bucket = case.step()
            compiled = compile_bucket(plan, bucket, Limits(seconds=_SECONDS))
            found = read(__file__, missing={})  # others may have been added meanwhile
            found.setdefault(name, {})["after"] = row = row_of(plan, bucket, compiled)
            print(f"{name}: {row}", flush=True)
            write(__file__, found)


if __name__ == "__main__":
    main()
